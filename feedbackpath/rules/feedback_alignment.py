"""Feedback alignment (FA): random, fixed feedback weights.

Akrout et al. 2019, equation 3 (Lillicrap et al. 2016): delta_l = phi'(y_l) B_{l+1} delta_{l+1}. Here B has
the layout of W, so that it is transposed on the way back, as W is under backprop.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from feedbackpath.core.context import RuleContext
from feedbackpath.rules.base import Facts, Rule, Scale, Weights, draw_feedback


@dataclass(frozen=True)
class FeedbackAlignment(Rule):
    """Draw B once and leave it; W may learn to agree with it.

    Args:
        scale: Of B; the paper leaves it open: ``"xavier"``, ``"he"``, ``"zero"`` or a number (see
            ``draw_feedback``). With B = 0 no error passes a layer: only the last one learns.

    Example:
        >>> import feedbackpath as fp
        >>> path = fp.untie(torch.nn.Linear(3, 2), "fa")
        >>> [feedback.requires_grad for _, _, feedback in path.pairs()]
        [False]
    """

    name: ClassVar[str] = "fa"
    facts: ClassVar[Facts] = Facts(
        paper="Lillicrap et al. 2016",
        equation="delta_l = phi'(y_l) B^T delta_(l+1), B random and fixed",
        needs="nothing beyond B",
        verdict="transport-free",
        flops=1.0,
    )
    search_space: ClassVar[Mapping[str, Sequence[Any]]] = {"scale": ("choice", "xavier", "he")}
    scale: Scale = field(default="xavier", kw_only=True)

    def start(self, weights: Weights, context: RuleContext) -> None:
        """Draw every B."""
        draw_feedback(weights, context, self.scale)
