"""The printed figures: learning curves, alignment of forward and feedback paths, gains."""

from collections.abc import Sequence
from math import ceil, isfinite
from textwrap import fill

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from feedbackpath.report.curves import (
    QUANTITIES,
    LayerCurves,
    LearningCurves,
    all_means,
    ends_of_bands,
    layer_curves_by_rule,
    learning_curves_by_rule,
)
from feedbackpath.report.panels import Panel, styles_of, suffix_of
from feedbackpath.report.parts import (
    COLUMN_WIDTH,
    FIGURE_STYLE,
    KINDS,
    PAGE_WIDTH,
    REFERENCE,
    draw_legend,
    key,
    legend_columns,
    looks_of,
    render,
    scale_layers,
    scale_metric,
)
from feedbackpath.report.scales import axis_title, describe_flat, epoch_ticks, scale_of
from feedbackpath.report.style import RuleStyle, Styles

LETTERS = 14  # of a title, an inch

LAYER_COLOURS = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.9, 256)))
"""From the input layer, dark, to the output layer, light."""


def render_figures(panels: Sequence[Panel]) -> dict[str, bytes]:
    """Draw every figure that the panels have data for.

    Args:
        panels: One panel, or several to lay side by side.

    Returns:
        File name (``learning_curves.png``, …) to the file's bytes: PNG of 300 dots per inch, PDF and SVG. Of
        several panels each has its own alignment and gains, such as ``gains-resnet8-glyphs-after.png``.
    """
    styles = styles_of(panels)
    with matplotlib.rc_context(FIGURE_STYLE):
        drawn = {"learning_curves": learning_curves(panels, styles)}
        for panel in panels:
            for name, quantities in LAYER_FIGURES.items():
                drawn[f"{name}{suffix_of(panel, panels)}"] = draw_layer_figure(panel, styles, quantities)
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
    rules = [rule for rule in styles if any(rule in found for _, found in curves)]
    columns = min(len(curves), 2 if len(curves) == 4 else 3)
    rows, width = ceil(len(curves) / columns), COLUMN_WIDTH if columns == 1 else PAGE_WIDTH
    keys = [key(styles[rule].legend, **looks_of(styles[rule])) for rule in rules]
    key_columns = legend_columns([styles[rule].legend for rule in rules], width, 2 if columns == 1 else 3)
    height = 2.4 * rows + 0.14 * ceil(len(rules) / key_columns)
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for axes, (panel, found) in zip(grid, curves, strict=False):
        for rule, of_rule in found.items():
            _draw_learning(axes, styles[rule], of_rule)
        axes.set_xlabel("epoch")
        _mark_epochs([axes], most=8)
        axes.set_title(panel.title if len(panels) > 1 else "", wrap=True)
    for axes in grid[len(curves) :]:
        axes.set_visible(False)
    scale_metric(grid[0], ends_of_bands(lines for _, of in curves for lines in of.values()), panels[0].metric)
    for axes in grid[::columns]:
        scale = ", log scale" if axes.get_yscale() == "log" else ""
        axes.set_ylabel(axis_title(panels[0].metric) + scale)
    draw_legend(figure, keys, key_columns)
    return figure


def _draw_learning(axes: Axes, style: RuleStyle, curves: LearningCurves) -> None:
    colour = style.colour
    for run, curve in curves:
        if run is None:
            axes.plot(curve.epochs, curve.means, markevery=ceil(len(curve.epochs) / 8), **looks_of(style))
            axes.fill_between(curve.epochs, *curve.band, color=colour, alpha=0.2, linewidth=0)
        else:
            axes.plot(curve.epochs, curve.means, color=colour, linestyle=style.dash, linewidth=0.6)
            end = curve.epochs[-1:], curve.means[-1:]
            axes.plot(*end, color=colour, marker="x", markersize=5, linestyle="", zorder=3)


def draw_layer_figure(panel: Panel, styles: Styles, rows: Sequence[str]) -> Figure | None:
    """Draw a row per quantity, a column per rule, a line per layer; None where nothing was measured."""
    columns = layer_curves_by_rule(panel.runs, rows)
    if not columns:
        return None
    width = min(PAGE_WIDTH, 1.0 + 1.6 * len(columns))
    figure = Figure(figsize=(width, 0.6 + 1.5 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey="row")
    for index, (rule, quantities) in enumerate(columns.items()):
        grid[0, index].set_title(fill(styles[rule].label, int(LETTERS * (width - 1) / len(columns))))
        for axes, (quantity, curves) in zip(grid[:, index], quantities.items(), strict=True):
            _draw_layer_lines(axes, quantity, curves)
    for axes_row, quantity in zip(grid, rows, strict=True):
        scale = scale_of(quantity, all_means(quantities[quantity] for quantities in columns.values()))
        scale_layers(axes_row, scale)
        axes_row[0].set_ylabel(f"{QUANTITIES[quantity]}\n{scale.name}".strip())
    _mark_epochs(list(grid.flat), most=4)
    figure.supxlabel("epoch", fontsize=8)
    key = figure.colorbar(ScalarMappable(cmap=LAYER_COLOURS), ax=grid, aspect=25, pad=0.02)
    key.outline.set_visible(False)
    key.set_ticks([0, 1], labels=["input", "output"])
    key.ax.tick_params(length=0)
    key.ax.grid(visible=False)
    key.set_label("layer", labelpad=-16)
    return figure


def _mark_epochs(every: Sequence[Axes], *, most: int) -> None:
    """Give axes ticks from epoch 0 to the last that one of them shows."""
    ends = [axes.dataLim.x1 for axes in every if isfinite(axes.dataLim.x1)]
    for axes in every:
        axes.xaxis.set_major_locator(FixedLocator(epoch_ticks(int(max(ends, default=0)), most)))


def _draw_layer_lines(axes: Axes, quantity: str, curves: LayerCurves) -> None:
    for position, curve in zip(np.linspace(0, 1, len(curves)), curves.values(), strict=True):
        marker = "o" if len(curve.epochs) == 1 else None
        axes.plot(curve.epochs, curve.means, color=LAYER_COLOURS(position), marker=marker, linewidth=1)
    if quantity == "gain":
        axes.axhline(1, linestyle="--", **REFERENCE)
        return
    note = describe_flat(all_means([curves])) if curves else "not measured"
    axes.text(0.5, 0.5, note, transform=axes.transAxes, ha="center", fontsize=7, color="#555555")


LAYER_FIGURES = {"alignment": ("matrix_angle_deg", "delta_angle_deg"), "gains": ("gain",)}
