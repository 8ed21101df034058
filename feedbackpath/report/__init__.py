"""Tables, figures and one HTML page, made from results files alone."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from feedbackpath.errors import ConfigError
from feedbackpath.report.panels import Panel, lay_side_by_side, make_panel
from feedbackpath.report.table import (
    format_with_error,
    markdown_error_table,
    markdown_table,
    rich_error_table,
    rich_table,
    summarise,
    summary_rows,
)

__all__ = [
    "SCHEMA",
    "Panel",
    "format_with_error",
    "markdown_error_table",
    "markdown_table",
    "read_results",
    "replace_file",
    "rich_error_table",
    "rich_table",
    "summarise",
    "summary_rows",
    "write_report",
    "write_side_by_side",
]

SCHEMA = 1
"""Version of the layout of ``results.json``."""


def read_results(folder: Path) -> dict[str, Any]:
    """Read the ``results.json`` of a folder.

    Raises:
        ConfigError: There is none, or it is damaged, or of another version's layout.
    """
    file = folder / "results.json"
    try:
        results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        schema = results.get("schema")
    except FileNotFoundError:
        raise ConfigError(f"{folder} holds no results.json; give the --out folder of a run") from None
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); choose another folder") from None
    if schema == SCHEMA and not _has_runs(results):
        raise ConfigError(f"{file} is damaged: it lacks config or runs; choose another folder")
    if schema != SCHEMA:
        raise ConfigError(f"{file} has layout {schema!r} and this version reads {SCHEMA}; make it anew")
    return results


def _has_runs(results: dict[str, Any]) -> bool:
    runs = results.get("runs")
    return (
        isinstance(results.get("config"), dict)
        and isinstance(runs, list)
        and all(
            isinstance(run, dict)
            and {"rule", "seed", "status"} <= run.keys()
            and isinstance(run.get("history"), list)
            for run in runs
        )
    )


def write_report(results: dict[str, Any], folder: Path, *, figures: bool = True) -> list[Path]:
    """Write ``figures/*.png``, ``figures/*.pdf`` and ``report.html`` into ``folder``.

    May be called again and again while runs are going on: each file is replaced in one step, so that a reader
    never meets half of one. A figure that nothing was measured for is not written.

    Args:
        results: A results file's content, complete or not.
        folder: The run's folder; made if it is not there.
        figures: Whether to draw the figures too; the page alone takes half a second.

    Returns:
        The files written, the page last.
    """
    return _write([make_panel([(str(folder), results)])], folder, figures=figures)


def write_side_by_side(folders: Sequence[Path], out: Path) -> list[Panel]:
    """Lay the runs of several folders side by side: a panel per network, as the paper's figures 3 to 5 have.

    Folders of the same data, model and norm are one panel; where they differ in anything but rules and seeds,
    the page says so. Writes what `write_report` does, and ``table.md`` with the paper's table.

    Args:
        folders: Folders that hold a ``results.json`` each.
        out: Where to write; made if it is not there.

    Returns:
        The panels, in the order of ``folders``.

    Raises:
        ConfigError: A folder has no results, ``out`` is a run's own folder, or two folders hold the same run.
    """
    if (out / "results.json").exists():
        raise ConfigError(
            f"--out {out} holds a run of its own, whose report this would replace; choose another"
        )
    panels = lay_side_by_side([(str(folder), read_results(folder)) for folder in folders])
    _write(panels, out, figures=True)
    replace_file(out / "table.md", markdown_error_table(panels).encode())
    return panels


def _write(panels: Sequence[Panel], folder: Path, *, figures: bool) -> list[Path]:
    from feedbackpath.report.figures import render_figures  # heavy, and not needed for tables
    from feedbackpath.report.page import render_page

    drawn = render_figures(panels) if figures else {}
    files = {folder / "figures" / name: content for name, content in drawn.items()}
    files[folder / "report.html"] = render_page(panels).encode()
    for path, content in files.items():
        replace_file(path, content)
    return list(files)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file in one step, so that a reader never meets half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
