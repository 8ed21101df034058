"""The figures of ``hardware tolerance``: the map of rules and imperfections, and errors."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from feedbackpath.report.parts import (
    COLUMN_WIDTH,
    FIGURE_STYLE,
    KINDS,
    PAGE_WIDTH,
    draw_cells,
    draw_legend,
    key,
    looks_of,
    render,
    scale_metric,
)
from feedbackpath.report.scales import axis_title
from feedbackpath.report.style import choose_styles, in_order
from feedbackpath.train.results import Metric
from feedbackpath.train.store import write_bytes


def draw_tolerance(kept: Mapping[str, Any], out: Path) -> None:
    """Write ``figures/tolerance.*`` and ``figures/error.*`` of a search's results (``tolerance.json``)."""
    (out / "figures").mkdir(parents=True, exist_ok=True)
    with rc_context(FIGURE_STYLE):
        for name, figure in (("tolerance", draw_map(kept)), ("error", draw_errors(kept))):
            for kind in KINDS:
                write_bytes(out / "figures" / f"{name}.{kind}", render(figure, kind))


def draw_map(kept: Mapping[str, Any]) -> Figure:
    """Draw the worst tolerated values: each imperfection has its own scale, darker is more tolerant."""
    found, ended = kept["found"], kept["ended"]
    rules, names = in_order(found), list(dict.fromkeys(name for row in found.values() for name in row))
    width = min(PAGE_WIDTH, 1.0 + 0.9 * len(names))
    figure = Figure(figsize=(width, 1.0 + 0.3 * len(rules)), layout="constrained")
    axes = figure.subplots()
    shades = [[math.nan] * len(names) for _ in rules]
    texts = [[""] * len(names) for _ in rules]
    for column, name in enumerate(names):
        values = [math.log10(found[rule][name]) if found[rule].get(name) else None for rule in rules]
        told = [value for value in values if value is not None]
        span = (max(told) - min(told)) or 1.0 if told else 1.0
        for row, (rule, value) in enumerate(zip(rules, values, strict=True)):
            if value is not None:
                shades[row][column] = 0.15 + 0.7 * (value - min(told)) / span
            tolerated = found[rule].get(name)
            text = "–" if name not in found[rule] else "none" if tolerated is None else f"{tolerated:.2g}"
            texts[row][column] = f"≥ {text}" if name in ended.get(rule, []) else text
    labels = [name.replace("_", " ") for name in names]
    draw_cells(axes, shades, texts, "Blues", Normalize(0, 1.4), across=labels, up=rules)
    axes.invert_yaxis()  # rules from above, as in a table
    for label in axes.get_xticklabels():
        label.set(rotation=25, ha="right")
    points = "1 point" if kept["margin"] == 1 else f"{kept['margin']:g} points"
    axes.set_title(f"Worst value within {points} of the rule's error on an ideal chip", wrap=True)
    return figure


def draw_errors(kept: Mapping[str, Any]) -> Figure:
    """Draw the mean error of every value that was tried, one panel for each imperfection."""
    runs: dict[tuple[str, str | None, float | None], list[float]] = {}
    for trial in kept["trials"]:
        error = 100.0 if trial["error"] is None else trial["error"]
        runs.setdefault((trial["rule"], trial["imperfection"], trial["value"]), []).append(error)
    names = list(dict.fromkeys(name for _, name, _ in runs if name is not None))
    columns = min(4, max(1, len(names)))
    rows = max(1, math.ceil(len(names) / columns))
    width = COLUMN_WIDTH if columns == 1 else PAGE_WIDTH
    figure = Figure(figsize=(width, 0.7 + 1.8 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    styles = choose_styles(in_order(rule for rule, _, _ in runs), {})
    shown: list[float] = []
    for axes, name in zip(grid, names, strict=False):
        for rule, style in styles.items():
            points = sorted(
                (value, sum(errors) / len(errors))
                for (of_rule, of_name, value), errors in runs.items()
                if (of_rule, of_name) == (rule, name) and value is not None
            )
            if points:
                axes.plot(*zip(*points, strict=True), **looks_of(style))
                shown += [error for _, error in points]
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(name.replace("_", " ") + "\nlog scale")
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    if shown:
        metric = Metric(unit=kept["unit"])
        scale_metric(grid[0], shown, metric)
        for axes in grid[::columns]:
            axes.set_ylabel(axis_title(metric) + (", log scale" if axes.get_yscale() == "log" else ""))
        draw_legend(figure, [key(style.legend, **looks_of(style)) for style in styles.values()], 3)
    return figure
