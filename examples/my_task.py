"""Data, a network and a rule of one's own, for the command line.

feedbackpath compare --import examples/my_task.py --data mine --model mynet --rules bp,kp,myrule --epochs 3
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

import feedbackpath as fp


def mine(seed: int) -> fp.Task:
    """Two interleaved spirals, to be told apart."""
    numbers = torch.Generator().manual_seed(0)
    label = torch.randint(2, (3000,), generator=numbers)
    angle = 6 * torch.rand(3000, generator=numbers)
    turned = angle + torch.pi * label
    x = torch.stack([angle * turned.cos(), angle * turned.sin()], 1)
    x += 0.1 * torch.randn(3000, 2, generator=numbers)
    parts = {"train": slice(2000), "validation": slice(2000, 2500), "test": slice(2500, None)}
    return fp.Task.of_tensors(
        "mine", **{name: (x[rows], label[rows]) for name, rows in parts.items()}, num_outputs=2
    )


def mynet(num_classes: int) -> nn.Module:
    """Three layers of ReLU."""
    return nn.Sequential(
        nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, num_classes)
    )


@fp.register_rule
@dataclass(frozen=True)
class MyRule(fp.FeedbackAlignment):
    """Feedback alignment with half as large a B."""

    name: ClassVar[str] = "myrule"
    label: ClassVar[str] = "half-size feedback"
    colour: ClassVar[str] = "#882255"

    def start(self, weights: list[fp.UntiedWeight], context: fp.RuleContext) -> None:
        """Draw B, and halve it."""
        super().start(weights, context)
        with torch.no_grad():
            for weight in weights:
                weight.feedback.mul_(0.5)


fp.register_task("mine", mine)
fp.register_model("mynet", mynet)
