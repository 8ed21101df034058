"""The figures of the study of mirror mode (``mirror_study.py``), from ``study.json`` alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from study_table import Group, group_trainings

from feedbackpath.mirror.settings import CODES as CODE_NAMES
from feedbackpath.report.curves import mean_and_error
from feedbackpath.report.parts import (
    COLUMN_WIDTH,
    FIGURE_STYLE,
    PAGE_WIDTH,
    REFERENCE,
    draw_cells,
    draw_legend,
    key,
    line_looks,
    render,
    scale_layers,
    scale_linear,
    scale_log,
    scale_metric,
    write_letters,
)
from feedbackpath.report.scales import describe_flat, scale_of
from feedbackpath.report.style import ORDER, legend_label
from feedbackpath.train.store import write_bytes as replace_file

DESIGN_COLOURS = {"gaussian": "#332288", "uniform": "#44AA99", "signs": "#882255"}  # none is a rule's
DESIGN_MARKERS = {"gaussian": "o", "uniform": "s", "signs": "^"}
ASIDE = {"gaussian": 0.84, "signs": 1.19}  # points of laws that agree stand side by side
OTHER_COLOUR = "#666666"
KINDS = ("png", "pdf")
CODES: dict[str, Any] = {"color": "#000000", "linestyle": "", "marker": "*", "markersize": 6}
FLOOR = 0.5  # degrees, the lowest of the figure of designs
SAMPLE_TICKS = (16, 256, 4096, 65536)
ANSWERS = {"ReLU": "behind a ReLU", "linear": "linear"}
READINGS = {"inside": "B ← B + η (cov − λB)", "printed": "B ← (1 − λ) B + η cov"}


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

    A column a layer, a row an activation. Points are means over seeds, with bars of one standard deviation.
    Codes are exact: a star shows how many samples they take.
    """
    cells = [cell for cell in study["cells"] if cell["part"] == "designs"]
    if not cells:
        return None
    layers, activations = (
        list(dict.fromkeys(cell[name] for cell in cells)) for name in ("layer", "activation")
    )
    width = max(COLUMN_WIDTH, min(PAGE_WIDTH, 0.8 + 1.55 * len(layers)))
    figure = Figure(figsize=(width, 1.0 + 1.75 * len(activations)), layout="constrained")
    grid = figure.subplots(len(activations), len(layers), squeeze=False, sharex=True, sharey=True)
    for cell in cells:
        axes = grid[activations.index(cell["activation"]), layers.index(cell["layer"])]
        (_draw_codes if _is_exact(cell) else _draw_design)(axes, cell)
    for axes, layer in zip(grid[0], layers, strict=True):
        axes.set_title(layer.replace(", ", "\n", 1))
    for axes, activation in zip(grid[:, 0], activations, strict=True):
        axes.set_ylabel(f"{ANSWERS[activation]}\nmatrix angle (°), log scale")
    scale_log(grid[0, 0], "y", (FLOOR, 1, 2, 5, 10, 20, 45, 90), is_marked=False)
    scale_log(grid[0, 0], "x", SAMPLE_TICKS, is_marked=False)
    figure.supxlabel("samples of noise, log scale", fontsize=8)
    designs = {cell["design"]: _is_exact(cell) for cell in cells}
    keys = [
        key(_design_name(name), **(CODES if designs[name] else _design_looks(name)))
        for name in sorted(designs, key=lambda name: (designs[name], name))
    ]
    draw_legend(figure, keys, 4 if len(layers) > 2 else 2)
    return figure


