"""An estimate from independent noise: at one receptive field, or over whole maps (Appendix D.2)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from feedbackpath.core.layers import UntiedWeight
from feedbackpath.mirror import fields
from feedbackpath.mirror.activations import Activation
from feedbackpath.mirror.covariance import Estimate, Receive, conv_products, make_receiver
from feedbackpath.mirror.designs import Design
from feedbackpath.mirror.rates import Rates

_ALL = slice(None)


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
    receive = make_receiver(weight, activation, rates, block_bias, dtype, design.is_paired)
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


def _estimate_from_receptive_fields(firing: _Firing, receive: Receive, num_samples: int) -> Estimate:
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


def _estimate_from_maps(firing: _Firing, receive: Receive, num_samples: int) -> Estimate:
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
