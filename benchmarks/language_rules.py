"""A rule of the study in ``language.py``: Kolen-Pollack learning whose B starts at 0."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

import feedbackpath as fp


@fp.register_rule
@dataclass(frozen=True)
class KolenPollackFromZero(fp.KolenPollack):
    """Kolen-Pollack with B = 0 at first: no error passes a layer until its B has learned something."""

    name: ClassVar[str] = "kp-zero"
    label: ClassVar[str] = "Kolen-Pollack from B = 0"

    def start(self, weights: Sequence[fp.UntiedWeight], context: fp.RuleContext) -> None:
        """Begin as Kolen-Pollack does, and take the random B away."""
        super().start(weights, context)
        with torch.no_grad():
            for weight in weights:
                weight.feedback.zero_()
