"""What docs/balance.md shows of `balance.py`: its figures, which `doc_figures.py` draws, and its tables.

`python benchmarks/balance_page.py` writes the tables.
"""

import itertools
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from balance import DEFAULTS, DEPTHS, FALLING, MIRROR, OUT, exact_efolds, schedule, steps_of
from cells import Cell, read_cells
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
from feedbackpath.report.table import summary_rows
from feedbackpath.train.results import read_results

PAGE = Path(__file__).parent.parent / "docs" / "balance.md"
RECIPE_COLUMNS = ("rule", "n", "test error", "minus bp", "angle, max", "δ angle, max")
CHANCE, FAILED = 90.0, 50.0  # percent of errors: of ten classes, and above which a network has not learned
OPTIMIZERS = {
    "SGD, rate 0.03": ({"optimizer": "sgd", "lr": 0.03}, "o"),
    "SGD, rate 0.2": ({"optimizer": "sgd", "lr": 0.2}, "s"),
    "AdamW": ({"optimizer": "adamw"}, "^"),
}
SERIES = {("kp", 1.0): "kp", ("kp", 0.0): "kp, B starts at 0", ("mirror-kp", 1.0): "mirror-kp"}
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
    """Draw angles against theory, and errors beyond backprop's against e-folds: a row for each depth."""
    figure = Figure(figsize=(PAGE_WIDTH, 5.2), layout="constrained")
    grid = figure.subplots(2, 3, width_ratios=(1, 1.1, 1.1), sharex="col")
    found = means_over_seeds(cells)
    for row, depth in zip(grid, DEPTHS, strict=True):
        at_depth = [cell for cell in found if cell["settings"]["depth"] == depth]
        _draw_angles(row[0], at_depth)
        for axes, norm in zip(row[1:], ("none", "batchnorm"), strict=True):
            _draw_errors(axes, [cell for cell in at_depth if cell["settings"]["norm"] == norm])
            axes.set_title(f"{depth} hidden layers, {'no norm' if norm == 'none' else 'BatchNorm'}")
        row[0].set_title(f"{depth} hidden layers")
        row[0].set_ylabel("angle after training (°)")
        row[1].set_ylabel("test error minus bp's (points)")
    for axes, label in zip(grid[1], ("angle by theory (°)", "e-folds", "e-folds"), strict=True):
        axes.set_xlabel(label)
    write_letters(grid.flat)
    keys = [key(label, **_looks(*series, "o")) for series, label in SERIES.items()]
    marks = [
        key(label, color="black", linestyle="", marker=marker, markersize=4)
        for label, (_, marker) in OPTIMIZERS.items()
    ]
    draw_legend(figure, [one for pair in zip(keys, marks, strict=True) for one in pair], 3, handlelength=1)
    return figure


def _looks(rule: str, start: float, marker: str) -> dict[str, Any]:
    colour = style_of(rule).colour
    return {
        "color": colour, "linestyle": "", "marker": marker, "markersize": 4,
        "markerfacecolor": colour if start else "white", "markeredgewidth": 0.8,
    }  # fmt: skip


def _draw_angles(axes: Axes, cells: list[Cell]) -> None:
    """Draw the largest angle after training against theory, of networks that have learned."""
    axes.plot([0, 90], [0, 90], **REFERENCE)
    for (rule, start), (wanted, marker) in itertools.product(SERIES, OPTIMIZERS.values()):
        if rule == "kp":
            shown = _chosen(cells, rule, start, wanted)
            learned = [cell["found"] for cell in shown if cell["found"]["error"] < FAILED]
            points = [(found["predicted"], found["last"]) for found in learned]
            axes.plot(*zip(*points, strict=True), **_looks(rule, start, marker))
    scale_linear(axes, "x", (0, 90), 30)
    scale_linear(axes, "y", (0, 90), 30)


def _draw_errors(axes: Axes, cells: list[Cell]) -> None:
    """Draw errors beyond backprop's, with their range over seeds, where every seed of backprop learned."""
    axes.axhline(0.0, **REFERENCE)
    axes.axvline(3.0, linestyle="--", **REFERENCE)
    backprop = {_without_rule(cell): cell["found"] for cell in cells if cell["settings"]["rule"] == "bp"}
    for (rule, start), (wanted, marker) in itertools.product(SERIES, OPTIMIZERS.values()):
        looks = _looks(rule, start, marker)
        for cell in _chosen(cells, rule, start, wanted):
            bp = backprop[_without_rule(cell)]
            if max(bp["errors"]) < FAILED:
                beyond = [
                    one - other for one, other in zip(cell["found"]["errors"], bp["errors"], strict=True)
                ]
                axes.plot([bp["efolds"]] * 2, [min(beyond), max(beyond)], color=looks["color"], linewidth=0.6)
                axes.plot(bp["efolds"], statistics.fmean(beyond), **looks)
    axes.set_xscale("symlog", linthresh=0.01)
    axes.set_xlim(-0.003, 60)
    axes.set_xticks((0, 0.01, 0.1, 1, 3, 10), ("0", "0.01", "0.1", "1", "3", "10"))
    axes.set_yscale("symlog", linthresh=2)
    axes.set_ylim(-15, 100)
    axes.set_yticks((-10, -5, -2, -1, 0, 1, 2, 5, 10, 30, 90))
    axes.set_yticklabels(("−10", "−5", "−2", "−1", "0", "1", "2", "5", "10", "30", "90"))
    axes.yaxis.set_minor_locator(NullLocator())


