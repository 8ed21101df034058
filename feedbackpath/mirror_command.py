"""The command ``mirror``."""

import shlex
import sys
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from feedbackpath.errors import ConfigError


def mirror(
    *,
    model: Annotated[str, Parameter(help="network")] = "resnet8",
    plan: Annotated[
        bool, Parameter(help="print what mirror mode will do with each layer", negative="")
    ] = False,
    noise: Annotated[str, Parameter(help="plan: noise design")] = "orthogonal",
    target_angle_deg: Annotated[
        float | None,
        Parameter(help="plan: angle that independent noise may leave, in degrees (8 unless given)"),
    ] = None,
    cost_share: Annotated[
        float | None,
        Parameter(help="plan: share of a step's FLOPs that mirroring may take (0.03 unless given)"),
    ] = None,
    batch_size: Annotated[int | None, Parameter(help="plan: samples of a training step")] = None,
    study: Annotated[
        bool, Parameter(help="measure angles, gains and errors over designs and settings", negative="")
    ] = False,
    parts: Annotated[str, Parameter(help="study: its parts, by commas")] = "designs,grid,depth,width,batch",
    data: Annotated[str, Parameter(help="study: what is trained on")] = "glyphs",
    seeds: Annotated[int, Parameter(help="study: trainings of each cell")] = 1,
    epochs: Annotated[int, Parameter(help="study: epochs of a training")] = 2,
    samples_per_epoch: Annotated[int, Parameter(help="study: training samples an epoch")] = 6144,
    num_threads: Annotated[int, Parameter(help="study: CPU threads of torch")] = 1,
    out: Annotated[Path, Parameter(help="study: folder for study.json and figures")] = Path(
        "runs/mirror-study"
    ),
    resume: Annotated[
        bool, Parameter(help="study: go on with what --out holds, if anything", negative="")
    ] = False,
) -> int:
    """Print a plan of mirror mode, or study it: angles, gains and errors over designs and settings.

    Exit codes: 0 done, 2 bad input, 130 or 143 interrupted (finished cells are kept).
    """
    given = locals()
    if plan == study:
        raise ConfigError(
            "mirror: say what to do: --plan prints what mirror mode will do with each layer, "
            "--study measures what settings give"
        )
    if plan:
        _refuse_flags_of("study", given)
        return _print_plan(model, noise, target_angle_deg, cost_share, batch_size)
    _refuse_flags_of("plan", given)
    settings = {
        "model": model, "data": data, "seeds": seeds, "epochs": epochs,
        "samples_per_epoch": samples_per_epoch, "num_threads": num_threads,
    }  # fmt: skip
    return _run_study(out, parts, settings, resume=resume)


def _refuse_flags_of(mode: str, given: dict[str, Any]) -> None:
    """Refuse what was given and does nothing here: the flags whose help begins with another mode."""
    for name, flag in signature(mirror).parameters.items():
        is_of_mode = flag.annotation.__metadata__[0].help.startswith(f"{mode}: ")
        if is_of_mode and given[name] != flag.default:
            raise ConfigError(f"mirror: --{name.replace('_', '-')} is for --{mode}")


def _run_study(out: Path, parts: str, settings: dict[str, Any], *, resume: bool) -> int:
    from feedbackpath.jobs import Interrupted
    from feedbackpath.jobs.mirror_study import StudySettings, run_study
    from feedbackpath.report.study import describe_cell, rich_study_table
    from feedbackpath.report.study_figures import write_study_figures

    console = Console()
    chosen = StudySettings(tuple(parts.split(",")), **settings)
    command = shlex.join(["feedbackpath", *sys.argv[1:]])

    def tell(where: str, entry: dict[str, Any]) -> None:
        console.print(f"{where} {describe_cell(entry)}", highlight=False, soft_wrap=True)

    try:
        measured = run_study(chosen, out, resume=resume, command=command, tell=tell)
    except Interrupted as stop:
        console.print(
            f"interrupted: finished cells are kept in {out}; the same command with --resume goes on"
        )
        return stop.exit_code
    write_study_figures(measured, out)
    console.print(rich_study_table(measured))
    console.print(f"study.json and figures are in {out}")
    return 0


def _print_plan(
    model: str, noise: str, target_angle_deg: float | None, cost_share: float | None, batch_size: int | None
) -> int:
    from rich.table import Table

    from feedbackpath.jobs.mirror import plan_of_model
    from feedbackpath.mirror import Mirror, When

    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"--batch-size is {batch_size}; it must be at least 1")
    when = When() if cost_share is None else When(cost_share=cost_share)
    settings = Mirror(noise=noise, target_angle_deg=target_angle_deg, when=when)
    layers, size = plan_of_model(model, settings, batch_size)
    table = Table("layer", "inputs", "samples", "angle", "FLOPs", "of a step", "every")
    for layer in layers:
        table.add_row(
            layer.name, str(layer.inputs), str(layer.samples), f"{layer.angle_deg:.2g}°",
            f"{layer.flops:.2g}", f"{100 * layer.share:.2g}%", f"{layer.steps_between:.1f}",
        )  # fmt: skip
    console = Console()
    console.print(f"{model}, batch {size}, {noise} noise")
    console.print(table)
    total = sum(layer.share for layer in layers)
    every = layers[0].steps_between
    console.print(
        f"all layers once: {100 * total:.2g}% of a training step's FLOPs (Appendix B's count); "
        f"each is mirrored every {every:.1f} steps on average; angles are what noise leaves, W at rest"
    )
    return 0
