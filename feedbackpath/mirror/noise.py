"""What the neurons of a layer fire in mirror mode, and what may be expected of it.

A mirror needs one thing of its noise, E[x x^T] = sigma^2 I (Akrout et al. 2019, equation 11 with a Gaussian).
Independent values have it on average: sampling leaves an angle that shrinks with the root of the samples.
Orthogonal codes have it exactly, once all of them have been fired.

Variance of one pass over N samples, for a linear neuron with weights w over n inputs and noise of fourth
moment m (in units of sigma^4)::

    sum_j Var[B_j] = |w|^2 (n - 2 + m) / N

Behind an activation phi that is driven by z the answer scatters more than its part that follows z does:
that factor, ``spread``, is Var[phi(z)] / (E[phi'(z)]^2 Var[z]): 1 for a linear neuron, 2 - 2 / pi for a ReLU.

Noise may come in pairs, each pattern followed by its negative. Neurons are as independent of each other as
before, but what is even in an answer cancels: a pair tells as much as one sample of ``phi(z) - phi(-z)``, N
counts pairs, and the spread of a ReLU is 1.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from feedbackpath.core.layers import is_channels_last
from feedbackpath.mirror.activations import Activation, dtype_of, is_channelwise, without_hooks

RELU_SPREAD = 2.0 - 2.0 / math.pi
CHUNK_VALUES = 2**23  # so many values of noise are fired at once: a wide layer fires its examples in parts
Draw = Callable[[Tensor, torch.Generator], Tensor]


def draw_gaussian(out: Tensor, generator: torch.Generator) -> Tensor:
    """Fill with N(0, 1): the paper's noise."""
    return out.normal_(generator=generator)


def draw_uniform(out: Tensor, generator: torch.Generator) -> Tensor:
    """Fill with values between -sqrt(3) and sqrt(3)."""
    return out.uniform_(-math.sqrt(3.0), math.sqrt(3.0), generator=generator)


def draw_signs(out: Tensor, generator: torch.Generator) -> Tensor:
    """Fill with -1 and 1."""
    return out.bernoulli_(0.5, generator=generator).mul_(2.0).sub_(1.0)


NOISES: dict[str, tuple[Draw, float]] = {  # independent noise of variance 1: how to draw it, and E[x^4]
    "gaussian": (draw_gaussian, 3.0),
    "uniform": (draw_uniform, 1.8),
    "signs": (draw_signs, 1.0),
}


