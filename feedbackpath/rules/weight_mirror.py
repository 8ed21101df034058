"""The weight mirror (WM): between updates of W, noise shows each B what its W has become.

Akrout et al. 2019, equations 5-7 and 21, Algorithm 1, Appendix D.2. The mechanism: ``feedbackpath.mirror``.

Differs from the paper: the default reading settles at B = W (the printed one at a fraction of it); the
number of noise samples follows from each layer's fan-in instead of being the batch size; noise maps have
a size of their own and no padding; biases are blocked (Section 4.3; the convolutions of the paper's
networks have none); norms between a layer and its activation are passed over.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from feedbackpath.layers import UntiedWeight
from feedbackpath.mirror.mode import Mirror
from feedbackpath.rules.base import Clock, FeedbackKind, draw_feedback


@dataclass(frozen=True)
class WeightMirror:
    """Mirror every layer a little after each update.

    Call ``path.mirror()`` before training for the first mirroring (two epochs of it in the paper); without
    it B comes to agree with W during the first dozens of steps.

    Args:
        mirror: Settings of mirror mode. The paper's literal Algorithm 1 is
            ``WeightMirror(Mirror(reading="printed"))``.

    Example:
        >>> import feedbackpath as fp
        >>> path = fp.untie(torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.ReLU()), "wm")
        >>> path.mirror()
        >>> path.matrix_angles()["0"] < 12
        True
    """

    name: ClassVar[str] = "wm"
    feedback_kind: ClassVar[FeedbackKind] = "own"
    mirror: Mirror = field(default_factory=Mirror)

    def start(self, weights: Sequence[UntiedWeight], clock: Clock) -> None:
        """Draw every B at random; see that every layer's activation is known."""
        draw_feedback(weights, clock)
        clock.mirror.find_activations(weights)

    def step(self, weights: Sequence[UntiedWeight], clock: Clock) -> None:
        """Make one pass of mirror mode through all layers."""
        clock.mirror.run(weights, self.mirror)
