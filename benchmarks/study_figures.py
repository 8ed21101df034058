"""The figures of the study of mirror mode (``mirror_study.py``), from ``study.json`` alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator
from study_table import Group, group_trainings

from feedbackpath.report.curves import mean_and_error
from feedbackpath.report.parts import FIGURE_STYLE, PAGE_WIDTH, render, scale_layers, scale_metric
from feedbackpath.report.scales import describe_flat, scale_of
from feedbackpath.report.style import style_of
from feedbackpath.train.store import write_bytes as replace_file

DESIGN_COLOURS = {"gaussian": "#332288", "uniform": "#44AA99", "signs": "#882255"}  # none is a rule's
DESIGN_MARKERS = {"gaussian": "o", "uniform": "s", "signs": "^"}
ASIDE = {"gaussian": 0.93, "signs": 1.075}  # points of laws that agree stand side by side
OTHER_COLOUR = "#666666"
EXACT = "orthogonal"
KINDS = ("png", "pdf")
SAMPLE_TICKS = (256, 2048, 32768)


def write_study_figures(study: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``figures/*.png`` and ``figures/*.pdf`` of a study into a folder; return the files."""
    files = {folder / "figures" / name: content for name, content in render_study(study).items()}
    for path, content in files.items():
        replace_file(path, content)
    return list(files)


def render_study(study: dict[str, Any]) -> dict[str, bytes]:
    """Draw every figure that a study has cells for.

    Returns:
        File name (``designs.png``, ``grid.pdf``, …) to the file's bytes.
    """
    with matplotlib.rc_context(FIGURE_STYLE):
        drawn = {"designs": draw_designs(study), "grid": draw_grid(study)}
        drawn |= {part: draw_sweep(study, part) for part in SWEEPS}
        figures = {name: figure for name, figure in drawn.items() if figure is not None}
        return {f"{name}.{kind}": render(figure, kind) for name, figure in figures.items() for kind in KINDS}


def draw_designs(study: dict[str, Any]) -> Figure | None:
    """Draw the angle that noise leaves against samples: measured points on the theory's curves.

    A column a layer, a row an activation. Codes are a point of their own, at twice the inputs. Points are
    means over seeds, with bars of one standard deviation.
    """
    cells = [cell for cell in study["cells"] if cell["part"] == "designs"]
    if not cells:
        return None
    layers, activations = (
        list(dict.fromkeys(cell[name] for cell in cells)) for name in ("layer", "activation")
    )
    width = max(3.4, min(PAGE_WIDTH, 0.8 + 1.55 * len(layers)))
    figure = Figure(figsize=(width, 0.8 + 1.75 * len(activations)), layout="constrained")
    grid = figure.subplots(
        2 * len(activations), len(layers), squeeze=False, sharex=True, sharey="row",
        height_ratios=[4, 1] * len(activations),
    )  # fmt: skip
    for cell in cells:
        above, below = (
            grid[2 * activations.index(cell["activation"]) + strip, layers.index(cell["layer"])]
            for strip in (0, 1)
        )
        _draw_design(below if cell["design"] == EXACT else above, cell)
    for axes, layer in zip(grid[0], layers, strict=True):
        axes.set_title(layer.replace(", ", "\n", 1))
    for axes, activation in zip(grid[::2, 0], activations, strict=True):
        axes.set_ylabel(f"{activation}, log scale\nmatrix angle (°)")
    for row in grid[::2]:
        _scale_log(row, (0.7, 95), {tick: f"{tick}" for tick in (1, 2, 5, 10, 20, 45, 90)})
    for row in grid[1::2]:
        _scale_log(row, (1e-6, 1e-4), {1e-6: "10⁻⁶", 1e-5: "10⁻⁵"})
    for axes in grid[-1]:
        axes.set_xscale("log", base=2)
        axes.margins(x=0.1)
        axes.set_xticks(SAMPLE_TICKS, [f"{tick:,}" for tick in SAMPLE_TICKS])
        axes.xaxis.set_minor_locator(NullLocator())
    figure.supxlabel("samples of noise, log scale", fontsize=8)
    designs = sorted({cell["design"] for cell in cells}, key=lambda name: (name == EXACT, name))
    names = {
        name: name.replace("-pairs", " in pairs").replace("orthogonal", "orthogonal codes")
        for name in designs
    }
    handles = [Line2D([], [], label=names[name], **_design_looks(name)) for name in designs]
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=4 if len(layers) > 2 else 3,
        frameon=False,
        handlelength=2.2,
    )
    return figure


