"""Studies made of cells: each a set of settings and what came of it, kept in one JSON file as it ends."""

import json
import os
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import feedbackpath

Cell = dict[str, Any]


def run_cells(
    file: Path,
    command: str,
    cells: Iterable[Cell],
    measure: Callable[[Cell], Cell],
    at_most: int | None = None,
) -> list[Cell]:
    """Measure the cells that a file does not hold yet, and return all that it holds then.

    Args:
        file: Where they are kept; it is whole at every moment, so that a run may be broken off at any time.
        command: What makes what is missing, and would make the whole file.
        cells: The settings, each with those that it leaves at their defaults.
        measure: Returns what comes of a cell.
        at_most: How many new ones to measure; None: all.
    """
    machine = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    kept: dict[str, Any] = {
        "command": command,
        "feedbackpath": feedbackpath.__version__,
        **machine,
        "cells": [],
    }
    if file.exists():
        kept = json.loads(file.read_text())
    known = {_key(cell["settings"]) for cell in kept["cells"]}
    missing = [cell for key, cell in {_key(cell): cell for cell in cells}.items() if key not in known]
    if missing:
        kept |= {"command": command, "feedbackpath": feedbackpath.__version__, **machine}
    for settings in missing[:at_most]:
        kept["cells"].append({"settings": settings, "found": measure(settings)})
        print(settings, kept["cells"][-1]["found"], flush=True)
        _write(file, kept)
    return list(kept["cells"])


def read_cells(file: Path) -> list[Cell]:
    """Return the cells that a file holds, each with its ``settings`` and what was ``found``."""
    return list(json.loads(file.read_text(encoding="utf-8"))["cells"])


def _write(file: Path, kept: dict[str, Any]) -> None:
    rows = ",\n".join(json.dumps(cell) for cell in kept["cells"])
    head = json.dumps({**kept, "cells": []}).removesuffix("]}")
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".part")
    draft.write_text(f"{head}\n{rows}\n]}}\n")
    os.replace(draft, file)


def _key(settings: Cell) -> str:
    return json.dumps(settings, sort_keys=True)
