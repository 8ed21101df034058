"""Many pairs of Gaussian noise at the price of few, where layers do nothing of their own: drawn as a whole.

Where a layer answers a pattern of noise x and its negative with ``phi(z) - phi(-z) = 2 s z`` (ReLU, GELU,
SiLU, no activation; ``odd_slope``), z = W x, what N pairs tell of W depends on them by one matrix alone::

    sum (phi(z) - phi(-z)) x^T = 2 s W S        S = sum x x^T

For n inputs that fire independent Gaussian noise of unit variance, S follows the Wishart distribution with N
degrees of freedom. It can be drawn without the patterns (Bartlett 1933): ``S = L L^T``, with L lower
triangular, N(0, 1) below its diagonal, and L_ii^2 chi-squared with N + 1 - i degrees of freedom, i = 1 ... n.
So the layer runs on the n columns of L, each followed by its negative, in place of N pairs. What B learns
follows the same law.

This is a way to simulate the weight mirror, and no other mirror: a physical layer fires all N pairs, and
``feedbackpath.mirror.cost`` counts them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from feedbackpath.mirror import noise
from feedbackpath.mirror.activations import Activation, odd_slope
from feedbackpath.mirror.fields import Field, is_convolution, is_local
from feedbackpath.mirror.settings import Mirror
from feedbackpath.mirror.shortcut import answers_by_weight


def can_draw(field: Field, activation: Activation, settings: Mirror, examples: int) -> bool:
    """Whether the noise of a pass is drawn as a whole, as ``Mirror.draw`` asks.

    Not where ``obstacle`` names a reason, nor where there are no more pairs than inputs: then the pairs
    themselves cost less.
    """
    is_many = examples // 2 * field.answers > field.shape[-1]
    return settings.draw == "whole" and is_many and obstacle(field, activation, settings) is None


def obstacle(field: Field, activation: Activation, settings: Mirror) -> str | None:
    """Return why a layer has to fire each pattern; None: it has not."""
    weight = field.weight
    if is_convolution(weight) or is_local(weight) or field.groups > 1:
        return "it has a map, or groups of inputs"
    if weight.weight.dtype not in (torch.float32, torch.float64):  # L has large values beside small ones
        return "its precision is below float32"
    if not answers_by_weight(weight, activation, odd_slope(activation), settings):
        return (
            "more than W tells in its answers, such as another activation, an open bias, a hook, autocast or "
            "code that watches operations"
        )
    return None


def draw_pairs(pairs: int, inputs: int, like: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield ``2 n`` patterns whose second moments are those of many pairs of noise, some at a time.

    Args:
        pairs: N, the pairs that they stand for: at least as many as inputs.
        inputs: n, of a neuron.
        like: A tensor of the precision and on the device that noise is needed in.
        generator: Random numbers.
    """
    freedom = pairs - torch.arange(inputs, dtype=torch.float64, device="cpu")
    most = max(1, noise.CHUNK_VALUES // (2 * inputs))
    for first in range(0, inputs, most):
        own = freedom[first : first + most]
        columns = like.new_empty(inputs, len(own)).normal_(generator=generator).tril_(-1 - first)
        with noise.own_random_numbers(generator):  # torch draws chi-squared values from the global ones alone
            squares = torch.distributions.Chi2(own).sample()
        columns.diagonal(-first).copy_(squares.sqrt())
        yield torch.cat([columns.T, -columns.T])
