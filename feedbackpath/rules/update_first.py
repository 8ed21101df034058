"""The order of Algorithm 2: each B is updated, and then the error passes through it, layer by layer.

Akrout et al. 2019, appendix E, for each layer from the last to the first, in W's layout::

    B' = update(B, delta x^T)     equation 17: (1 - lambda) B - eta_B delta x^T under plain SGD
    dx = op'(delta, B')           equation 3, through the B that is new already

The update of B takes the layer's own gradient of this step. W's may come at any time: no error passes
through W. A copy of the optimizer says what B' will be (``feedbackpath.rules.look_ahead``), and errors go
through that. The optimizer itself comes to B' after the backward pass, from the same gradient, and
``path.step()`` sees that it did. On several devices each layer's gradient is averaged before the error goes
on: one more message a layer.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from feedbackpath.core.layers import UntiedWeight
from feedbackpath.core.operations import Args, Call, Kwargs
from feedbackpath.core.pytorch import uncompiled
from feedbackpath.core.sendback import Local
from feedbackpath.errors import RuleError
from feedbackpath.rules.activity_rule import backward, can_run, product
from feedbackpath.rules.look_ahead import SETTING, LookAhead
from feedbackpath.rules.replicas import running_ddp

if TYPE_CHECKING:
    from feedbackpath.core.exchange import Exchange


@dataclass(frozen=True)
class UpdateFirst(Local):
    """Send delta back through B as the update of this very step leaves it."""

    def serves(self, weights: list[UntiedWeight]) -> bool:
        """Linear layers, and convolutions that pad with zeros: one product has all of their gradient."""
        unfit = nn.modules.linear.NonDynamicallyQuantizableLinear  # attention reads its weight by itself
        layer = weights[0].layer
        return len(weights) == 1 and can_run(layer) and not isinstance(layer, unfit)

    def run(self, layer: nn.Module, forward: Call, args: Args, kwargs: Kwargs, exchange: "Exchange") -> Any:
        """Run the layer; what it sends to its input is replaced."""
        x, (weight,) = args[0] if args else kwargs["input"], layer.__dict__["untied"].weights
        if not (x.requires_grad and weight.feedback.requires_grad):
            return forward(*args, **kwargs)
        arrived: list[Tensor] = []
        x = _enter(x, weight, arrived)
        y = forward(x, *args[1:], **kwargs) if args else forward(**(kwargs | {"input": x}))
        _leave(y, arrived)
        return y


@uncompiled
def _enter(x: Tensor, weight: UntiedWeight, arrived: list[Tensor]) -> Tensor:
    ddp = running_ddp()
    if ddp is not None and ddp._join_config.enable:
        raise RuleError(
            f"{SETTING} averages each layer's gradient over all processes, and DistributedDataParallel.join "
            "lets some end before others: give each process the same number of batches (drop_last=True)"
        )
    group = None if ddp is None else ddp.process_group
    return _SendThroughNext.apply(x, weight.feedback, weight, group, arrived)  # type: ignore[no-any-return, no-untyped-call]


@uncompiled
def _leave(y: Tensor, arrived: list[Tensor]) -> None:
    y.register_hook(arrived.append)  # type: ignore[no-untyped-call]


class _SendThroughNext(torch.autograd.Function):
    """Return x; send to it the delta that has arrived at the layer's output, through the next B."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, b: nn.Parameter, weight: UntiedWeight, group: Any, arrived: Any
    ) -> Tensor:
        ctx.b, ctx.weight, ctx.group, ctx.arrived = b, weight, group, arrived
        ctx.save_for_backward(x, b)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *through_old: Tensor) -> Any:
        (x, _), b, layer, untied = ctx.saved_tensors, ctx.b, ctx.weight.layer, ctx.weight.layer.untied
        if untied.context.is_measuring:
            return *through_old, None, None, None, None
        with torch.autocast(x.device.type, enabled=False):
            like, delta = x.to(b.dtype), ctx.arrived.pop().to(b.dtype)
            gradient, make = product(layer, like, b, delta), untied.gradients_of(ctx.weight)
            gradient = _averaged(gradient if make is None else make(gradient)[1], ctx.group)
            through = untied.context.part(LookAhead).update(ctx.weight, b, gradient)
            sent = backward(layer, like, through, delta).to(x.dtype)
        return sent, None, None, None, None


def _averaged(gradient: Tensor, group: Any) -> Tensor:
    """Return the mean over the processes of a group; None: this one is alone."""
    if group is None:
        return gradient
    mean = gradient.clone()
    torch.distributed.all_reduce(mean, group=group)
    return mean.div_(group.size())
