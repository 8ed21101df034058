"""The file of the study of mirror mode (``mirror_study.py``), and its table."""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from feedbackpath.errors import ConfigError
from feedbackpath.report.curves import mean_and_error
from feedbackpath.report.table import format_angle, format_with_error, to_markdown

Cell = dict[str, Any]

STUDY_SCHEMA = 1
"""Version of the layout of ``study.json``."""

PAPERS_NUMBERS = (0.1, 0.5)  # eta and lambda, Appendix D.2
LABELS = {"bp": "bp", "default": "wm-exact", "paper": "wm, paper"}  # of today; the file has "default"
STUDY_COLUMNS = (
    "part", "network", "batch", "rule", "n", "angle, max", "δ angle, first", "gain", "test error",
)  # fmt: skip
"""Columns of the table. Angles are the largest after any epoch of training: over layers, and, of δ, of the
first layer, which errors reach last. Gains, of all layers, and errors are the last epoch's."""


def read_study(folder: Path) -> dict[str, Any]:
    """Read the ``study.json`` of a folder.

    Raises:
        ConfigError: There is none, or it is damaged, or of another version's layout.
    """
    file = folder / "study.json"
    try:
        study: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        schema, cells = study["schema"], study["cells"]
        is_whole = isinstance(study["settings"], dict) and all("part" in cell for cell in cells)
    except FileNotFoundError:
        raise ConfigError(f"{folder} holds no study.json; give the --out folder of a study") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is damaged ({error}); choose another folder") from None
    if schema != STUDY_SCHEMA or not is_whole:
        raise ConfigError(f"{file} has layout {schema!r} and this version reads {STUDY_SCHEMA}; make it anew")
    return study


@dataclass(frozen=True)
class Group:
    """The trainings of one setting, a seed each.

    Attributes:
        part: The part of the study.
        name: ``"bp"``, ``"default"`` or ``"paper"``.
        model: The network.
        batch_size: Samples a step.
        mirror: The mirror's settings; empty under backprop.
        cells: The entries of ``study.json``.
    """

    part: str
    name: str
    model: str
    batch_size: int
    mirror: dict[str, Any]
    cells: tuple[Cell, ...]

    @property
    def has_diverged(self) -> bool:
        """Whether a training did not get to its end."""
        return any(cell["status"] == "diverged" for cell in self.cells)

    @property
    def is_as_printed(self) -> bool:
        """Whether the mirror's two numbers are the paper's, or it has others instead."""
        return self.name != "paper" or (self.mirror["rate"], self.mirror["decay"]) == PAPERS_NUMBERS

    @property
    def label(self) -> str:
        """What was trained, for people."""
        if self.name != "paper":
            return LABELS[self.name]
        numbers = "" if self.is_as_printed else f", η {self.mirror['rate']:g}, λ {self.mirror['decay']:g}"
        return f"{LABELS['paper']} {self.mirror['reading']}{numbers}"

    def last(self, name: str) -> list[float]:
        """Return a quantity after the last epoch, of each seed."""
        return [cell["history"][-1][name] for cell in self.cells]

    def worst(self, name: str) -> list[float]:
        """Return the largest value of a quantity after any epoch of training, of each seed."""
        return [max(entry[name] for entry in _trained(cell)) for cell in self.cells]


def group_trainings(study: dict[str, Any], part: str) -> list[Group]:
    """Return the trainings of a part, the seeds of each setting together, in the order of the file."""
    by_setting: dict[str, list[Cell]] = {}
    for cell in study["cells"]:
        if cell["part"] == part and "history" in cell:
            told = [cell[name] for name in ("rule", "model", "batch_size", "mirror")]
            by_setting.setdefault(json.dumps(told), []).append(cell)
    return [
        Group(part, cells[0]["rule"], cells[0]["model"], cells[0]["batch_size"],
              cells[0]["mirror"] or {}, tuple(cells))
        for cells in by_setting.values()
    ]  # fmt: skip


def describe_cell(cell: Cell) -> str:
    """Return an entry as a line for people."""
    if cell["part"] == "designs":
        angle, expected = fmean(cell["angle_deg"][-1]), cell["predicted_deg"][-1]
        return (
            f"{cell['design']}, {cell['layer']}, {cell['activation']}: {angle:.2g}° after "
            f"{cell['samples'][-1]} samples, theory {expected:.2g}°"
        )
    group = Group(
        cell["part"], cell["rule"], cell["model"], cell["batch_size"], cell["mirror"] or {}, (cell,)
    )
    where, seed = f"{cell['part']}: {cell['model']}, batch {cell['batch_size']}", cell["seed"]
    *_, largest, _, gain, error = _row(group)
    return f"{where}, {group.label}, seed {seed}: angle {largest}, gain {gain}, error {error}"


def study_rows(study: dict[str, Any]) -> list[list[str]]:
    """Return the text of a study's table: of the grid, the paper's numbers alone and what stands beside."""
    parts = dict.fromkeys(cell["part"] for cell in study["cells"])
    return [_row(group) for part in parts for group in group_trainings(study, part) if group.is_as_printed]


def rich_study_table(study: dict[str, Any]) -> Table:
    """Build the table for a terminal."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in STUDY_COLUMNS:
        table.add_column(column, no_wrap=column in ("network", "rule"))
    for row in study_rows(study):
        table.add_row(*row)
    return table


def markdown_study_table(study: dict[str, Any]) -> str:
    """Return the table in Markdown."""
    return to_markdown(STUDY_COLUMNS, study_rows(study))


def _row(group: Group) -> list[str]:
    least, most = min(group.last("gain_min")), max(group.last("gain_max"))
    error = "diverged" if group.has_diverged else format_with_error(*mean_and_error(group.last("test_error")))
    return [
        group.part,
        group.model,
        str(group.batch_size),
        group.label,
        str(len(group.cells)),
        format_angle(fmean(group.worst("matrix_angle_deg_max"))),
        format_angle(fmean(group.worst("delta_angle_deg_deepest"))),
        f"{least:.2g}…{most:.2g}" if f"{least:.2g}" != f"{most:.2g}" else f"{most:.2g}",
        error,
    ]


def _trained(cell: Cell) -> list[dict[str, Any]]:
    """Return what was measured after an epoch of training; what came before it where there was none."""
    return [entry for entry in cell["history"] if entry["epoch"] > 0] or cell["history"]
