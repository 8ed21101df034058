"""Who carries the error to a layer's input: chosen by a rule as its ``send_back``.

With delta the error at a layer's output, e that at the model's output, x a layer's input and y its output::

    Local       dx = op'(delta, B)          in W's place (feedback alignment, Kolen-Pollack, the mirror)
    Broadcast   dx = e B                    straight from the model's output (direct feedback alignment)
    Target      dx = g(y) - g(y - delta)    y - delta is the layer's target (target propagation)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from feedbackpath.arguments import CheckedArguments
from feedbackpath.core import pytorch
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.core.operations import Args, Call, Kwargs
from feedbackpath.errors import RuleError

if TYPE_CHECKING:
    from feedbackpath.core.exchange import Exchange


class SendBack(Protocol):
    """Carries the error to the inputs of layers.

    Attributes:
        is_local: Whether B stands where W stood, so that it has W's shape.
        is_broadcast: Whether the error comes from the model's output, so that the whole model has to run.
    """

    is_local: ClassVar[bool]
    is_broadcast: ClassVar[bool]

    def feedback_shape(self, weight: UntiedWeight) -> torch.Size | None:
        """Return the shape of B; None: it shows when the model first runs."""

    def run(self, layer: nn.Module, forward: Call, args: Args, kwargs: Kwargs, exchange: "Exchange") -> Any:
        """Run a layer's own forward pass, with gradients that go back as this object says."""

    def serves(self, weights: list[UntiedWeight]) -> bool:
        """Whether a layer with these weights can be run so."""


@dataclass(frozen=True)
class Local:
    """Send delta back through B, in W's place (equation 3). B has W's layout; any module can be run."""

    is_local: ClassVar[bool] = True
    is_broadcast: ClassVar[bool] = False

    def feedback_shape(self, weight: UntiedWeight) -> torch.Size | None:
        """Return W's shape."""
        return weight.weight.shape

    def serves(self, weights: list[UntiedWeight]) -> bool:
        """Any layer."""
        return True

    def run(self, layer: nn.Module, forward: Call, args: Args, kwargs: Kwargs, exchange: "Exchange") -> Any:
        """Run the forward pass: the exchange sees to each operation in it."""
        return forward(*args, **kwargs)


LOCAL: SendBack = Local()


class _OneInput:
    """What layers have in common that take one input and own one weight."""

    is_local: ClassVar[bool] = False

    def serves(self, weights: list[UntiedWeight]) -> bool:
        """Layers with one weight and one input, such as linear layers, convolutions; not attention's."""
        unfit = nn.MultiheadAttention, nn.Bilinear, nn.modules.linear.NonDynamicallyQuantizableLinear
        return len(weights) == 1 and not isinstance(weights[0].layer, unfit)

    def run(self, layer: nn.Module, forward: Call, args: Args, kwargs: Kwargs, exchange: "Exchange") -> Any:
        """Run the layer on an input that sends nothing back by itself."""
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, Tensor) or not x.requires_grad:
            return forward(*args, **kwargs)
        if args:
            args = (x.detach(), *args[1:])
        else:
            kwargs = {**kwargs, "input": x.detach()}
        (weight,) = layer.__dict__["untied"].weights
        return self._connect(weight, x, forward(*args, **kwargs), exchange)

    def _connect(self, weight: UntiedWeight, x: Tensor, y: Tensor, exchange: "Exchange") -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Broadcast(_OneInput, CheckedArguments):
    """Send the error at the model's output straight to each layer's input (Nokland 2016).

    B of a layer is ``[outputs, *input]``: ``[outputs, in_features]`` of a linear layer, ``[outputs, C, H,
    W]`` of a convolution. It is made when the model first runs. The model's output is a tensor ``[...,
    outputs]``; layers without an input that asks for a gradient need no error, and get no B. ``signal`` makes
    of e what is sent in its place, ``dx = signal(e) B``; None: e itself.
    """

    signal: Callable[[Tensor], Tensor] | None = None
    is_broadcast: ClassVar[bool] = True

    def feedback_shape(self, weight: UntiedWeight) -> torch.Size | None:
        """Return None: it takes the sizes of the model's output and of the layer's input."""
        return None

    def _connect(self, weight: UntiedWeight, x: Tensor, y: Tensor, exchange: "Exchange") -> Tensor:
        if not pytorch.is_in_backward():
            exchange.deliveries.append((x, weight))
        elif pytorch.outer_hooks() is None:
            raise RuleError(
                f"{weight.name!r} runs under reentrant checkpointing, where the error of the model's output "
                "cannot reach it: checkpoint with use_reentrant=False"
            )
        return y  # else checkpointing recomputes a layer whose error is on its way


