"""Sparse feedback alignment: random, fixed feedback weights, most of which are missing.

Akrout et al. 2019, equation 3 (Lillicrap et al. 2016), with a share s of B's synapses. Sparse feedback for
direct feedback alignment is studied by Crafton et al. 2019. Take the B that feedback alignment draws::

    B_s = M * B / sqrt(s)        M has s of its entries at 1, in random places, and the others at 0

The factor keeps the mean square of B. At s = 1, B_s is B.
Differs from the papers: the first has no such rule, the second sends the output's error to each layer.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from feedbackpath.core.context import RuleContext
from feedbackpath.errors import RuleError
from feedbackpath.rules.base import Facts, Weights
from feedbackpath.rules.feedback_alignment import FeedbackAlignment


@dataclass(frozen=True)
class SparseFeedbackAlignment(FeedbackAlignment):
    """Draw B once, with a share of its synapses, and leave it.

    Args:
        share: Which share of B's weights there are: exactly that many, rounded, and at least one.

    Example:
        >>> import feedbackpath as fp
        >>> path = fp.untie(torch.nn.Linear(10, 10), fp.SparseFeedbackAlignment(share=0.2))
        >>> [int((feedback != 0).sum()) for _, _, feedback in path.pairs()]
        [20]
    """

    name: ClassVar[str] = "fa-sparse"
    facts: ClassVar[Facts] = Facts(
        paper="after Lillicrap et al. 2016",
        equation="B_s = M * B / sqrt(s), B random and fixed",
        needs="nothing beyond B",
        verdict="transport-free",
        flops=1.0,
    )
    is_mirrorable: ClassVar[bool] = False
    share: float = 0.1

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        if not 0.0 < self.share <= 1.0:
            raise RuleError(f"fa-sparse: share must be above 0 and at most 1, not {self.share}")

    def start(self, weights: Weights, context: RuleContext) -> None:
        """Draw every B as feedback alignment does, and take weights out of it."""
        super().start(weights, context)
        with torch.no_grad():
            for weight in weights:
                b = weight.feedback
                kept = max(1, round(self.share * b.numel()))
                generator = context.generator(weight, "sparse")
                order = torch.randperm(b.numel(), generator=generator, device=b.device)
                mask = torch.zeros(b.numel(), dtype=b.dtype, device=b.device)
                mask[order[:kept]] = math.sqrt(b.numel() / kept)
                b.mul_(mask.view(b.shape))
