"""A control whose B is late and has no noise: `--import benchmarks/late_feedback.py --rules late`."""

from dataclasses import dataclass
from typing import ClassVar

import torch

import feedbackpath as fp
from feedbackpath.rules.base import Weights
from feedbackpath.rules.symmetric_alignment import SymmetricAlignment


@fp.register_rule
@dataclass(frozen=True)
class LateFeedback(SymmetricAlignment):
    """Begin with B = W, and let it follow W as a mirror without noise would: B <- (1 - d) B + d W."""

    name: ClassVar[str] = "late"
    label: ClassVar[str] = "late feedback (control)"
    colour: ClassVar[str] = "#888888"

    @torch.no_grad()
    def start(self, weights: Weights, context: fp.RuleContext) -> None:
        """Begin where W does."""
        for weight in weights:
            weight.feedback.copy_(weight.weight)
