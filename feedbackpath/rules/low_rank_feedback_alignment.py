"""Feedback alignment of low rank: random, fixed feedback weights that carry few directions.

Akrout et al. 2019, equation 3 (Lillicrap et al. 2016), with a B of rank r. A matrix of rank r stands for a
feedback path of r fibres: the errors of a layer's n neurons pass through r numbers on their way down.

Take the B that feedback alignment draws, m by n with m <= n, and an m by r matrix Q with orthonormal columns
whose directions are random::

    B_r = sqrt(m / r) Q Q^T B

Q Q^T projects onto r directions; the factor keeps the mean square of B. At r = m, B_r is B.
Differs from the paper: it has no such rule. This one shows how many fibres an error needs.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from feedbackpath.core.context import RuleContext
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.errors import RuleError
from feedbackpath.rules.base import Facts, Weights
from feedbackpath.rules.feedback_alignment import FeedbackAlignment


@dataclass(frozen=True)
class LowRankFeedbackAlignment(FeedbackAlignment):
    """Draw B once, with few directions, and leave it.

    The rank of a convolution is that of its kernel as a matrix from channels to receptive fields, for each
    group by itself.

    Args:
        rank: The rank of every B; one that has fewer rows or columns stays as feedback alignment draws it.

    Example:
        >>> import feedbackpath as fp
        >>> path = fp.untie(torch.nn.Linear(30, 20), fp.LowRankFeedbackAlignment(rank=3))
        >>> [int(torch.linalg.matrix_rank(feedback)) for _, _, feedback in path.pairs()]
        [3]
    """

    name: ClassVar[str] = "fa-lowrank"
    facts: ClassVar[Facts] = Facts(
        paper="after Lillicrap et al. 2016",
        equation="B_r = sqrt(m / r) Q Q^T B, B random and fixed",
        needs="nothing beyond B",
        verdict="transport-free",
        flops=1.0,
    )
    is_mirrorable: ClassVar[bool] = False
    rank: int = 8

    def __post_init__(self) -> None:
        """Refuse what is no rank."""
        if self.rank < 1:
            raise RuleError(f"fa-lowrank: rank must be at least 1, not {self.rank}")

    def start(self, weights: Weights, context: RuleContext) -> None:
        """Draw every B as feedback alignment does, and project it."""
        super().start(weights, context)
        with torch.no_grad():
            for weight in weights:
                self._project(weight, context)

    def _project(self, weight: UntiedWeight, context: RuleContext) -> None:
        matrix = _as_matrix(weight)
        is_wide = matrix.shape[-2] <= matrix.shape[-1]
        rows = matrix if is_wide else matrix.mT
        m = rows.shape[-2]
        if self.rank >= m:
            return
        drawn = rows.new_empty((*rows.shape[:-1], self.rank), dtype=torch.float32)
        drawn.normal_(generator=context.generator(weight, "low_rank"))
        q = torch.linalg.qr(drawn)[0].to(rows.dtype)
        projected = math.sqrt(m / self.rank) * (q @ (q.mT @ rows))
        matrix.copy_(projected if is_wide else projected.mT)


def _as_matrix(weight: UntiedWeight) -> Tensor:
    """View B as ``[groups, neurons, inputs]``; that of an unknown layer by its first dimension."""
    view = weight.kind.as_matrix
    return weight.feedback.flatten(1)[None] if view is None else view(weight.layer, weight.feedback)
