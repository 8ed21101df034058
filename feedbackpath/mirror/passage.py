"""Signals that pass forward through a weight outside a model's own forward pass: mirror noise, say.

An audit has to distinguish them from a copy of the weight. Noise that goes in at one end of a synapse and is
received at the other carries what the synapse does to it, as data do.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

from feedbackpath.arguments import checked
from feedbackpath.errors import RuleError


class Listener(Protocol):
    """Is told when a passage begins and ends."""

    def enter_passage(self, weights: tuple[Tensor, ...]) -> None:
        """Signals begin to pass through ``weights``."""

    def leave_passage(self, weights: tuple[Tensor, ...]) -> None:
        """They have passed."""


LISTENERS: list[Listener] = []


@checked(RuleError)
@contextmanager
def forward_passage(*weights: Tensor) -> Iterator[None]:
    """Mark a block of code that sends signals forward through ``weights``.

    If your own rule mirrors, put this around the products of its noise and W; ``audit`` then counts
    these answers as activity. Outside an audit it does nothing.

    Args:
        weights: The forward weights that signals pass.

    Example:
        >>> import torch
        >>> weight, noise = torch.ones(2, 3), torch.randn(5, 3)
        >>> with forward_passage(weight):
        ...     answer = torch.relu(noise @ weight.T)
    """
    for listener in LISTENERS:
        listener.enter_passage(weights)
    try:
        yield
    finally:
        for listener in LISTENERS:
            listener.leave_passage(weights)
