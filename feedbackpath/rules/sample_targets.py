"""The carrier of difference target propagation: each sample of a layer has a target of its own.

With ``y = W x + b``, N samples, and delta the error of a loss that averages over them, ``y - N delta`` is a
sample's target. ``feedbackpath.core.sendback.Target`` has y - delta, and an inverse that does not see the
layer's input: that of a convolution has to know its size.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from feedbackpath.core.layers import UntiedWeight
from feedbackpath.core.sendback import Target
from feedbackpath.rules.activity_rule import backward, without_bias

if TYPE_CHECKING:
    from feedbackpath.core.exchange import Exchange


def inverse(weight: UntiedWeight, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return g(y) = psi(B^T y), of the shape of x, and the slope of psi there; y is without the bias."""
    u = backward(weight.layer, x, weight.feedback.to(y.dtype), y)
    if weight.layer.untied.rule.inverse == "linear":
        return u, torch.ones_like(u)
    return u.tanh(), 1.0 - u.tanh().square()


@dataclass(frozen=True)
class SampleTargets(Target):
    """Send ``(g(y) - g(y - N delta)) / N`` to a layer's input; its rule says what psi is."""

    inverse: Any = None

    def _connect(self, weight: UntiedWeight, x: Tensor, y: Tensor, exchange: "Exchange") -> Tensor:
        return _ToTarget.apply(x, y, weight)  # type: ignore[no-any-return, no-untyped-call]


class _ToTarget(torch.autograd.Function):
    """Return y; send delta on to it, and the difference of g to x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: UntiedWeight) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(x, y)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> Any:
        (delta,), (x, y), weight = deltas, ctx.saved_tensors, ctx.weight
        like, y = x.to(y.dtype), without_bias(weight.layer, y)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            if weight.layer.untied.rule.inverse == "linear":  # the difference of two large numbers is inexact
                sent = inverse(weight, like, delta)[0]
            else:
                above, target = inverse(weight, like, y)[0], inverse(weight, like, y - len(y) * delta)[0]
                sent = (above - target) / len(y)
        return sent.to(x.dtype), delta, None
