"""The weight mirror (WM): between updates of W, noise shows each B what its W has become.

Akrout et al. 2019, equations 5-7 and 21, Algorithm 1, Appendix D.2. All neurons of a layer fire independent
noise of unit variance at once. It passes through the layer's own forward call and its activation; batch means
are subtracted; B integrates the covariance, and decays. The mechanism: ``feedbackpath.mirror``.

Differs from the paper: B's gain is calibrated by each neuron's own mean slope, so that it settles at W (the
paper's own reading is ``Mirror.paper()``); noise has as many examples as the minibatch, not 2048; biases are
blocked (Section 4.3; the convolutions of the paper's networks have none); norms between a layer and its
activation are passed over; the first layer is mirrored too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from feedbackpath.core.context import RuleContext
from feedbackpath.mirror import Mirror, MirrorMode
from feedbackpath.mirror.layouts import view_of
from feedbackpath.rules.base import Facts, Rule, Weights, draw_feedback


@dataclass(frozen=True)
class WeightMirror(Rule):
    """Mirror every layer after each update, with as many examples of noise as the minibatch has.

    Call ``path.mirror()`` before training for the first mirroring (two epochs of it in the paper). Until a
    first minibatch has been seen, noise has 2048 examples, and maps just large enough for a kernel.

    The size of each layer's input is seen in the first step, except under ``torch.compile``.

    Args:
        mirror: Settings of mirror mode. The paper's are ``WeightMirror(Mirror.paper())``.

    Example:
        >>> import feedbackpath as fp
        >>> path = fp.untie(torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.ReLU()), "wm")
        >>> path.mirror()
        >>> 0.5 < path.matrix_angles()["0"] < 4
        True
    """

    name: ClassVar[str] = "wm"
    facts: ClassVar[Facts] = Facts(
        paper="Akrout et al. 2019, eq. 7 and 21",
        equation="B <- (1 - d) B + d cov(y, x) / (sigma^2 s), x noise",
        needs="a second phase, mirror mode, after each update",
        verdict="transport-free",
        flops=1.67,
    )
    search_space: ClassVar[Mapping[str, Sequence[Any]]] = {
        # As many samples as a minibatch and a long memory, or more samples and a short one: where W learns
        # fast, a B that is late does more harm than one that is noisy.
        "mirror": (
            "choice",
            {},
            {"target_angle_deg": 20.0, "forgetting": 0.6},
            {"target_angle_deg": 10.0, "forgetting": 0.3},
        )
    }
    mirror: Mirror = field(default_factory=Mirror)

    def serves(self, weights: Weights) -> bool:
        """Layers that a mirror can run: unknown ones are left to backprop."""
        return can_mirror(weights)

    def start(self, weights: Weights, context: RuleContext) -> None:
        """Draw every B at random; see what the first step brings each layer, and what follows it."""
        draw_feedback(weights, context)
        context.part(MirrorMode).watch_step(weights)

    def step(self, weights: Weights, context: RuleContext) -> None:
        """Mirror the layers whose turn it is: by default all."""
        context.part(MirrorMode).run_due(weights, self.mirror, context.steps)


def can_mirror(weights: Weights) -> bool:
    """Whether a mirror can run a layer with these weights."""
    return all(view_of(weight) is not None for weight in weights)
