"""The interactive page: one HTML file that fetches nothing."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from feedbackpath.report.charts import draw_layers, draw_learning_curves
from feedbackpath.report.curves import unfinished
from feedbackpath.report.style import legend_label, style_of
from feedbackpath.report.table import COLUMNS, describe_stop, summary_rows


def render_page(results: dict[str, Any]) -> str:
    """Render the report of ``results``, a results file's content, as one self-contained HTML page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(
        title=_title(results),
        results=results,
        notes=list_notes(results),
        columns=COLUMNS,
        rows=summary_rows(results),
        curves=draw_learning_curves(results),
        layers=draw_layers(results),
        plotly_js=Markup(get_plotlyjs()),
        style_of=style_of,
        legend_label=legend_label,
        as_text=_as_text,
    )


def list_notes(results: dict[str, Any]) -> list[str]:
    """List what a reader must know before trusting the averages: runs that diverged, stopped or are missing.

    Example:
        >>> runs = [{"rule": "fa", "seed": seed, "status": "finished"} for seed in (0, 1)]
        >>> runs[1] |= {"status": "diverged", "history": [{"epoch": 2}]}
        >>> list_notes({"runs": runs})
        ['fa, seed 1: diverged (epoch 2); left out of the averaged errors.']
    """
    runs = results.get("runs") or []
    waiting = [run for run in runs if run.get("status") == "waiting"]
    notes = [f"Incomplete: {len(waiting)} of {len(runs)} runs have not started."] if waiting else []
    notes += [
        f"{run['rule']}, seed {run.get('seed', '?')}: {describe_stop(run)}; left out of the averaged errors."
        for run in unfinished(runs)
        if run not in waiting
    ]
    if runs and len({run.get("seed") for run in runs}) == 1:
        notes.append("One seed: there are no standard errors, and small differences may be chance.")
    return notes


def _title(results: dict[str, Any]) -> str:
    data = results.get("data")
    name = data.get("name") if isinstance(data, Mapping) else data
    return " on ".join(str(part) for part in (results.get("model"), name) if part) or "feedbackpath"


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False, default=str)
