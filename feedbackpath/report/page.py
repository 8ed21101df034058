"""The interactive page: one HTML file that fetches nothing."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from feedbackpath.report.charts import draw_layers, draw_learning_curves
from feedbackpath.report.curves import group_by_rule
from feedbackpath.report.panels import Panel, list_differences
from feedbackpath.report.style import legend_label, style_of
from feedbackpath.report.table import COLUMNS, describe_divergence, error_rows, seeds_by_stop, summary_rows


def render_page(panels: Sequence[Panel]) -> str:
    """Render the report of one panel, or of several side by side, as one self-contained HTML page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(
        title=panels[0].title if len(panels) == 1 else "Side by side",
        sources=[source for panel in panels for source in panel.sources],
        notes=_all_notes(panels),
        error_rows=error_rows(panels) if len(panels) > 1 else [],
        columns=COLUMNS,
        panels=[
            {
                "title": panel.title,
                "rows": summary_rows({"runs": panel.runs}),
                "curves": curves,
                "layers": draw_layers(panel),
            }
            for panel, curves in zip(panels, draw_learning_curves(panels), strict=True)
        ],
        plotly_js=Markup(get_plotlyjs()),
        style_of=style_of,
        legend_label=legend_label,
        as_text=_as_text,
    )


def list_notes(panel: Panel) -> list[str]:
    """List what a reader must know before trusting averages: runs that stopped or wait, settings that differ.

    Example:
        >>> from feedbackpath.report.panels import make_panel
        >>> runs = [{"rule": "fa", "seed": seed, "status": "finished"} for seed in (0, 1)]
        >>> runs[1] |= {"status": "diverged", "history": [{"epoch": 2}]}
        >>> list_notes(make_panel([("runs/fa", {"runs": runs})]))
        ['fa, seed 1: diverged (epoch 2); left out of the averaged errors.']
    """
    runs = panel.runs
    waiting = [run for run in runs if run.get("status") == "waiting"]
    notes = [f"Incomplete: {len(waiting)} of {len(runs)} runs have not started."] if waiting else []
    for rule, group in group_by_rule([run for run in runs if run not in waiting]).items():
        notes += [
            f"{rule}, {seeds}: {stop}; left out of the averaged errors."
            for stop, seeds in seeds_by_stop(group).items()
        ]
    notes += [
        f"{run['rule']}, seed {run.get('seed')}: {describe_divergence(run)}."
        for run in runs
        if "divergence" in run
    ]
    if runs and len({run.get("seed") for run in runs}) == 1:
        notes.append("One seed: there are no standard errors, and small differences may be chance.")
    return notes + list_differences(panel)


def _all_notes(panels: Sequence[Panel]) -> list[str]:
    """Return the notes of each panel, with its title where there are several."""
    if len(panels) == 1:
        return list_notes(panels[0])
    return [f"{panel.title}: {note}" for panel in panels for note in list_notes(panel)]


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False, default=str)
