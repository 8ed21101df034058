"""The command ``mirror plan``."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from feedbackpath.cli.exit_codes import DONE
from feedbackpath.cli.output import make_console, make_table, plain
from feedbackpath.errors import ConfigError

Noise = Literal["gaussian", "uniform", "signs", "orthogonal", "hadamard"]


def plan(
    *,
    model: Annotated[str, Parameter(help="network")] = "resnet8",
    noise: Annotated[Noise, Parameter(help="kind of noise, or of codes (orthogonal, hadamard)")] = "gaussian",
    target_angle_deg: Annotated[
        float | None,
        Parameter(
            help="angle that independent noise may leave, in degrees (default: what the minibatch leaves)"
        ),
    ] = None,
    cost_share: Annotated[
        float | None,
        Parameter(help="share of a step's FLOPs that mirroring may take (default: all layers, every step)"),
    ] = None,
    batch_size: Annotated[int | None, Parameter(help="samples of a training step")] = None,
    imports: Annotated[
        tuple[Path, ...],
        Parameter(name="--import", help="Python file with layers or models of your own", negative=""),
    ] = (),
) -> int:
    """Print what mirror mode will do with each layer: samples, predicted angle, costs, and how often.

    Prints two kinds of costs: FLOPs of the simulation, and reads, writes and signals of a brain or a chip.

    Exit codes: 0 done, 2 bad input.
    """
    from feedbackpath.jobs.imports import import_files
    from feedbackpath.jobs.mirror import plan_of_model
    from feedbackpath.mirror import Mirror, When

    import_files(imports)
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"--batch-size is {batch_size}; it must be at least 1")
    when = When() if cost_share is None else When(cost_share=cost_share)
    settings = Mirror(noise=noise, target_angle_deg=target_angle_deg, when=when)
    layers, size = plan_of_model(model, settings, batch_size)
    table = make_table(
        "layer", "inputs", "samples", "maps of", "angle", "FLOPs", "of step", "reads", "spikes", "every"
    )
    for layer in layers:
        dues = layer.dues
        table.add_row(
            layer.name, plain(layer.inputs), plain(layer.samples), plain(layer.positions),
            f"{plain(layer.angle_deg)}°", plain(layer.flops), f"{plain(100 * layer.share)}%",
            plain(dues.reads), plain(dues.spikes), plain(layer.steps_between),
        )  # fmt: skip
    console = make_console()
    console.print(f"{model}, batch {size}, {noise} noise")
    console.print(table)
    total = sum(layer.share for layer in layers)
    between = plain(layers[0].steps_between)
    every = "after each step" if between == "1" else f"every {between} steps on average"
    reads, spikes = (sum(getattr(layer.dues, what) for layer in layers) for what in ("reads", "spikes"))
    console.print(
        "samples: examples of noise in a pass; maps of: positions of a map; of step: FLOPs in percent of a "
        "training step's; every: steps from one pass to the next."
    )
    console.print(
        f"In the simulation, mirroring all layers once takes {plain(100 * total)}% of a training step's "
        f"FLOPs (counted as in the paper's Appendix B). Each layer is mirrored {every}. Angles are what "
        "noise leaves if W does not change."
    )
    console.print(
        f"In a brain or a chip, it takes {plain(reads)} reads of an array of W, as many writes of each "
        f"synapse of B, and {plain(spikes)} signals of neurons."
    )
    return DONE
