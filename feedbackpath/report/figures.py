"""The printed figures: learning curves, alignment of forward and feedback paths, gains."""

from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from math import ceil
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
    Curve,
    error_curve,
    finished,
    group_by_rule,
    largest_mean,
    layer_curves_by_rule,
    unfinished,
)
from feedbackpath.report.panels import Panel, join_runs
from feedbackpath.report.style import legend_label, style_of

COLUMN_WIDTH = 3.4  # inches, one column of a two-column page
PAGE_WIDTH = 7.0

KINDS = ("png", "pdf")

LAYER_COLOURS = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.9, 256)))
"""From the input layer, dark, to the output layer, light."""

ERROR_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
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
    with matplotlib.rc_context(FIGURE_STYLE):
        drawn = {"learning_curves": learning_curves(panels)}
        for panel in panels:
            suffix = f"-{panel.file_name}" if len(panels) > 1 else ""
            drawn |= {f"alignment{suffix}": alignment(panel), f"gains{suffix}": gains(panel)}
        figures = {name: figure for name, figure in drawn.items() if figure is not None}
        return {f"{name}.{kind}": render(figure, kind) for name, figure in figures.items() for kind in KINDS}


def learning_curves(panels: Sequence[Panel]) -> Figure | None:
    """Draw test error by epoch: the mean of each rule's finished runs in a band of ± its standard error.

    Panels stand side by side and share the error axis. A run that diverged or was interrupted is a thin line
    of its own that ends in a cross.
    """
    shown = [panel for panel in panels if error_curve(panel.runs).epochs]
    rules = [rule for rule, runs in group_by_rule(join_runs(shown)).items() if error_curve(runs).epochs]
    if not shown:
        return None
    columns = min(len(shown), 2 if len(shown) == 4 else 3)
    rows, width = ceil(len(shown) / columns), COLUMN_WIDTH if columns == 1 else PAGE_WIDTH
    figure = Figure(figsize=(width, 2.4 * rows + 0.14 * ceil(len(rules) / 2)), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for axes, panel in zip(grid, shown, strict=False):
        _draw_errors(axes, panel)
        axes.set_title(panel.title if len(panels) > 1 else "", wrap=True)
    for axes in grid[len(shown) :]:
        axes.set_visible(False)
    _scale_errors(grid)
    for axes in grid[::columns]:
        axes.set_ylabel("test error (%)")
    _draw_rule_key(figure, rules, columns=2 if columns == 1 else 3)
    return figure


def alignment(panel: Panel) -> Figure | None:
    """Draw matrix angles over δ angles, in degrees, by epoch: a column per rule, a line per layer.

    Angles have a square-root axis, so that 1° and 90° can both be read and 0° is on it.
    """
    rows = {"matrix_angle_deg": "matrix angle (°)", "delta_angle_deg": "δ angle (°)"}
    return _draw_layers(panel, rows, scale_angles)


def gains(panel: Panel) -> Figure | None:
    """Draw the gain ⟨B,W⟩/⟨W,W⟩ by epoch: a column per rule, a line per layer, the target 1 dashed.

    Each column has its own axis, so that a rule whose gains run far off does not flatten the others. It spans
    at least 0 to 1.25, so that small gains look small and steady ones steady.
    """
    return _draw_layers(panel, {"gain": "gain"}, _mark_gain_of_one)


def error_axis(errors: Iterable[float]) -> tuple[str, tuple[float, float], list[float]]:
    """Return the scale of an axis for errors in percent, its ends and its ticks.

    It is logarithmic, or where an error of zero has to be shown, linear with ticks of the library's choice.
    """
    smallest, largest = min(errors := list(errors)), max(errors)
    if smallest <= 0:
        return "linear", (0.0, max(1.05 * largest, 1.0)), []
    high = 1.15 * largest
    low = min(smallest / 1.25, high / 6)  # wide enough for two ticks at least
    return "log", (low, high), [tick for tick in ERROR_TICKS if low <= tick <= high]


def angle_axis(largest: float) -> tuple[float, list[float]]:
    """Return the upper end and the ticks, in degrees, of an axis for angles up to ``largest``."""
    top = 1.05 * max(largest, 20.0)
    return top, [tick for tick in ANGLE_TICKS if tick <= top]


def _draw_errors(axes: Axes, panel: Panel) -> None:
    for rule, runs in group_by_rule(panel.runs).items():
        _draw_mean(axes, rule, error_curve(finished(runs)))
        for run in unfinished(runs):
            _draw_unfinished(axes, rule, error_curve([run]))
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _draw_rule_key(figure: Figure, rules: Sequence[str], *, columns: int) -> None:
    figure.legend(
        handles=[Line2D([], [], label=legend_label(rule), **line_looks(rule)) for rule in rules],
        loc="outside upper left",
        ncols=columns,
        frameon=False,
        handlelength=2.6,
        columnspacing=1.2,
    )


def _draw_mean(axes: Axes, rule: str, curve: Curve) -> None:
    if not curve.epochs:
        return
    axes.plot(curve.epochs, curve.means, markevery=ceil(len(curve.epochs) / 8), **line_looks(rule))
    means, errors = np.array(curve.means), np.array([error or 0.0 for error in curve.errors])
    colour = style_of(rule).colour
    axes.fill_between(curve.epochs, means - errors, means + errors, color=colour, alpha=0.2, linewidth=0)


def line_looks(rule: str) -> dict[str, Any]:
    """Return a rule's colour, dash and marker in matplotlib's words."""
    style = style_of(rule)
    return {"color": style.colour, "linestyle": style.dash, "marker": style.marker}


def _draw_unfinished(axes: Axes, rule: str, curve: Curve) -> None:
    if not curve.epochs:
        return
    style = style_of(rule)
    axes.plot(curve.epochs, curve.means, color=style.colour, linestyle=style.dash, linewidth=0.6)
    axes.plot(curve.epochs[-1:], curve.means[-1:], color=style.colour, marker="x", markersize=5, linestyle="")


def _scale_errors(grid: Sequence[Axes]) -> None:
    """Scale the error axis that all panels share, and label it with plain numbers."""
    values = np.concatenate([np.asarray(line.get_ydata(), float) for axes in grid for line in axes.lines])
    scale, (low, high), ticks = error_axis(values)
    axes = grid[0]
    axes.set_yscale(scale)
    axes.set_ylim(low, high)
    if ticks:
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.yaxis.set_minor_locator(NullLocator())


def _draw_layers(
    panel: Panel, rows: dict[str, str], scale: Callable[[Sequence[Axes], float], None]
) -> Figure | None:
    """Draw a grid, a row per quantity and a column per rule; None where nothing was measured."""
    columns = layer_curves_by_rule(panel.runs, rows)
    if not columns:
        return None
    width = min(PAGE_WIDTH, 1.0 + 1.6 * len(columns))
    figure = Figure(figsize=(width, 0.5 + 1.45 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True)
    for index, (rule, quantities) in enumerate(columns.items()):
        grid[0, index].set_title(style_of(rule).label, wrap=True)
        for axes, curves in zip(grid[:, index], quantities.values(), strict=True):
            _draw_layer_lines(axes, curves)
    for axes_row, (quantity, label) in zip(grid, rows.items(), strict=True):
        axes_row[0].set_ylabel(label)
        scale(axes_row, largest_mean(quantities[quantity] for quantities in columns.values()))
    figure.supxlabel("epoch", fontsize=8)
    _draw_layer_key(figure, grid)
    return figure


def _draw_layer_lines(axes: Axes, curves: dict[str, Curve]) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    for position, curve in zip(np.linspace(0, 1, len(curves)), curves.values(), strict=True):
        marker = "o" if len(curve.epochs) == 1 else None
        axes.plot(curve.epochs, curve.means, color=LAYER_COLOURS(position), marker=marker, linewidth=1)


def _draw_layer_key(figure: Figure, grid: Any) -> None:
    key = figure.colorbar(ScalarMappable(cmap=LAYER_COLOURS), ax=grid, aspect=25, pad=0.02)
    key.outline.set_visible(False)
    key.set_ticks([0, 1], labels=["input", "output"])
    key.ax.tick_params(length=0)
    key.ax.grid(visible=False)
    key.set_label("layer", labelpad=-16)


def scale_angles(axes_row: Sequence[Axes], largest: float) -> None:
    """Give the panels of a row the same square-root axis."""
    top, ticks = angle_axis(largest)
    for axes in axes_row:
        axes.set_yscale("function", functions=(lambda y: np.sqrt(np.clip(y, 0, None)), np.square))
        axes.set_ylim(0, top)
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks] if axes is axes_row[0] else [])


def _mark_gain_of_one(axes_row: Sequence[Axes], largest: float) -> None:
    for axes in axes_row:
        low, high = axes.get_ylim()
        axes.set_ylim(min(-0.05, low), max(1.25, high))
        axes.axhline(1, color="#555555", linestyle="--", linewidth=0.7, zorder=1)


def render(figure: Figure, kind: str) -> bytes:
    """Return a figure as a file of a kind; equal results give equal files."""
    buffer = BytesIO()
    metadata = {"CreationDate": None} if kind == "pdf" else None
    figure.savefig(buffer, format=kind, dpi=300, metadata=metadata)
    figure.set_layout_engine("none")  # laid out now: a second time would cost as much as drawing
    return buffer.getvalue()
