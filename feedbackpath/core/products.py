"""The short way for torch's linear layers and convolutions: one autograd function a call.

``feedbackpath.core.one_operation`` serves these layers too, by several calls, and does where anything stands
between: another form of input, autocast, ``torch.compile``, a listener. Going forward this is the plain
operation. Going backward, with delta = dL/dy arriving from above (equation numbers of Akrout et al. 2019)::

    dL/dx = delta sent back through B        equation 3
    dL/dW = delta x^T                        equation 4
    dL/dB = delta x^T                        equation 17, only where B asks for a gradient (Kolen-Pollack)
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feedbackpath.core import pytorch
from feedbackpath.core.layers import TransposedConvolution
from feedbackpath.core.one_operation import swap
from feedbackpath.core.operations import Args, Kwargs

Gradients = tuple[Tensor | None, ...]


def multiply(layer: Any, args: Args, kwargs: Kwargs) -> Tensor | None:
    """Return what a layer makes of its input; None where it has to go the long way.

    Args:
        layer: A linear layer or a convolution that runs torch's own forward pass.
        args: A batch ``[N, in_features]`` or ``[N, C, ...]``.
        kwargs: None may be given.
    """
    w, b = layer.weight, getattr(layer, "feedback", None)
    is_like_w = b is not None and (b.shape, b.dtype, b.device) == (w.shape, w.dtype, w.device)
    if len(args) != 1 or kwargs or not is_like_w or args[0].layout is not torch.strided:
        return None
    x = args[0]
    if isinstance(layer, nn.Linear):
        if x.dtype != w.dtype or x.dim() < 2 or not x.is_contiguous():
            return None
        if x.dim() == 2:
            return linear(x, w, b, layer.bias)
        # As torch does. The view is made outside: one that a function returns may not be changed in place.
        return linear(x.flatten(0, -2), w, b, layer.bias).view(*x.shape[:-1], len(w))
    padding = layer.padding
    if layer.padding_mode != "zeros" or isinstance(padding, str) or x.dim() != w.dim() or x.dtype != w.dtype:
        return None
    is_transposed = isinstance(layer, TransposedConvolution)
    geometry = layer.stride, padding, layer.dilation, is_transposed, layer.output_padding, layer.groups
    return _convolution(x, w, b, layer.bias, geometry)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        asks_x, asks_w, asks_b, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if asks_w or asks_b else None, b if asks_x else None)
        ctx.w = w
        return F.linear(x, w, bias)

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> Gradients:
        (delta,) = deltas
        x, b = _saved(ctx)
        asks_x, asks_w, asks_b, asks_bias = ctx.needs_input_grad
        rows = delta.flatten(0, -2)
        for_w = rows.t().mm(x.flatten(0, -2)) if asks_w or asks_b else None
        return (
            rows.mm(b).view(*delta.shape[:-1], b.shape[1]) if asks_x else None,
            for_w if asks_w else None,
            pytorch.share(for_w) if asks_b and for_w is not None else None,
            rows.sum(0) if asks_bias else None,
        )


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, bias: Tensor | None, geometry: Any) -> Tensor:
        ctx.save_for_backward(x, b)
        ctx.w = w
        ctx.geometry = geometry
        ctx.bias_sizes = None if bias is None else bias.shape
        return torch.convolution(x, w, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> Gradients:
        (delta,) = deltas
        x, b = _saved(ctx)
        asks_x, asks_w, asks_b, asks_bias, _ = ctx.needs_input_grad
        # One call, as in plain backprop, with B where W would be: a weight's gradient takes only its shape.
        for_x, for_w, for_bias = torch.ops.aten.convolution_backward.default(
            delta, x, b, ctx.bias_sizes, *ctx.geometry, (asks_x, asks_w or asks_b, asks_bias)
        )
        return for_x, for_w if asks_w else None, pytorch.share(for_w) if asks_b else None, for_bias, None


def _saved(ctx: Any) -> tuple[Tensor, Tensor]:
    """Return x and B; where this backward pass is differentiated itself, that goes to W as well."""
    x, b = ctx.saved_tensors
    return x, swap(ctx.w, b, None, False) if b is not None and torch.is_grad_enabled() else b


# What ``apply`` comes to where nothing is traced, without looking once more whether that is so.
linear: Callable[..., Tensor] = super(torch.autograd.Function, _Linear).apply
_convolution: Callable[..., Tensor] = super(torch.autograd.Function, _Convolution).apply
