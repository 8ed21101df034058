"""Symmetric alignment (SA): after every update of W, B goes a part of the way to W.

Kunin et al. 2020, "Two routes to scalable credit assignment without weight symmetry": the primitives decay
and self, each with the coefficient 1. With B laid out as W::

    R = 1/2 |B|^2 - tr(B^T W) = 1/2 |B - W|^2 - 1/2 |W|^2        dB = -rate (B - W)

So W - B shrinks by (1 - rate) a step while W stands still, and B settles at W. The rule reads W, so it
transports weights. It shows how much feedback may lag behind W.

Differs from the paper: B has a rate of its own, and takes no part in the optimizer's momentum and schedule; R
does not change W.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from feedbackpath.core.context import RuleContext
from feedbackpath.errors import RuleError
from feedbackpath.rules.base import Facts, Rule, Weights


@dataclass(frozen=True)
class SymmetricAlignment(Rule):
    """Draw B at random, and let it follow W with a delay of about 1 / rate steps.

    Args:
        rate: The part of W - B that a step takes away, above 0 and at most 1.

    Example:
        >>> import feedbackpath as fp
        >>> path = fp.untie(torch.nn.Linear(8, 4), fp.SymmetricAlignment(rate=0.5))
        >>> for _ in range(50):
        ...     path.step()
        >>> path.matrix_angles()[""] < 0.01
        True
    """

    name: ClassVar[str] = "sa"
    facts: ClassVar[Facts] = Facts(
        paper="Kunin et al. 2020",
        equation="dB = -rate (B - W)",
        needs="W after each update",
        verdict="transports weights",
        flops=1.0,
    )
    group: ClassVar[str] = "transports"
    is_mirrorable: ClassVar[bool] = False
    search_space: ClassVar[Mapping[str, Sequence[Any]]] = {"rate": ("log", 0.001, 1.0)}
    rate: float = 0.1

    def __post_init__(self) -> None:
        """Refuse a rate at which B does not settle."""
        if not 0.0 < self.rate <= 1.0:
            raise RuleError(f"sa: rate must be above 0 and at most 1, not {self.rate}")

    @torch.no_grad()
    def step(self, weights: Weights, context: RuleContext) -> None:
        """Take B a part of the way to W."""
        for weight in weights:
            weight.feedback.lerp_(weight.weight, self.rate)
