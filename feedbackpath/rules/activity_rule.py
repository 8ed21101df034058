"""What information, activation and phaseless alignment share: B learns from a layer's own input and output.

Each lowers a loss R of its own. A backward pass tells the rule a layer's input x and its output, of which
``y = op(x, W)`` is left when the bias is taken off. From these and B comes the slope of R, summed over the
samples of a step; ``path.step()`` goes down it. With K the number of positions of a kernel (1 for a linear
layer) the slope is divided by K times the summed squares of the signal that R is quadratic in. That is at
least the largest curvature of R, so a step of any rate below 2 is stable whatever the size of the activity.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feedbackpath.core.context import RuleContext
from feedbackpath.core.layers import Convolution, UntiedWeight, is_torchs_own
from feedbackpath.core.pytorch import has_processes
from feedbackpath.errors import RuleError
from feedbackpath.rules.base import Rule, Weights


@dataclass(frozen=True)
class ActivityRule(Rule):
    """Draw B at random; let it learn from activity, by a loss of its own.

    It takes for granted that W meets activity in the layer that owns it. It does not know of another module
    that reads W, transposed or without the bias.

    Args:
        rate: The size of a step of B, between 0 and 2.
    """

    group: ClassVar[str] = "learned"
    is_mirrorable: ClassVar[bool] = False
    reads_output: ClassVar[bool] = True
    rate: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a rate at which B does not settle."""
        if not 0.0 < self.rate < 2.0:
            raise RuleError(f"{self.name}: rate must lie between 0 and 2, not {self.rate}")

    def serves(self, weights: Weights) -> bool:
        """Linear layers, and convolutions that pad with zeros; others are left to backprop."""
        return len(weights) == 1 and can_run(weights[0].layer)

    def slope(
        self, weight: UntiedWeight, x: Tensor, y: Tensor, context: RuleContext
    ) -> tuple[Tensor, Tensor]:
        """Return the slope of R, summed over samples, and the summed squares that it is divided by."""
        raise NotImplementedError

    @torch.no_grad()
    def after_backward(
        self, weight: UntiedWeight, x: Tensor, output: Tensor, delta: Tensor, context: RuleContext
    ) -> None:
        """Add the slope at this activity to that of the step."""
        if context.is_measuring:
            return
        dtype = weight.feedback.dtype
        with torch.autocast(x.device.type, enabled=False):
            y = without_bias(weight.layer, output.to(dtype))
            slope, power = self.slope(weight, x.to(dtype), y, context)
        seen = context.state.get(weight.name, {"slope": 0.0, "power": 0.0})
        context.state[weight.name] = {"slope": slope + seen["slope"], "power": power + seen["power"]}

    @torch.no_grad()
    def step(self, weights: Weights, context: RuleContext) -> None:
        """Go down the slope that all layers of a weight, on all processes, have found together."""
        everywhere: Weights = context.model.__dict__["untied"].below
        for weight in weights:
            names = [other.name for other in everywhere if other.weight is weight.weight]
            found = [context.state.pop(name) for name in dict.fromkeys(names) if name in context.state]
            slope = sum((part["slope"] for part in found), torch.zeros_like(weight.feedback))
            power = sum((part["power"] for part in found), slope.new_zeros(()))
            if has_processes():
                torch.distributed.all_reduce(slope)
                torch.distributed.all_reduce(power)
            kernel = math.prod(weight.feedback.shape[2:])
            self.descend(weight, slope / (kernel * power).clamp(min=torch.finfo(power.dtype).tiny), context)

    def descend(self, weight: UntiedWeight, slope: Tensor, context: RuleContext) -> None:
        """Change B by a step down a slope of curvature at most 1."""
        weight.feedback.sub_(slope, alpha=self.rate)


def own_noise(weight: UntiedWeight, purpose: str, context: RuleContext) -> torch.Generator:
    """Return random numbers of this weight, purpose, step and process: each has samples of its own."""
    return context.generator(weight, f"{purpose}{process_number() or ''}")


def process_number() -> int:
    """Return the rank of this process; 0 where it is the only one."""
    return torch.distributed.get_rank() if has_processes() else 0


def can_run(layer: nn.Module) -> bool:
    """Whether ``forward`` is what the layer computes."""
    is_zero_padded = isinstance(layer, Convolution) and layer.padding_mode == "zeros"
    return is_torchs_own(type(layer)) and (isinstance(layer, nn.Linear) or is_zero_padded)


def forward(layer: Any, x: Tensor, b: Tensor) -> Tensor:
    """Return ``op(x, B)``: what the layer would make of x with B for a weight, and without its bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, b)
    convolve: Callable[..., Tensor] = getattr(F, f"conv{b.dim() - 2}d")
    return convolve(x, b, None, layer.stride, layer.padding, layer.dilation, layer.groups)


def backward(layer: Any, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """Return ``op'(y, B)``: y sent back through B to the layer's input, which has the shape of x."""
    with torch.enable_grad():
        x = torch.zeros_like(x, requires_grad=True)
        sent: Tensor = torch.autograd.grad(forward(layer, x, b.detach()), x, y)[0]
    return sent


def product(layer: Any, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """Return ``y x^T``, laid out as B: the sum over samples, and over the positions of a kernel."""
    if isinstance(layer, nn.Linear):
        return y.reshape(-1, y.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
    with torch.enable_grad():
        b = b.detach().requires_grad_()
        summed: Tensor = torch.autograd.grad(forward(layer, x, b), b, y)[0]
    return summed


def without_bias(layer: Any, output: Tensor) -> Tensor:
    """Return ``op(x, W)``, of a layer's output."""
    if layer.bias is None:
        return output
    places = 0 if isinstance(layer, nn.Linear) else layer.weight.dim() - 2
    bias: Tensor = layer.bias.detach().to(output.dtype)
    return output - bias.view(-1, *[1] * places)
