"""Tables, figures and one HTML page, made from results files alone."""

from collections.abc import Sequence
from pathlib import Path

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
from feedbackpath.train.results import Results, read_results

__all__ = [
    "Panel",
    "format_with_error",
    "markdown_error_table",
    "markdown_table",
    "rich_error_table",
    "rich_table",
    "summarise",
    "summary_rows",
    "write_report",
    "write_side_by_side",
]


def write_report(results: Results, folder: Path, *, figures: bool = True) -> list[Path]:
    """Write ``figures/*.png``, ``*.pdf`` and ``*.svg``, and ``report.html`` into ``folder``.

    May be called again and again while runs are going on: each file is replaced in one step, so that a reader
    never meets half of one. A figure that nothing was measured for is not written.

    Args:
        results: Results, complete or not.
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
        ConfigError: A folder has no results, ``out`` is a run's own folder, or has other files of
            these names; or two folders hold the same run or are judged by different metrics.
    """
    if (out / "results.json").exists():
        raise ConfigError(f"--out {out} has its own run, whose report would be replaced; choose another")
    from feedbackpath.train.store import write_text  # needs torch, which tables alone do not

    panels = lay_side_by_side([(str(folder), read_results(folder)) for folder in folders])
    table, page = out / "table.md", out / "report.html"
    if not (
        table.is_file() and table.read_text(encoding="utf-8", errors="replace").startswith("| network |")
    ):
        for file in (table, page):
            if file.exists():
                raise ConfigError(
                    f"{file} exists, is not from a report, and would be overwritten; choose another --out"
                )
    write_text(table, markdown_error_table(panels))  # first: by it the other files are known for ours
    _write(panels, out, figures=True)
    return panels


def _write(panels: Sequence[Panel], folder: Path, *, figures: bool) -> list[Path]:
    from feedbackpath.report.figures import render_figures  # heavy, and not needed for tables
    from feedbackpath.report.page import render_page
    from feedbackpath.train.store import write_bytes

    drawn = render_figures(panels) if figures else {}
    files = {folder / "figures" / name: content for name, content in drawn.items()}
    page = render_page(panels, figures=drawn)
    files[folder / "report.html"] = page.encode("utf-8", "backslashreplace")
    for path, content in files.items():
        write_bytes(path, content)
    return list(files)
