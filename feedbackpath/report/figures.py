"""The printed figures: learning curves, alignment of forward and feedback paths, gains."""

from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from math import ceil, floor, log10
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from feedbackpath.report.curves import (
    QUANTITIES,
    LayerCurves,
    LearningCurves,
    largest_mean,
    layer_curves_by_rule,
    learning_curves_by_rule,
)
from feedbackpath.report.panels import Panel, styles_of
from feedbackpath.report.style import RuleStyle, Styles, style_of
from feedbackpath.train.results import Metric

COLUMN_WIDTH = 3.4  # inches, one column of a two-column page
PAGE_WIDTH = 7.0

KINDS = ("png", "pdf")

LAYER_COLOURS = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.9, 256)))
"""From the input layer, dark, to the output layer, light."""

ERROR = Metric()
MOST_TICKS = 10  # of an axis for the metric
ANGLE_TICKS = (0, 1, 5, 15, 30, 60, 90, 180)

FIGURE_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.5,
    "text.parse_math": False,  # a rule's name is text, whatever dollar signs it has
    "pdf.fonttype": 42,  # fonts that journals accept and editors can edit
}


def render_figures(panels: Sequence[Panel]) -> dict[str, bytes]:
    """Draw every figure that the panels have data for.

    Args:
        panels: One panel, or several to lay side by side.

    Returns:
        File name (``learning_curves.png``, …) to the file's bytes: PNG of 300 dots per inch, and PDF. Of
        several panels each has its own alignment and gains, such as ``gains-resnet8-glyphs-after.png``.
    """
    styles = styles_of(panels)
    with matplotlib.rc_context(FIGURE_STYLE):
        drawn = {"learning_curves": learning_curves(panels, styles)}
        for panel in panels:
            suffix = f"-{panel.file_name}" if len(panels) > 1 else ""
            for name, (quantities, scale) in LAYER_FIGURES.items():
                drawn[f"{name}{suffix}"] = _draw_layers(panel, styles, quantities, scale)
        figures = {name: figure for name, figure in drawn.items() if figure is not None}
        return {f"{name}.{kind}": render(figure, kind) for name, figure in figures.items() for kind in KINDS}


