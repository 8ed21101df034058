"""The autograd functions: forward through W, backward through B.

Each is the plain PyTorch operation going forward, so outputs are bit-identical. Going backward, with
delta = dL/dy arriving from above (equation numbers of Akrout et al. 2019)::

    dL/dx = delta sent back through B        equation 3: feedback alignment, and every rule here
    dL/dW = delta x^T                        equation 4: the outer product, free of any weight
    dL/dB = delta x^T                        equation 18: only where B asks for a gradient (Kolen-Pollack)

W is never saved for the backward pass: there is nothing to transport it from. B has W's layout.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

Gradients = tuple[Tensor | None, ...]
_weights_learn = True

# Looked up once: a layer's call asks all of these, and between layers the caches have been emptied.
_autocast_is_on = torch._C._is_any_autocast_enabled
_transforms_are_active = torch._C._are_functorch_transforms_active
_alive = torch._C._functorch.unwrap_if_dead  # a tensor may have outlived its transform


class ConvGeometry(NamedTuple):
    """How a convolution walks over its input; the tuples hold one number for each spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


def linear(x: Tensor, weight: Tensor, feedback: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias``, whose backward pass sends delta through ``feedback``.

    Args:
        x: Input ``[..., in_features]``.
        weight: Forward weight W ``[out_features, in_features]``.
        feedback: Feedback weight B, laid out as W. It gets W's gradient if it requires one.
        bias: Bias ``[out_features]``.

    Returns:
        Output ``[..., out_features]``.

    Example:
        >>> x = torch.ones(1, 2, requires_grad=True)
        >>> linear(x, torch.zeros(3, 2), torch.full((3, 2), 2.0)).sum().backward()
        >>> x.grad
        tensor([[6., 6.]])
    """
    if _autocast_is_on():
        x, weight, bias = _cast_for_autocast(x, weight, bias)
    if _transforms_are_active() or torch.compiler.is_compiling():
        return _apply_traced(_Linear, _TransformableLinear, x, weight, feedback, bias)
    bias = None if bias is None else _alive(bias)
    return _apply_linear(_alive(x), _alive(weight), _alive(feedback), bias)


def convolution(
    x: Tensor, weight: Tensor, feedback: Tensor, bias: Tensor | None, geometry: ConvGeometry
) -> Tensor:
    """Return the (transposed) convolution of ``x`` with ``weight``; delta goes back through ``feedback``.

    Args:
        x: Input ``[N, C_in, ...]`` with one to three spatial dimensions.
        weight: ``[C_out, C_in / groups, ...]``; transposed: ``[C_in, C_out / groups, ...]``.
        feedback: Feedback weight B, laid out as W. It gets W's gradient if it requires one.
        bias: Bias ``[C_out]``.
        geometry: Stride, padding, dilation, transposition and groups.

    Returns:
        Output ``[N, C_out, ...]``.

    Example:
        >>> geometry = ConvGeometry((1,), (0,), (1,), False, (0,), 1)
        >>> x = torch.ones(1, 1, 3, requires_grad=True)
        >>> convolution(x, torch.zeros(1, 1, 2), torch.ones(1, 1, 2), None, geometry).sum().backward()
        >>> x.grad
        tensor([[[1., 2., 1.]]])
    """
    if _autocast_is_on():
        x, weight, bias = _cast_for_autocast(x, weight, bias)
    if _transforms_are_active() or torch.compiler.is_compiling():
        return _apply_traced(_Convolution, _TransformableConvolution, x, weight, feedback, bias, geometry)
    bias = None if bias is None else _alive(bias)
    return _apply_convolution(_alive(x), _alive(weight), _alive(feedback), bias, geometry)


@contextmanager
def errors_alone() -> Iterator[None]:
    """Let backward passes send errors back and work out no weight's gradient.

    Autograd does not tell a function written in Python that nobody asks for one. This holds for the whole
    process: no other thread may train meanwhile.
    """
    global _weights_learn
    before, _weights_learn = _weights_learn, False
    try:
        yield
    finally:
        _weights_learn = before


def _apply_traced(function: Any, transformable: Any, *inputs: Any) -> Tensor:
    """Call an autograd function in the form that torch.func takes, if one of its transforms is active.

    That form has a ``setup_context``, for which PyTorch binds the arguments of each call by their names: that
    takes longer than all the rest of the call.
    """
    return cast(Tensor, (transformable if _transforms_are_active() else function).apply(*inputs))


def _cast_for_autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as autocast would cast the plain operation: autograd sees the casts and undoes them.

    B is not cast here but in the backward pass, so that no low-precision copy of it is kept meanwhile.
    """
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def share(gradient: Tensor) -> Tensor:
    """Return a tensor of the same values whose memory is the other's, until one of the two is written to.

    Autograd would copy a tensor that goes to two parameters. So would whoever clips or unscales gradients in
    place; an update only reads them. Where a tensor cannot be shared so, it is returned as it is.
    """
    is_plain = type(gradient) is Tensor and gradient.device.type in ("cpu", "cuda")
    if not is_plain or torch.compiler.is_compiling() or not hasattr(torch, "_lazy_clone"):
        return gradient
    try:
        return torch._lazy_clone(gradient)
    except RuntimeError:  # memory of an allocator that PyTorch cannot share
        return gradient


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, feedback: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, feedback)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> Gradients:
        (delta,) = deltas
        x, feedback = ctx.saved_tensors
        asks_x, asks_weight, asks_feedback, asks_bias = ctx.needs_input_grad
        grad_x = grad_weight = grad_feedback = grad_bias = None
        is_flat = x.dim() == 2
        if not is_flat:
            delta = delta.reshape(-1, delta.shape[-1])
        if asks_x:
            grad_x = delta.mm(_cast(feedback, delta.dtype))
            grad_x = grad_x if is_flat else grad_x.view(x.shape)
        if (asks_weight or asks_feedback) and _weights_learn:
            grad_weight = delta.t().mm(x if is_flat else x.reshape(-1, x.shape[-1]))
            if asks_feedback:
                grad_feedback = share(_cast(grad_weight, feedback.dtype))
        if asks_bias:
            grad_bias = delta.sum(0)
        return grad_x, grad_weight if asks_weight else None, grad_feedback, grad_bias


