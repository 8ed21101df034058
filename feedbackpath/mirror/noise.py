"""What a layer's neurons fire in mirror mode, and what can be read off the answer.

Each function drives one layer with noise of variance sigma^2 and returns

- the covariance of its output with its input, in the layout of W;
- the mean slope of its activation: E[covariance] = sigma^2 * slope * W.

A convolution fires whole maps, without padding: every weight then connects equally many pairs of
inputs and outputs, over which its covariance is averaged (Appendix D.2).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from feedbackpath.layers import UntiedWeight
from feedbackpath.mirror.activations import Activation, identity
from feedbackpath.ops import ConvGeometry

MAP_POSITIONS = 64  # positions in a noise map: 64 along a line, 8 x 8 in a plane, 4 x 4 x 4 in space
MAX_CODE_VALUES = 2**22  # codes are fired in blocks of at most this many values, to bound memory


def fire_gaussian(
    weight: UntiedWeight,
    activation: Activation,
    *,
    num_samples: int,
    sigma: float,
    block_bias: bool,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Fire independent Gaussian noise: the weight mirror of the paper.

    The output's mean is taken over samples and, in a convolution, positions: units that share their weights
    share their mean. The estimate is divided by n - 1, which makes it unbiased for dense layers; in a
    convolution the mean holds something of every weight of the kernel, and a single large kernel over few
    channels comes out small by some percent.

    Args:
        weight: The weight to mirror.
        activation: What follows its layer.
        num_samples: Pairs of input and output that each weight sees, at least.
        sigma: Standard deviation of the noise.
        block_bias: Whether the layer's bias is left out meanwhile (equation 12).
        generator: Random numbers.

    Returns:
        Covariance, laid out as W, and mean slope (a scalar tensor).
    """
    layer = weight.layer
    bias = None if block_bias else _bias(weight)
    if not isinstance(layer, _ConvNd):
        noise = _normal((num_samples, weight.weight.shape[1]), weight, sigma, generator)
        answer, slope = _answer(F.linear(noise, weight.weight, bias), activation)
        answer -= answer.mean(0)
        return answer.T @ noise / (num_samples - 1), slope
    dims = len(layer.kernel_size)
    side = round(MAP_POSITIONS ** (1 / dims))
    num_maps = math.ceil(num_samples / side**dims)
    noise = _normal((num_maps, layer.in_channels, *_map_size(layer, side)), weight, sigma, generator)
    drive = torch.convolution(noise, layer.weight, bias, *_unpadded(layer))
    answer, slope = _answer(drive, activation, _inputs_of_outputs(layer, noise) if layer.transposed else None)
    answer -= answer.mean((0, *range(2, answer.dim())), keepdim=True)
    return _conv_covariance(layer, weight, noise, answer) / (num_maps * side**dims - 1), slope


