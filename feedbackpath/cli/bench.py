"""The command ``bench``."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from feedbackpath.cli.exit_codes import DONE
from feedbackpath.cli.output import make_console
from feedbackpath.errors import ConfigError
from feedbackpath.train.config import MOST_THREADS

OURS = b'{\n "command": "feedbackpath'  # how a file of results begins


def bench(
    *,
    models: Annotated[str, Parameter(help="networks, separated by commas")] = (
        "mlp,lenet,transformer,resnet8,resnet18,resnet50"
    ),
    rules: Annotated[str, Parameter(help="rules, separated by commas")] = "bp,fa,ss,kp,mirror-kp,wm",
    rounds: Annotated[int, Parameter(help="least number of timed steps of each network (2 or more)")] = 10,
    seconds: Annotated[
        float,
        Parameter(help="least time for the timed steps of a network, all rules together"),
    ] = 20.0,
    batch_size: Annotated[
        int | None, Parameter(help="samples per step (each network's own unless given)")
    ] = None,
    device: Annotated[str, Parameter(help="torch device")] = "cpu",
    bf16: Annotated[bool, Parameter(help="autocast to bfloat16", negative="")] = False,
    channels_last: Annotated[bool, Parameter(help="memory format of images and convolutions")] = True,
    compile: Annotated[
        bool, Parameter(help="run under torch.compile, no graph break allowed", negative="")
    ] = False,
    num_threads: Annotated[int, Parameter(help="CPU threads of torch")] = 1,
    out: Annotated[Path, Parameter(help="file for the results")] = Path("runs/bench.json"),
) -> int:
    """Measure what each rule costs compared with plain PyTorch: time, memory, traffic and start-up.

    Exit codes: 0 done, 2 bad input.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else its profiler writes lines between ours
    import torch

    from feedbackpath.bench import BenchSettings, run_bench
    from feedbackpath.bench.workloads import Arithmetic
    from feedbackpath.data.reading import open_file
    from feedbackpath.train.store import write_json

    if not 1 <= num_threads <= MOST_THREADS:
        raise ConfigError(f"--num-threads is {num_threads}; give 1 to {MOST_THREADS}")
    if out.exists():
        with open_file(out) as file:
            if file.read(len(OURS)) != OURS:
                raise ConfigError(f"--out {out} exists, and was not written by bench; choose another file")
    torch.set_num_threads(num_threads)
    arithmetic = Arithmetic(device, bf16, channels_last, compile)
    settings = BenchSettings(
        tuple(models.split(",")), tuple(rules.split(",")), rounds, batch_size, arithmetic, seconds
    )
    out.parent.mkdir(parents=True, exist_ok=True)  # what cannot be written is refused before it is measured
    if not os.access(out.parent, os.W_OK):
        raise ConfigError(f"--out {out}: nothing can be written to {out.parent}; choose another file")
    console = make_console()
    console.print("a training step's time over plain PyTorch's, medians:")
    found = run_bench(settings, console.print)
    write_json(out, {"command": shlex.join(["feedbackpath", *sys.argv[1:]]), **found})
    console.print(f"quartiles, memory, angles, traffic and start-up are in {out}")
    return DONE
