"""The weight mirror (WM): between updates of W, noise shows each B what its W has become.

Akrout et al. 2019, equations 5-7 and 21, Algorithm 1, Appendix D.2. The mechanism: ``feedbackpath.mirror``.

Differs from the paper: orthogonal codes take the place of Gaussian noise, so that one pass measures W
exactly and replaces B; layers are mirrored as often as a share of the step's FLOPs allows, those that have
gone stalest first; biases are blocked (Section 4.3; the convolutions of the paper's networks have none);
norms between a layer and its activation are passed over. ``Mirror.paper()`` has the paper's settings; its
noise maps have a size of their own and no padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from feedbackpath.core.context import RuleContext
from feedbackpath.layers import UntiedWeight
from feedbackpath.mirror import Mirror, MirrorMode
from feedbackpath.rules.base import FeedbackKind, draw_feedback


@dataclass(frozen=True)
class WeightMirror:
    """Mirror after each update: all layers, or the stalest where all cost over 3% of a step's FLOPs.

    A layer whose B lags by 0.7 degrees is not kept waiting, whatever it costs.

    Call ``path.mirror()`` before training for the first mirroring (two epochs of it in the paper); without
    it the first step does it.

    What a training step costs is read off the first one, from the sizes of the layers' outputs; under
    ``torch.compile`` it cannot be, and all layers are mirrored after every step.

    Args:
        mirror: Settings of mirror mode. The paper's are ``WeightMirror(Mirror.paper())``.

    Example:
        >>> import feedbackpath as fp
        >>> path = fp.untie(torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.ReLU()), "wm")
        >>> path.mirror()
        >>> path.matrix_angles()["0"] < 0.01
        True
    """

    name: ClassVar[str] = "wm"
    feedback_kind: ClassVar[FeedbackKind] = "own"
    mirror: Mirror = field(default_factory=Mirror)

    def start(self, weights: Sequence[UntiedWeight], context: RuleContext) -> None:
        """Draw every B at random; see that every layer's activation is known."""
        draw_feedback(weights, context)
        mode = context.part(MirrorMode)
        mode.find_activations(weights)
        if self.mirror.when.layers == "drift":
            mode.watch_step(weights)

    def step(self, weights: Sequence[UntiedWeight], context: RuleContext) -> None:
        """Mirror the layers whose turn it is: by default all, or the stalest that the budget pays for."""
        context.part(MirrorMode).run_due(weights, self.mirror, context.steps)
