"""Difference target propagation (DTP): layers get targets, which learned inverses take down the net.

Lee et al. 2015, equations 13 and 15. For a layer ``y = W x + b`` with N samples a step and errors delta of a
loss that averages over them, t = y - N delta is the target of y, and x gets the error of its own target::

    g(y) = psi(B^T (y - b))             psi the identity, or tanh
    dx   = (g(y) - g(t)) / N            so that x - N dx = x - g(y) + g(t), equation 15
    R    = 1/2 E|g(W x~) - x~|^2        with x~ = x + eps, eps of variance sigma^2; equation 13

B goes down the slope of R, divided by E|W x~|^2. On linear layers R is least at a regression::

    B = (W C W^T)^-1 W C                with C = E[x~ x~^T]; B^T = W^-1 if W has one

So errors go back through an inverse of W, as in Gauss and Newton's method, and not along backprop's.

``loss="difference"`` is the local difference reconstruction loss of Ernoult et al. 2022::

    R = E[-eps . (g(W (x + eps)) - g(W x)) + 1/2 |g(W x + eta) - g(W x)|^2] / sigma^2

In small noise that is ``-tr(J W) + 1/2 |J|^2`` for the Jacobian J of g, least at ``J = W^T``: errors are then
backprop's. Where psi is the identity, R has the slope B - W on average, for noise of any size. As its sampled
slope is divided by E|eta|^2 / sigma^2, the m outputs, W - B shrinks by (1 - rate / m) a step.

Differs from the papers: a layer ends before its activation, whose slope autograd sends delta through; g has
no bias of its own; the output's target comes from the gradient, and goes through g as every other. The paper
of Ernoult et al. was not at hand: its loss is written down here from memory, and tested by where it leads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from feedbackpath.core.context import RuleContext
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.core.sendback import SendBack
from feedbackpath.errors import RuleError
from feedbackpath.mirror.passage import forward_passage
from feedbackpath.rules.activity_rule import ActivityRule, forward, own_noise, product
from feedbackpath.rules.base import Facts, Weights
from feedbackpath.rules.sample_targets import SampleTargets, inverse


@dataclass(frozen=True)
class DifferenceTargetPropagation(ActivityRule):
    """Give each layer a target by a learned inverse of the layer above.

    An activation that works in place is refused: it overwrites the output. B learns in ``path.step()``.

    Args:
        rate: The size of a step of B, between 0 and 2.
        loss: What B learns by: ``"reconstruction"`` (Lee et al.) or ``"difference"`` (Ernoult et al.).
        inverse: psi: ``"linear"``, or ``"tanh"`` where inputs lie between -1 and 1.
        sigma: Standard deviation of the noise that B learns from.

    Example:
        >>> import feedbackpath as fp
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 4))
        >>> path = fp.untie(model, fp.DifferenceTargetPropagation(loss="difference"))
        >>> for _ in range(100):
        ...     model(torch.randn(64, 8)).sum().backward()
        ...     path.step()
        >>> path.delta_angles(lambda: model(torch.randn(64, 8)).sum())["0"] < 10
        True
    """

    name: ClassVar[str] = "dtp"
    facts: ClassVar[Facts] = Facts(
        paper="Lee et al. 2015, eq. 15; Ernoult et al. 2022",
        equation="dx = (g(y) - g(y - N delta)) / N, g a learned inverse",
        needs="noise after each update; each layer's input and output, kept",
        verdict="transport-free",
        flops=3.67,
    )
    send_back: ClassVar[SendBack] = SampleTargets()
    group: ClassVar[str] = "targets"
    search_space: ClassVar[Mapping[str, Sequence[Any]]] = {
        "rate": ("log", 0.01, 1.9),
        "loss": ("choice", "reconstruction", "difference"),
        "sigma": ("log", 0.01, 1.0),
    }
    loss: Literal["reconstruction", "difference"] = "reconstruction"
    inverse: Literal["linear", "tanh"] = "linear"
    sigma: float = 0.1

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        super().__post_init__()
        if not self.sigma > 0.0:
            raise RuleError(f"dtp: sigma must be above 0, not {self.sigma}")

    def serves(self, weights: Weights) -> bool:
        """Linear layers, and convolutions that pad with zeros, that run by themselves."""
        return super().serves(weights) and self.send_back.serves(list(weights))

    def after_backward(
        self, weight: UntiedWeight, x: Tensor, output: Tensor, delta: Tensor, context: RuleContext
    ) -> None:
        """Keep what the layer saw until the step: noise passes through W then, apart from training."""
        if not context.is_measuring:
            weight.layer.untied.memo.setdefault("dtp", []).append((x, output))

    def step(self, weights: Weights, context: RuleContext) -> None:
        """Let every B learn from noise about what its layer saw."""
        for weight in context.model.__dict__["untied"].below:
            for x, output in (
                weight.layer.untied.memo.pop("dtp", ()) if weight.layer.untied.rule == self else ()
            ):
                super().after_backward(weight, x, output, output, context)
        super().step(weights, context)

    def slope(
        self, weight: UntiedWeight, x: Tensor, y: Tensor, context: RuleContext
    ) -> tuple[Tensor, Tensor]:
        """Return the slope of R, summed over samples, and the summed squares that it is divided by."""
        layer, b = weight.layer, weight.feedback
        generator = own_noise(weight, "dtp", context)
        eps, eta = (torch.empty_like(like).normal_(0.0, self.sigma, generator=generator) for like in (x, y))
        with forward_passage(weight.weight):
            moved = y + forward(layer, eps, weight.weight)

        (rebuilt, steep), (plain, flat) = inverse(weight, x, moved), inverse(weight, x, y)
        if self.loss == "reconstruction":
            return product(layer, (rebuilt - x - eps) * steep, b, moved), moved.square().sum()
        pushed, level = inverse(weight, x, y + eta)
        spread = product(layer, (pushed - plain) * level, b, y + eta)
        agreed = product(layer, eps * steep, b, moved)
        common = product(layer, (pushed - plain - eps) * flat, b, y)
        return (spread - agreed - common) / self.sigma**2, eta.square().sum() / self.sigma**2
