"""What the MLP's smallest possible Kolen-Pollack step would cost, and what brings the real one down.

Run it alone on a machine: `python benchmarks/mlp_floor.py`. All train the same MLP on the same 256 samples,
whose labels change, in turns step by step, one thread; ratios are to plain PyTorch's step.
"""

import json
from functools import cached_property
from pathlib import Path

import torch

import feedbackpath as fp
from feedbackpath.bench.bench import describe_machine
from feedbackpath.bench.measure import keep_freed_memory, ratio_to, time_in_turns
from feedbackpath.bench.workloads import (
    NUM_LABELLINGS,
    PLAIN,
    Arithmetic,
    TrainingStep,
    find_workload,
    make_optimizer,
)

OUT = Path(__file__).parent / "step-cost" / "mlp-floor.json"
WARM_UP, ROUNDS, SECONDS = 3, 10, 60.0
FIRST = "fc1"  # no error leaves it, so that nothing reads its B


class FloorStep(TrainingStep):
    """A step of feedback alignment that adds a finished update to each B: to train B takes no less."""

    def __call__(self) -> None:
        """Do a step."""
        super().__call__()
        for feedback, update in self.updates:
            feedback.add_(update, alpha=-1e-9)

    @cached_property
    def updates(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each B with what is added to it."""
        return [(b.detach(), torch.randn_like(b)) for _, _, b in self.path.pairs()]


def make_step(
    rule: str | None, kind: type[TrainingStep] = TrainingStep, *, is_fused: bool = False
) -> TrainingStep:
    """Return a step of the MLP by a rule."""
    step = kind(find_workload("mlp"), rule, 256, Arithmetic(), NUM_LABELLINGS)
    if is_fused:
        step.optimizer = make_optimizer(step.model, is_fused=True)
    return step


def make_step_without_first(rule: str) -> TrainingStep:
    """Return a step in which the first layer stays as it is under backprop."""
    step = make_step(rule)
    step.path.retie()
    step.path = fp.untie(step.model, rule, overrides={FIRST: "bp"})
    step.optimizer = make_optimizer(step.model)
    return step


def main() -> None:
    """Measure, and write the result file."""
    torch.set_num_threads(1)
    keep_freed_memory()
    steps = {
        PLAIN: make_step(None),
        "fa": make_step("fa"),
        "fa, and a finished update added to B": make_step("fa", FloorStep),
        "kp": make_step("kp"),
        "kp, first layer by bp": make_step_without_first("kp"),
        "wm": make_step("wm"),
        "wm, first layer by bp": make_step_without_first("wm"),
        "plain, SGD(fused=True)": make_step(None, is_fused=True),
        "kp, SGD(fused=True)": make_step("kp", is_fused=True),
    }
    time_in_turns(steps, WARM_UP)
    seconds = time_in_turns(steps, ROUNDS, least_seconds=SECONDS)
    ratios = {name: ratio_to(seconds[PLAIN], times) for name, times in seconds.items()}
    found = {"machine": describe_machine(Arithmetic()), "rounds": len(seconds[PLAIN]), "step": ratios}
    OUT.write_text(json.dumps(found, indent=2) + "\n")
    for name, ratio in ratios.items():
        print(f"{name}: {ratio['median']:.3f} ({ratio['q1']:.2f}-{ratio['q3']:.2f})")


if __name__ == "__main__":
    main()
