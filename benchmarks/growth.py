"""How a step's ratios grow with depth, width, batch and sequence length; what a weight and a value cost.

Example:
    python benchmarks/growth.py --out benchmarks/step-cost/growth.json

Every rule and plain PyTorch take turns, step by step, over the sizes of some axes. The figure is drawn beside
``--out``. ``cost_page.py`` puts the numbers into step-cost/README.md.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from growth_figure import render_growth
from torch import nn

from feedbackpath.bench.bench import check_rounds, describe_machine
from feedbackpath.bench.measure import keep_freed_memory, ratio_to, time_in_turns
from feedbackpath.bench.workloads import (
    PLAIN,
    SMALL_IMAGE,
    Arithmetic,
    Workload,
    find_workload,
    make_steps,
)
from feedbackpath.errors import ConfigError, UserError
from feedbackpath.mirror import Mirror
from feedbackpath.rules import Rule, WeightMirror, resolve_rule
from feedbackpath.train.devices import usable_device

WARM_UP = 2
RULES = ("fa", "ss", "kp", "mirror-kp", "wm")


@dataclass(frozen=True)
class Cell:
    """One size on an axis.

    Attributes:
        size: Where it stands on the axis.
        workload: The network and its samples.
        batch_size: Samples a step.
    """

    size: int
    workload: Workload
    batch_size: int


@dataclass(frozen=True)
class Axis:
    """What grows, and the sizes that are measured.

    Attributes:
        label: For people.
        cells: From small to large.
    """

    label: str
    cells: tuple[Cell, ...]


BATCHES = (16, 64, 256, 1024, 2048)
IMAGE_32 = (3, 32, 32)


def _deep(depth: int) -> Cell:
    workload = find_workload(f"resnet{depth}")
    return Cell(depth, replace(workload, sample_shape=IMAGE_32, num_classes=10), 32)


def _wide(factor: int) -> Cell:
    return Cell(factor, find_workload(f"resnet8x{factor}"), 32)


def _long(rows: int) -> Cell:
    channels, _, columns = SMALL_IMAGE
    return Cell(rows, replace(find_workload("transformer"), sample_shape=(channels, rows, columns)), 16)


def _batched(model: str, batch_size: int) -> Cell:
    return Cell(batch_size, find_workload(model), batch_size)


AXES = {
    "depth": Axis("depth of the ResNet (layers), batch 32", tuple(map(_deep, (8, 20, 56, 110)))),
    "width": Axis("width of ResNet-8 (times), batch 32", tuple(map(_wide, (1, 2, 4, 8)))),
    "batch": Axis("batch of ResNet-8 (samples)", tuple(_batched("resnet8", size) for size in BATCHES)),
    "mlp-batch": Axis("batch of the MLP (samples)", tuple(_batched("mlp", size) for size in BATCHES)),
    "sequence": Axis("sequence of the transformer (rows), batch 16", tuple(map(_long, (32, 128, 512)))),
}


@dataclass(frozen=True)
class GrowthSettings:
    """What to measure.

    Args:
        axes: Keys of `AXES`.
        rules: Names of rules.
        rounds: Steps of each network that are timed, at least.
        arithmetic: How the networks compute.
        least_seconds: What the timed steps of a size take at least, all rules together.
        calibration_rounds: Timed steps of each network that tells what a weight and a value cost.
    """

    axes: tuple[str, ...]
    rules: tuple[str, ...]
    rounds: int = 10
    arithmetic: Arithmetic = Arithmetic()
    least_seconds: float = 20.0
    calibration_rounds: int = 50

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        for axis in self.axes:
            if axis not in AXES:
                raise ConfigError(f"no axis {axis!r} to grow along; there are {', '.join(AXES)}")
        for rule in self.rules:
            resolve_rule(rule)
        check_rounds(self.rounds)
        usable_device(self.arithmetic.device)


def run_growth(
    settings: GrowthSettings,
    tell: Callable[[str], None] = lambda line: None,
    axes: dict[str, Axis] | None = None,
) -> dict[str, Any]:
    """Measure every rule at every size of some axes.

    Args:
        settings: What to measure.
        tell: Called with a line of text when a size has been measured.
        axes: The sizes; `AXES` unless given.

    Returns:
        ``machine``, ``settings``, ``calibration`` and ``growth``: by axis, its label and cells, each with
        ``step``: ratios to plain PyTorch in the same rounds, by rule.
    """
    keep_freed_memory()
    found = {}
    for name in settings.axes:
        axis = (axes or AXES)[name]
        cells = []
        for cell in axis.cells:
            cells.append(measure_cell(cell, settings))
            tell(_describe(name, cells[-1]))
        found[name] = {"label": axis.label, "cells": cells}
    return {
        "machine": describe_machine(settings.arithmetic),
        "settings": asdict(settings),
        "calibration": calibrate(settings.rules, settings.arithmetic, settings.calibration_rounds),
        "growth": found,
    }


def measure_cell(cell: Cell, settings: GrowthSettings) -> dict[str, Any]:
    """Measure one size under every rule."""
    rules = {rule: rule for rule in settings.rules}
    steps = make_steps(cell.workload, rules, cell.batch_size, settings.arithmetic)
    time_in_turns(steps, WARM_UP, settings.arithmetic.device)
    seconds = time_in_turns(steps, settings.rounds, settings.arithmetic.device, settings.least_seconds)
    return {
        "size": cell.size,
        "model": cell.workload.model,
        "sample_shape": list(cell.workload.sample_shape),
        "num_classes": cell.workload.num_classes,
        "batch_size": cell.batch_size,
        "rounds": len(seconds[PLAIN]),
        "plain_seconds": round(statistics.median(seconds[PLAIN]), 6),
        "step": {rule: ratio_to(seconds[PLAIN], seconds[rule]) for rule in rules},
    }


def _describe(axis: str, found: dict[str, Any]) -> str:
    ratios = ", ".join(f"{rule} {ratio['median']:.3f}" for rule, ratio in found["step"].items())
    return f"{axis} {found['size']} ({found['model']}, batch {found['batch_size']}): {ratios}"


@dataclass(frozen=True)
class _Stack(Workload):
    """Equal layers, one on the other: so many that what is added a layer can be told.

    Attributes:
        num_layers: How many.
        is_conv: 3 x 3 convolutions in place of dense layers.
    """

    num_layers: int = 1
    is_conv: bool = False

    def build(self) -> nn.Module:
        size = self.sample_shape[0]
        layers = [nn.Conv2d(size, size, 3, padding=1) if self.is_conv else nn.Linear(size, size)
                  for _ in range(self.num_layers)]  # fmt: skip
        with_relus = [module for layer in layers for module in (layer, nn.ReLU())]
        first, last = (nn.Flatten(), nn.Identity()) if not self.is_conv else (nn.Identity(), nn.Flatten())
        return nn.Sequential(first, *with_relus[:-1], last)


LARGE = 2048
_STACKS = {
    "dense": _Stack("stack", (64, 1, 1), 64, batch_size=2048, num_layers=16),
    "convolution": _Stack("stack", (16, 24, 24), 16 * 24 * 24, batch_size=16, num_layers=16, is_conv=True),
    "values": _Stack("stack", (LARGE, 1, 1), LARGE, 1),
}


def calibrate(rules: Iterable[str], arithmetic: Arithmetic, rounds: int) -> dict[str, Any]:
    """Measure what one weight and one of its values add to a step, on networks that are on no axis.

    Two stacks of 16 layers with so few values that only their number counts, and one layer so large that only
    its values do. The stacks have activities enough to fill a cache between calls, as networks do: with none,
    a call was measured to cost a third or less. The mirror mirrors every layer after every step there.

    Returns:
        ``us_per_weight``: by kind of layer and rule, microseconds; ``ns_per_value``: by rule, nanoseconds.
    """
    every: dict[str, str | Rule] = {
        rule: WeightMirror(Mirror.exact()) if rule == "wm" else rule for rule in rules
    }
    added = {name: _added_seconds(stack, every, arithmetic, rounds) for name, stack in _STACKS.items()}
    return {
        "us_per_weight": {
            name: {rule: round(1e6 * s / _STACKS[name].num_layers, 2) for rule, s in added[name].items()}
            for name in ("dense", "convolution")
        },
        "ns_per_value": {rule: round(1e9 * s / LARGE**2, 4) for rule, s in added["values"].items()},
    }


def _added_seconds(
    stack: Workload, rules: dict[str, str | Rule], arithmetic: Arithmetic, rounds: int
) -> dict[str, float]:
    """Return by rule the median of what a step takes beyond plain PyTorch's of the same round."""
    steps = make_steps(stack, rules, stack.batch_size, arithmetic)
    time_in_turns(steps, WARM_UP, arithmetic.device)
    seconds = time_in_turns(steps, rounds, arithmetic.device)
    plain = seconds[PLAIN]
    return {
        rule: statistics.median(mine - base for mine, base in zip(seconds[rule], plain, strict=True))
        for rule in rules
    }


