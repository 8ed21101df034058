"""The figure of how a step's cost grows: ratios to plain PyTorch by size, one panel an axis."""

from collections.abc import Mapping
from math import ceil
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from feedbackpath.report.parts import (
    FIGURE_STYLE,
    PAGE_WIDTH,
    REFERENCE,
    draw_legend,
    key,
    line_looks,
    render,
    scale_linear,
    write_letters,
)
from feedbackpath.report.style import in_order, legend_label

GOALS = {1.02: ("goal: 1.02", "--"), 1.05: ("goal of the mirror: 1.05", ":")}
COLUMNS = 3
SPREAD = 0.13  # between rules, which stand side by side at each size


def render_growth(found: Mapping[str, Any]) -> bytes:
    """Draw what ``growth.py`` found, as the bytes of a PNG.

    Args:
        found: The result file's content.
    """
    with matplotlib.rc_context(FIGURE_STYLE):
        return render(draw_growth(found), "png")


def draw_growth(found: Mapping[str, Any]) -> Figure:
    """Draw medians and quartiles of each rule's ratios by size; the goals are lines across."""
    axes_found, rules = found["growth"], in_order(found["settings"]["rules"])
    columns = min(COLUMNS, len(axes_found) + 1)
    rows = ceil((len(axes_found) + 1) / columns)
    figure = Figure(figsize=(PAGE_WIDTH * columns / COLUMNS, 2.2 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey="row")
    panels = list(grid.flat)
    for axes, axis in zip(panels, axes_found.values(), strict=False):
        _draw_panel(axes, axis, rules)
    write_letters(panels[: len(axes_found)])
    for axes in panels[len(axes_found) :]:
        axes.set_axis_off()
    for row in grid:
        ends = [end for axes in row for end in (axes.dataLim.y0, axes.dataLim.y1) if axes.has_data()]
        scale_linear(row[0], "y", ends, 0.05 if max(ends) < 1.25 else 0.1)
        row[0].set_ylabel("time of a step\nover plain PyTorch's")
    keys = [key(legend_label(rule), **line_looks(rule)) for rule in rules]
    keys += [key(label, **REFERENCE | {"linestyle": dash}) for label, dash in GOALS.values()]
    draw_legend(panels[len(axes_found)], keys, 1, loc="center left", borderaxespad=0)
    return figure


def _draw_panel(axes: Axes, axis: Mapping[str, Any], rules: list[str]) -> None:
    sizes = [cell["size"] for cell in axis["cells"]]
    for goal, (_, dash) in GOALS.items():
        axes.axhline(goal, linestyle=dash, **REFERENCE)
    for place, rule in enumerate(rules):
        aside = SPREAD * (place - (len(rules) - 1) / 2)
        _draw_rule(axes, rule, np.arange(len(sizes)) + aside, [cell["step"][rule] for cell in axis["cells"]])
    axes.set_xticks(range(len(sizes)), [f"{size:g}" for size in sizes])
    axes.set_xlim(-0.5, len(sizes) - 0.5)
    axes.grid(visible=False, axis="x")
    axes.set_xlabel(axis["label"].replace(", ", "\n"))


def _draw_rule(axes: Axes, rule: str, places: Any, ratios: list[dict[str, float]]) -> None:
    low, middle, high = (np.array([ratio[key] for ratio in ratios]) for key in ("q1", "median", "q3"))
    looks = line_looks(rule) | {"linewidth": 0.6, "elinewidth": 0.8}
    axes.errorbar(places, middle, yerr=(middle - low, high - middle), **looks)