def fire_orthogonal(
    weight: UntiedWeight,
    activation: Activation,
    *,
    num_samples: int,
    sigma: float,
    block_bias: bool,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Fire orthogonal +-sigma codes and their negatives, one receptive field at a time.

    Each input neuron has its own code, a row of a Walsh-Hadamard matrix with random signs, so that the
    noise's covariance over the codes is sigma^2 I exactly; and phi(z) - phi(-z) is proportional to z
    for every (leaky) ReLU whose bias is blocked. ``num_samples`` is not used: there are as many codes as it
    takes.

    Args and returns as in ``fire_gaussian``.
    """
    matrix = _as_matrix(weight)
    groups, num_outputs, num_inputs = matrix.shape
    own_bias = None if block_bias else _bias(weight)
    bias: Tensor | float = 0.0 if own_bias is None else own_bias[:, None]
    num_codes = 1 << (num_inputs - 1).bit_length()
    signs = torch.randint(0, 2, (num_inputs,), generator=generator, device=matrix.device) * 2 - 1
    covariance, slope = torch.zeros_like(matrix), matrix.new_zeros(())
    chunk = max(1, MAX_CODE_VALUES // max(num_inputs, groups * num_outputs))
    for first in range(0, num_codes, chunk):
        rows = torch.arange(first, min(first + chunk, num_codes), device=matrix.device)
        codes = sigma * _walsh_hadamard(rows, num_inputs).mul_(signs).to(matrix.dtype)
        drive = (codes @ matrix.mT).transpose(0, 1).reshape(len(rows), _num_channels(weight), -1)
        (positive, slope_up), (negative, slope_down) = (
            _answer(signed + bias, activation) for signed in (drive, -drive)
        )
        answer = (positive - negative).reshape(len(rows), groups, num_outputs)
        covariance += answer.permute(1, 2, 0) @ codes
        slope += (slope_up + slope_down) * len(rows)
    return _as_weight(covariance / (2 * num_codes), weight), slope / (2 * num_codes)


def _walsh_hadamard(rows: Tensor, num_columns: int) -> Tensor:
    """Return rows of the Walsh-Hadamard matrix: entry (i, j) is -1 to the number of bits i and j share."""
    bits = rows[:, None] & torch.arange(num_columns, device=rows.device)
    for shift in (32, 16, 8, 4, 2, 1):
        bits ^= bits >> shift  # the parity of all bits gathers in the lowest one
    return 1 - 2 * (bits & 1)


def _inputs_of_outputs(layer: _ConvNd, noise: Tensor) -> Tensor:
    """Count the inputs that reach each output: with stride, dilation or borders they differ, down to none."""
    return torch.convolution(
        torch.ones_like(noise[:1]), torch.ones_like(layer.weight), None, *_unpadded(layer)
    )


def _answer(drive: Tensor, activation: Activation, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return phi(z), which may be z itself, and the mean of phi'(z), each output counted so many times."""
    if activation is identity:
        return drive, drive.new_ones(())
    with torch.enable_grad():
        z = drive.detach().requires_grad_()
        answer = activation(z.clone())  # a copy, for activations that work in place
        (slopes,) = torch.autograd.grad(answer.sum(), z)
    # A neuron without a drive says nothing of its slope: behind a ReLU its subgradient would count as 0.
    counts = (drive != 0) * (1.0 if counts is None else counts)
    return answer.detach(), (slopes * counts).sum() / counts.sum().clamp(min=1)


def _bias(weight: UntiedWeight) -> Tensor | None:
    # A packed attention projection has a linear answer, whose bias goes with the mean.
    return weight.layer.bias if isinstance(weight.layer, nn.Linear | _ConvNd) else None


def _normal(shape: tuple[int, ...], weight: UntiedWeight, sigma: float, generator: torch.Generator) -> Tensor:
    w = weight.weight
    if w.dim() == 4 and w.is_contiguous(memory_format=torch.channels_last):
        batch, channels, *size = shape
        # Filled in memory order and then viewed: normal_ is several times slower on other layouts.
        return _normal_values((batch, *size, channels), w, sigma, generator).movedim(-1, 1)
    return _normal_values(shape, w, sigma, generator)


def _normal_values(shape: tuple[int, ...], like: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device).normal_(0.0, sigma, generator=generator)


def _map_size(layer: _ConvNd, side: int) -> list[int]:
    """Return the size of an input map that gives ``side`` positions a dimension without padding."""
    if layer.transposed:
        return [side] * len(layer.kernel_size)
    sizes = zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
    return [(side - 1) * stride + dilation * (kernel - 1) + 1 for kernel, stride, dilation in sizes]


def _conv_covariance(layer: _ConvNd, weight: UntiedWeight, noise: Tensor, answer: Tensor) -> Tensor:
    """Sum answer x noise over samples and positions: exactly a convolution's weight gradient."""
    placeholder = weight.feedback  # gives the shape; a weight's gradient does not depend on the weight
    gradients: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        answer, noise, placeholder, None, *_unpadded(layer), (False, True, False)
    )
    return gradients[1]


def _unpadded(layer: _ConvNd) -> ConvGeometry:
    zeros = (0,) * len(layer.kernel_size)
    return ConvGeometry(layer.stride, zeros, layer.dilation, layer.transposed, zeros, layer.groups)


def _as_matrix(weight: UntiedWeight) -> Tensor:
    """View W as ``[groups, outputs, inputs]`` of one receptive field (transposed: one input position)."""
    w = weight.weight.detach()
    groups = _groups(weight)
    if weight.transposed:
        return w.reshape(groups, w.shape[0] // groups, -1).mT
    return w.reshape(groups, w.shape[0] // groups, -1)


def _as_weight(matrix: Tensor, weight: UntiedWeight) -> Tensor:
    """Undo ``_as_matrix``."""
    return (matrix.mT if weight.transposed else matrix).reshape(weight.weight.shape)


def _groups(weight: UntiedWeight) -> int:
    return weight.layer.groups if isinstance(weight.layer, _ConvNd) else 1


def _num_channels(weight: UntiedWeight) -> int:
    """Return the number of output channels: activations with a setting a channel need them in dimension 1."""
    return weight.weight.shape[1] * _groups(weight) if weight.transposed else weight.weight.shape[0]
