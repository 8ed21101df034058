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
from feedbackpath.report.table import in_two_digits
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
    """Draw the worst tolerated value of each rule, and the next one, which failed; darker is more tolerant.

    Each imperfection has a scale of its own, of a factor of 10 or more.
    """
    found = kept["found"]
    rules, names = in_order(found), list(dict.fromkeys(name for row in found.values() for name in row))
    width = COLUMN_WIDTH if len(rules) <= 3 else PAGE_WIDTH
    figure = Figure(figsize=(width, 0.7 + 0.24 * len(names)), layout="constrained")
    axes = figure.subplots()
    shades = []
    for name in names:
        values = [math.log10(found[rule][name]) if found[rule].get(name) else math.nan for rule in rules]
        told = [value for value in values if not math.isnan(value)] or [0.0]
        span = max(max(told) - min(told), 1.0)
        shades.append([0.15 + 0.7 * (value - min(told)) / span for value in values])
    texts = [[_told(kept, rule, name) for rule in rules] for name in names]
    labels = [name.replace("_", " ") for name in names]
    draw_cells(axes, shades, texts, "Blues", Normalize(0, 1.4), across=rules, up=labels)
    axes.invert_yaxis()  # from above, as in a table
    axes.xaxis.tick_top()
    points = "1 point" if kept["margin"] == 1 else f"{kept['margin']:g} points"
    axes.set_xlabel(f"value within {points} of the rule's error on an ideal chip – next value, which failed")
    return figure


def _told(kept: Mapping[str, Any], rule: str, name: str) -> str:
    """Return the text of a cell: what passed, and what failed next."""
    if name not in kept["found"][rule]:
        return "–"
    passed = kept["found"][rule][name]
    tried = [t["value"] for t in kept["trials"] if (t["rule"], t["imperfection"]) == (rule, name)]
    failed = min((value for value in tried if value > (passed or 0.0)), default=None)
    if failed is None:
        return f"≥ {passed:g}"
    return f"{in_two_digits(passed)}–{in_two_digits(failed)}" if passed else f"< {in_two_digits(failed)}"


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
