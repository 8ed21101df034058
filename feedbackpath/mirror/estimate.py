"""The estimate: one layer's neurons fire noise, and it is seen what that tells of W.

Noise x of variance sigma^2 passes through the layer, z = W x + b, and its activation, y = phi(z). With all
means taken over the examples::

    cov   = mean of (y - mean y) x^T        E[cov] = sigma^2 s W      (Akrout et al. 2019, equation 11)
    s     = mean (y - mean y) z / mean z^2  the mean slope of each neuron, from its own drive and answer

The slope needs no derivative of phi: for Gaussian drives it is E[phi'(z)] (Stein's lemma), and where y is
proportional to z it is exact.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from feedbackpath.core.layers import UntiedWeight, is_channels_last
from feedbackpath.core.pytorch import has_processes
from feedbackpath.mirror import fields
from feedbackpath.mirror.activations import LEAST_SLOPE, Activation
from feedbackpath.mirror.fields import Field
from feedbackpath.mirror.noise import fire_codes, fire_noise, own_random_numbers
from feedbackpath.mirror.passage import forward_passage
from feedbackpath.mirror.rates import RATES, Rates
from feedbackpath.mirror.settings import Mirror
from feedbackpath.mirror.shortcut import is_plain
from feedbackpath.mirror.wishart import can_draw, draw_pairs


@dataclass
class Estimate:
    """What a pass of mirror mode found.

    Attributes:
        weight: The weight that it is about.
        products: Sum of (y - mean y) x, laid out as W, in W's precision or float32 if that is finer.
        pairs: How many products each is the sum of, less the degrees of freedom that means take.
        drive_answer: Sum of z (y - mean y) for each output channel.
        drive_power: Sum of (z - mean z)^2 for each output channel, over the same samples.
        variance: sigma^2, one for all or one for each output channel.
        num_samples: Answers of each neuron, or channel: examples times positions, of all devices that
            average.
        effective_samples: Those that tell as much, of a layer without a map; 0: all do.
    """

    weight: UntiedWeight
    products: Tensor
    pairs: Tensor | float
    drive_answer: Tensor
    drive_power: Tensor
    variance: float | Tensor
    num_samples: int
    effective_samples: float = 0.0

    @property
    def covariance(self) -> Tensor:
        """cov, laid out as W."""
        return self.products / self.pairs

    @property
    def slopes(self) -> Tensor:
        """The mean slope of each output channel; 1 for a neuron without a drive, whose weights are 0."""
        return torch.where(self.drive_power > 0, self.drive_answer / self.drive_power, 1.0)

    @property
    def is_silent(self) -> Tensor:
        """Which output channels did not answer: all of them, where no drive reached any."""
        return (self.slopes.abs() < LEAST_SLOPE) | ~(self.drive_power > 0).any()

    def at_gain_one(self) -> Tensor:
        """Turn the products, in place, into the W that they tell of: cov / (sigma^2 s), laid out as W."""
        return self.products.div_(fields.per_neuron(self.slopes * self.variance, self.weight) * self.pairs)


class _Heard(NamedTuple):
    """Sums over some of a pass's examples, about their means."""

    products: Tensor
    drive_answer: Tensor
    drive_power: Tensor
    noise_power: float  # of a neuron, where rates are about a baseline
    freedom: float  # examples, less what the means take
    examples: int


