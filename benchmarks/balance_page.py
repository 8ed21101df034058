"""What docs/balance.md shows of `balance.py`: its figures, which `doc_figures.py` draws, and its table.

`python benchmarks/balance_page.py` writes the table.
"""

import itertools
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from balance import DEFAULTS, DEPTHS, FALLING, MIRROR, OUT
from cells import Cell
from marked import as_table, write_between
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from feedbackpath.report.parts import (
    PAGE_WIDTH,
    REFERENCE,
    draw_cells,
    draw_legend,
    key,
    scale_linear,
    write_letters,
)
from feedbackpath.report.style import style_of

PAGE = Path(__file__).parent.parent / "docs" / "balance.md"
CHANCE, FAILED = 90.0, 50.0  # percent of errors: of ten classes, and above which a network has not learned
MAPS = {
    "kp": (("weight_decay", "lr"), ("start", "momentum")),
    "wm": (("decay", "rate"), ("samples", "sigma"), ("lr", "every")),
}
NAMES = {
    "lr": "learning rate", "weight_decay": "weight decay", "momentum": "momentum",
    "rate": "rate of the mirror, η", "decay": "decay of the mirror, λ", "samples": "samples of noise",
    "sigma": "noise, σ", "every": "steps between mirror phases",
    "start": "size of the initial B (default: 1)",
}  # fmt: skip