def draw_grid(study: dict[str, Any]) -> Figure | None:
    """Draw the paper's two numbers as maps: worst matrix angle, gain and test error, a row a reading.

    The paper's own numbers are in a box; what backprop and the default mirror give stands in the titles.
    """
    groups = group_trainings(study, "grid")
    readings = list(dict.fromkeys(group.mirror["reading"] for group in groups if group.name == "paper"))
    if not readings:
        return None
    figure = Figure(figsize=(PAGE_WIDTH, 0.75 + 1.55 * len(readings)), layout="constrained")
    axes_grid = figure.subplots(len(readings), len(MAPS), squeeze=False)
    beside = [group for group in groups if group.name != "paper"]
    for row, reading in zip(axes_grid, readings, strict=True):
        chosen = [g for g in groups if g.name == "paper" and g.mirror["reading"] == reading]
        for axes, quantity in zip(row, MAPS, strict=True):
            _draw_map(axes, chosen, quantity)
        row[0].set_ylabel(f"{reading}\nλ")
    for axes, quantity in zip(axes_grid[0], MAPS, strict=True):
        references = ", ".join(f"{BESIDE[g.name]} {quantity.text(quantity.value(g))}" for g in beside)
        axes.set_title(f"{quantity.label}\n{references}")
    for axes in axes_grid[-1]:
        axes.set_xlabel("η")
    return figure


def draw_sweep(study: dict[str, Any], part: str) -> Figure | None:
    """Draw angles, gains and test error against one size of the network or of the step.

    Means over seeds with bars of their standard error; of the gain the range over layers.
    """
    groups = group_trainings(study, part)
    if not groups:
        return None
    label, read_size = SWEEPS[part]
    sizes = sorted({read_size(group) for group in groups})
    by_name: dict[str, list[Group]] = {}
    for group in groups:
        by_name.setdefault(group.name, []).append(group)
    figure = Figure(figsize=(PAGE_WIDTH, 2.2), layout="constrained")
    row = figure.subplots(1, 4)
    for shift, (name, own) in enumerate(by_name.items()):
        _draw_rule(row, name, own, [sizes.index(read_size(group)) for group in own], 0.16 * (shift - 1.5))
    _scale_sweep(row, groups)
    titles = (
        "worst matrix angle (°)\nsquare-root scale",
        "δ angle, first layer (°)\nsquare-root scale",
        "gain, all layers",
        "test error (%)\nlog scale",
    )
    for axes, title in zip(row, titles, strict=True):
        axes.set_title(title)
        axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axes.set_xlim(-0.35, len(sizes) - 0.65)
    figure.supxlabel(label, fontsize=8)
    handles = [Line2D([], [], label=KEY[name], **_rule_looks(name)) for name in by_name]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, handlelength=2.6)
    return figure


def _draw_rule(
    row: Sequence[Axes], name: str, groups: Sequence[Group], places: Sequence[int], aside: float
) -> None:
    """Draw one rule into the panels of a sweep; backprop has neither angles nor gains to speak of."""
    if name != "bp":
        for axes, angle in zip(row, ANGLES, strict=False):
            _draw_bars(axes, name, places, [group.worst(angle) for group in groups])
        _draw_gains(row[2], name, [place + aside for place in places], groups)
    _draw_bars(row[3], name, places, [group.last("test_error") for group in groups])


def _scale_sweep(row: Sequence[Axes], groups: Sequence[Group]) -> None:
    largest = max(value for group in groups for angle in ANGLES for value in group.worst(angle))
    scale_layers(row[:2], scale_of("matrix_angle_deg", [largest]))
    row[2].set_ylim(0, max(1.25, 1.05 * row[2].get_ylim()[1]))
    row[2].axhline(1, color="#555555", linestyle="--", linewidth=0.7, zorder=1)
    scale_metric(row[3], [value for group in groups for value in group.last("test_error")])


@dataclass(frozen=True)
class _Quantity:
    """What a map shows.

    Attributes:
        label: Its title.
        value: Reads it from a group of trainings.
        text: Prints it.
        colours: Name of its colour map.
        norm: Its scale of colours.
    """

    label: str
    value: Callable[[Group], float]
    text: Callable[[float], str]
    colours: str
    norm: Normalize


