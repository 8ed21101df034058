"""The commands: each takes its settings, runs its job and returns an exit code."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console

from feedbackpath.errors import ConfigError
from feedbackpath.recipes import make_recipe
from feedbackpath.train.config import CompareConfig, RunConfig, merge_config, read_config, read_run

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

    Exit codes: 0 done, 2 bad input, 3 a run diverged, 130 or 143 interrupted (what was done is kept).
    """
    return _run(merge_config(flags, config), out, resume=resume)


def train(
    *,
    flags: Annotated[RunConfig, Parameter(name="*")] = RunConfig(),  # noqa: B008 (frozen)
    recipe: Annotated[
        str | None, Parameter(help="recipe to begin from; a file and flags override it")
    ] = None,
    config: Annotated[Path | None, Parameter(help="YAML file of settings; flags override it")] = None,
    out: Annotated[
        Path | None, Parameter(help="folder for what the run leaves; runs/ and a name by default")
    ] = None,
    resume: Annotated[Path | None, Parameter(help="folder of a run to go on with, its settings too")] = None,
    print_config: Annotated[bool, Parameter(help="print the whole config and stop", negative="")] = False,
) -> int:
    """Train one network by one rule; keep checkpoints, the network, its history and a page.

    Exit codes: 0 done, 2 bad input, 3 diverged, 130 or 143 interrupted (the last step is kept).
    """
    if resume is not None:
        if recipe or config or out:
            raise ConfigError(
                "--resume takes the settings of the run: leave --recipe, --config and --out out"
            )
        settings, folder = read_run(resume, **flags.model_dump(include=flags.model_fields_set)), resume
    else:
        settings = _settings_of_run(flags, recipe, config)
        name = recipe or f"{settings.data}-{settings.model}"
        folder = out or Path("runs") / f"{name}-{settings.rule}-norm-{settings.norm}-seed{settings.seed}"
    if print_config:
        sys.stdout.write(settings.to_yaml())
        return DONE
    # torchrun starts the same command anew after a crash: it goes on then with what is there.
    was_restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return _run(settings, folder, resume=resume is not None or was_restarted)


def evaluate(
    folder: Annotated[Path, Parameter(help="folder of a run, made by feedbackpath train")],
    *,
    which: Annotated[Literal["last", "best"], Parameter(help="checkpoint")] = "last",
    data_dir: Annotated[Path | None, Parameter(help="folder of the data files, if not the run's")] = None,
    device: Annotated[str, Parameter(help="torch device")] = "cpu",
) -> int:
    """Measure a trained network anew: errors on validation and test data, angles and gains."""
    from feedbackpath.jobs.evaluate import evaluate as job

    changes: dict[str, Any] = {"data_dir": data_dir} if data_dir else {}
    found = job(folder, which, device=device, devices=1, num_nodes=1, **changes)
    console = Console()
    console.print(
        f"{found.run.rule} seed {found.run.seed}, {len(found.run.history)} epochs, {which} checkpoint of {folder}"
    )
    name, unit = found.metric.name, found.metric.unit
    console.print(f"validation {name} {found.validation:.2f}{unit}, test {name} {found.test:.2f}{unit}")
    for layer, angle in found.matrix_angle_deg.items():
        console.print(
            f"  {layer}: matrix angle {angle:.2f}°, gain {found.gain[layer]:.3f}", highlight=False
        )
    return DONE


def _settings_of_run(flags: RunConfig, recipe: str | None, config: Path | None) -> RunConfig:
    """Return a run's config; the recipe is that of the rule and norm which the flags or the file name."""
    if recipe is None:
        return merge_config(flags, config)
    given = read_config(config, RunConfig) if config is not None else {}
    given |= flags.model_dump(include=flags.model_fields_set)
    cell = {name: given[name] for name in ("rule", "norm") if name in given}
    return merge_config(flags, config, make_recipe(recipe, **cell))


def _run(settings: CompareConfig | RunConfig, out: Path, *, resume: bool) -> int:
    from feedbackpath.jobs import Interrupted, run_job
    from feedbackpath.report import rich_table
    from feedbackpath.report.live import LiveView

    console = Console(quiet=not _is_main_process())
    command = shlex.join(["feedbackpath", *sys.argv[1:]])
    try:
        results = run_job(settings, out, resume=resume, command=command, view=LiveView(console))
    except Interrupted as stop:
        onward = (
            f"feedbackpath train --resume {out}"
            if isinstance(settings, RunConfig)
            else ("the same command with --resume")
        )
        console.print(f"interrupted: what was done is kept in {out}; {onward} goes on")
        return stop.exit_code
    console.print(rich_table(results))
    console.print(f"results, figures and report.html are in {out}")
    return DIVERGED if any(run.status == "diverged" for run in results.runs) else DONE


def _is_main_process() -> bool:
    """Whether torchrun, SLURM or the engine has not started this process as one of others."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))


def report(
    folders: Annotated[list[Path], Parameter(help="folders that hold a results.json each")],
    /,
    *,
    out: Annotated[
        Path | None,
        Parameter(help="folder for the report (a single run's own, else runs/report)"),
    ] = None,
) -> int:
    """Write the figures and report.html of a run anew, or lay several runs side by side."""
    from feedbackpath.report import rich_error_table, rich_table, write_report, write_side_by_side
    from feedbackpath.train.results import read_results

    console = Console()
    if len(folders) == 1 and out in (None, folders[0]):
        results = read_results(folders[0])
        write_report(results, folders[0])
        console.print(rich_table(results))
        return DONE
    out = out or Path("runs/report")
    console.print(rich_error_table(write_side_by_side(folders, out)))
    console.print(f"table.md, figures and report.html are in {out}")
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
