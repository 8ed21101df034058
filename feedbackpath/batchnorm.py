"""Batch normalisation that sends back its scale alone, as the paper's networks did.

Akrout et al. 2019, Appendix D.3: "we simply passed the scaling parameter sigma from the forward to the
feedback path (mu was not needed)": one scalar for each feedback neuron. With x_hat = (x - mu) / sigma::

    y = gamma x_hat + beta
    dL/dx = gamma / sigma delta                                                here
    dL/dx = gamma / sigma (delta - mean(delta) - x_hat mean(delta x_hat))      autograd

Autograd minds that mu and sigma depend on x. The gradients of gamma and beta are the same in both. The paper
does not say whether gamma goes along with sigma; it is assumed here: gamma is a scalar of the same neuron.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class SigmaBatchNorm(nn.modules.batchnorm._BatchNorm):
    """What the three sizes share: forward as torch's, bit for bit; backward through gamma / sigma alone."""

    plain_type: ClassVar[type[nn.Module]]

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``[N, C, ...]`` by channel."""
        if not self.training or not input.requires_grad:
            return super().forward(input)  # evaluation has fixed mu and sigma: nothing else to send back
        detached = super().forward(input.detach())
        batch = input.detach().to(torch.promote_types(input.dtype, torch.float32))
        dims = [dim for dim in range(input.dim()) if dim != 1]
        variance = batch.var(dims, unbiased=False)
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight.detach()
        passed: Tensor = _PassScaled.apply(input, detached, scale)  # type: ignore[no-untyped-call]
        return passed


class _PassScaled(torch.autograd.Function):
    """Return ``output`` as it is; give delta to the norm's own parameters and delta * scale to ``x``."""

    @staticmethod
    def forward(x: Tensor, output: Tensor, scale: Tensor) -> Tensor:
        return output.view_as(output)

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


class SigmaBatchNorm1d(SigmaBatchNorm, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` that sends back gamma / sigma alone."""

    plain_type = nn.BatchNorm1d


class SigmaBatchNorm2d(SigmaBatchNorm, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that sends back gamma / sigma alone."""

    plain_type = nn.BatchNorm2d


class SigmaBatchNorm3d(SigmaBatchNorm, nn.BatchNorm3d):
    """``nn.BatchNorm3d`` that sends back gamma / sigma alone."""

    plain_type = nn.BatchNorm3d


SIGMA_TYPES: dict[type[nn.Module], type[SigmaBatchNorm]] = {
    kind.plain_type: kind for kind in (SigmaBatchNorm1d, SigmaBatchNorm2d, SigmaBatchNorm3d)
}