def fire_noise(
    name: str,
    examples: int,
    shape: tuple[int, ...],
    like: Tensor,
    generator: torch.Generator,
    *,
    pairs: bool = False,
) -> Iterator[Tensor]:
    """Yield independent noise of variance 1 for so many examples of a shape, some at a time.

    Args:
        name: Which, of ``NOISES``.
        examples: How many; two at least are fired at once, for their mean is taken off.
        shape: Of one example.
        like: A tensor of the precision and on the device that noise is needed in.
        generator: Random numbers.
        pairs: Whether the second half of what is fired at once is the negative of the first.
    """
    draw, _ = NOISES[name]
    copies = 2 if pairs else 1
    drawn, most = examples // copies, max(2, CHUNK_VALUES // (copies * math.prod(shape)))
    parts = max(1, min(math.ceil(drawn / most), drawn // 2))
    for part in range(parts):
        size = drawn * (part + 1) // parts - drawn * part // parts
        noise = draw(like.new_empty(size * math.prod(shape)), generator)
        noise = in_order_of(noise, (size, *shape), like)
        yield torch.cat([noise, -noise]) if pairs else noise


@contextmanager
def own_random_numbers(generator: torch.Generator) -> Iterator[None]:
    """Let what draws from the global random numbers draw from a pass's own for a while.

    A hook that adds noise must not move training's random numbers, nor draw the same noise in every pass.
    """
    seed = int(torch.randint(2**31, (1,), generator=generator, device=generator.device))
    is_cuda = generator.device.type == "cuda"
    with torch.random.fork_rng([generator.device] if is_cuda else []):
        torch.default_generator.manual_seed(seed)
        if is_cuda:
            with torch.cuda.device(generator.device):
                torch.cuda.manual_seed(seed)
        yield


def in_order_of(values: Tensor, shape: tuple[int, ...], weight: Tensor) -> Tensor:
    """View independent values as ``[N, C, ...]``, in the order of memory of a weight."""
    if len(shape) < 4 or not is_channels_last(weight):
        return values.view(shape)
    return values.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def code_length(inputs: int) -> int:
    """Return how many codes it takes for each input to have one: a power of two."""
    return 1 << max(inputs - 1, 0).bit_length()


def fire_codes(
    shape: tuple[int, ...], groups: int, like: Tensor, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield orthogonal codes of +-1, each followed by its negative, for the inputs of one example.

    All inputs fire at once. Input j fires column j of Sylvester's Hadamard matrix, with a random sign. What
    is even in an answer, a ReLU's half of ``|z|`` say, cancels between a code and its negative.

    Args:
        shape: Of one example ``[channels, ...]``.
        groups: Groups of channels that meet weights of their own: all fire the same codes.
        like: A tensor of the precision and on the device that codes are needed in.
        generator: Random signs.
    """
    inputs = math.prod(shape) // groups
    signs = draw_signs(like.new_empty(inputs, dtype=torch.float32), generator).to(like.dtype)
    length = code_length(inputs)
    rows = min(length, 1 << max(CHUNK_VALUES // (2 * math.prod(shape)), 1).bit_length() - 1)
    outer, inner = (_hadamard(size).to(like) for size in (length // rows, rows))
    for row in outer:
        codes = torch.kron(row[None], inner)[:, :inputs] * signs
        codes = codes[:, None].expand(-1, groups, -1).reshape(-1, *shape)
        yield torch.cat([codes, -codes])


def _hadamard(size: int) -> Tensor:
    matrix = torch.ones(1, 1, device="cpu")
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def relative_variance(noise: str, inputs: int, samples: float, spread: float = RELU_SPREAD) -> float:
    """Return ``E|B - W|^2 / |W|^2`` of a pass of independent noise at gain 1.

    Args:
        noise: Which, of ``NOISES``.
        inputs: n, the inputs of a neuron.
        samples: N, answers that the estimate is averaged over.
        spread: How much more an answer scatters than that of a linear neuron.

    Example:
        >>> round(relative_variance("gaussian", 99, 1000, spread=1.0), 3)
        0.1
    """
    return spread * (inputs - 2.0 + NOISES[noise][1]) / samples


def relu_spread(pairs: bool) -> float:
    """Return the spread of a ReLU's answers: to single patterns of noise, or to pairs."""
    return 1.0 if pairs else RELU_SPREAD


def spread_of(activation: Activation, drive: float = 1.0, pairs: bool = False) -> float:
    """Return Var[phi(z)] / (E[phi'(z)]^2 Var[z]) for z ~ N(0, drive^2): 1 for a linear neuron.

    The mean slope is Cov[phi(z), z] / Var[z] (Stein's lemma), so that no derivative is needed. An activation
    with settings for each channel is taken for a ReLU. Of ``pairs``, what is odd in phi takes its place.

    Example:
        >>> round(spread_of(torch.relu), 2), round(spread_of(torch.tanh, 0.01), 2)
        (1.36, 1.0)
        >>> round(spread_of(torch.relu, pairs=True), 2)
        1.0
    """
    if is_channelwise(activation):
        return relu_spread(pairs)
    quantiles = (torch.arange(20_001, dtype=torch.float64) + 0.5) / 20_001
    z = drive * math.sqrt(2.0) * torch.erfinv(2.0 * quantiles - 1.0)
    phi = without_hooks(activation)
    try:
        answer = phi(z.to(dtype_of(activation), copy=True)).detach().double()
    except RuntimeError:  # it has learned something in another precision
        answer = phi(z.float()).detach().double()
    answer = answer - (answer.flip(0) if pairs else answer.mean())  # z is symmetric, from low to high
    return ((answer**2).mean() * (z**2).mean() / (answer * z).mean() ** 2).item()
