"""What it costs to simulate a chip: a step of ResNet-8 with one over a step without, and memory.

    python benchmarks/chip_step.py          # measure, and write the table of docs/hardware.md
    python benchmarks/chip_step.py --draw   # write the table from the result file alone

Steps are taken in turns, in CPU time, one thread: net updates, SGD with momentum, batch 128. Memory is that
of all tensors after a step beyond those without a chip. Three minutes of one core.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from marked import as_table, measure_into, with_quartiles, write_between
from marked import parse_draw as parse

import feedbackpath as fp
from feedbackpath.bench.measure import keep_freed_memory, ratio_to, time_in_turns
from feedbackpath.bench.workloads import Arithmetic, TrainingStep, find_workload, make_optimizer
from feedbackpath.train.chips import make_chip
from feedbackpath.train.config import CHIPS, ChipSettings

HERE = Path(__file__).parent
OUT, PAGE = HERE / "hardware-theory" / "step.json", HERE.parent / "docs" / "hardware.md"
RULES, BITS, BATCH, ROUNDS = ("kp", "wm"), 8, 128, 9
WITHOUT = "none"


class StepOnChip(TrainingStep):
    """A training step of ResNet-8 whose weights lie on a chip.

    Args:
        rule: The rule.
        chip: The chip's name, or ``WITHOUT``.
        bits: Of the converters; None: ideal reads.
    """

    def __init__(self, rule: str, chip: str, bits: int | None) -> None:
        super().__init__(find_workload("resnet8"), None, BATCH, Arithmetic(is_channels_last=True), 8)
        made = None if chip == WITHOUT else make_chip(ChipSettings(chip=chip, read_bits=bits), seed=0)
        self.path = fp.untie(self.model, rule, chip=made)
        self.optimizer = make_optimizer(self.model)
        if made is not None:
            made.attach(self.optimizer)


def measure() -> list[dict[str, Any]]:
    """Return what each chip costs, by rule: ratios of times, without and with converters, and memory."""
    keep_freed_memory()
    rows, unit = [], bytes_of_weights()
    for rule in RULES:
        without = bytes_after_a_step(rule, WITHOUT)
        for chip in CHIPS:
            steps = {
                WITHOUT: StepOnChip(rule, WITHOUT, None),
                "ideal reads": StepOnChip(rule, chip, None),
                f"{BITS} bits": StepOnChip(rule, chip, BITS),
            }
            for step in steps.values():
                step()
            seconds = time_in_turns(steps, ROUNDS)
            ratios = {name: ratio_to(seconds[WITHOUT], seconds[name]) for name in list(steps)[1:]}
            steps.clear()
            memory = (bytes_after_a_step(rule, chip) - without) / unit
            rows.append({"rule": rule, "chip": chip, "memory": memory, **ratios})
            sys.stderr.write(f"{rows[-1]}\n")
    return rows


def bytes_after_a_step(rule: str, chip: str) -> int:
    """Return the bytes of all tensors that a step leaves alive."""
    before = bytes_of_tensors()
    step = StepOnChip(rule, chip, BITS)
    step()
    return bytes_of_tensors() - before


def bytes_of_tensors() -> int:
    """Return the bytes of all tensors that there are, shared memory once."""
    gc.collect()
    memories = [
        tensor.untyped_storage() for tensor in gc.get_objects() if issubclass(type(tensor), torch.Tensor)
    ]
    return sum({memory.data_ptr(): memory.nbytes() for memory in memories}.values())


def bytes_of_weights() -> int:
    """Return the bytes of all W that have a B."""
    path = fp.untie(find_workload("resnet8").build(), "fa")
    return sum(weight.nbytes for _, weight, _ in path.pairs())


def table() -> str:
    """Return the table of docs/hardware.md."""
    found = json.loads(OUT.read_text(encoding="utf-8"))
    reads = ("ideal reads", f"{BITS} bits")
    columns = ["chip", *(f"`{rule}`, {read}" for rule in RULES for read in reads), "memory, in W"]
    lines = []
    for chip in CHIPS:
        rows = [row for row in found["rows"] if row["chip"] == chip]
        ratios = [with_quartiles(row[read], 2) for row in rows for read in reads]
        lines.append([f"`{chip}`", *ratios, f"{max(row['memory'] for row in rows):.1f}"])
    return as_table(columns, lines)


if __name__ == "__main__":
    if not parse(sys.argv[1:]).draw:
        measure_into(OUT, "rows", measure)
    write_between(PAGE, "chip-step", table() + "\n")
