"""Mirror once, then Kolen-Pollack: start with B = W, and KP keeps it so.

Akrout et al. 2019 suggest both halves and do not join them: equations 5-7 (the mirror) make B agree with W
once, "in utero"; equations 16 and 17 (Kolen-Pollack) then keep it so, for equal updates keep equals equal. No
further mirroring, no waiting for weight decay: training follows backprop's own course.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from feedbackpath.core.context import RuleContext
from feedbackpath.errors import RuleError
from feedbackpath.mirror import Mirror, MirrorMode
from feedbackpath.mirror.settings import refuse_no_count
from feedbackpath.rules.base import Weights
from feedbackpath.rules.kolen_pollack import KolenPollack
from feedbackpath.rules.weight_mirror import can_mirror


@dataclass(frozen=True)
class MirrorKolenPollack(KolenPollack):
    """Mirror before training, then give B the gradient of W.

    Call ``path.mirror()`` before the first step; else the first ``path.step()`` does it. Unlike plain KP
    it does not need weight decay, though decay heals what the mirror left.

    Args:
        mirror: Settings of the one mirroring; by default orthogonal codes: exact behind ReLUs, and so
            weak that any smooth activation is linear to them.
        every: Steps from one mirroring to the next, to correct drift (an optimizer that treats W and B
            differently, rounding, noise on the feedback side); None: mirror once.

    Example:
        >>> import feedbackpath as fp
        >>> path = fp.untie(torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.ReLU()), "mirror-kp")
        >>> path.mirror()
        >>> path.matrix_angles()["0"] < 0.01
        True
    """

    def __post_init__(self) -> None:
        """Refuse readings that settle elsewhere than at W: Kolen-Pollack would keep what they leave."""
        if self.every is not None:
            refuse_no_count("mirror-kp: every", self.every)
        if self.mirror.reading != "calibrated":
            raise RuleError(f"mirror-kp needs the 'calibrated' reading, not {self.mirror.reading!r}")

    name: ClassVar[str] = "mirror-kp"
    needs_decay: ClassVar[bool] = False
    mirror: Mirror = field(default_factory=Mirror)
    every: int | None = None

    def serves(self, weights: Weights) -> bool:
        """Layers that a mirror can run: recurrent layers and unknown ones are left to backprop."""
        return can_mirror(weights)

    def start(self, weights: Weights, context: RuleContext) -> None:
        """Draw every B at random; see that every layer's activation is known."""
        super().start(weights, context)
        context.part(MirrorMode).find_activations(weights)

    def step(self, weights: Weights, context: RuleContext) -> None:
        """Mirror what has never been mirrored, and all when it is time; the optimizer does the rest."""
        super().step(weights, context)
        mode = context.part(MirrorMode)
        is_time = self.every is not None and context.steps % self.every == 0
        fresh = [weight for weight in weights if is_time or weight.name not in mode.passes]
        if fresh:
            mode.run(fresh, self.mirror, self.mirror.memory_passes)