def split(text: str) -> tuple[str, ...]:
    """Return names that commas separate."""
    return tuple(text.split(","))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return what was asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--axes", type=split, default=tuple(AXES), help=f"of {','.join(AXES)}")
    parser.add_argument("--rules", type=split, default=RULES, help="by commas")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each network, at least")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a size, all rules together, at least")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--compile", action="store_true", help="run under torch.compile, no graph break allowed"
    )
    parser.add_argument("--num-threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--out", type=Path, default=Path("runs/growth.json"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print each size as it comes, and write the result file and its figure."""
    arguments = parse(argv)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else PyTorch's profiler writes lines between ours
    torch.set_num_threads(arguments.num_threads)
    arithmetic = Arithmetic(arguments.device, arguments.bf16, arguments.channels_last, arguments.compile)
    try:
        settings = GrowthSettings(
            arguments.axes, arguments.rules, arguments.rounds, arithmetic, arguments.seconds
        )
    except UserError as error:
        raise SystemExit(f"growth: {error}") from None
    print("a training step's time over plain PyTorch's, medians:")
    found = run_growth(settings, lambda line: print(line, flush=True))
    words = ["python", "benchmarks/growth.py", *(sys.argv[1:] if argv is None else argv)]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"command": shlex.join(words), **found}, indent=2) + "\n")
    arguments.out.with_suffix(".png").write_bytes(render_growth(found))


if __name__ == "__main__":
    main()
