"""What noise tells of one weight: the covariance of a layer's answer with its input, and each neuron's slope.

Noise x of variance sigma^2 drives z = W x + b, the layer answers y = phi(z), and::

    cov   = mean of (y - mean y) x^T        E[cov] = sigma^2 s W      (Akrout et al. 2019, equation 11)
    s     = mean (y - mean y) z / mean z^2  the mean slope of each neuron, from its own drive and answer

The slope needs no derivative of phi: for Gaussian drives it is E[phi'(z)] (Stein's lemma), and where y is
proportional to z it is exact.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from feedbackpath.core.layers import UntiedWeight
from feedbackpath.mirror import fields
from feedbackpath.mirror.activations import Activation
from feedbackpath.mirror.fields import ConvGeometry
from feedbackpath.mirror.rates import Rates

LEAST_SLOPE = 1e-4  # a neuron that answers with less than this share of its drive does not answer
Receive = Callable[[Tensor, slice], Tensor]
"""What some of a layer's channels answer to a drive ``[N, channels, ...]``."""


@dataclass
class Estimate:
    """What a pass of mirror mode found.

    Attributes:
        covariance: cov, laid out as W, in W's precision or float32 if that is finer.
        drive_answer: Sum of z (y - mean y) for each output channel.
        drive_power: Sum of z^2 for each output channel, over the same samples.
        variance: sigma^2, one for all or one for each output channel.
        num_samples: Drives of each connection that these are taken over; a sample and its negative are one.
    """

    weight: UntiedWeight
    covariance: Tensor
    drive_answer: Tensor
    drive_power: Tensor
    variance: float | Tensor
    num_samples: int

    @property
    def slopes(self) -> Tensor:
        """The mean slope of each output channel; 1 for a neuron without a drive, which tells nothing."""
        return torch.where(self.drive_power > 0, self.drive_answer / self.drive_power, 1.0)

    @property
    def is_dead(self) -> Tensor:
        """Which output channels do not answer."""
        return self.slopes.abs() < LEAST_SLOPE

    def at_gain_one(self) -> Tensor:
        """Turn the covariance, in place, into the W that it tells of: cov / (sigma^2 s), laid out as W."""
        scale = fields.per_neuron(self.slopes * self.variance, self.weight)
        fields.as_matrix(self.covariance, self.weight).div_(scale)
        return self.covariance


def make_receiver(
    weight: UntiedWeight,
    activation: Activation,
    rates: Rates,
    block_bias: bool,
    dtype: torch.dtype,
    in_pairs: bool,
) -> Receive:
    """Return what some of a layer's channels answer to a drive ``[N, channels, ...]``."""
    bias = fields.open_bias(weight, block_bias)
    at_rest = None if bias is None else bias.detach().to(dtype)[:, None]
    return lambda drive, rows: rates.answer(
        drive, 0.0 if at_rest is None else at_rest[rows], activation, in_pairs
    )


def conv_products(geometry: ConvGeometry, like: Tensor, x: Tensor, answer: Tensor) -> Tensor:
    """Sum answer times input over samples and positions: exactly a convolution's weight gradient.

    Args:
        geometry: How the convolution walks over its input.
        like: A tensor of W's shape; its values make no difference.
        x: Input ``[N, C_in, ...]``.
        answer: Answers ``[N, C_out, ...]``.
    """
    gradients: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        answer, x, like, None, *geometry, (False, True, False)
    )
    return gradients[1]
