"""The command ``mirror plan``."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from feedbackpath.cli.exit_codes import DONE
from feedbackpath.errors import ConfigError


def plan(
    *,
    model: Annotated[str, Parameter(help="network")] = "resnet8",
    noise: Annotated[str, Parameter(help="noise design")] = "orthogonal",
    target_angle_deg: Annotated[
        float | None,
        Parameter(help="angle that independent noise may leave, in degrees (8 unless given)"),
    ] = None,
    cost_share: Annotated[
        float | None,
        Parameter(help="share of a step's FLOPs that mirroring may take (0.03 unless given)"),
    ] = None,
    batch_size: Annotated[int | None, Parameter(help="samples of a training step")] = None,
    imports: Annotated[
        tuple[Path, ...],
        Parameter(name="--import", help="Python file with layers or models of your own", negative=""),
    ] = (),
) -> int:
    """Print what mirror mode will do with each layer: samples, predicted angle, FLOPs, and how often.

    Exit codes: 0 done, 2 bad input.
    """
    from rich.table import Table

    from feedbackpath.jobs.imports import import_files
    from feedbackpath.jobs.mirror import plan_of_model
    from feedbackpath.mirror import Mirror, When

    import_files(imports)
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
    return DONE
