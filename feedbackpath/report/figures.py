"""The printed figures: learning curves, alignment of forward and feedback paths, gains."""

from collections.abc import Callable, Sequence
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
    layer_panels,
    unfinished,
)
from feedbackpath.report.style import legend_label, style_of

COLUMN_WIDTH = 3.4  # inches, one column of a two-column page
PAGE_WIDTH = 7.0

KINDS = ("png", "pdf")

LAYER_COLOURS = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.9, 256)))
"""From the input layer, dark, to the output layer, light."""

ERROR_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
ANGLE_TICKS = (0, 1, 5, 15, 30, 60, 90, 180)

_RC: dict[Any, Any] = {
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


def render_figures(results: dict[str, Any]) -> dict[str, bytes]:
    """Draw every figure that the results have data for.

    Args:
        results: A results file's content.

    Returns:
        File name (``learning_curves.png``, …) to the file's bytes: PNG of 300 dots per inch, and PDF.
    """
    draw: dict[str, Callable[[dict[str, Any]], Figure | None]] = {
        "learning_curves": learning_curves,
        "alignment": alignment,
        "gains": gains,
    }
    with matplotlib.rc_context(_RC):
        figures = {name: figure for name, drawn in draw.items() if (figure := drawn(results)) is not None}
        return {f"{name}.{kind}": _render(figure, kind) for name, figure in figures.items() for kind in KINDS}


def learning_curves(results: dict[str, Any]) -> Figure | None:
    """Draw test error by epoch: the mean of each rule's finished runs in a band of ± its standard error.

    A run that diverged or was interrupted is a thin line of its own that ends in a cross.
    """
    groups = group_by_rule(results.get("runs") or [])
    groups = {rule: runs for rule, runs in groups.items() if error_curve(runs).epochs}
    if not groups:
        return None
    figure = Figure(figsize=(COLUMN_WIDTH, 2.4 + 0.14 * ceil(len(groups) / 2)), layout="constrained")
    axes = figure.add_subplot()
    for rule, runs in groups.items():
        _draw_mean(axes, rule, error_curve(finished(runs)))
        for run in unfinished(runs):
            _draw_unfinished(axes, rule, error_curve([run]))
    _scale_errors(axes)
    axes.set_xlabel("epoch")
    axes.set_ylabel("test error (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.legend(
        handles=[Line2D([], [], label=legend_label(rule), **_line_looks(rule)) for rule in groups],
        loc="outside upper left",
        ncols=2,
        frameon=False,
        handlelength=2.6,
        columnspacing=1.2,
    )
    return figure


def alignment(results: dict[str, Any]) -> Figure | None:
    """Draw matrix angles over δ angles, in degrees, by epoch: a column per rule, a line per layer.

    Angles have a square-root axis, so that 1° and 90° can both be read and 0° is on it.
    """
    rows = {"matrix_angle_deg": "matrix angle (°)", "delta_angle_deg": "δ angle (°)"}
    return _draw_layers(results, rows, _scale_angles)


def gains(results: dict[str, Any]) -> Figure | None:
    """Draw the gain ⟨B,W⟩/⟨W,W⟩ by epoch: a column per rule, a line per layer, the target 1 dashed.

    Each column has its own axis, so that a rule whose gains run far off does not flatten the others. It spans
    at least 0 to 1.25, so that small gains look small and steady ones steady.
    """
    return _draw_layers(results, {"gain": "gain"}, _mark_gain_of_one)


def angle_axis(largest: float) -> tuple[float, list[float]]:
    """Return the upper end and the ticks, in degrees, of an axis for angles up to ``largest``."""
    top = 1.05 * max(largest, 20.0)
    return top, [tick for tick in ANGLE_TICKS if tick <= top]


def _draw_mean(axes: Axes, rule: str, curve: Curve) -> None:
    if not curve.epochs:
        return
    axes.plot(curve.epochs, curve.means, markevery=ceil(len(curve.epochs) / 8), **_line_looks(rule))
    means, errors = np.array(curve.means), np.array([error or 0.0 for error in curve.errors])
    colour = style_of(rule).colour
    axes.fill_between(curve.epochs, means - errors, means + errors, color=colour, alpha=0.2, linewidth=0)


def _line_looks(rule: str) -> dict[str, Any]:
    style = style_of(rule)
    return {"color": style.colour, "linestyle": style.dash, "marker": style.marker}


def _draw_unfinished(axes: Axes, rule: str, curve: Curve) -> None:
    if not curve.epochs:
        return
    style = style_of(rule)
    axes.plot(curve.epochs, curve.means, color=style.colour, linestyle=style.dash, linewidth=0.6)
    axes.plot(curve.epochs[-1:], curve.means[-1:], color=style.colour, marker="x", markersize=5, linestyle="")


def _scale_errors(axes: Axes) -> None:
    """Make the error axis logarithmic, with plain numbers; linear where an error of zero has to be shown."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    if values.min() <= 0:
        axes.set_ylim(bottom=0)
        return
    axes.set_yscale("log")
    high = values.max() * 1.15
    low = min(values.min() / 1.25, high / 6)  # wide enough for two ticks at least
    axes.set_ylim(low, high)
    ticks = [tick for tick in ERROR_TICKS if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())


def _draw_layers(
    results: dict[str, Any], rows: dict[str, str], scale: Callable[[Sequence[Axes], float], None]
) -> Figure | None:
    """Draw a grid of panels, a row per quantity and a column per rule; None where nothing was measured."""
    columns = layer_panels(results, rows)
    if not columns:
        return None
    width = min(PAGE_WIDTH, 1.0 + 1.6 * len(columns))
    figure = Figure(figsize=(width, 0.5 + 1.45 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False, sharex="col")
    for index, (rule, panels) in enumerate(columns.items()):
        grid[0, index].set_title(style_of(rule).label, wrap=True)
        for axes, curves in zip(grid[:, index], panels.values(), strict=True):
            _draw_panel(axes, curves)
    for axes_row, (quantity, label) in zip(grid, rows.items(), strict=True):
        axes_row[0].set_ylabel(label)
        scale(axes_row, largest_mean(panels[quantity] for panels in columns.values()))
    figure.supxlabel("epoch", fontsize=8)
    _draw_layer_key(figure, grid)
    return figure


def _draw_panel(axes: Axes, curves: dict[str, Curve]) -> None:
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


def _scale_angles(axes_row: Sequence[Axes], largest: float) -> None:
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


def _render(figure: Figure, kind: str) -> bytes:
    buffer = BytesIO()
    metadata = {"CreationDate": None} if kind == "pdf" else None  # equal results give equal files
    figure.savefig(buffer, format=kind, dpi=300, metadata=metadata)
    figure.set_layout_engine("none")  # laid out now: a second time would cost as much as drawing
    return buffer.getvalue()
