"""The commands: each takes its settings, runs its job and returns an exit code."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from feedbackpath.train.config import CompareConfig, merge_config

DONE, DIVERGED = 0, 3


def compare(
    *,
    flags: Annotated[CompareConfig, Parameter(name="*")] = CompareConfig(),  # noqa: B008 (frozen)
    config: Annotated[Path | None, Parameter(help="YAML file of settings; flags override it")] = None,
    out: Annotated[Path, Parameter(help="folder for results, figures and report.html")] = Path(
        "runs/compare"
    ),
    resume: Annotated[bool, Parameter(help="go on with what --out holds, if anything", negative="")] = False,
) -> int:
    """Train the same network by several rules; write a table, figures and one HTML page.

    Exit codes: 0 done, 2 bad input, 3 a run diverged, 130 or 143 interrupted (finished epochs are kept).
    """
    settings = merge_config(flags, config)
    from feedbackpath import compare as job
    from feedbackpath.report import rich_table
    from feedbackpath.report.live import LiveView

    console = Console()
    try:
        command = shlex.join(["feedbackpath", *sys.argv[1:]])
        results = job.compare(settings, out, resume=resume, command=command, view=LiveView(console))
    except job.Interrupted as stop:
        console.print(
            f"interrupted: finished epochs are kept in {out}; the same command with --resume goes on"
        )
        return stop.exit_code
    console.print(rich_table(results))
    console.print(f"results, figures and report.html are in {out}")
    return DIVERGED if any(run["status"] == "diverged" for run in results["runs"]) else DONE


def report(folder: Annotated[Path, Parameter(help="folder that holds results.json")]) -> int:
    """Write the figures and report.html of a folder's results.json anew."""
    from feedbackpath.report import read_results, rich_table, write_report

    results = read_results(folder)
    write_report(results, folder)
    Console().print(rich_table(results))
    return DONE


def rules() -> int:
    """List the rules."""
    from rich.table import Table

    from feedbackpath.rules import RULES

    table = Table("rule", "class", "what it does")
    for name, rule in RULES.items():
        table.add_row(name, rule.__name__, (rule.__doc__ or "").strip().splitlines()[0])
    Console().print(table)
    return DONE
