"""Backprop (BP), the ruler: B is W itself.

Akrout et al. 2019, equation 2 (Rumelhart, Hinton & Williams 1986): delta_l = phi'(y_l) W_{l+1}^T delta_{l+1}.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from feedbackpath.core.context import RuleContext
from feedbackpath.layers import UntiedWeight
from feedbackpath.rules.base import FeedbackKind


@dataclass(frozen=True)
class Backprop:
    """Send delta back through W; the layers run PyTorch's own code.

    Example:
        >>> import feedbackpath as fp
        >>> path = fp.untie(torch.nn.Linear(3, 2), fp.Backprop())
        >>> path.matrix_angles()
        {'': 0.0}
    """

    name: ClassVar[str] = "bp"
    feedback_kind: ClassVar[FeedbackKind] = "tied"

    def start(self, weights: Sequence[UntiedWeight], context: RuleContext) -> None:
        """Do nothing: B is W."""

    def step(self, weights: Sequence[UntiedWeight], context: RuleContext) -> None:
        """Do nothing: B is W."""