class _TransformableLinear(_Linear):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, feedback: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, feedback, _ = inputs
        ctx.save_for_backward(x, feedback)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, feedback: Tensor, bias: Tensor | None, geometry: ConvGeometry
    ) -> Tensor:
        _keep_for_convolution(ctx, x, feedback, bias, geometry)
        return torch.convolution(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> Gradients:
        (delta,) = deltas
        x, feedback = ctx.saved_tensors
        asks_x, asks_weight, asks_feedback, asks_bias, _ = ctx.needs_input_grad
        asks_product = (asks_weight or asks_feedback) and _weights_learn
        # One call, as in plain backprop, with B where W would be: a weight's gradient takes only its shape.
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward.default(
            delta,
            x,
            _cast(feedback, delta.dtype),
            ctx.bias_sizes,
            *ctx.geometry,
            (asks_x, asks_product, asks_bias),
        )
        grad_feedback = share(_cast(grad_weight, feedback.dtype)) if asks_feedback and asks_product else None
        return grad_x, grad_weight if asks_weight else None, grad_feedback, grad_bias, None


class _TransformableConvolution(_Convolution):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        x: Tensor, weight: Tensor, feedback: Tensor, bias: Tensor | None, geometry: ConvGeometry
    ) -> Tensor:
        return torch.convolution(x, weight, bias, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, feedback, bias, geometry = inputs
        _keep_for_convolution(ctx, x, feedback, bias, geometry)


def _keep_for_convolution(
    ctx: Any, x: Tensor, feedback: Tensor, bias: Tensor | None, geometry: ConvGeometry
) -> None:
    ctx.save_for_backward(x, feedback)
    ctx.geometry = geometry
    ctx.bias_sizes = None if bias is None else bias.shape


# What ``apply`` comes to where nothing is traced, without looking once more whether that is so.
_apply_linear: Callable[..., Tensor] = super(torch.autograd.Function, _Linear).apply
_apply_convolution: Callable[..., Tensor] = super(torch.autograd.Function, _Convolution).apply
