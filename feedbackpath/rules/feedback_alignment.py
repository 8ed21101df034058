"""Feedback alignment (FA): random, fixed feedback weights.

Akrout et al. 2019, equation 3 (Lillicrap et al. 2016): delta_l = phi'(y_l) B_{l+1} delta_{l+1}.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from feedbackpath.core.context import RuleContext
from feedbackpath.layers import UntiedWeight
from feedbackpath.rules.base import FeedbackKind, draw_feedback


@dataclass(frozen=True)
class FeedbackAlignment:
    """Draw B once and leave it; W may learn to agree with it.

    The paper leaves the law of B open: here N(0, 2 / (fan_in + fan_out)) (see ``draw_feedback``).

    Example:
        >>> import feedbackpath as fp
        >>> path = fp.untie(torch.nn.Linear(3, 2), "fa")
        >>> [feedback.requires_grad for _, _, feedback in path.pairs()]
        [False]
    """

    name: ClassVar[str] = "fa"
    feedback_kind: ClassVar[FeedbackKind] = "own"

    def start(self, weights: Sequence[UntiedWeight], context: RuleContext) -> None:
        """Draw every B at random."""
        draw_feedback(weights, context)

    def step(self, weights: Sequence[UntiedWeight], context: RuleContext) -> None:
        """Do nothing: B is fixed."""
