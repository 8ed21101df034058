"""What a rule is: how feedback weights begin, and what happens to them after each update of W."""

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, Protocol

import torch

from feedbackpath.core.context import RuleContext
from feedbackpath.layers import UntiedWeight

FeedbackKind = Literal["tied", "own", "derived", "learned"]


class Rule(Protocol):
    """How the feedback weights come about.

    Attributes:
        name: Short name, as on the command line.
        feedback_kind: ``"tied"``: B is W itself (backprop); ``"own"``: B is a tensor that only the rule and
            mirror mode change; ``"derived"``: B is computed from W, so that mirroring it makes no sense
            (sign-symmetry); ``"learned"``: B gets W's gradient and the optimizer updates it (Kolen-Pollack).
    """

    name: ClassVar[str]
    feedback_kind: ClassVar[FeedbackKind]

    def start(self, weights: Sequence[UntiedWeight], context: RuleContext) -> None:
        """Give every feedback weight its first value; called once, by ``untie``."""

    def step(self, weights: Sequence[UntiedWeight], context: RuleContext) -> None:
        """Do what follows an update of W; called by ``path.step()``, after ``optimizer.step()``."""


def draw_feedback(weights: Sequence[UntiedWeight], context: RuleContext) -> None:
    """Draw every feedback weight from N(0, 2 / (fan_in + fan_out)), never looking at W.

    That is Glorot & Bengio's law (2010, equation 12) for weights that signals cross both ways. The paper
    leaves the law of the initial B open.
    """
    with torch.no_grad():
        for weight in weights:
            std = math.sqrt(2.0 / (weight.fan_in + weight.fan_out))
            weight.feedback.normal_(0.0, std, generator=context.generator(weight, "draw_feedback"))
