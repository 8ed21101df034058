"""Mirror once, then feedback alignment: B begins near W and stays where it was.

Akrout et al. 2019: a mirror "in utero" (Section 4, equations 5-7), then equation 3 with a fixed B. The paper
does not join them. What it tells: whether a good beginning is enough, as W moves away from B while it learns.
"""

from dataclasses import dataclass
from typing import ClassVar

from feedbackpath.core.context import RuleContext
from feedbackpath.mirror import Mirror, MirrorMode
from feedbackpath.rules.base import Facts, Rule, Weights, draw_feedback
from feedbackpath.rules.mirror_kolen_pollack import START_ANGLE_DEG, Start, settings_to_start
from feedbackpath.rules.weight_mirror import can_mirror


@dataclass(frozen=True, init=False)
class MirrorFeedbackAlignment(Rule):
    """Mirror before training, then leave B as it is.

    Call ``path.mirror()`` before the first step; else the first ``path.step()`` does it.

    Args:
        mirror: Settings of the one mirroring; None: those of ``start``.
        start: ``"faithful"``: the weight mirror, until it is predicted to be within 2 degrees;
            ``"exact"``: the exact read-out.

    Example:
        >>> import feedbackpath as fp
        >>> path = fp.untie(torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.ReLU()), "mirror-fa")
        >>> path.mirror()
        >>> path.matrix_angles()["0"] < 2.5
        True
    """

    name: ClassVar[str] = "mirror-fa"
    facts: ClassVar[Facts] = Facts(
        paper="after Akrout et al. 2019, eq. 3 and 7",
        equation="B mirrored once, then fixed",
        needs="mirror mode before training",
        verdict="transport-free",
        flops=1.0,
    )
    start_angle_deg: ClassVar[float] = START_ANGLE_DEG
    mirror: Mirror

    def __init__(self, mirror: Mirror | None = None, start: Start = "faithful") -> None:
        object.__setattr__(self, "mirror", settings_to_start(start, mirror))

    def serves(self, weights: Weights) -> bool:
        """Layers that a mirror can run: recurrent layers and unknown ones are left to backprop."""
        return can_mirror(weights)

    def start(self, weights: Weights, context: RuleContext) -> None:
        """Draw every B at random; see that every layer's activation is known."""
        draw_feedback(weights, context)
        context.part(MirrorMode).find_activations(weights)

    def step(self, weights: Weights, context: RuleContext) -> None:
        """Mirror what has never been mirrored; from then on B is fixed."""
        mode = context.part(MirrorMode)
        fresh = [weight for weight in weights if weight.name not in mode.passes]
        if fresh:
            mode.begin(fresh, self.mirror, self.start_angle_deg)
