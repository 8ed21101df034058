"""How ``train`` and ``compare`` run their job and say what came of it."""

import os
import shlex
import sys
from pathlib import Path

from feedbackpath.cli.exit_codes import DIVERGED, DONE
from feedbackpath.cli.output import make_console
from feedbackpath.train.config import CompareConfig, RunConfig


def run(settings: CompareConfig | RunConfig, out: Path, *, resume: bool) -> int:
    """Run a job and show how it goes on; return the exit code."""
    from feedbackpath.jobs import Interrupted, run_job
    from feedbackpath.report import rich_table
    from feedbackpath.report.equivalence import describe
    from feedbackpath.report.live import LiveView

    console = make_console(quiet=not _is_main_process())
    command = shlex.join(["feedbackpath", *sys.argv[1:]])
    try:
        results = run_job(settings, out, resume=resume, command=command, view=LiveView(console))
    except Interrupted as stop:
        onward = (
            f"feedbackpath train --resume {out}"
            if isinstance(settings, RunConfig)
            else ("the same command with --resume")
        )
        console.print(f"{stop.reason}: what was done is kept in {out}; {onward} continues it")
        return stop.exit_code
    console.print(rich_table(results))
    for line in describe(results):
        console.print(line)
    console.print(f"results, figures and report.html are in {out}")
    return DIVERGED if any(run.status == "diverged" for run in results.runs) else DONE


def _is_main_process() -> bool:
    """Whether torchrun, SLURM or the engine has not started this process as one of others."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