def draw_grid(study: dict[str, Any]) -> Figure | None:
    """Draw the paper's two numbers as maps: worst matrix angle, gain and test error, a row a reading.

    The paper's own numbers are in a box; what backprop and the default mirror give stands in the titles.
    """
    groups = group_trainings(study, "grid")
    readings = list(dict.fromkeys(group.mirror["reading"] for group in groups if group.name == "paper"))
    if not readings:
        return None
    figure = Figure(figsize=(PAGE_WIDTH, 0.8 + 1.6 * len(readings)), layout="constrained")
    axes_grid = figure.subplots(len(readings), len(MAPS), squeeze=False, sharey=True)
    beside = [group for group in groups if group.name != "paper"]
    for row, reading in zip(axes_grid, readings, strict=True):
        chosen = [g for g in groups if g.name == "paper" and g.mirror["reading"] == reading]
        for axes, quantity in zip(row, MAPS, strict=True):
            _draw_cells(axes, chosen, quantity)
        row[0].set_ylabel(f"{READINGS[reading]}\ndecay λ")
    for axes, quantity in zip(axes_grid[0], MAPS, strict=True):
        references = ", ".join(f"{_rule_of(g)} {quantity.text(quantity.value(g))}" for g in beside)
        axes.set_title(f"{quantity.label}\n{references}")
    for axes in axes_grid[-1]:
        axes.set_xlabel("rate η")
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
    for group in sorted(groups, key=lambda group: ORDER.index(_rule_of(group))):
        by_name.setdefault(group.name, []).append(group)
    figure = Figure(figsize=(PAGE_WIDTH, 2.3), layout="constrained")
    row = figure.subplots(1, 4)
    row[1].sharey(row[0])
    for shift, own in enumerate(by_name.values()):
        _draw_rule(row, own, [sizes.index(read_size(group)) for group in own], 0.16 * (shift - 1.5))
    titles = _scale_sweep(row, groups)
    for axes, title in zip(row, titles, strict=True):
        axes.set_ylabel(title)
        axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axes.set_xlim(-0.4, len(sizes) - 0.6)
    write_letters(row)
    figure.supxlabel(label, fontsize=8)
    draw_legend(figure, [key(_label_of(own[0]), **_rule_looks(own[0])) for own in by_name.values()], 3)
    return figure


def _draw_rule(row: Sequence[Axes], groups: Sequence[Group], places: Sequence[int], aside: float) -> None:
    """Draw one rule into the panels of a sweep; backprop has neither angles nor gains to speak of."""
    if groups[0].name != "bp":
        for axes, angle in zip(row, ANGLES, strict=False):
            _draw_bars(axes, groups, places, [group.worst(angle) for group in groups])
        _draw_gains(row[2], [place + aside for place in places], groups)
    _draw_bars(row[3], groups, places, [group.last("test_error") for group in groups])


def _scale_sweep(row: Sequence[Axes], groups: Sequence[Group]) -> tuple[str, ...]:
    """Scale the panels of a sweep; return what their axes show."""
    angles = scale_of(
        "matrix_angle_deg", [v for group in groups for angle in ANGLES for v in group.worst(angle)]
    )
    scale_layers(row[:2], angles)
    gains = [value for group in groups for name in ("gain_min", "gain_max") for value in group.last(name)]
    scale_linear(row[2], "y", gains, 0.25 if max(gains) - min(gains) < 1.5 else 0.5)
    row[2].axhline(1, linestyle="--", **REFERENCE)
    scale_metric(row[3], [value for group in groups for value in group.last("test_error")])
    error = "test error (%)" + (", log scale" if row[3].get_yscale() == "log" else "")
    scale = f" (°)\n{angles.name}"
    return f"worst matrix angle{scale}", f"δ angle, first layer{scale}", "gain of all layers", error


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
ANGLES = ("matrix_angle_deg_max", "delta_angle_deg_deepest")


def _draw_cells(axes: Axes, groups: Sequence[Group], quantity: _Quantity) -> None:
    rates, decays = (sorted({group.mirror[name] for group in groups}) for name in ("rate", "decay"))
    values = np.full((len(decays), len(rates)), np.nan)
    texts = [[""] * len(rates) for _ in decays]
    for group in groups:
        y, x = decays.index(group.mirror["decay"]), rates.index(group.mirror["rate"])
        values[y, x] = quantity.value(group)
        texts[y][x] = "diverged" if group.has_diverged else quantity.text(values[y, x])
        if group.is_as_printed:
            axes.add_patch(
                Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="#D55E00", linewidth=2, zorder=3)
            )
    draw_cells(
        axes, values, texts, quantity.colours, quantity.norm,
        across=[f"{rate:g}" for rate in rates], up=[f"{decay:g}" for decay in decays],
    )  # fmt: skip


