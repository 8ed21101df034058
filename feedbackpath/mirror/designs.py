"""Noise designs: what the neurons of a layer fire in mirror mode, and what may be expected of it.

A mirror needs one thing of its noise, E[x x^T] = sigma^2 I (Akrout et al. 2019, equation 11 with a Gaussian).
Independent values have it on average: sampling leaves an angle that shrinks with the root of the samples.
Orthogonal codes have it exactly, sample for sample.

Variance of one pass over N samples, for a linear neuron with weights w over n inputs and noise of fourth
moment m (in units of sigma^4)::

    sum_j Var[B_j] = |w|^2 (n - 2 + m) / N

Behind an activation phi that is driven by z the answer scatters more than its part that follows z does:
that factor, ``spread``, is Var[phi(z)] / (E[phi'(z)]^2 Var[z]): 1 for a linear neuron, 2 - 2 / pi for a ReLU.
Pairs of a sample and its negative cancel all that is even in phi, and count as one sample each.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from feedbackpath.errors import RuleError
from feedbackpath.mirror.activations import Activation, dtype_of

CODE_LENGTH = 16  # input neurons that fire together: longer codes cost more products, shorter ones more calls
RELU_SPREAD = 2.0 - 2.0 / math.pi

Draw = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Design:
    """Independent noise of mean 0 and variance 1.

    Args:
        name: Short name, as in ``Mirror(noise=...)``.
        draw: Fills a tensor with noise, given a generator, and returns it.
        fourth_moment: E[x^4].
        is_paired: Whether each sample is followed by its negative.
    """

    name: str
    draw: Draw
    fourth_moment: float
    is_paired: bool = False

    def relative_variance(self, fan_in: int, samples: int, spread: float = 1.0) -> float:
        """Return ``E|B - W|^2 / |W|^2`` of a pass at gain 1.

        Args:
            fan_in: n, the inputs of a neuron.
            samples: N, answers that the estimate is averaged over; both of a pair count.
            spread: How much more an answer scatters than that of a linear neuron.

        Example:
            >>> round(DESIGNS["gaussian"].relative_variance(99, 1000), 3)
            0.1
        """
        terms = fan_in - 2.0 + self.fourth_moment
        return 2.0 * terms / samples if self.is_paired else spread * terms / samples

    def expected_angle_deg(self, fan_in: int, samples: int, spread: float = RELU_SPREAD) -> float:
        """Return the angle between B and W that a pass leaves, in degrees: tan^2 of it is the variance."""
        return math.degrees(math.atan(math.sqrt(self.relative_variance(fan_in, samples, spread))))

    def samples_for(self, fan_in: int, angle_deg: float, spread: float = RELU_SPREAD) -> int:
        """Return the samples after which that angle is left."""
        return math.ceil(self.relative_variance(fan_in, 1, spread) / math.tan(math.radians(angle_deg)) ** 2)


@dataclass(frozen=True)
class OrthogonalCodes:
    """Codes of +-1 that are orthogonal to each other, each followed by its negative.

    Input neurons fire in groups of ``CODE_LENGTH``, or of two (``feedbackpath.mirror.pairs``), one group
    after the other, the others silent. In a group each neuron fires its own code, a row of a Walsh-Hadamard
    matrix with random signs. Then the noise's covariance is sigma^2 I exactly, and phi(z) - phi(-z) is
    proportional to z for every (leaky) ReLU, GELU or SiLU whose bias is blocked: one pass measures W to
    rounding error.
    """

    name: str = "orthogonal"

    def relative_variance(self, fan_in: int, samples: int, spread: float = 1.0) -> float:
        """Return 0: nothing is left to chance once every code has been fired."""
        return 0.0

    def expected_angle_deg(self, fan_in: int, samples: int, spread: float = RELU_SPREAD) -> float:
        """Return 0 degrees."""
        return 0.0

    def samples_for(
        self, fan_in: int, angle_deg: float, spread: float = RELU_SPREAD, length: int = CODE_LENGTH
    ) -> int:
        """Return the samples that a pass takes: twice the inputs, in whole groups of ``length``."""
        return 2 * length * math.ceil(fan_in / length)


def draw_gaussian(out: Tensor, generator: torch.Generator) -> Tensor:
    """Fill with N(0, 1): the paper's noise."""
    return out.normal_(generator=generator)


def draw_uniform(out: Tensor, generator: torch.Generator) -> Tensor:
    """Fill with values between -sqrt(3) and sqrt(3)."""
    return out.uniform_(-math.sqrt(3.0), math.sqrt(3.0), generator=generator)


def draw_signs(out: Tensor, generator: torch.Generator) -> Tensor:
    """Fill with -1 and 1."""
    return out.bernoulli_(0.5, generator=generator).mul_(2.0).sub_(1.0)


DESIGNS: dict[str, Design | OrthogonalCodes] = {"orthogonal": OrthogonalCodes()}


def register_design(design: Design) -> Design:
    """Add a design to the table under its name, and under ``<name>-pairs`` with each sample's negative.

    Raises:
        RuleError: A design has that name already.

    Example:
        >>> half_silent = lambda out, generator: draw_signs(out, generator).mul_(
        ...     2**0.5 * torch.empty_like(out).bernoulli_(0.5, generator=generator))
        >>> register_design(Design("half-silent", half_silent, fourth_moment=2.0)).samples_for(100, 8.0)
        6903
        >>> del DESIGNS["half-silent"], DESIGNS["half-silent-pairs"]
    """
    if design.name in DESIGNS:
        raise RuleError(f"a noise design named {design.name!r} exists already; choose another name")
    DESIGNS[design.name] = design
    pairs = Design(f"{design.name}-pairs", design.draw, design.fourth_moment, is_paired=True)
    DESIGNS[pairs.name] = pairs
    return design


for _design in (
    Design("gaussian", draw_gaussian, 3.0),
    Design("uniform", draw_uniform, 1.8),
    Design("signs", draw_signs, 1.0),
):
    register_design(_design)


@functools.cache
def orthogonal_codes(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return ``[CODE_LENGTH, CODE_LENGTH]``: row by row the code of each neuron of a group.

    Sylvester's Walsh-Hadamard matrix, its rows and columns with random signs, so that no sample has all
    neurons fire alike.
    """
    matrix = torch.ones(1, 1, device="cpu")
    while len(matrix) < CODE_LENGTH:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    generator = torch.Generator().manual_seed(0)
    rows, columns = (draw_signs(torch.empty(CODE_LENGTH, device="cpu"), generator) for _ in range(2))
    return (rows[:, None] * matrix * columns).to(device, dtype)


def spread_of(activation: Activation, drive: float = 1.0) -> float:
    """Return Var[phi(z)] / (E[phi'(z)]^2 Var[z]) for z ~ N(0, drive^2): 1 for a linear neuron.

    The mean slope is Cov[phi(z), z] / Var[z] (Stein's lemma), so that no derivative is needed.

    Example:
        >>> round(spread_of(torch.relu), 2), round(spread_of(torch.tanh, 0.01), 2)
        (1.36, 1.0)
    """
    quantiles = (torch.arange(20_001, dtype=torch.float64) + 0.5) / 20_001
    z = drive * math.sqrt(2.0) * torch.erfinv(2.0 * quantiles - 1.0)
    answer = activation(z.to(dtype_of(activation), copy=True)).detach().double()
    answer = answer - answer.mean()
    return ((answer**2).mean() * (z**2).mean() / (answer * z).mean() ** 2).item()
