"""The command ``report``."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from feedbackpath.cli.exit_codes import DONE
from feedbackpath.cli.output import make_console


def report(
    folders: Annotated[list[Path], Parameter(help="folders that hold a results.json each")],
    /,
    *,
    out: Annotated[
        Path | None,
        Parameter(
            help="folder for the report (default: the run's own folder; for several runs, runs/report)"
        ),
    ] = None,
) -> int:
    """Draw the figures and report.html of a run again, or put several runs side by side."""
    from feedbackpath.report import rich_error_table, rich_table, write_report, write_side_by_side
    from feedbackpath.report.equivalence import describe
    from feedbackpath.train.results import read_results

    console = make_console()
    if len(folders) == 1 and out in (None, folders[0]):
        results = read_results(folders[0])
        write_report(results, folders[0])
        console.print(rich_table(results))
        for line in describe(results):
            console.print(line)
        return DONE
    out = out or Path("runs/report")
    console.print(rich_error_table(write_side_by_side(folders, out)))
    console.print(f"table.md, figures and report.html are in {out}")
    return DONE
