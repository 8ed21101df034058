"""What all printed figures share: sizes, looks, legends, letters of panels, axes and maps."""

from collections.abc import Iterable, Sequence
from io import BytesIO
from math import ceil, isnan
from string import ascii_lowercase
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.textpath import TextPath
from matplotlib.ticker import NullFormatter, NullLocator

from feedbackpath.report.scales import (
    ERROR,
    ROOM,
    LayerScale,
    error_axis,
    minor_ticks,
    ticks_around,
    with_room,
    write_number,
    write_numbers,
)
from feedbackpath.report.style import RuleStyle, style_of
from feedbackpath.train.results import Metric

COLUMN_WIDTH = 3.35  # inches: 8.5 cm, one column of a two-column page
PAGE_WIDTH = 6.69  # 17 cm

KINDS = ("png", "pdf", "svg")

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
    "svg.hashsalt": "feedbackpath",  # equal results give equal files
}

REFERENCE: dict[str, Any] = {"color": "#555555", "linewidth": 0.7, "zorder": 1}
"""Looks of a line that no rule drew: a theory, a goal, a value to compare with."""


KEY_ROOM = 31  # points: an entry of a legend without its text


def line_looks(rule: str) -> dict[str, Any]:
    """Return a built-in rule's colour, dash and marker in matplotlib's words."""
    return looks_of(style_of(rule))


def looks_of(style: RuleStyle) -> dict[str, Any]:
    """Return a style in matplotlib's words."""
    return {"color": style.colour, "linestyle": style.dash, "marker": style.marker}


def key(label: str, **looks: Any) -> Line2D:
    """Return an entry of a legend."""
    return Line2D([], [], label=label, **looks)


def legend_columns(labels: Sequence[str], width: float, most: int) -> int:
    """Return how many columns of a legend fit into a width in inches, one to ``most``."""
    lengths = [
        TextPath((0, 0), label, size=FIGURE_STYLE["legend.fontsize"]).get_extents().width for label in labels
    ]
    for columns in range(most, 1, -1):
        rows = max(1, ceil(len(labels) / columns))
        texts = sum(max(lengths[first : first + rows]) for first in range(0, len(labels), rows))
        if texts + KEY_ROOM * columns <= 72 * width:
            return columns
    return 1


def draw_legend(figure: Figure | Axes, keys: Sequence[Line2D], columns: int, **more: Any) -> Legend:
    """Draw a legend above a figure, or elsewhere; its lines are long enough to show their dashes.

    Args:
        figure: The figure, or one panel.
        keys: The entries, in the order that all figures have.
        columns: Into how many columns they go, or into fewer where labels are long.
        more: What `matplotlib.legend.Legend` takes, such as ``loc``.
    """
    if isinstance(figure, Figure):
        columns = legend_columns([str(entry.get_label()) for entry in keys], figure.get_figwidth(), columns)
    spaces = {"handlelength": 2.8, "handletextpad": 0.6, "columnspacing": 1, "borderpad": 0}
    looks: dict[str, Any] = {"loc": "outside upper left", **spaces, **more}
    return figure.legend(handles=keys, ncols=columns, frameon=False, **looks)


def write_letters(panels: Iterable[Axes]) -> None:
    """Call panels a, b, c and so on."""
    for axes, letter in zip(panels, ascii_lowercase, strict=False):
        axes.set_title(letter, loc="left", fontweight="bold")


def scale_metric(axes: Axes, values: Iterable[float], metric: Metric = ERROR) -> None:
    """Scale an axis for values of a metric, with plain numbers; every digit has a mark on a log axis."""
    scale, ends, ticks = error_axis(values, metric)
    axes.set_yscale(scale)
    axes.set_ylim(ends)
    axes.set_yticks(ticks, [write_number(tick) for tick in ticks])
    if scale == "log":
        axes.set_yticks(minor_ticks(ends), [""] * len(minor_ticks(ends)), minor=True)
        axes.grid(visible=False, which="minor")


def scale_layers(axes_row: Iterable[Axes], scale: LayerScale) -> None:
    """Give the panels of a row the same axis."""
    for axes in axes_row:
        axes.set_yscale("function", functions=(scale.forward, scale.inverse))
        axes.set_ylim(scale.ends)
        axes.set_yticks(scale.ticks, write_numbers(scale.ticks))


def scale_linear(axes: Axes, name: Literal["x", "y"], values: Iterable[float], step: float) -> None:
    """Scale an axis linearly, with ticks a step apart that reach around all values."""
    ticks = ticks_around(values, step)
    axes.set(**{f"{name}lim": with_room(ticks)})
    axes.set(**{f"{name}ticks": ticks, f"{name}ticklabels": write_numbers(ticks)})


def scale_log(axes: Axes, name: Literal["x", "y"], ticks: Sequence[float], *, is_marked: bool = True) -> None:
    """Scale an axis logarithmically, from its first tick to its last, with marks between them or without."""
    room = (ticks[-1] / ticks[0]) ** ROOM
    axes.set(**{f"{name}scale": "log", f"{name}lim": (ticks[0] / room, ticks[-1] * room)})
    axes.set(**{f"{name}ticks": ticks, f"{name}ticklabels": [write_number(tick) for tick in ticks]})
    axis = axes.xaxis if name == "x" else axes.yaxis
    axis.set_minor_formatter(NullFormatter())
    if not is_marked:
        axis.set_minor_locator(NullLocator())


def draw_cells(
    axes: Axes,
    values: Sequence[Sequence[float]],
    texts: Sequence[Sequence[str]],
    colours: str,
    norm: Normalize,
    *,
    across: Sequence[str],
    up: Sequence[str],
) -> Any:
    """Draw values as colours with a text in each cell, from the lower left; cells without one are grey.

    Returns:
        What a colour bar is made from.
    """
    axes.set_facecolor("#EEEEEE")
    drawn = axes.imshow(values, cmap=colours, norm=norm, aspect="auto", origin="lower")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            is_dark = not isnan(value) and _luminance(colours, norm(value)) < 0.18
            axes.text(
                x, y, texts[y][x], ha="center", va="center", fontsize=7, color="white" if is_dark else "black"
            )
    axes.set_xticks(range(len(across)), across)
    axes.set_yticks(range(len(up)), up)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return drawn


def _luminance(colours: str, place: float) -> float:
    """Return the relative luminance of WCAG 2; below 0.18 white is the text that can be read better."""
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in matplotlib.colormaps[colours](place)[:3]
    )
    return float(0.2126 * red + 0.7152 * green + 0.0722 * blue)


def render(figure: Figure, kind: str) -> bytes:
    """Return a figure as a file of a kind; equal results give equal files."""
    buffer = BytesIO()
    metadata = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
    figure.savefig(buffer, format=kind, dpi=300, metadata=metadata)
    figure.set_layout_engine("none")  # laid out now: a second time would cost as much as drawing
    return buffer.getvalue()