def learning_curves(panels: Sequence[Panel], styles: Styles) -> Figure | None:
    """Draw the metric by epoch: the mean of each rule's finished runs in a band of ± its standard error.

    Panels stand side by side and share the metric's axis. A run that diverged or was interrupted is a thin
    line of its own that ends in a cross.
    """
    curves = [(panel, found) for panel in panels if (found := learning_curves_by_rule(panel.runs))]
    if not curves:
        return None
    rules = list(dict.fromkeys(rule for _, found in curves for rule in found))
    columns = min(len(curves), 2 if len(curves) == 4 else 3)
    rows, width = ceil(len(curves) / columns), COLUMN_WIDTH if columns == 1 else PAGE_WIDTH
    figure = Figure(figsize=(width, 2.4 * rows + 0.14 * ceil(len(rules) / 2)), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for axes, (panel, found) in zip(grid, curves, strict=False):
        for rule, of_rule in found.items():
            _draw_learning(axes, styles[rule], of_rule)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_title(panel.title if len(panels) > 1 else "", wrap=True)
    for axes in grid[len(curves) :]:
        axes.set_visible(False)
    _scale_metric(grid, panels[0].metric)
    for axes in grid[::columns]:
        scale = ", log scale" if axes.get_yscale() == "log" else ""
        axes.set_ylabel(axis_title(panels[0].metric) + scale)
    figure.legend(
        handles=[Line2D([], [], label=styles[rule].legend, **_looks(styles[rule])) for rule in rules],
        loc="outside upper left",
        ncols=2 if columns == 1 else 3,
        frameon=False,
        handlelength=2.6,
        columnspacing=1.2,
    )
    return figure


def axis_title(metric: Metric) -> str:
    """Return the title of an axis for the metric, such as ``test error (%)``."""
    return metric.label + (f" ({metric.unit})" if metric.unit else "")


def error_axis(
    values: Iterable[float], metric: Metric = ERROR
) -> tuple[str, tuple[float, float], list[float]]:
    """Return the scale of an axis for values of a metric, its ends and its ticks.

    It is logarithmic where lower is better and all are positive; else linear, and the library chooses ticks.
    """
    smallest, largest = min(values := list(values)), max(values)
    if smallest == 0 and metric.lower_is_better:
        return "linear", (0.0, max(1.05 * largest, 1.0 if metric.unit == "%" else 0.0) or 1.0), []
    if smallest < 0 or not metric.lower_is_better:
        room = 0.05 * (largest - smallest) or 0.5
        return "linear", (smallest - room, largest + room), []
    high = 1.15 * largest
    decades = range(floor(log10(smallest)) - 1, floor(log10(high)) + 1)
    for digits in ((1, 2, 3, 5), (1,)):
        marks = [float(f"{digit}e{decade}") for decade in decades for digit in digits]
        below = max(mark for mark in marks if mark <= smallest)  # every value has a tick below it
        ticks = [mark for mark in marks if below <= mark <= high]
        if len(ticks) <= MOST_TICKS:
            break
    return "log", (min(below / 1.1, high / 6), high), ticks


def angle_axis(largest: float) -> tuple[float, list[float]]:
    """Return the upper end and the ticks, in degrees, of an axis for angles up to ``largest``."""
    top = 1.05 * max(largest, 20.0)
    return top, [tick for tick in ANGLE_TICKS if tick <= top]


def line_looks(rule: str) -> dict[str, Any]:
    """Return a built-in rule's colour, dash and marker in matplotlib's words."""
    return _looks(style_of(rule))


def _looks(style: RuleStyle) -> dict[str, Any]:
    return {"color": style.colour, "linestyle": style.dash, "marker": style.marker}


def _draw_learning(axes: Axes, style: RuleStyle, curves: LearningCurves) -> None:
    colour = style.colour
    for run, curve in curves:
        if run is None:
            axes.plot(curve.epochs, curve.means, markevery=ceil(len(curve.epochs) / 8), **_looks(style))
            means, errors = np.array(curve.means), np.array([error or 0.0 for error in curve.errors])
            band = means - errors, means + errors
            axes.fill_between(curve.epochs, *band, color=colour, alpha=0.2, linewidth=0)
        else:
            axes.plot(curve.epochs, curve.means, color=colour, linestyle=style.dash, linewidth=0.6)
            end = curve.epochs[-1:], curve.means[-1:]
            axes.plot(*end, color=colour, marker="x", markersize=5, linestyle="")


def _scale_metric(grid: Sequence[Axes], metric: Metric) -> None:
    """Scale the axis that all panels share, and label it with plain numbers."""
    values = np.concatenate([np.asarray(line.get_ydata(), float) for axes in grid for line in axes.lines])
    scale, (low, high), ticks = error_axis(values, metric)
    axes = grid[0]
    axes.set_yscale(scale)
    axes.set_ylim(low, high)
    if ticks:
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.yaxis.set_minor_locator(NullLocator())


def _draw_layers(
    panel: Panel, styles: Styles, rows: Sequence[str], scale: Callable[[Sequence[Axes], float], None]
) -> Figure | None:
    """Draw a row per quantity, a column per rule, a line per layer; None where nothing was measured."""
    columns = layer_curves_by_rule(panel.runs, rows)
    if not columns:
        return None
    width = min(PAGE_WIDTH, 1.0 + 1.6 * len(columns))
    figure = Figure(figsize=(width, 0.5 + 1.45 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True)
    for index, (rule, quantities) in enumerate(columns.items()):
        grid[0, index].set_title(styles[rule].label, wrap=True)
        for axes, curves in zip(grid[:, index], quantities.values(), strict=True):
            _draw_layer_lines(axes, curves)
    for axes_row, quantity in zip(grid, rows, strict=True):
        axes_row[0].set_ylabel(QUANTITIES[quantity])
        scale(axes_row, largest_mean(quantities[quantity] for quantities in columns.values()))
    figure.supxlabel("epoch", fontsize=8)
    key = figure.colorbar(ScalarMappable(cmap=LAYER_COLOURS), ax=grid, aspect=25, pad=0.02)
    key.outline.set_visible(False)
    key.set_ticks([0, 1], labels=["input", "output"])
    key.ax.tick_params(length=0)
    key.ax.grid(visible=False)
    key.set_label("layer", labelpad=-16)
    return figure


def _draw_layer_lines(axes: Axes, curves: LayerCurves) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    for position, curve in zip(np.linspace(0, 1, len(curves)), curves.values(), strict=True):
        marker = "o" if len(curve.epochs) == 1 else None
        axes.plot(curve.epochs, curve.means, color=LAYER_COLOURS(position), marker=marker, linewidth=1)


def scale_angles(axes_row: Sequence[Axes], largest: float) -> None:
    """Give the panels of a row the same square-root axis: 1° and 90° can both be read, and 0° is on it."""
    top, ticks = angle_axis(largest)
    for axes in axes_row:
        axes.set_yscale("function", functions=(lambda y: np.sqrt(np.clip(y, 0, None)), np.square))
        axes.set_ylim(0, top)
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks] if axes is axes_row[0] else [])


def _mark_gain_of_one(axes_row: Sequence[Axes], largest: float) -> None:
    """Dash the target. Each panel has its own axis: one rule's large gains do not flatten the others'.

    It spans at least 0 to 1.25, so that small gains look small and steady ones steady.
    """
    for axes in axes_row:
        low, high = axes.get_ylim()
        axes.set_ylim(min(-0.05, low), max(1.25, high))
        axes.axhline(1, color="#555555", linestyle="--", linewidth=0.7, zorder=1)


LAYER_FIGURES = {
    "alignment": (("matrix_angle_deg", "delta_angle_deg"), scale_angles),
    "gains": (("gain",), _mark_gain_of_one),
}


def render(figure: Figure, kind: str) -> bytes:
    """Return a figure as a file of a kind; equal results give equal files."""
    buffer = BytesIO()
    metadata = {"CreationDate": None} if kind == "pdf" else None
    figure.savefig(buffer, format=kind, dpi=300, metadata=metadata)
    figure.set_layout_engine("none")  # laid out now: a second time would cost as much as drawing
    return buffer.getvalue()
