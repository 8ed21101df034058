"""What one layer sees and answers, as sums of products of its signals about the mean of each neuron."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from feedbackpath.core.layers import UntiedWeight
from feedbackpath.errors import RuleError
from feedbackpath.mirror.activations import Activation
from feedbackpath.mirror.fields import ConvGeometry, conv_products, pad_input

RIDGE = 1e-4  # of the inputs' mean variance, added to each when they are decorrelated
UNFOLDED_VALUES = 2**23  # receptive fields are laid out for so many values at once


class Moments(NamedTuple):
    """Sums over samples and positions, all about the mean of each neuron over its minibatch.

    Attributes:
        products: Sum of y x, laid out as the rows of W that they belong to.
        pairs: How many products each value is the sum of, less the degrees of freedom that means take.
        drive_answer: Sum of z y by output channel.
        drive_power: Sum of z^2 by output channel.
        input_power: Sum of x^2 over all inputs.
        inputs: How many squares those are, less the degrees of freedom that means take.
        fields: Sum of x x^T over receptive fields ``[groups, n, n]``; empty where not needed.
        samples: How many receptive fields those are.
    """

    products: Tensor
    pairs: Tensor
    drive_answer: Tensor
    drive_power: Tensor
    input_power: Tensor
    inputs: Tensor
    fields: Tensor
    samples: Tensor

    def add(self, other: "Moments") -> "Moments":
        """Return the sums over both."""
        return Moments(*(one + more for one, more in zip(self, other, strict=True)))

    def correlate(self) -> Tensor:
        """Return cov, the mean of y x over the pairs of each weight; 0 where only padding came."""
        return self.products / self.pairs.clamp_min(1.0)

    def regress(self) -> Tensor:
        """Return cov (C + ridge v I)^-1, laid out as the products."""
        variance = self.fields.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        damped = self.fields + RIDGE * variance * torch.eye(self.fields.shape[1]).to(self.fields)
        by_group = self.products.reshape(len(self.fields), -1, self.fields.shape[1])
        solved: Tensor = torch.linalg.solve(damped, by_group.mT)
        return solved.mT.reshape(self.products.shape)

    def input_covariance(self) -> Tensor:
        """Return C ``[groups, n, n]``, each column averaged over the pairs that its input's weight has."""
        pairs = self.pairs.clamp_min(1.0).flatten()
        return self.fields / pairs.repeat(self.fields.shape[-1] // pairs.numel())


def measure(weight: UntiedWeight, activation: Activation, x: Tensor, z: Tensor, with_inputs: bool) -> Moments:
    """Measure one use of a weight.

    Args:
        weight: The weight.
        activation: What follows its layer.
        x: The layer's input ``[..., in]``, or ``[N, C_in, ...]`` of a convolution.
        z: Its drive ``[..., out]``, or ``[N, C_out, ...]``.
        with_inputs: Whether to take the covariance of the inputs as well.

    Raises:
        RuleError: There is one sample alone.
    """
    of_kind = _measure_convolution if isinstance(weight.layer, _ConvNd) else _measure_dense
    return of_kind(weight, activation, x, z, with_inputs)


def _measure_dense(
    weight: UntiedWeight, activation: Activation, x: Tensor, z: Tensor, with_inputs: bool
) -> Moments:
    """Measure a dense layer's inputs ``[..., in]`` and drives ``[..., out]``: all of them are samples."""
    x, z = x.reshape(-1, x.shape[-1]), z.reshape(-1, z.shape[-1])
    x, y, z = (_about_mean(signal, weight) for signal in (x, activation(z), z))
    return Moments(
        y.mT @ x,
        x.new_tensor(len(x) - 1.0),
        *_drive_sums(z, y),
        x.square().sum(),
        x.new_tensor((len(x) - 1.0) * x.shape[1]),
        (x.mT @ x)[None] if with_inputs else x.new_empty(0),
        x.new_tensor(float(len(x))),
    )


def _measure_convolution(
    weight: UntiedWeight, activation: Activation, x: Tensor, z: Tensor, with_inputs: bool
) -> Moments:
    """Measure a convolution's input ``[N, C_in, ...]`` and drive ``[N, C_out, ...]``.

    Each position is a neuron with a mean of its own, for a border is driven otherwise than the middle. A
    weight is averaged over the pairs that it connects, as in Appendix D.2: fewer where it meets a padding.
    """
    layer = weight.layer
    assert isinstance(layer, _ConvNd)
    if x.dim() == len(layer.kernel_size) + 1:
        x, z = x[None], z[None]
    x, y, z = (_about_mean(signal, weight) for signal in (x, activation(z), z))
    num_samples, freedom, num_inputs, input_power = len(x), len(x) - 1.0, x[0].numel(), x.square().sum()
    x, geometry = _walk(layer, x, z)
    shape = weight.weight.shape
    ones = x.new_ones(1, 1, *x.shape[2:]), x.new_ones(1, 1, *z.shape[2:])
    pairs = conv_products(geometry._replace(groups=1), x.new_empty(1, 1, *shape[2:]), *ones)
    return Moments(
        conv_products(geometry, x.new_empty(shape), x, y),
        pairs * freedom,
        *_drive_sums(z, y),
        input_power,
        x.new_tensor(freedom * num_inputs),
        _field_products(x, geometry, shape[2:]) if with_inputs else x.new_empty(0),
        x.new_tensor(float(num_samples * z[0, 0].numel())),
    )


def _about_mean(signal: Tensor, weight: UntiedWeight) -> Tensor:
    """Take the mean over the minibatch off each neuron's signal."""
    if len(signal) < 2:
        raise RuleError(f"one input: {weight.name!r} saw one sample; run the model on a minibatch")
    return signal - signal.mean(0)


def _drive_sums(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of z y and of z^2 by channel, dimension 1."""
    z, y = (signal.transpose(0, 1).flatten(1) for signal in (z, y))
    return torch.linalg.vecdot(z, y), torch.linalg.vecdot(z, z)


def _walk(layer: _ConvNd, x: Tensor, z: Tensor) -> tuple[Tensor, ConvGeometry]:
    """Return a convolution's input, padded as far as the layer does that itself, and its geometry."""
    if not layer.transposed:
        x, padding = pad_input(layer, x)
        nothing = (0,) * len(padding)
        return x, ConvGeometry(layer.stride, padding, layer.dilation, False, nothing, layer.groups)
    sizes = zip(x.shape[2:], z.shape[2:], layer.kernel_size, layer.stride, layer.padding, layer.dilation,
                strict=True)  # fmt: skip
    extra = tuple(
        out - ((size - 1) * stride - 2 * int(padding) + dilation * (kernel - 1) + 1)
        for size, out, kernel, stride, padding, dilation in sizes
    )
    paddings = tuple(int(padding) for padding in layer.padding)
    return x, ConvGeometry(layer.stride, paddings, layer.dilation, True, extra, layer.groups)


def _field_products(x: Tensor, geometry: ConvGeometry, kernel: Sequence[int]) -> Tensor:
    """Sum x x^T over all receptive fields: ``[groups, n, n]``, n = C_in / groups times the kernel's size."""
    dims = len(kernel)
    x = F.pad(x, [side for padding in reversed(geometry.padding) for side in (padding, padding)])
    for dim, (size, stride, dilation) in enumerate(
        zip(kernel, geometry.stride, geometry.dilation, strict=True), start=2
    ):
        x = x.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
    x = x.reshape(len(x), geometry.groups, -1, *x.shape[2:])  # [N, groups, C, positions..., kernel...]
    x = x.movedim(1, 0).movedim(2, 2 + dims)  # [groups, N, positions..., C, kernel...]
    num_inputs = x.shape[2 + dims] * math.prod(kernel)
    total = x.new_zeros(geometry.groups, num_inputs, num_inputs)
    at_once = max(1, UNFOLDED_VALUES * x.shape[1] // x.numel())
    for part in torch.split(x, at_once, 1):
        laid_out = part.reshape(geometry.groups, -1, num_inputs)
        total += laid_out.mT @ laid_out
    return total
