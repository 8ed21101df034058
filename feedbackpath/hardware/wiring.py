"""Wiring: which part of an update arrives at the feedback array, where, and when."""

from dataclasses import dataclass

import torch
from torch import Tensor

from feedbackpath.errors import ChipError


@dataclass(frozen=True)
class Wiring:
    """How updates reach the feedback array; by default as they reach the forward array.

    Args:
        swapped: Share of the inputs of each layer whose feedback cells get the signal of another forward cell
            than their partner (Akrout et al. 2019, Appendix C.1, asks whether strict pairing is needed).
        delay: Steps that an update takes to reach B.
        arrives: Probability that an update reaches a cell of B.
        rate: A factor for the updates of B.
        decay: Weight decay of B, divided by that of W.

    Example:
        >>> import feedbackpath as fp
        >>> fp.Wiring(swapped=0.1).partners(5, torch.Generator().manual_seed(0)).sort().values
        tensor([0, 1, 2, 3, 4])
    """

    swapped: float = 0.0
    delay: int = 0
    arrives: float = 1.0
    rate: float = 1.0
    decay: float = 1.0

    def __post_init__(self) -> None:
        """Refuse wiring that cannot be."""
        for name in ("swapped", "arrives"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ChipError(f"Wiring: {name} must lie between 0 and 1, not {getattr(self, name)}")
        if type(self.delay) is not int or self.delay < 0:
            raise ChipError(f"Wiring: delay must be a whole number of steps, not {self.delay!r}")
        if not (self.rate > 0.0 and self.decay >= 0.0):
            raise ChipError("Wiring: rate must be above 0, and decay 0 or more")

    @property
    def is_ideal(self) -> bool:
        """Whether B hears of updates as W does."""
        return self == Wiring()

    def partners(self, inputs: int, generator: torch.Generator) -> Tensor:
        """Draw which forward cell each feedback cell hears: the chosen ones hear each other in a ring."""
        order = torch.randperm(inputs, generator=generator, device=generator.device)
        count = round(self.swapped * inputs)
        chosen = order[: count if count > 1 else 0]
        heard = torch.arange(inputs, device=generator.device)
        heard[chosen] = chosen.roll(1)
        return heard


class Line:
    """What is on its way to one feedback array.

    Args:
        wiring: How it is wired.
        partners: Which input each feedback cell hears; None: its own.
    """

    def __init__(self, wiring: Wiring, partners: Tensor | None) -> None:
        self.wiring, self.partners = wiring, partners
        self.waiting: list[Tensor] = []

    def pass_on(self, update: Tensor, generator: torch.Generator) -> Tensor:
        """Send an update off; return what arrives now."""
        if self.partners is not None:
            update = update.index_select(1, self.partners)
        if self.wiring.delay:
            self.waiting.append(update.clone())
            is_filled = len(self.waiting) > self.wiring.delay
            update = self.waiting.pop(0) if is_filled else torch.zeros_like(update)
        if self.wiring.arrives < 1.0:
            drawn = torch.empty_like(update).uniform_(generator=generator)
            update = torch.where(drawn < self.wiring.arrives, update, 0.0)
        return update * self.wiring.rate if self.wiring.rate != 1.0 else update
