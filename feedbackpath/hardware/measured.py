"""A device as it was measured: pulse by pulse, from a file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from feedbackpath.errors import ChipError
from feedbackpath.hardware.cells import Cells, Device, either


@dataclass(frozen=True)
class Measured(Device):
    """A device as it was measured: the weight after each pulse of a rising and of a falling train.

    Args:
        rising: Weights after 0, 1, 2, ... up pulses, from the lowest on.
        falling: Weights after 0, 1, 2, ... down pulses, from the highest on.

    ``step`` is what the controller takes for one pulse; ``from_csv`` takes the mean of both trains.

    Example:
        >>> import feedbackpath as fp, torch
        >>> device = fp.devices.Measured(rising=(-1.0, 0.0, 0.5, 1.0), falling=(1.0, 0.0, -1.0), step=0.5)
        >>> w, random = torch.tensor([0.0, 0.25]), torch.Generator().manual_seed(0)
        >>> device.write(w, torch.tensor([0.5, 0.5]), device.draw(w, random), random)
        tensor([0.5000, 0.7500])
    """

    rising: tuple[float, ...] = ()
    falling: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse trains that cannot be followed."""
        super().__post_init__()
        up, down = list(self.rising), list(self.falling)
        if min(len(up), len(down)) < 2 or up != sorted(set(up)) or down[::-1] != sorted(set(down)):
            raise ChipError(
                "Measured: give at least two pulses that raise the conductance, and two that lower it"
            )

    @classmethod
    def from_csv(cls, file: str | Path, *, bound: float = 1.0, **settings: Any) -> "Measured":
        """Read a response from a file: lines ``pulse,conductance``, up pulses first, then down pulses.

        The largest conductance becomes the weight ``bound``, the smallest ``-bound``. If a train is not
        monotonic, because a measurement is noisy, values that go back are left out.

        Args:
            file: The file; a first line without numbers is a heading.
            bound: The weight of the largest conductance.
            settings: Other settings of a device.

        Raises:
            ChipError: The file cannot be read, or does not rise and then fall.
        """
        values = _conductances(Path(file))
        top = values.index(max(values))
        low, high = min(values), max(values)
        if not 2 <= top < len(values) - 2 or high == low:
            raise ChipError(
                f"{file}: conductance has to rise over several pulses and then fall: list the up pulses first"
            )
        scaled = [bound * (2.0 * (value - low) / (high - low) - 1.0) for value in values]
        rising = _steady(scaled[: top + 1])
        falling = tuple(-value for value in _steady([-value for value in scaled[top:]]))
        step = (rising[-1] - rising[0] + falling[0] - falling[-1]) / (len(rising) + len(falling) - 2)
        return cls(**{"step": step, "bound": bound} | settings, rising=rising, falling=falling)

    def _along(self, state: Tensor, pulses: Tensor, is_up: Tensor) -> Tensor:
        """Return the state so many pulses further along the train of their direction."""
        moved = []
        for train, sign in ((self.rising, 1.0), (self.falling, -1.0)):
            knots = torch.tensor(train, dtype=state.dtype, device=state.device) * sign
            place = _interpolate(state * sign, knots, None) + pulses
            moved.append(_interpolate(place, None, knots) * sign)
        return torch.where(is_up, moved[0], moved[1])

    def response(self, state: Tensor, is_up: Tensor, cells: Cells) -> Tensor:
        """Return the size of the next pulse, in steps."""
        moved = (self._along(state, torch.ones_like(state), is_up) - state).abs() / self.step
        return moved * either(is_up, cells.up, cells.down, state)

    def after(self, state: Tensor, pulses: Tensor, is_up: Tensor, cells: Cells) -> Tensor:
        """Return the state after n pulses; a cell of size c goes c n pulses along the train."""
        return self._along(state, pulses * either(is_up, cells.up, cells.down, state), is_up)


def _interpolate(at: Tensor, knots: Tensor | None, values: Tensor | None) -> Tensor:
    """Interpolate between values at rising knots (None: 0, 1, 2, ...); beyond the ends: the ends."""
    table = knots if knots is not None else values
    assert table is not None
    last = len(table) - 2
    if knots is None:
        number = at.floor().clamp(0, last).long()
        share = (at - number).clamp(0.0, 1.0)
        return table[number] + share * (table[number + 1] - table[number])
    number = (torch.searchsorted(table, at.contiguous()) - 1).clamp(0, last)
    return number + ((at - table[number]) / (table[number + 1] - table[number])).clamp(0.0, 1.0)


def _conductances(file: Path) -> list[float]:
    """Read the second column of a file of numbers."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ChipError(
            f"cannot read {file} ({getattr(error, 'strerror', None) or error}): give a CSV file"
        ) from None
    values = []
    for number, line in enumerate(lines, 1):
        parts = line.replace(";", ",").split(",")
        try:
            values.append(float(parts[1]))
        except (IndexError, ValueError):
            if line.strip() and number > 1:
                raise ChipError(
                    f"{file}, line {number}: expected 'pulse,conductance', not {line!r}"
                ) from None
    if len(values) < 4 or not all(math.isfinite(value) for value in values):
        raise ChipError(f"{file}: at least four pulses with finite conductances are needed")
    return values


def _steady(values: Sequence[float]) -> tuple[float, ...]:
    """Return a train without the values that fall back."""
    kept: list[float] = []
    for value in values:
        if not kept or value > kept[-1]:
            kept.append(value)
    return tuple(kept)