def _chosen(cells: list[Cell], rule: str, start: float, wanted: Cell) -> list[Cell]:
    wanted = {"rule": rule, "start": start, **wanted}
    return [cell for cell in cells if wanted.items() <= cell["settings"].items()]


def _without_rule(cell: Cell) -> str:
    return json.dumps({**cell["settings"], "rule": None, "start": None})


def means_over_seeds(cells: list[Cell]) -> list[Cell]:
    """Return a cell for each set of settings but the seed; a run that diverged has an error of chance.

    Each has the means of what was found, and the errors of all seeds as ``errors``.
    """
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(json.dumps({**cell["settings"], "seed": None}), []).append(cell["found"])
    means = []
    for settings, found in groups.items():
        whole = [{"error": CHANCE} if one.get("diverged") else one for one in found]
        names = set.union(*map(set, whole))
        mean: Cell = {name: statistics.fmean(one[name] for one in whole if name in one) for name in names}
        mean["errors"] = [one["error"] for one in whole]
        means.append({"settings": json.loads(settings), "found": mean})
    return means


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


ANGLES: dict[str, Any] = {"colours": "viridis_r", "norm": Normalize(0, 90), "ticks": (0, 45, 90)}
QUANTITIES = (
    Quantity(
        "test error (%)", lambda c: c["error"], _in_two_digits, "viridis_r", Normalize(0, 20), (0, 10, 20)
    ),
    Quantity("largest angle of\nany epoch (°)", lambda c: c["worst"], _in_two_digits, **ANGLES),
    Quantity("largest angle\nafter training (°)", lambda c: c["last"], _in_two_digits, **ANGLES),
    Quantity(
        "gain farthest from 1", farthest_gain, _as_ratio, "PuOr", LogNorm(0.1, 10), (0.1, 1, 10), "both"
    ),
)  # fmt: skip


def draw_maps(part: str, cells: list[Cell]) -> Figure:
    """Draw a part's quantities over each pair of settings, the others at their defaults."""
    axes = MAPS[part]
    figure = Figure(figsize=(PAGE_WIDTH, 8.4), layout="constrained")
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
    """Draw one quantity over two settings; where most seeds fail is a cross, where none was run nothing."""
    xs, ys = (sorted({c["settings"][key] for c in shown}) for key in (across, up))
    values, texts = [], []
    for y in ys:
        at = [[c for c in shown if (c["settings"][across], c["settings"][up]) == (x, y)] for x in xs]
        pairs = [value_and_text(quantity, [cell["found"] for cell in cells]) for cells in at]
        values.append([value for value, _ in pairs])
        texts.append([text for _, text in pairs])
    axes.set(xlabel=NAMES[across], ylabel=NAMES[up])
    return draw_cells(
        axes, values, texts, quantity.colours, quantity.norm,
        across=[f"{x:g}" for x in xs], up=[f"{y:g}" for y in ys],
    )  # fmt: skip


def value_and_text(quantity: Quantity, found: list[Cell]) -> tuple[float, str]:
    """Return the median of the seeds that have learned, with a star if others have not.

    If most have not, there is no value, and a cross; if there are none, no text either.
    """
    learned = [one for one in found if one.get("error", CHANCE) < FAILED]
    if 2 * len(learned) <= len(found):
        return math.nan, "×" if found else ""
    value = statistics.median(quantity.of(one) for one in learned)
    return value, quantity.write(value) + "*" * (len(learned) < len(found))


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
        efolds = [f"{efolds_of({**DEFAULTS, **named, **falling}):.1f}" for falling in ({}, FALLING)]
        norm = {"none": "none", "batchnorm": "BatchNorm"}[settings[0]]
        sums = f"{pairs['bp'][0]['efolds']:.1f}"
        rows.append([norm, f"{settings[1]:g}", f"{settings[2]:g}", sums, *efolds, *errors, *angles])
    both = [f"{name}{more}" for name in ("e-folds", "`bp`", "`kp`", "angle") for more in ("", ", falling")]
    return as_table(["norm", "rate", "decay", "by the sum", *both], sorted(rows, reverse=True))


def efolds_of(settings: Cell) -> float:
    """Return the e-folds of a run without the approximation of the sum."""
    return exact_efolds(schedule(settings, steps_of(settings)), settings["momentum"])


def _shape(settings: Cell) -> tuple[str, float, float]:
    return settings["norm"], settings["lr"], settings["weight_decay"]


def recipe_table() -> str:
    """Return the table of the recipe ``glyphs-resnet8`` with its decay, and with more."""
    rows = []
    for folder in (OUT.parent / "glyphs-resnet8", OUT / "more-decay"):
        results = read_results(folder)
        decay = f"{results.config['weight_decay']:g}"
        for row in summary_rows(results.runs, results.metric):
            if row["rule"] in ("bp", "kp"):
                rows.append([decay, *(row[column] for column in RECIPE_COLUMNS)])
    return as_table(["decay", *RECIPE_COLUMNS], rows)


def main() -> None:
    """Write the tables."""
    cells = read_cells(OUT / "falling.json")
    write_between(PAGE, "falling", falling_table(cells) + "\n")
    write_between(PAGE, "recipe", recipe_table() + "\n")


if __name__ == "__main__":
    main()
