"""How noise and answers travel: as signed numbers, about a baseline rate, or by pairs of cells.

Neurons cannot fire at negative rates. Akrout et al. 2019, Appendix C.2, name two ways round that: rates about
a baseline beta (equations 23 and 24), and cells that act in push-pull. Both are here, and neither ever sends
a rate below zero.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from feedbackpath.errors import RuleError
from feedbackpath.mirror.activations import Activation


class Rates(Protocol):
    """How one layer's noise is sent to the next, and how the next one answers."""

    def send(self, noise: Tensor) -> Tensor:
        """Return what arrives of the noise, as signed numbers."""

    def answer(self, drive: Tensor, activation: Activation) -> Tensor:
        """Return what neurons answer to a drive ``[N, channels, ...]``, as signed numbers."""


@dataclass(frozen=True)
class Signed:
    """Signed numbers, as in the paper's experiments."""

    def send(self, noise: Tensor) -> Tensor:
        """Return the noise."""
        return noise

    def answer(self, drive: Tensor, activation: Activation) -> Tensor:
        """Return phi(z)."""
        return activation(drive)


@dataclass(frozen=True)
class AboutBaseline:
    """Rates about a baseline (equations 23, 24): neurons fire beta + x, and their targets take beta off.

    A neuron whose rate would fall below zero is silent, and its targets learn from what it did fire. The next
    layer rests at the bias b- for which phi(b-) = beta, with phi'(b-) > 0.

    Args:
        beta: The baseline rate.
        is_estimated: Whether targets take off the mean of the rates that each neuron has fired in this
            pass, as in the paper's experiments, instead of the beta that all know.
    """

    beta: float = 1.0
    is_estimated: bool = False

    def send(self, noise: Tensor) -> Tensor:
        """Return max(beta + x, 0) - beta, having sent the first."""
        return self._without_baseline(transmit((noise + self.beta).clamp_min(0.0)))

    def answer(self, drive: Tensor, activation: Activation) -> Tensor:
        """Return max(phi(z + b-), 0) - beta; the layer's own bias is replaced by b-."""
        rates = transmit(activation(drive + _resting_bias(activation, self.beta, drive)).clamp_min(0.0))
        return self._without_baseline(rates)

    def _without_baseline(self, rates: Tensor) -> Tensor:
        return rates - (rates.mean(0) if self.is_estimated else self.beta)


@dataclass(frozen=True)
class PushPull:
    """Pairs of cells: one fires the positive part of a signal, the other the negative part.

    The pair of an answering unit are phi(z) and phi(-z), 0 where that is less: a cell fires or is silent.
    Their difference is odd in z.
    """

    def send(self, noise: Tensor) -> Tensor:
        """Return x, sent as max(x, 0) and max(-x, 0)."""
        return transmit(noise.relu()) - transmit((-noise).relu())

    def answer(self, drive: Tensor, activation: Activation) -> Tensor:
        """Return max(phi(z), 0) - max(phi(-z), 0)."""
        push, pull = (activation(signal).clamp_min(0.0) for signal in (drive, -drive))
        return transmit(push) - transmit(pull)


RATES: dict[str, Callable[[float, bool], Rates]] = {
    "signed": lambda beta, is_estimated: Signed(),
    "baseline": AboutBaseline,
    "push-pull": lambda beta, is_estimated: PushPull(),
}


def transmit(rates: Tensor) -> Tensor:
    """Let rates pass, none of which is negative: every rate that is sent goes through here."""
    return rates


def _resting_bias(activation: Activation, beta: float, like: Tensor) -> Tensor:
    """Find b- with phi(b-) = beta by halving an interval, for each channel (dimension 1) of ``like``."""
    shape = (1, like.shape[1], *(1,) * (like.dim() - 2))
    low, high = (like.new_full(shape, 2.0 * sign * (8.0 + beta)) for sign in (-1.0, 1.0))
    for _ in range(60):
        middle = (low + high) / 2.0
        is_below = activation(middle.clone()) < beta
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    if not torch.allclose(activation(high.clone()), torch.full_like(high, beta), rtol=1e-3):
        raise RuleError(f"mirror mode: the activation gives no output at the baseline rate {beta:g}")
    return high