@dataclass(frozen=True)
class Target(_OneInput, CheckedArguments):
    """Give each layer a target for its output, and its input the target that g computes from it.

    The target of y is ``y - delta``. Difference target propagation (Lee et al. 2015, equation 15) takes
    ``x - g(y) + g(y - delta)`` for the target of x, so that the error at x is ``g(y) - g(y - delta)``. With
    ``g(y) = y B`` that is delta sent back through B.

    Args:
        inverse: g: given the weight and y, returns an estimate of the layer's input. It reads B by
            ``weight.feedback``.
    """

    inverse: Callable[[UntiedWeight, Tensor], Tensor]
    is_broadcast: ClassVar[bool] = False

    def feedback_shape(self, weight: UntiedWeight) -> torch.Size | None:
        """Return W's shape."""
        return weight.weight.shape

    def _connect(self, weight: UntiedWeight, x: Tensor, y: Tensor, exchange: "Exchange") -> Tensor:
        return _ToTarget.apply(x, y, self.inverse, weight)  # type: ignore[no-any-return, no-untyped-call]


def broadcast_error(output: Any, deliveries: list[tuple[Tensor, UntiedWeight]]) -> Any:
    """Return the model's output, whose error goes to the inputs of layers as well.

    Raises:
        RuleError: The output is no tensor, or an input does not belong to the same samples.
    """
    if not deliveries:
        return output
    if not isinstance(output, Tensor):
        raise RuleError(
            f"a rule that broadcasts the output's error needs a model that returns one tensor, not a "
            f"{type(output).__name__}; let the model's forward return its output alone"
        )
    for x, weight in deliveries:
        weight.layer.__dict__["untied"].make_feedback(weight, _shape_for(x, output, weight))
    xs = [x for x, _ in deliveries]
    feedbacks = [weight.feedback for _, weight in deliveries]
    signals = tuple(weight.layer.__dict__["untied"].send_back.signal for _, weight in deliveries)
    return _BroadcastError.apply(output, signals, *feedbacks, *xs)  # type: ignore[no-untyped-call]


def _shape_for(x: Tensor, output: Tensor, weight: UntiedWeight) -> torch.Size:
    """Return the shape of the B that brings an error of the output's shape to an input."""
    samples = output.dim() - 1
    if x.shape[:samples] != output.shape[:samples]:
        raise RuleError(
            f"the input of {weight.name!r} has shape {list(x.shape)} and the model's output "
            f"{list(output.shape)}: a broadcast error needs the same samples in the first dimension; give "
            "this layer another rule by overrides="
        )
    return torch.Size((output.shape[-1], *x.shape[samples:]))


class _BroadcastError(torch.autograd.Function):
    """Return the output; send e on, ``e B`` to each input, and ``e^T x`` to each B that learns."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, signals: Any, *feedbacks_and_inputs: Tensor) -> Tensor:
        feedbacks, xs = feedbacks_and_inputs[: len(signals)], feedbacks_and_inputs[len(signals) :]
        ctx.signals = signals
        ctx.save_for_backward(*feedbacks, *[x for b, x in zip(feedbacks, xs, strict=True) if b.requires_grad])
        return output.clone()  # not a view of it: a loss may change it in place

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> Any:
        (e,), count = errors, len(ctx.signals)
        feedbacks, kept = ctx.saved_tensors[:count], list(ctx.saved_tensors[count:])
        sent = [e if signal is None else signal(e) for signal in ctx.signals]
        to_inputs = [
            torch.tensordot(s, b.detach().to(s.dtype), dims=1) for s, b in zip(sent, feedbacks, strict=True)
        ]
        samples = list(range(e.dim() - 1))
        to_feedbacks = [
            torch.tensordot(s, kept.pop(0).to(s.dtype), dims=(samples, samples)).to(b.dtype)
            if b.requires_grad
            else None
            for s, b in zip(sent, feedbacks, strict=True)
        ]
        return e, None, *to_feedbacks, *to_inputs


class _ToTarget(torch.autograd.Function):
    """Return y; send delta on to it, and ``g(y) - g(y - delta)`` to x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, inverse: Any, weight: UntiedWeight) -> Tensor:
        ctx.inverse, ctx.weight = inverse, weight
        ctx.save_for_backward(y)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> Any:
        (delta,) = deltas
        (y,) = ctx.saved_tensors
        error = ctx.inverse(ctx.weight, y) - ctx.inverse(ctx.weight, y - delta)
        return error, delta, None, None
