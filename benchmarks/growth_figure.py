"""The figure of how a step's cost grows: ratios to plain PyTorch against size, one panel an axis."""

from collections.abc import Mapping
from math import ceil
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from feedbackpath.report.figures import FIGURE_STYLE, PAGE_WIDTH, line_looks, render
from feedbackpath.report.style import in_order, legend_label

GOALS = {1.02: "goal 1.02", 1.05: "goal 1.05 (wm)"}
GOAL_DASHES: dict[float, Literal["--", ":"]] = {1.02: "--", 1.05: ":"}
COLUMNS = 3
CLOSE = 0.16  # of an axis: labels nearer than that touch
SPREAD = 0.06  # of the distance between sizes: rules stand side by side, so that their bars can be told


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
    figure = Figure(figsize=(PAGE_WIDTH * columns / COLUMNS, 2.15 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey="row")
    panels = list(grid.flat)
    for axes, axis in zip(panels, axes_found.values(), strict=False):
        _draw_panel(axes, axis, rules)
    for axes in panels[len(axes_found) :]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set_ylabel("time of a step\nover plain PyTorch's")
    _draw_key(panels[len(axes_found)], rules)
    return figure


def _draw_panel(axes: Axes, axis: Mapping[str, Any], rules: list[str]) -> None:
    cells = axis["cells"]
    sizes = np.array([cell["size"] for cell in cells], float)
    step = (sizes[-1] / sizes[0]) ** (1 / max(1, len(sizes) - 1))
    for goal, dash in GOAL_DASHES.items():
        axes.axhline(goal, color="#555555", linestyle=dash, linewidth=0.8, zorder=1)
    for position, rule in enumerate(rules):
        shift = step ** (SPREAD * (position - (len(rules) - 1) / 2))
        _draw_rule(axes, rule, sizes * shift, [cell["step"][rule] for cell in cells])
    axes.set_xscale("log")
    axes.set_xticks(sizes, _tick_labels(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    at = axis["label"].replace(", ", "\n")
    axes.set_xlabel(f"{at}, log scale" if "\n" in at else f"{at}\nlog scale")
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _tick_labels(sizes: Any) -> list[str]:
    """Return a label a size, empty where it would run into the next one's."""
    nearest = CLOSE * np.log(sizes[-1] / sizes[0])
    gaps = [*np.diff(np.log(sizes)), np.inf]
    return [f"{size:g}" if gap > nearest else "" for size, gap in zip(sizes, gaps, strict=True)]


def _draw_rule(axes: Axes, rule: str, places: Any, ratios: list[dict[str, float]]) -> None:
    low, middle, high = (np.array([ratio[key] for ratio in ratios]) for key in ("q1", "median", "q3"))
    spread = (middle - low, high - middle)
    axes.errorbar(places, middle, yerr=spread, elinewidth=0.8, linewidth=1.0, **line_looks(rule))


def _draw_key(axes: Axes, rules: list[str]) -> None:
    of_rules = [Line2D([], [], label=legend_label(rule), **line_looks(rule)) for rule in rules]
    of_goals = [
        Line2D([], [], color="#555555", linestyle=GOAL_DASHES[goal], linewidth=0.8, label=label)
        for goal, label in GOALS.items()
    ]
    axes.legend(handles=[*of_rules, *of_goals], loc="center left", frameon=False, handlelength=2.4)