def draw_balance(cells: list[Cell]) -> Figure:
    """Draw angles against theory, and errors beyond backprop's against the e-folds of a run, by depth."""
    figure = Figure(figsize=(PAGE_WIDTH, 2.9), layout="constrained")
    left, *right = figure.subplots(1, 3, width_ratios=(1.1, 1, 1))
    found = means_over_seeds(cells)
    colour, keys = style_of("kp").colour, []
    for start, (norm, marker) in itertools.product((1.0, 0.0), (("none", "o"), ("batchnorm", "^"))):
        looks: dict[str, Any] = {
            "color": colour, "linestyle": "", "marker": marker, "markersize": 4,
            "markerfacecolor": colour if start else "none", "markeredgewidth": 0.8,
        }  # fmt: skip
        place = "at random" if start else "at 0"
        keys.append(key(f"B starts {place}, {'no norm' if norm == 'none' else 'BatchNorm'}", **looks))
        for axes, depth in zip(right, DEPTHS, strict=True):
            wanted = {"rule": "kp", "start": start, "norm": norm, "depth": depth}
            shown = [c for c in found if wanted.items() <= c["settings"].items()]
            learned = [c["found"] for c in shown if c["found"]["error"] < FAILED]
            left.plot([f["predicted"] for f in learned], [f["last"] for f in learned], **looks)
            pairs = [(c["found"], _backprop_beside(c, found)) for c in shown]
            beyond = [(bp["efolds"], f["error"] - bp["error"]) for f, bp in pairs if bp["error"] < FAILED]
            axes.plot(*zip(*beyond, strict=True), **looks)
    left.plot([0, 90], [0, 90], **REFERENCE)
    left.set(xlabel="angle by theory (°)", ylabel="largest angle after training (°)", aspect="equal")
    scale_linear(left, "x", (0, 90), 30)
    scale_linear(left, "y", (0, 90), 30)
    for axes, depth in zip(right, DEPTHS, strict=True):
        axes.set_xscale("symlog", linthresh=0.01)
        axes.set_xlim(-0.003, 35)
        axes.set_xticks((0, 0.01, 0.1, 1, 3, 10), ("0", "0.01", "0.1", "1", "3", "10"))
        axes.set_yscale("symlog", linthresh=2)
        axes.set_ylim(-1.6, 100)
        axes.set_yticks((-1, 0, 1, 2, 5, 10, 30, 90), ("−1", "0", "1", "2", "5", "10", "30", "90"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set(xlabel=f"e-folds, {depth} hidden layers")
        axes.axhline(0.0, **REFERENCE)
        axes.axvline(3.0, linestyle="--", **REFERENCE)
    right[0].set_ylabel("test error minus bp's (points)")
    write_letters((left, *right))
    draw_legend(figure, keys, 2, handlelength=1)
    return figure


def means_over_seeds(cells: list[Cell]) -> list[Cell]:
    """Return a cell for each set of settings but the seed; one whose run diverged has an error of chance."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(json.dumps({**cell["settings"], "seed": None}), []).append(cell["found"])
    means = []
    for settings, found in groups.items():
        whole = [{"error": CHANCE} if one.get("diverged") else one for one in found]
        names = set.union(*map(set, whole))
        mean = {name: statistics.fmean(one[name] for one in whole if name in one) for name in names}
        means.append({"settings": json.loads(settings), "found": mean})
    return means


def _backprop_beside(cell: Cell, cells: list[Cell]) -> Cell:
    """Return what was found of backprop at the same settings."""
    wanted = {**cell["settings"], "rule": "bp", "start": 1.0}
    return next(dict(c["found"]) for c in cells if c["settings"] == wanted)


@dataclass(frozen=True)
class Quantity:
    """What a map shows.

    Attributes:
        label: Of the colours.
        of: Its value in what was found of a run that did not diverge.
        write: Makes the text of a cell.
        colours: A colour map of matplotlib.
        norm: From values to colours.
        ticks: Values that the colour bar names.
        extend: Ends of the colour bar beyond which all values have one colour.
    """

    label: str
    of: Callable[[Cell], float]
    write: Callable[[float], str]
    colours: str
    norm: Normalize
    ticks: tuple[float, ...]
    extend: str = "max"


def _in_two_digits(value: float) -> str:
    return "< 0.1" if 0 < value < 0.1 else f"{value:.{int(value < 9.95)}f}"


def _as_ratio(value: float) -> str:
    return f"{value:.1g}" if value < 0.0995 else f"{value:.2g}" if value < 0.995 else f"{value:.1f}"


def farthest_gain(found: Cell) -> float:
    """Return the gain of the layer whose gain is farthest from 1, as a ratio.

    Example:
        >>> farthest_gain({"least_gain": 0.1, "most_gain": 3.0})
        0.1
    """
    least, most = max(float(found["least_gain"]), 1e-9), float(found["most_gain"])
    return most if most * least > 1.0 else least


QUANTITIES = (
    Quantity(
        "test error (%)", lambda c: c["error"], _in_two_digits, "viridis_r", Normalize(0, 20), (0, 10, 20)
    ),
    Quantity(
        "worst matrix angle (°)", lambda c: c["worst"], _in_two_digits,
        "viridis_r", Normalize(0, 90), (0, 45, 90),
    ),
    Quantity(
        "gain farthest from 1", farthest_gain, _as_ratio, "PuOr", LogNorm(0.1, 10), (0.1, 1, 10), "both"
    ),
)  # fmt: skip


def draw_maps(part: str, cells: list[Cell]) -> Figure:
    """Draw a part's quantities over each pair of settings, the others at their defaults."""
    axes = MAPS[part]
    figure = Figure(figsize=(PAGE_WIDTH, 6.9), layout="constrained")
    grid = figure.subplots(len(QUANTITIES), len(axes), squeeze=False)
    others = {**DEFAULTS, **MIRROR} if part == "wm" else DEFAULTS
    for row, quantity in zip(grid, QUANTITIES, strict=True):
        for axis, (across, up) in zip(row, axes, strict=True):
            fixed = {key: value for key, value in others.items() if key not in (across, up, "seed")}
            shown = [c for c in cells if all(c["settings"].get(key) == at for key, at in fixed.items())]
            drawn = _draw_map(axis, shown, quantity, across, up)
        colours = figure.colorbar(
            drawn, ax=list(row), label=quantity.label, extend=quantity.extend, pad=0.01, aspect=16
        )
        colours.ax.grid(visible=False)
        colours.ax.minorticks_off()
        colours.set_ticks(quantity.ticks, labels=[f"{tick:g}" for tick in quantity.ticks])
    write_letters(grid.flat)
    return figure


def _draw_map(axes: Axes, shown: list[Cell], quantity: Quantity, across: str, up: str) -> Any:
    """Draw one quantity over two settings; what diverged has a cross, what was not run has nothing."""
    xs, ys = (sorted({c["settings"][key] for c in shown}) for key in (across, up))
    values, texts = [], []
    for y in ys:
        at = [[c for c in shown if (c["settings"][across], c["settings"][up]) == (x, y)] for x in xs]
        values.append([_median(found, quantity) for found in at])
        texts.append(
            [
                _cell_text(value, quantity) if found else ""
                for value, found in zip(values[-1], at, strict=True)
            ]
        )
    axes.set(xlabel=NAMES[across], ylabel=NAMES[up])
    return draw_cells(
        axes, values, texts, quantity.colours, quantity.norm,
        across=[f"{x:g}" for x in xs], up=[f"{y:g}" for y in ys],
    )  # fmt: skip


def _cell_text(value: float, quantity: Quantity) -> str:
    """Return the text of a cell; a cross where runs diverged."""
    return "×" if math.isnan(value) else quantity.write(value)


def _median(found: list[Cell], quantity: Quantity) -> float:
    """Return the median over seeds; not a number where most runs diverged or none was made."""
    whole = [math.inf if c["found"].get("diverged") else quantity.of(c["found"]) for c in found]
    value = statistics.median_low(whole) if whole else math.inf
    return value if math.isfinite(value) else math.nan


def falling_table(cells: list[Cell]) -> str:
    """Return the table of a constant decay beside one that falls with time."""
    found = {json.dumps(cell["settings"]): cell["found"] for cell in means_over_seeds(cells)}

    def at(settings: Cell, rule: str, falling: Cell) -> Cell:
        return found[json.dumps({**DEFAULTS, **settings, "rule": rule, "seed": None, **falling})]

    rows = []
    for settings in dict.fromkeys(_shape(cell["settings"]) for cell in cells):
        named = dict(zip(("norm", "lr", "weight_decay"), settings, strict=True))
        pairs = {rule: [at(named, rule, falling) for falling in ({}, FALLING)] for rule in ("bp", "kp")}
        errors = [f"{one['error']:.1f}%" for rule in ("bp", "kp") for one in pairs[rule]]
        angles = [f"{one['last']:.1f}°" for one in pairs["kp"]]
        efolds = f"{pairs['kp'][0]['efolds']:.1f}"
        norm = {"none": "none", "batchnorm": "BatchNorm"}[settings[0]]
        rows.append([norm, f"{settings[1]:g}", f"{settings[2]:g}", efolds, *errors, *angles])
    heads = ["`bp`", "`bp`, falling", "`kp`", "`kp`, falling", "angle", "angle, falling"]
    return as_table(["norm", "rate", "decay", "e-folds", *heads], sorted(rows, reverse=True))


def _shape(settings: Cell) -> tuple[str, float, float]:
    return settings["norm"], settings["lr"], settings["weight_decay"]


def main() -> None:
    """Write the table."""
    cells = json.loads((OUT / "falling.json").read_text(encoding="utf-8"))["cells"]
    write_between(PAGE, "falling", falling_table(cells) + "\n")


if __name__ == "__main__":
    main()
