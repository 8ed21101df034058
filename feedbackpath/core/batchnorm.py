"""Batch normalisation that sends back its scale alone, as the paper's networks did.

Akrout et al. 2019, Appendix D.3: "we simply passed the scaling parameter sigma from the forward to the
feedback path (mu was not needed)": one scalar for each feedback neuron. With x_hat = (x - mu) / sigma::

    y = gamma x_hat + beta
    dL/dx = gamma / sigma delta                                                here
    dL/dx = gamma / sigma (delta - mean(delta) - x_hat mean(delta x_hat))      autograd

Autograd minds that mu and sigma depend on x. The gradients of gamma and beta are the same in both. The paper
does not say whether gamma goes along with sigma; it is assumed here: gamma is a scalar of the same neuron.
"""

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn


class SigmaBatchNorm(nn.Module):
    """BatchNorm whose forward pass is torch's, bit for bit, and that sends back gamma / sigma alone.

    Mixed into the class that a norm had; it reads ``eps`` and ``weight`` there.
    """

    plain_type: ClassVar[type[nn.Module]]

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``[N, C, ...]`` by channel."""
        forward = super().forward
        if not self.training or not input.requires_grad:
            return cast(Tensor, forward(input))  # evaluation has fixed mu and sigma: all else is theirs
        detached = forward(input.detach())
        batch = input.detach().to(torch.promote_types(input.dtype, torch.float32))
        dims = [dim for dim in range(input.dim()) if dim != 1]
        variance = batch.var(dims, unbiased=False)
        scale = torch.rsqrt(variance + cast(float, self.eps))
        if self.weight is not None:
            scale = scale * cast(Tensor, self.weight).detach()
        passed: Tensor = _PassScaled.apply(input, detached, scale)  # type: ignore[no-untyped-call]
        return passed

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the plain class: this one is made when it is needed."""
        return (_make_empty, (self.plain_type,), *super().__reduce_ex__(protocol)[2:])


class _PassScaled(torch.autograd.Function):
    """Return ``output`` as it is; give delta to the norm's own parameters and delta * scale to ``x``."""

    @staticmethod
    def forward(x: Tensor, output: Tensor, scale: Tensor) -> Tensor:
        return output.clone()  # not a view of it: ReLU(inplace=True) may change it

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _, _, scale = inputs
        ctx.save_for_backward(scale)

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor, Tensor, None]:
        (delta,) = deltas
        (scale,) = ctx.saved_tensors
        by_channel = scale.to(delta.dtype).view(1, -1, *(1,) * (delta.dim() - 2))
        return delta * by_channel, delta, None


_SIGMA_TYPES: dict[type[nn.Module], type[SigmaBatchNorm]] = {}


def sigma_type(plain: type[nn.Module]) -> type[SigmaBatchNorm] | None:
    """Return the class of a norm that sends back sigma alone; None where it has a forward pass of its own."""
    bases = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    if not any(issubclass(plain, base) and plain.forward is base.forward for base in bases):
        return None
    if plain not in _SIGMA_TYPES:
        body = {"plain_type": plain, "__module__": plain.__module__, "__doc__": plain.__doc__}
        made = type(f"Sigma{plain.__name__}", (SigmaBatchNorm, plain), body)
        _SIGMA_TYPES[plain] = cast(type[SigmaBatchNorm], made)
    return _SIGMA_TYPES[plain]


def _make_empty(plain: type[nn.Module]) -> SigmaBatchNorm:
    kind = sigma_type(plain)
    assert kind is not None
    return kind.__new__(kind)
