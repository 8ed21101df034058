"""Rules on imperfect arrays at fixed values: what mends asymmetric devices, and ResNet-8 on glyphs.

    python benchmarks/hardware_grid.py mend
    python benchmarks/hardware_grid.py glyphs [--imperfections update_noise]
    python benchmarks/hardware_grid.py page

``mend`` trains the network of hardware_tolerance.py, with the settings that were chosen there and five other
seeds, on soft bounds whose up and down pulses differ from cell to cell. It tries what is said to help:
mirroring once, now and then, or after every update, and reference columns that hold each cell's symmetry
point (zero shifting). ``fa``, whose B needs no agreement, and ``bp`` on one array stand beside them.

``glyphs`` trains bp, kp and wm on ResNet-8, four epochs of 10,000 samples, two seeds, with the settings that
tuned_glyphs.py has found by equal trials. Its two imperfections are those at which one array and two differ
most on digits: the spread of the asymmetry of devices, and noise in the signals of an update. (Only the
spread of the step differs more there, but no rule fails below a scatter of 80%.) It describes; it tests
nothing.

Both go on where they were broken off. ``page`` writes the tables of docs/hardware.md.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from marked import as_far_as_run, write_between
from studies import chosen_settings, train
from tuned_glyphs import best_settings

from feedbackpath.jobs.tolerance import IMPERFECTIONS
from feedbackpath.report.table import summary_rows
from feedbackpath.train.results import Results, read_results

HERE = Path(__file__).parent
OUT, WORK, PAGE = (
    HERE / "hardware-tolerance",
    Path("runs/hardware-tolerance"),
    HERE.parent / "docs/hardware.md",
)
IDEAL: dict[str, Any] = {"chip": "ideal"}


@dataclass(frozen=True)
class Way:
    """A rule on some arrays.

    Attributes:
        rule: Its name.
        imperfection: What becomes worse from column to column.
        settings: Settings of the rule besides those that were chosen.
        chip: Its devices; None: those of the imperfection.
    """

    rule: str
    imperfection: str = "asymmetry_spread"
    settings: Mapping[str, Any] = field(default_factory=dict)
    chip: str | None = None

    def chip_at(self, value: float | None) -> dict[str, Any]:
        """Return the settings of a chip of which the imperfection has a value; None: an ideal one."""
        if value is None:
            return IDEAL
        what = IMPERFECTIONS[self.imperfection]
        return {"chip": self.chip or what.chip, "chip_settings": what.settings(value)}


SPREADS = (None, 0.3, 1.0, 3.0)
WAYS = {
    "`bp`, one array": Way("bp"),
    "`fa`": Way("fa"),
    "`kp`": Way("kp"),
    "`kp`, reference columns": Way("kp", chip="reference"),
    "`mirror-kp`, mirrored once": Way("mirror-kp"),
    "`mirror-kp`, every 100 steps": Way("mirror-kp", settings={"every": 100}),
    "`wm`, after every update": Way("wm"),
}
MEND_SEEDS, GLYPHS_SEEDS = (200, 5), (700, 2)
GLYPHS = {"samples_per_epoch": 10_000, "epochs": 4, "num_threads": 1}
GLYPHS_RULES = ("bp", "kp", "wm")
GRID: dict[str, tuple[float, ...]] = {
    "asymmetry_spread": (0.1, 0.2, 0.4, 0.8, 1.6),
    "update_noise": (0.05, 0.1, 0.2, 0.4, 0.8),
}


def name_of(text: str, value: float | None) -> str:
    """Return the folder of a cell."""
    kept = "".join(letter for letter in text if letter.isalnum() or letter in " _-")
    return f"{kept.replace(' ', '-')}-{'ideal' if value is None else f'{value:g}'}".lstrip("-")


def train_at(settings: Mapping[str, Any], seeds: tuple[int, int], place: Path) -> None:
    """Train with some seeds, or go on, and keep the result file."""
    first, count = seeds
    command = f"python benchmarks/hardware_grid.py {place.parts[0]}"
    train({**settings, "seed": first, "seeds": count}, WORK / place, OUT / place, command)


def mend() -> None:
    """Train all ways at every spread of the asymmetry."""
    chosen = chosen_settings(OUT / "tuned")
    for text, way in WAYS.items():
        own = chosen.get("rule_settings", {}).get(way.rule, {}) | dict(way.settings)
        config = chosen | {"rules": [way.rule], "rule_settings": {way.rule: own} if own else {}}
        for spread in SPREADS:
            train_at(config | way.chip_at(spread), MEND_SEEDS, Path("mend") / name_of(text, spread))


def glyphs_places() -> dict[tuple[str, float | None], Path]:
    """Return the folder of every column of the grid on glyphs; the first is ideal."""
    columns: list[tuple[str, float | None]] = [("", None)]
    columns += [(name, value) for name, values in GRID.items() for value in values]
    return {(name, value): Path("glyphs") / name_of(name, value) for name, value in columns}


def glyphs(imperfections: Sequence[str]) -> None:
    """Train the three rules on ideal arrays, and at every value of some imperfections."""
    found = best_settings()
    settings = {
        part: {rule: found[part][rule] for rule in GLYPHS_RULES if rule in found[part]} for part in found
    }
    for (name, value), place in glyphs_places().items():
        if value is not None and name not in imperfections:
            continue
        chip = Way("bp", name).chip_at(value)
        train_at({**GLYPHS, **settings, **chip, "rules": GLYPHS_RULES}, GLYPHS_SEEDS, place)


def cell(results: Results, rule: str) -> str:
    """Return what came of a rule: its error, and its worst angle at the end."""
    row = next((row for row in summary_rows(results.runs, results.metric) if row["rule"] == rule), None)
    if row is None:
        return "–"
    angle = row["angle, max"]
    parts = [row[results.metric.label], *([angle] if rule != "bp" and angle != "–" else [])]
    count, of_all = row["n"].split("/")
    return ", ".join(parts) + (f" ({row['n']} finished)" if count != of_all else "")


def table(heads: Sequence[str], rows: Mapping[str, Sequence[tuple[Path, str]]], part: str) -> str:
    """Return a table of cells, a folder and a rule each; below it, what has not been run."""
    places = {place for cells in rows.values() for place, _ in cells}
    found = {place: read_results(OUT / place) for place in places if (OUT / place / "results.json").exists()}
    parts = {
        head: [[head, *(cell(found[place], rule) for place, rule in cells)]]
        if all(place in found for place, _ in cells)
        else []
        for head, cells in rows.items()
    }
    return as_far_as_run(heads, parts, f"python benchmarks/hardware_grid.py {part}")


def mend_table() -> str:
    """Return the table of what mends asymmetric devices."""
    rows = {
        text: [(Path("mend") / name_of(text, spread), way.rule) for spread in SPREADS]
        for text, way in WAYS.items()
    }
    return table(["", "ideal", *[f"spread {spread:g}" for spread in SPREADS[1:]]], rows, "mend")


def glyphs_table() -> str:
    """Return the table of the grid on glyphs: imperfections and values down, rules across."""
    rows = {
        "ideal" if value is None else f"`{name}` {value:g}": [(place, rule) for rule in GLYPHS_RULES]
        for (name, value), place in glyphs_places().items()
    }
    return table(["", *[f"`{rule}`" for rule in GLYPHS_RULES]], rows, "glyphs")


TABLES = {"mend": mend_table, "hardware-glyphs": glyphs_table}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return what a command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("part", choices=("mend", "glyphs", "page"))
    parser.add_argument("--imperfections", nargs="+", choices=GRID, default=list(GRID), help="of glyphs")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Do what a command line asks for."""
    asked = parse(arguments)
    if asked.part == "mend":
        mend()
    elif asked.part == "glyphs":
        glyphs(asked.imperfections)
    else:
        for mark, make in TABLES.items():
            write_between(PAGE, mark, make() + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
