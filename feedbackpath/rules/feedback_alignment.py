"""Feedback alignment (FA): random, fixed feedback weights.

Akrout et al. 2019, equation 3 (Lillicrap et al. 2016): delta_l = phi'(y_l) B_{l+1} delta_{l+1}.
"""

from dataclasses import dataclass
from typing import ClassVar

from feedbackpath.rules.base import Facts, Rule


@dataclass(frozen=True)
class FeedbackAlignment(Rule):
    """Draw B once and leave it; W may learn to agree with it.

    The paper leaves the law of B open: here N(0, 2 / (fan_in + fan_out)) (see ``draw_feedback``).

    Example:
        >>> import feedbackpath as fp
        >>> path = fp.untie(torch.nn.Linear(3, 2), "fa")
        >>> [feedback.requires_grad for _, _, feedback in path.pairs()]
        [False]
    """

    name: ClassVar[str] = "fa"
    facts: ClassVar[Facts] = Facts(
        paper="Lillicrap et al. 2016",
        equation="delta_l = phi'(y_l) B delta_(l+1), B random and fixed",
        needs="nothing beyond B",
        verdict="transport-free",
        flops=1.0,
    )
