"""The interactive page: one HTML file that fetches nothing."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from feedbackpath.report.charts import draw_layers, draw_learning_curves
from feedbackpath.report.curves import group_by_rule
from feedbackpath.report.equivalence import describe
from feedbackpath.report.panels import Panel, list_differences, styles_of, suffix_of
from feedbackpath.report.style import Styles, in_order
from feedbackpath.report.table import (
    MISSING,
    describe_divergence,
    error_rows,
    format_metric,
    seeds_by_stop,
    summary_rows,
)
from feedbackpath.rules import RULES
from feedbackpath.rules.registry import OWN, what_of
from feedbackpath.train.results import Results, Run

EMPTY = {"δ norm": MISSING, "minus bp": MISSING, "status": "finished"}
"""Columns of the table that are left out where they say this of every rule."""
SHOWN_OF_SOURCES = ("command", "device", "model", "data", "config", "versions")


def render_page(panels: Sequence[Panel], *, figures: Collection[str] = ()) -> str:
    """Render the report of one panel, or of several side by side, as one self-contained HTML page.

    Args:
        panels: The panels.
        figures: Names of the files in ``figures/`` beside the page, which it offers to save.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    styles, metric = styles_of(panels), panels[0].metric
    return environment.get_template("page.html").render(
        title=panels[0].title if len(panels) == 1 else "Side by side",
        sources=[(folder, _facts_of(results)) for panel in panels for folder, results in panel.sources],
        notes=_all_notes(panels, styles),
        error_rows=error_rows(panels) if len(panels) > 1 else [],
        metric=metric,
        panels=[
            {
                "title": panel.title,
                "task": describe_task(panel),
                "rows": _rows_of(panel),
                "curves": curves,
                "layers": draw_layers(panel),
                "suffix": suffix_of(panel, panels),
            }
            for panel, curves in zip(panels, draw_learning_curves(panels, styles), strict=True)
        ],
        plotly_js=Markup(get_plotlyjs()),
        styles=styles,
        rules=describe_rules(panels),
        figures=figures,
    )


def describe_task(panel: Panel) -> str:
    """Say what is learned, what guessing gives, and by how much training, as far as the results tell.

    Example:
        >>> from feedbackpath.report.panels import make_panel
        >>> from feedbackpath.train.results import DataFacts
        >>> data = DataFacts(name="digits", classes=10, chance=90.0, sizes={"test": 347})
        >>> results = Results(model="mlp", data=data, config={"epochs": 2}, runs=[Run(rule="kp", seed=0)])
        >>> describe_task(make_panel([("runs/kp", results)])).rpartition("%. ")[2]
        'The error is measured on 347 samples after each of 2 epochs.'
    """
    results, metric = panel.sources[0][1], panel.metric
    facts = results.data.model_extra or {}
    classes, chance, sizes = facts.get("classes"), facts.get("chance"), facts.get("sizes")
    epochs, tested = results.config.get("epochs"), sizes.get("test") if isinstance(sizes, dict) else None
    what = f"tells apart the {classes:,} classes of" if isinstance(classes, int) else "learns"
    sentences = [f"The network {results.model or 'of the runs'} {what} {results.data.name or 'its data'}."]
    if isinstance(chance, int | float):
        sentences.append(f"Guesses at random have a {metric.label} of {format_metric(metric, chance)}.")
    if isinstance(tested, int):
        when = f" after each of {epochs:,} epochs" if isinstance(epochs, int) else ""
        sentences.append(f"The {metric.words} is measured on {tested:,} samples{when}.")
    return " ".join(sentences)


def describe_rules(panels: Sequence[Panel]) -> dict[str, tuple[str, str]]:
    """Return what rules do, and their equations, where that is known; of users' rules the results say it."""
    looks = {rule: look for panel in panels for _, file in panel.sources for rule, look in file.looks.items()}
    facts = {}
    for rule in in_order(run.rule for panel in panels for run in panel.runs):
        if rule in looks and (what := looks[rule].what):
            facts[rule] = what, ""
        elif rule in OWN:
            facts[rule] = what_of(RULES[rule]), RULES[rule].facts.equation
    return facts


def _rows_of(panel: Panel) -> list[dict[str, str]]:
    """Return the rows of a panel's table, without columns in which no run has anything to say."""
    rows = summary_rows(panel.runs, panel.metric)
    empty = [name for name in EMPTY if all(row[name] == EMPTY[name] for row in rows)]
    return [{name: text for name, text in row.items() if name not in empty} for row in rows]


def list_notes(panel: Panel) -> list[str]:
    """List what to know before trusting averages: runs that go on, stopped or wait; settings that differ.

    Example:
        >>> from feedbackpath.report.panels import make_panel
        >>> runs = [Run(rule="fa", seed=seed, status="finished") for seed in (0, 1)]
        >>> runs[1].status, runs[1].diverged_epoch = "diverged", 2
        >>> list_notes(make_panel([("runs/fa", Results(runs=runs))]))
        ['fa, seed 1: diverged (epoch 2); left out of the averages.']
    """
    notes = [
        f"{run.rule}, seed {run.seed}: {_progress_of(run, results)}."
        for _, results in panel.sources
        for run in results.runs
        if run.status == "running"
    ]
    runs = panel.runs
    waiting = sum(run.status == "waiting" for run in runs)
    notes += [f"Incomplete: {waiting} of {len(runs)} runs have not started."] if waiting else []
    for rule, group in group_by_rule(run for run in runs if run.status not in ("waiting", "running")).items():
        notes += [
            f"{rule}, {seeds}: {stop}; left out of the averages."
            for stop, seeds in seeds_by_stop(group).items()
        ]
    notes += [f"{run.rule}, seed {run.seed}: {describe_divergence(run)}." for run in runs if run.divergence]
    if len({run.seed for run in runs}) == 1:
        notes.append("One seed: there are no standard errors, and small differences may be chance.")
    notes += [line for _, results in panel.sources for line in describe(results)]
    return notes + list_differences(panel)


def _all_notes(panels: Sequence[Panel], styles: Styles) -> list[str]:
    """Return the notes of each panel, with its title where there are several, and those on colours."""
    titles = [f"{panel.title}: " if len(panels) > 1 else "" for panel in panels]
    notes = [
        f"{title}{note}" for title, panel in zip(titles, panels, strict=True) for note in list_notes(panel)
    ]
    return notes + [
        f"{style.rule} is drawn in {style.colour}: another rule has {style.refused}, the colour that it sets."
        for style in styles.values()
        if style.refused
    ]


def _progress_of(run: Run, results: Results) -> str:
    """Say in which epoch a running run is."""
    done, epochs = (run.entries[-1].epoch if run.entries else 0), results.config.get("epochs")
    if not isinstance(epochs, int):
        return f"running, epoch {done + 1}"
    return f"running, epoch {min(done + 1, epochs)} of {epochs}"


def _facts_of(results: Results) -> dict[str, str]:
    """Return what a results file says of how it was made, as text; what is empty is left out."""
    facts: dict[str, Any] = results.model_dump(mode="json", include=set(SHOWN_OF_SOURCES))
    return {
        name: fact if isinstance(fact, str) else json.dumps(fact, indent=2, ensure_ascii=False)
        for name in SHOWN_OF_SOURCES
        if (fact := facts[name])
    }
