"""The command ``bench``."""

import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from feedbackpath.errors import ConfigError

if TYPE_CHECKING:
    from feedbackpath.bench import BenchSettings, GrowthSettings


def bench(
    *,
    models: Annotated[str, Parameter(help="networks, by commas")] = (
        "mlp,lenet,transformer,resnet8,resnet18,resnet50"
    ),
    rules: Annotated[str, Parameter(help="rules, by commas")] = "bp,fa,ss,kp,mirror-kp,wm",
    rounds: Annotated[int, Parameter(help="timed steps of each network, at least")] = 10,
    seconds: Annotated[
        float,
        Parameter(help="that a network's timed steps take at least, all rules together"),
    ] = 20.0,
    batch_size: Annotated[
        int | None, Parameter(help="samples a step (each network's own unless given)")
    ] = None,
    grow: Annotated[
        str | None,
        Parameter(
            help="how ratios grow, in place of networks: depth,width,batch,mlp-batch,sequence or some of them"
        ),
    ] = None,
    device: Annotated[str, Parameter(help="torch device")] = "cpu",
    bf16: Annotated[bool, Parameter(help="autocast to bfloat16", negative="")] = False,
    channels_last: Annotated[bool, Parameter(help="memory format of images and convolutions")] = True,
    compile: Annotated[
        bool, Parameter(help="run under torch.compile, no graph break allowed", negative="")
    ] = False,
    num_threads: Annotated[int, Parameter(help="CPU threads of torch")] = 1,
    out: Annotated[Path, Parameter(help="file for the figures")] = Path("runs/bench.json"),
) -> int:
    """Measure what each rule costs beside plain PyTorch: time, memory, traffic and start-up; or its growth.

    Exit codes: 0 done, 2 bad input.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else its profiler writes lines between ours
    import torch

    from feedbackpath.bench import BenchSettings, GrowthSettings
    from feedbackpath.bench.workloads import Arithmetic

    if num_threads < 1:
        raise ConfigError(f"--num-threads is {num_threads}; it must be at least 1")
    torch.set_num_threads(num_threads)
    arithmetic = Arithmetic(device, bf16, channels_last, compile)
    names = tuple(rules.split(","))
    if grow is None:
        _bench(BenchSettings(tuple(models.split(",")), names, rounds, batch_size, arithmetic, seconds), out)
    else:
        _grow(GrowthSettings(tuple(grow.split(",")), names, rounds, arithmetic, seconds), out)
    return 0


def _bench(settings: "BenchSettings", out: Path) -> None:
    from feedbackpath.bench import run_bench

    _measure(lambda tell: run_bench(settings, tell), out)
    Console().print(f"quartiles, memory, angles, traffic and start-up are in {out}")


def _grow(settings: "GrowthSettings", out: Path) -> None:
    from feedbackpath.bench import run_growth
    from feedbackpath.report.growth import render_growth

    found = _measure(lambda tell: run_growth(settings, tell), out)
    figure = out.with_suffix(".png")
    figure.write_bytes(render_growth(found))
    Console().print(f"quartiles and calibration are in {out}, the figure in {figure}")


def _measure(run: Callable[[Callable[[str], None]], dict[str, Any]], out: Path) -> dict[str, Any]:
    """Run, print each line as it comes, and write what was found."""
    console = Console()
    console.print("a training step's time over plain PyTorch's, medians:")
    found = run(lambda line: console.print(line, highlight=False))
    out.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["feedbackpath", *sys.argv[1:]])
    out.write_text(json.dumps({"command": command, **found}, indent=2) + "\n")
    return found