@torch.no_grad()
def estimate(
    field: Field, activation: Activation, settings: Mirror, examples: int, generator: torch.Generator
) -> Estimate:
    """Let a layer's neurons fire noise once, and return the covariance of their answers with it.

    Where each device of a job fires its own noise, this is the average over all of them. The global random
    numbers are left as they were, whatever the layer's hooks draw.

    Args:
        field: Where to fire.
        activation: What follows the layer.
        settings: The noise.
        examples: How many to fire, on this device; codes take as many as there are inputs, twice.
        generator: Random numbers of this pass.
    """
    weight, sigma = field.weight, settings.deviation
    like = weight.weight.detach()
    rates = RATES[settings.rates](settings.baseline, not settings.baseline_known)
    is_whole = can_draw(field, activation, settings, examples)
    if is_whole:
        fired = draw_pairs(examples // 2 * field.answers, field.shape[-1], like, generator)
    elif settings.fires_codes:
        fired = fire_codes(field.code_shape, field.groups, like, generator)
    else:
        name, pairs = settings.noise, settings.pairs
        fired = fire_noise(name, examples, field.shape, like, generator, pairs=pairs)
    with (
        forward_passage(weight.weight),
        _bias_closed(weight, settings.block_bias or settings.rates == "baseline"),
        nullcontext() if is_plain(weight, activation) else own_random_numbers(generator),
    ):
        heard = []
        for noise in fired:
            x = rates.send(noise if sigma == 1.0 else noise.mul_(sigma))
            heard.append(_hear(field, activation, rates, x, settings))
    products, drive_answer, drive_power, noise_power, freedom, num_heard = (
        sum(parts[1:], start=parts[0]) for parts in zip(*heard, strict=True)
    )
    if is_whole:  # what was fired stands for all examples
        freedom = num_heard = examples
    variance = sigma**2
    if settings.rates == "baseline":  # cells that are silent take something off
        variance = noise_power / freedom
    sums = (products, drive_answer, drive_power)
    if count_devices(settings) > 1:
        _average_over_devices(sums)
    num_samples = num_heard * field.answers * count_devices(settings)
    return Estimate(
        weight,
        sums[0],
        field.pairs * freedom,
        *sums[1:],
        variance,
        num_samples,
        num_heard * field.positions * count_devices(settings),
    )


def _hear(field: Field, activation: Activation, rates: Rates, x: Tensor, settings: Mirror) -> _Heard:
    """Fire once, and sum up what arrives of the noise with the answers to it."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    fired = field.lay_out(x)
    z = field.run(fired).to(dtype)
    x = x.to(dtype)
    y = rates.answer(z, activation)
    y = y - _mean(y)
    if field.mask is not None:
        y, z = y * field.mask, z * field.mask
    examples = len(x)
    about_mean = _by_channel(z, z) - len(z) * _by_channel(*[_mean(z)[None]] * 2)
    power = 0.0
    if settings.rates == "baseline":
        power = float((x - x.mean(0)).square().sum()) / x[0].numel()
    # Patterns and their negatives have a mean of exactly 0, which takes no degree of freedom.
    lost = 0.0 if settings.fires_codes or settings.pairs else examples / len(z)
    products = field.multiply(fired.to(dtype), y)
    return _Heard(products, _by_channel(z, y), about_mean.clamp_min(0.0), power, examples - lost, examples)


def _by_channel(one: Tensor, other: Tensor) -> Tensor:
    """Sum the products of two signals ``[N, channels, ...]`` over all but channels."""
    if one.dim() == 2:
        products: Tensor = torch.linalg.vecdot(one, other, dim=0)
    else:
        products = torch.linalg.vecdot(one.flatten(2), other.flatten(2)).sum(0)
    return products


def _mean(signal: Tensor) -> Tensor:
    """Return each neuron's mean over the examples, in the order of memory that the signal has."""
    is_last = signal.dim() > 3 and is_channels_last(signal)
    return signal.movedim(1, -1).mean(0).movedim(-1, 0) if is_last else signal.mean(0)


@contextmanager
def _bias_closed(weight: UntiedWeight, is_blocked: bool) -> Iterator[None]:
    """Let a layer run without its bias for a while, if that is blocked (equation 12)."""
    parameters = weight.layer._parameters
    is_called = fields.runs_itself(weight) or fields.is_local(weight)
    if not (is_blocked and is_called) or parameters.get("bias") is None:
        yield
        return
    bias, parameters["bias"] = parameters["bias"], None
    try:
        yield
    finally:
        parameters["bias"] = bias


def count_devices(settings: Mirror) -> int:
    """Return how many devices fire noise of their own: 1 where all fire the same, or there is only one."""
    is_averaged = has_processes() and settings.across_devices == "averaged"
    return torch.distributed.get_world_size() if is_averaged else 1


def own_rank(settings: Mirror) -> int:
    """Return this device's place among them: 0 where all fire the same."""
    return torch.distributed.get_rank() if count_devices(settings) > 1 else 0


def _average_over_devices(parts: Sequence[Tensor]) -> None:
    """Average what each device found, in place; every process of the job has to take part."""
    together = torch.cat([part.flatten() for part in parts])
    torch.distributed.all_reduce(together)
    together.div_(torch.distributed.get_world_size())
    means = torch.split(together, [part.numel() for part in parts])
    for part, mean in zip(parts, means, strict=True):
        part.copy_(mean.view(part.shape))
