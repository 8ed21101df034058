"""What noise tells of one weight: the covariance of a layer's answer with its input, and each neuron's slope.

Noise x of variance sigma^2 drives z = W x + b, the layer answers y = phi(z), and::

    cov   = mean of (y - mean y) x^T        E[cov] = sigma^2 s W      (Akrout et al. 2019, equation 11)
    s     = mean (y - mean y) z / mean z^2  the mean slope of each neuron, from its own drive and answer

The slope needs no derivative of phi: for Gaussian drives it is E[phi'(z)] (Stein's lemma), and where y is
proportional to z it is exact.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from feedbackpath.core.layers import UntiedWeight
from feedbackpath.mirror import fields
from feedbackpath.mirror.activations import Activation, is_channelwise
from feedbackpath.mirror.designs import CODE_LENGTH, Design, orthogonal_codes
from feedbackpath.mirror.fields import ConvGeometry
from feedbackpath.mirror.rates import Rates

CHUNK_VALUES = 2**15  # answers that a CPU works on at once: they stay in its cache
LEAST_SLOPE = 1e-4  # a neuron that answers with less than this share of its drive does not answer
_Receive = Callable[[Tensor, slice], Tensor]
_ALL = slice(None)


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


def estimate_with_codes(
    weight: UntiedWeight,
    activation: Activation,
    rates: Rates,
    *,
    sigma: float,
    block_bias: bool,
    scratch: Tensor | None = None,
) -> Estimate:
    """Fire orthogonal codes, one group of inputs after the other: see ``OrthogonalCodes``.

    Each input's covariance is taken over the codes of its own group. Neurons are worked through some at a
    time, so that their answers stay in a CPU's cache.

    Args:
        weight: The weight to mirror.
        activation: What follows its layer.
        rates: How noise and answers travel.
        sigma: The codes' strength.
        block_bias: Whether the layer's bias is left out meanwhile (equation 12).
        scratch: Memory for the covariance, at least as large as W; made anew where not given.
    """
    dtype = torch.promote_types(weight.weight.dtype, torch.float32)
    codes = rates.send(sigma * orthogonal_codes(weight.weight.device, dtype), in_pairs=True)
    covariance = fields.make_estimate(weight, dtype, scratch)
    source = fields.as_rows(weight.weight.detach(), weight)
    target = (
        torch.empty_like(source, dtype=dtype) if weight.transposed else fields.as_rows(covariance, weight)
    )
    size = _rows_at_once(source, weight, activation)
    receive = _receiver(weight, activation, rates, block_bias, dtype, in_pairs=True)
    sums = _fire_codes(source, target, codes, receive, fields.outputs_per_channel(weight), size)
    if weight.transposed:
        matrix = fields.as_matrix(covariance, weight)
        matrix.copy_(target.view(matrix.shape))
    return Estimate(weight, covariance, *sums, sigma**2, CODE_LENGTH)


def _fire_codes(
    source: Tensor, target: Tensor, codes: Tensor, receive: _Receive, rows_per_channel: int, size: int
) -> tuple[Tensor, Tensor]:
    """Write covariances of answers with codes into ``target``; return sums of z (y - mean y) and of z^2.

    Args:
        source: W as ``[neurons, inputs]``.
        target: Where cov goes, in the same form.
        codes: ``[CODE_LENGTH, CODE_LENGTH]`` as they arrive.
        receive: What channels answer to a drive.
        rows_per_channel: Neurons that share a channel.
        size: Neurons to work on at once.
    """
    decode = codes.mT / (2.0 * CODE_LENGTH)  # a mean over each code and its negative
    sums = []
    for number, (part, place) in enumerate(
        zip(torch.split(source, size), torch.split(target, size), strict=True)
    ):
        rows = slice(number * size, number * size + len(part))
        drive = _in_groups(part).to(codes.dtype) @ codes
        z = drive.view(1, len(part) // rows_per_channel, -1)
        answer = receive(z, rows) - receive(-z, rows)
        sums.append((torch.linalg.vecdot(answer, z), torch.linalg.vecdot(z, z)))
        _decode(answer.view_as(drive), decode, place)
    drive_answer, drive_power = (torch.cat(parts, 1)[0] for parts in zip(*sums, strict=True))
    return drive_answer / 2.0, drive_power


def _in_groups(rows: Tensor) -> Tensor:
    """View ``[neurons, inputs]`` as ``[neurons * groups, CODE_LENGTH]``; zeros fill up the last group."""
    missing = -rows.shape[1] % CODE_LENGTH
    return (F.pad(rows, (0, missing)) if missing else rows).reshape(-1, CODE_LENGTH)


def _decode(answer: Tensor, decode: Tensor, place: Tensor) -> None:
    """Write the covariance of answers with their codes into ``place``, ``[neurons, inputs]``."""
    if place.shape[1] % CODE_LENGTH == 0 and place.is_contiguous():
        torch.mm(answer, decode, out=place.view(-1, CODE_LENGTH))
    else:
        place.copy_((answer @ decode).view(len(place), -1)[:, : place.shape[1]])


def _rows_at_once(rows: Tensor, weight: UntiedWeight, activation: Activation) -> int:
    """Return how many neurons to work on at once: all where their activation, or place in W, asks for it."""
    is_small = rows.device.type != "cpu" or rows.numel() <= CHUNK_VALUES
    if is_small or weight.transposed or is_channelwise(activation):
        return len(rows)
    return max(1, CHUNK_VALUES // rows.shape[1])


def estimate_with_noise(
    weight: UntiedWeight,
    activation: Activation,
    rates: Rates,
    *,
    design: Design,
    field: str,
    num_samples: int,
    sigma: float,
    block_bias: bool,
    generator: torch.Generator,
) -> Estimate:
    """Fire independent noise: at one receptive field (all that a dense layer has), or at whole maps.

    Args:
        weight: The weight to mirror.
        activation: What follows its layer.
        rates: How noise and answers travel.
        design: The noise.
        field: ``"receptive"``, or ``"map"``: a convolution is driven by whole maps without padding, so that
            every weight connects equally many inputs and outputs, and its covariance is averaged over them
            (Appendix D.2).
        num_samples: Answers that each weight's covariance is averaged over, at least.
        sigma: Standard deviation of the noise.
        block_bias: Whether the layer's bias is left out meanwhile (equation 12).
        generator: Random numbers.
    """
    dtype = torch.promote_types(weight.weight.dtype, torch.float32)
    receive = _receiver(weight, activation, rates, block_bias, dtype, design.is_paired)
    firing = _Firing(weight, design, rates, sigma, generator, dtype)
    if field == "map" and isinstance(weight.layer, _ConvNd):
        return _estimate_from_maps(firing, receive, num_samples)
    return _estimate_from_receptive_fields(firing, receive, num_samples)


@dataclass(frozen=True)
class _Firing:
    """Noise for one weight."""

    weight: UntiedWeight
    design: Design
    rates: Rates
    sigma: float
    generator: torch.Generator
    dtype: torch.dtype

    def draw(self, *shape: int) -> Tensor:
        """Return noise as it arrives."""
        out = self.weight.weight.new_empty(shape, dtype=self.dtype)
        noise = self.design.draw(out, self.generator).mul_(self.sigma)
        return self.rates.send(noise, self.design.is_paired)

    def draws_for(self, num_samples: int) -> int:
        """Return how many draws give so many samples: half of them are negatives in a design of pairs."""
        return math.ceil(num_samples / 2) if self.design.is_paired else num_samples


def _estimate_from_receptive_fields(firing: _Firing, receive: _Receive, num_samples: int) -> Estimate:
    weight, design = firing.weight, firing.design
    covariance = fields.make_estimate(weight, firing.dtype)
    source, target = (fields.as_matrix(x, weight) for x in (weight.weight.detach(), covariance))
    num_draws = firing.draws_for(num_samples)
    noise = firing.draw(source.shape[0], num_draws, source.shape[2])
    drive = (noise @ source.to(firing.dtype).mT).transpose(0, 1)  # [N, groups, neurons]
    by_channel = drive.reshape(num_draws, fields.count_channels(weight), -1)
    if design.is_paired:
        answer, divisor = (receive(by_channel, _ALL) - receive(-by_channel, _ALL)).div_(2.0), num_draws
    else:
        answer, divisor = receive(by_channel, _ALL), num_draws - 1
        answer = answer - answer.mean(0)
    target.copy_(answer.view(drive.shape).permute(1, 2, 0) @ noise / divisor)
    return _sum_up(firing, covariance, by_channel, answer, num_draws)


def _estimate_from_maps(firing: _Firing, receive: _Receive, num_samples: int) -> Estimate:
    """Take each map's answer about the mean of the *other* maps.

    All positions of a channel share their weights, and so their mean. The mean of a map's own positions
    holds something of every weight of the kernel: to subtract it would make the covariance too small.
    """
    weight, layer = firing.weight, firing.weight.layer
    assert isinstance(layer, _ConvNd)
    positions = fields.map_side(layer) ** len(layer.kernel_size)
    num_maps = max(2, math.ceil(firing.draws_for(num_samples) / positions))
    noise = firing.draw(num_maps, layer.in_channels, *fields.map_size(layer))
    w = weight.weight.detach().to(firing.dtype)
    drive = torch.convolution(noise, w, None, *fields.unpadded(layer))
    by_channel = drive.flatten(2)
    if firing.design.is_paired:
        answer = (receive(by_channel, _ALL) - receive(-by_channel, _ALL)).div_(2.0)
    else:
        answer = receive(by_channel, _ALL)
        own = answer.mean(2, keepdim=True)
        answer = answer - (own.sum(0) - own) / (num_maps - 1)
    products = conv_products(fields.unpadded(layer), w, noise, answer.view(drive.shape))
    found = products / (num_maps * positions)
    return _sum_up(firing, found, by_channel, answer, num_maps * positions)


def _sum_up(firing: _Firing, covariance: Tensor, drive: Tensor, answer: Tensor, num_samples: int) -> Estimate:
    drive_answer, drive_power = ((drive * other).sum((0, 2)) for other in (answer, drive))
    return Estimate(firing.weight, covariance, drive_answer, drive_power, firing.sigma**2, num_samples)


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


def _receiver(
    weight: UntiedWeight,
    activation: Activation,
    rates: Rates,
    block_bias: bool,
    dtype: torch.dtype,
    in_pairs: bool,
) -> _Receive:
    """Return what some of a layer's channels answer to a drive ``[N, channels, ...]``."""
    bias = fields.open_bias(weight, block_bias)
    at_rest = None if bias is None else bias.detach().to(dtype)[:, None]
    return lambda drive, rows: rates.answer(
        drive, 0.0 if at_rest is None else at_rest[rows], activation, in_pairs
    )
