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

from feedbackpath.mirror.activations import Activation, odd_slope
from feedbackpath.mirror.fields import Field, is_convolution, is_local
from feedbackpath.mirror.passage import LISTENERS
from feedbackpath.mirror.settings import Mirror
from feedbackpath.mirror.shortcut import answers_by_weight, is_watched


def can_draw(field: Field, activation: Activation, settings: Mirror, examples: int) -> bool:
    """Whether the noise of a pass is drawn as a whole, as ``Mirror.draw`` asks.

    Not where the layer has a map, nor where anything but W tells in its answers, nor where there are no more
    pairs than inputs: then the pairs themselves cost less.
    """
    weight = field.weight
    if settings.draw != "whole" or is_convolution(weight) or is_local(weight) or field.groups > 1:
        return False
    is_many = examples // 2 * field.answers > field.shape[-1]
    is_fine = weight.weight.dtype in (torch.float32, torch.float64)  # L has large values beside small ones
    is_changed = is_watched() and not LISTENERS  # an audit watches, and changes nothing
    if not is_many or not is_fine or is_changed:
        return False
    return answers_by_weight(weight, activation, odd_slope(activation), settings)


def draw_pairs(pairs: int, inputs: int, like: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield patterns ``[2 inputs, inputs]`` whose second moments are those of many pairs of noise.

    Args:
        pairs: N, the pairs that they stand for: at least as many as inputs.
        inputs: n, of a neuron.
        like: A tensor of the precision and on the device that noise is needed in.
        generator: Random numbers.
    """
    freedom = pairs - torch.arange(inputs, dtype=torch.float64, device="cpu")
    root = like.new_empty(inputs, inputs).normal_(generator=generator).tril_(-1)
    root.diagonal().copy_(_chi_squared(freedom, generator).sqrt())
    yield torch.cat([root.T, -root.T])


def _chi_squared(freedom: Tensor, generator: torch.Generator) -> Tensor:
    """Draw from chi-squared distributions, for which torch knows its global random numbers alone."""
    seed = int(torch.randint(2**31, (1,), generator=generator, device=generator.device))
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        return torch.distributions.Chi2(freedom).sample()
