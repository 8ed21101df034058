"""Mirror once, then feedback alignment: B begins as W and stays where it was.

Akrout et al. 2019: a mirror "in utero" (Section 4, equations 5-7), then equation 3 with a fixed B. The paper
does not join them. What it tells: whether a good beginning is enough, as W moves away from B while it learns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from feedbackpath.core.context import RuleContext
from feedbackpath.layers import UntiedWeight
from feedbackpath.mirror import Mirror, MirrorMode
from feedbackpath.rules.base import FeedbackKind, draw_feedback


@dataclass(frozen=True)
class MirrorFeedbackAlignment:
    """Mirror before training, then leave B as it is.

    Call ``path.mirror()`` before the first step; else the first ``path.step()`` does it.

    Args:
        mirror: Settings of the one mirroring; by default orthogonal codes.

    Example:
        >>> import feedbackpath as fp
        >>> path = fp.untie(torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.ReLU()), "mirror-fa")
        >>> path.mirror()
        >>> path.matrix_angles()["0"] < 0.01
        True
    """

    name: ClassVar[str] = "mirror-fa"
    feedback_kind: ClassVar[FeedbackKind] = "own"
    mirror: Mirror = field(default_factory=Mirror)

    def start(self, weights: Sequence[UntiedWeight], context: RuleContext) -> None:
        """Draw every B at random; see that every layer's activation is known."""
        draw_feedback(weights, context)
        context.part(MirrorMode).find_activations(weights)

    def step(self, weights: Sequence[UntiedWeight], context: RuleContext) -> None:
        """Mirror what has never been mirrored; from then on B is fixed."""
        mode = context.part(MirrorMode)
        fresh = [weight for weight in weights if weight.name not in mode.passes]
        if fresh:
            mode.run(fresh, self.mirror, self.mirror.memory_passes)