def _is_exact(cell: dict[str, Any]) -> bool:
    """Whether a design leaves no angle by theory: orthogonal codes."""
    return not any(cell["predicted_deg"])


def _draw_codes(axes: Axes, cell: dict[str, Any]) -> None:
    (samples,) = cell["samples"]
    axes.plot(samples, 1.2 * FLOOR, **CODES)
    told = describe_flat([max(cell["angle_deg"][0])]).removeprefix("all ")
    axes.annotate(
        f"{told.replace(' ', chr(10))} ↓", (samples, 1.2 * FLOOR), (5, 0),
        textcoords="offset points", va="bottom", fontsize=7,
    )  # fmt: skip


def _draw_design(axes: Axes, cell: dict[str, Any]) -> None:
    looks = _design_looks(cell["design"])
    means = [fmean(angles) for angles in cell["angle_deg"]]
    spread = [np.std(angles, ddof=1) if len(angles) > 1 else 0.0 for angles in cell["angle_deg"]]
    samples = np.array(cell["samples"], float)
    axes.plot(samples, cell["predicted_deg"], color=looks["color"], linestyle=looks["linestyle"], lw=0.7)
    samples *= ASIDE.get(cell["design"].removesuffix("-pairs"), 1.0)
    axes.errorbar(samples, means, yerr=spread, **(looks | {"linestyle": ""}), elinewidth=0.7)


def _design_name(name: str) -> str:
    words = name.replace("-pairs", ", in pairs").replace("gaussian", "Gaussian")
    return words if words not in CODE_NAMES else f"{words} codes"


def _design_looks(name: str) -> dict[str, Any]:
    """Return how a design is drawn: a colour a law, open markers and dashes for pairs."""
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


def _rule_of(group: Group) -> str:
    """Return the rule that is called so today: what a mirror was that fires codes, or fires noise."""
    return "bp" if group.name == "bp" else "wm-exact" if group.mirror["noise"] in CODE_NAMES else "wm"


def _label_of(group: Group) -> str:
    return legend_label(_rule_of(group)) + (", the paper's settings" if group.name == "paper" else "")


def _rule_looks(group: Group) -> dict[str, Any]:
    """Return a rule's looks; the paper's settings of the mirror are dotted, with open squares."""
    own = {"linestyle": ":", "marker": "s", "markerfacecolor": "white"} if group.name == "paper" else {}
    return line_looks(_rule_of(group)) | own


def _draw_bars(
    axes: Axes, groups: Sequence[Group], places: Sequence[float], by_seed: Sequence[Sequence[float]]
) -> None:
    found = [mean_and_error(list(values)) for values in by_seed]
    axes.errorbar(
        places, [mean for mean, _ in found], yerr=[error or 0.0 for _, error in found],
        elinewidth=0.8, capsize=1.5, **_rule_looks(groups[0]),
    )  # fmt: skip


def _draw_gains(axes: Axes, places: Sequence[float], groups: Sequence[Group]) -> None:
    """Draw, for each size, the range of the gain over layers and its median."""
    middle = [fmean(group.last("gain_median")) for group in groups]
    ends = [(min(group.last("gain_min")), max(group.last("gain_max"))) for group in groups]
    below = [max(m - low, 0.0) for m, (low, _) in zip(middle, ends, strict=True)]
    above = [max(high - m, 0.0) for m, (_, high) in zip(middle, ends, strict=True)]
    looks = _rule_looks(groups[0]) | {"linestyle": ""}
    axes.errorbar(places, middle, yerr=[below, above], elinewidth=1.2, capsize=2, **looks)


def _depth_of(group: Group) -> int:
    return int(group.model.removeprefix("resnet"))


def _width_of(group: Group) -> int:
    _, _, width = group.model.partition("x")
    return int(width or 1)


SWEEPS: dict[str, tuple[str, Callable[[Group], int]]] = {
    "depth": ("depth of the ResNet (layers)", _depth_of),
    "width": ("width of ResNet-8 (times the default)", _width_of),
    "batch": ("batch (samples per step)", lambda group: group.batch_size),
}