def _plain(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _angle_text(degrees: float) -> str:
    return describe_flat([degrees]).removeprefix("all ") or f"{_plain(degrees)}°"


MAPS = (
    _Quantity(
        "worst matrix angle", lambda group: fmean(group.worst("matrix_angle_deg_max")), _angle_text,
        "viridis_r", Normalize(0, 90),
    ),
    _Quantity(
        "gain, median layer", lambda group: fmean(group.last("gain_median")), _plain,
        "PuOr_r", LogNorm(1 / 64, 64),
    ),
    _Quantity(
        "test error", lambda group: fmean(group.last("test_error")), lambda value: f"{value:.1f}%",
        "viridis_r", LogNorm(1, 100),
    ),
)  # fmt: skip
BESIDE = {"bp": "bp", "default": "wm"}
ANGLES = ("matrix_angle_deg_max", "delta_angle_deg_deepest")


def _draw_map(axes: Axes, groups: Sequence[Group], quantity: _Quantity) -> None:
    rates, decays = (sorted({group.mirror[name] for group in groups}) for name in ("rate", "decay"))
    values = np.full((len(decays), len(rates)), np.nan)
    for group in groups:
        place = decays.index(group.mirror["decay"]), rates.index(group.mirror["rate"])
        values[place] = quantity.value(group)
        _write(axes, place, group, quantity)
        if group.is_as_printed:
            corner = (place[1] - 0.5, place[0] - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#D55E00", linewidth=2, zorder=3))
    axes.imshow(values, cmap=quantity.colours, norm=quantity.norm, aspect="auto", origin="lower")
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes.set_yticks(range(len(decays)), [f"{decay:g}" for decay in decays])
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _write(axes: Axes, place: tuple[int, int], group: Group, quantity: _Quantity) -> None:
    """Write a value into its cell, in black or white, whichever can be read on its colour."""
    value = quantity.value(group)
    red, green, blue, _ = matplotlib.colormaps[quantity.colours](float(quantity.norm(value)))
    is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
    axes.text(
        place[1], place[0], "diverged" if group.has_diverged else quantity.text(value),
        ha="center", va="center", fontsize=7, color="white" if is_dark else "black",
    )  # fmt: skip


def _draw_design(axes: Axes, cell: dict[str, Any]) -> None:
    looks = _design_looks(cell["design"])
    means = [fmean(angles) for angles in cell["angle_deg"]]
    spread = [np.std(angles, ddof=1) if len(angles) > 1 else 0.0 for angles in cell["angle_deg"]]
    samples = np.array(cell["samples"], float)
    if cell["design"] != EXACT:
        axes.plot(samples, cell["predicted_deg"], color=looks["color"], linestyle=looks["linestyle"], lw=0.9)
        samples *= ASIDE.get(cell["design"].removesuffix("-pairs"), 1.0)
    axes.errorbar(samples, means, yerr=spread, **(looks | {"linestyle": ""}), elinewidth=0.7)


def _design_looks(name: str) -> dict[str, Any]:
    """Return how a design is drawn: a colour a law, open markers and dashes for pairs, a star for codes."""
    if name == EXACT:
        return {"color": "#000000", "linestyle": "", "marker": "*", "markersize": 7}
    law = name.removesuffix("-pairs")
    is_paired = law != name
    colour = DESIGN_COLOURS.get(law, OTHER_COLOUR)
    return {
        "color": colour,
        "linestyle": "--" if is_paired else "-",
        "marker": DESIGN_MARKERS.get(law, "D"),
        "markersize": 3,
        "markerfacecolor": "white" if is_paired else colour,
        "markeredgewidth": 0.7,
    }


def _scale_log(row: Sequence[Axes], ends: tuple[float, float], ticks: Mapping[float, str]) -> None:
    """Give the panels of a row one logarithmic axis."""
    row[0].set_ylim(*ends)  # first: an exact angle of 0 gives a logarithmic axis no ends
    row[0].set_yscale("log")
    row[0].set_yticks(list(ticks), list(ticks.values()))
    row[0].yaxis.set_minor_locator(NullLocator())


KEY = {
    "bp": "backprop",
    "default": "weight mirror, default (codes)",
    "paper": "weight mirror, the paper's settings",
}


def _rule_looks(name: str) -> dict[str, Any]:
    """Return a rule's looks; the paper's settings of the mirror are dotted, with open squares."""
    style = style_of("bp" if name == "bp" else "wm")
    looks: dict[str, Any] = {"color": style.colour, "linestyle": style.dash, "marker": style.marker}
    return looks | ({"linestyle": ":", "marker": "s", "markerfacecolor": "white"} if name == "paper" else {})


def _draw_bars(axes: Axes, name: str, places: Sequence[float], by_seed: Sequence[Sequence[float]]) -> None:
    found = [mean_and_error(list(values)) for values in by_seed]
    axes.errorbar(
        places, [mean for mean, _ in found], yerr=[error or 0.0 for _, error in found],
        elinewidth=0.8, capsize=1.5, **_rule_looks(name),
    )  # fmt: skip


def _draw_gains(axes: Axes, name: str, places: Sequence[float], groups: Sequence[Group]) -> None:
    """Draw, for each size, the range of the gain over layers and its median."""
    looks = _rule_looks(name) | {"linestyle": ""}
    middle = [fmean(group.last("gain_median")) for group in groups]
    ends = [(min(group.last("gain_min")), max(group.last("gain_max"))) for group in groups]
    below = [max(m - low, 0.0) for m, (low, _) in zip(middle, ends, strict=True)]
    above = [max(high - m, 0.0) for m, (_, high) in zip(middle, ends, strict=True)]
    axes.errorbar(places, middle, yerr=[below, above], elinewidth=1.2, capsize=2, **looks)


def _depth_of(group: Group) -> int:
    return int(group.model.removeprefix("resnet"))


def _width_of(group: Group) -> int:
    _, _, width = group.model.partition("x")
    return int(width or 1)


SWEEPS: dict[str, tuple[str, Callable[[Group], int]]] = {
    "depth": ("layers of the ResNet", _depth_of),
    "width": ("times as wide", _width_of),
    "batch": ("samples per step", lambda group: group.batch_size),
}
