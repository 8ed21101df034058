"""Mirror once, then Kolen-Pollack: start with B near W, and KP keeps it so.

Akrout et al. 2019 suggest both halves and do not join them: equations 5-7 (the mirror) make B agree with W
once, "in utero"; equations 16 and 17 (Kolen-Pollack) then keep it so, for equal updates keep what difference
there is, and weight decay takes that away. No further mirroring, no waiting for weight decay.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from feedbackpath.core.context import RuleContext
from feedbackpath.errors import RuleError
from feedbackpath.mirror import Mirror, MirrorMode
from feedbackpath.mirror.settings import refuse_no_count
from feedbackpath.rules.base import Facts, Weights
from feedbackpath.rules.kolen_pollack import KolenPollack
from feedbackpath.rules.weight_mirror import can_mirror

START_ANGLE_DEG = 2.0
Start = Literal["faithful", "exact"]


def settings_to_start(start: Start, mirror: Mirror | None) -> Mirror:
    """Return the settings of a rule's one mirroring.

    Args:
        start: ``"faithful"``: the weight mirror, independent noise; ``"exact"``: the exact read-out.
        mirror: Settings that were given; None: the default ones of that start.

    Raises:
        RuleError: The settings given are those of the other start.
    """
    chosen = mirror or (Mirror.exact() if start == "exact" else Mirror())
    if start == "exact" and not chosen.is_exact:
        raise RuleError(f"start='exact' reads out by codes, and the mirror's noise is {chosen.noise!r}")
    if chosen.reading != "calibrated":
        raise RuleError(f"mirroring once needs the 'calibrated' reading, not {chosen.reading!r}")
    return chosen


@dataclass(frozen=True, init=False)
class MirrorKolenPollack(KolenPollack):
    """Mirror before training, then give B the gradient of W.

    Call ``path.mirror()`` before the first step; else the first ``path.step()`` does it. Unlike plain KP
    it does not need weight decay, though decay removes the difference that the mirror left.

    Args:
        mirror: Settings of the one mirroring; None: those of ``start``.
        every: Steps from one mirroring to the next, to correct drift (an optimizer that treats W and B
            differently, rounding, noise on the feedback side); None: mirror once.
        start: ``"faithful"``: the weight mirror, until it is predicted to be within 2 degrees;
            ``"exact"``: the exact read-out, so training is that of backprop.

    Example:
        >>> import feedbackpath as fp
        >>> path = fp.untie(torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.ReLU()), "mirror-kp")
        >>> path.mirror()
        >>> path.matrix_angles()["0"] < 2.5
        True
    """

    name: ClassVar[str] = "mirror-kp"
    facts: ClassVar[Facts] = Facts(
        paper="after Akrout et al. 2019, eq. 7, 16 and 17",
        equation="B mirrored once; then dB = -eta delta y^T - lambda B",
        needs="mirror mode before training; B's own optimizer state",
        verdict="transport-free",
        flops=1.0,
    )
    needs_decay: ClassVar[bool] = False
    search_space: ClassVar[Mapping[str, Sequence[Any]]] = {}  # its B begins with the mirror
    start_angle_deg: ClassVar[float] = START_ANGLE_DEG
    mirror: Mirror
    every: int | None

    def __init__(
        self, mirror: Mirror | None = None, every: int | None = None, start: Start = "faithful"
    ) -> None:
        if every is not None:
            refuse_no_count("mirror-kp: every", every)
        object.__setattr__(self, "mirror", settings_to_start(start, mirror))
        object.__setattr__(self, "every", every)

    def serves(self, weights: Weights) -> bool:
        """Layers that a mirror can run: unknown ones are left to backprop."""
        return can_mirror(weights)

    def start(self, weights: Weights, context: RuleContext) -> None:
        """Draw every B at random; see in the first step what follows each layer."""
        super().start(weights, context)
        context.part(MirrorMode).watch_step(weights, counts=False)

    def step(self, weights: Weights, context: RuleContext) -> None:
        """Mirror what has never been mirrored, and all when it is time; the optimizer does the rest."""
        super().step(weights, context)
        mode = context.part(MirrorMode)
        is_time = self.every is not None and context.steps % self.every == 0
        fresh = [weight for weight in weights if is_time or weight.name not in mode.passes]
        if fresh:
            mode.begin(fresh, self.mirror, self.start_angle_deg)
