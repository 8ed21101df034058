"""Cells: how a cell of an array changes its weight when a change is asked for.

A cell gets pulses. With g the ``step``, w the weight and f(w) in [0, ...) its response, one pulse does::

    up      w <- w + g c_up f_up(w) (1 + noise xi)          c: drawn once for each cell and direction
    down    w <- w - g c_down f_down(w) (1 + noise xi)      xi ~ N(0, 1): drawn for each pulse

A change d is asked for as ``n = |d| / g`` pulses; the fraction is rounded up or down at random, so that the
mean is right. The writer knows g, but not the cell's response. n pulses are done at once, in closed form;
``tests/test_devices.py`` compares that with pulses one by one. Weights are in the network's own units.

Sources: Gokmen & Vlasov 2016; Rasch et al. 2021 (the package aihwkit), whose names stand beside the settings.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from feedbackpath.errors import ChipError

Values = Tensor | float
LEAST_BOUND = 0.05  # of the bound that cells have on average: a cell has some range


class Cells(NamedTuple):
    """What was drawn once for the cells of one array; numbers where all cells are alike.

    Attributes:
        up: Size of an up pulse, in steps.
        down: Size of a down pulse, in steps.
        high: Largest weight.
        low: Smallest weight.
        shift: What is taken off the cell's own state to read a weight: see ``Reference``.
        is_stuck: Which cells never change; None: no cell.
        minus: State of the second cell of each pair, which writes change: see ``Pair``; None: no pairs.
        counted: Told of the pulses that arrive, where a chip counts them; copies are not.
    """

    up: Values
    down: Values
    high: Values
    low: Values
    shift: Values = 0.0
    is_stuck: Tensor | None = None
    minus: Tensor | None = None
    counted: "Counted | None" = None


class Counted:
    """Tells who counts of the pulses that arrive at one array.

    Args:
        tell: Called with the pulses of each cell.
    """

    def __init__(self, tell: Callable[[Tensor], None]) -> None:
        self.tell = tell

    def __reduce__(self) -> tuple[Any, ...]:
        """Let copies of an array be counted by nobody."""
        return type(None), ()


def either(is_up: Tensor, up: Values, down: Values, like: Tensor) -> Tensor:
    """Return one value for up pulses and another for down pulses, in the precision of ``like``."""
    one, other = (torch.as_tensor(value, dtype=like.dtype, device=like.device) for value in (up, down))
    return torch.where(is_up, one, other)


@dataclass(frozen=True)
class Device:
    """What devices have in common.

    Args:
        step: g, the change by one pulse at weight 0 (``dw_min``), in units of weight.
        noise: Standard deviation of a pulse from one to the next, in its own size (``dw_min_std``).
        spread: Standard deviation of the step from cell to cell, the same up and down (``dw_min_dtod``).
        asymmetry: How much larger an up pulse is than a down pulse, as a share (``up_down``).
        asymmetry_spread: Its standard deviation from cell to cell, drawn separately for up and for down
            (``up_down_dtod``).
        bound: The largest weight (``w_max``).
        low: The smallest (``w_min``); None: ``-bound``.
        bound_spread: Standard deviation of both from cell to cell, as a share (``w_max_dtod``).
        lifetime: Updates in which an unwritten weight leaks away by a factor of e (``lifetime``).
        drift: Exponent nu: a weight that was written t updates ago has shrunk by ``t^-nu``.
        stuck: Share of cells that keep their initial weight.
    """

    step: float = 1e-3
    noise: float = 0.0
    spread: float = 0.0
    asymmetry: float = 0.0
    asymmetry_spread: float = 0.0
    bound: float = 1.0
    low: float | None = None
    bound_spread: float = 0.0
    lifetime: float = math.inf
    drift: float = 0.0
    stuck: float = 0.0

    is_ideal: ClassVar[bool] = False
    cells_per_weight: ClassVar[int] = 1

    def __post_init__(self) -> None:
        """Refuse settings that no device has."""
        kind = type(self).__name__
        for name in ("noise", "spread", "asymmetry_spread", "bound_spread", "drift"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ChipError(f"{kind}: {name} must be 0 or more, not {getattr(self, name)}")
        for name in ("step", "bound", "lifetime"):
            if not getattr(self, name) > 0.0:
                raise ChipError(f"{kind}: {name} must be above 0, not {getattr(self, name)}")
        if not 0.0 <= self.stuck <= 1.0:
            raise ChipError(
                f"{kind}: stuck is the share of cells that never change, between 0 and 1, not {self.stuck}"
            )
        if not self.lowest < self.bound:
            raise ChipError(f"{kind}: low must be below bound {self.bound}, not {self.low}")

    @property
    def lowest(self) -> float:
        """The smallest weight of a cell without spread."""
        return -self.bound if self.low is None else self.low

    def draw(self, like: Tensor, generator: torch.Generator) -> Cells:
        """Draw the cells of an array that is laid out as ``like``."""

        def spread(by: float, least: float = 0.0) -> Values:
            """Draw a factor about 1; a cell that would do the opposite of what it is told does nothing."""
            if by == 0.0:
                return 1.0
            return torch.empty_like(like).normal_(1.0, by, generator=generator).clamp_min_(least)

        common, half = spread(self.spread), self.asymmetry
        return Cells(
            up=(spread(self.asymmetry_spread) + max(half, 0.0)) * common,
            down=(spread(self.asymmetry_spread) + max(-half, 0.0)) * common,
            high=self.bound * spread(self.bound_spread, LEAST_BOUND),
            low=self.lowest * spread(self.bound_spread, LEAST_BOUND),
            is_stuck=torch.empty_like(like).uniform_(generator=generator) < self.stuck
            if self.stuck
            else None,
        )

    def write(self, w: Tensor, asked: Tensor, cells: Cells, generator: torch.Generator) -> Tensor:
        """Return weights after a change was asked of them, in a tensor of its own.

        Args:
            w: The weights as they are.
            asked: The changes asked for, of the same shape.
            cells: What ``draw`` returned for this array.
            generator: Random numbers of the writes.
        """
        pulses = self.pulses(asked, generator)
        return self.apply(w, pulses, asked > 0, cells, generator)

    def pulses(self, asked: Tensor, generator: torch.Generator) -> Tensor:
        """Return how many pulses stand for a change: ``abs(asked) / step``, rounded at random."""
        fraction = torch.empty_like(asked).uniform_(generator=generator)
        return fraction.add_(asked.abs(), alpha=1.0 / self.step).floor_()

    def apply(
        self, w: Tensor, pulses: Tensor, is_up: Tensor, cells: Cells, generator: torch.Generator | None
    ) -> Tensor:
        """Return weights after so many pulses, all in one direction for each cell."""
        if cells.counted is not None:
            cells.counted.tell(pulses)
        state = w if isinstance(cells.shift, float) else w + cells.shift
        new = self.after(state, pulses, is_up, cells)
        if self.noise and generator is not None:
            size = self.response(state, is_up, cells).mul_(self.step * self.noise).mul_(pulses.sqrt())
            new.add_(torch.empty_like(new).normal_(generator=generator).mul_(size))
        # A cell that was put beyond its bounds from without stays where it is until it is written.
        within = torch.clamp(new, cast(Any, cells.low), cast(Any, cells.high))
        bounded = torch.where(pulses > 0, within, state)
        bounded = bounded if state is w else bounded.sub_(cells.shift)
        return bounded if cells.is_stuck is None else torch.where(cells.is_stuck, w, bounded)

    def response(self, state: Tensor, is_up: Tensor, cells: Cells) -> Tensor:
        """Return the size of the next pulse, in steps."""
        raise NotImplementedError

    def after(self, state: Tensor, pulses: Tensor, is_up: Tensor, cells: Cells) -> Tensor:
        """Return the state after so many pulses without noise, before bounds."""
        raise NotImplementedError

    def symmetry_point(self, cells: Cells) -> Values:
        """Return where an up pulse and a down pulse are of one size: many of both lead a cell there."""
        raise ChipError(f"the symmetry point of {type(self).__name__} has no closed form: use SoftBounds")

    def mean(self, w: Tensor, asked: Tensor, cells: Cells) -> Tensor:
        """Return what a write comes to on average, but for the rounding of pulses and bounds."""
        return self.after(w + cells.shift, asked.abs() / self.step, asked > 0, cells) - cells.shift

    def variance(self, w: Tensor, asked: Tensor, cells: Cells) -> Tensor:
        """Return the variance of a write: of the rounding, and of the pulses' own noise (to first order).

        With p the fraction of n = abs(asked) / step and r the response at w::

            var = (step r)^2 (p (1 - p) + noise^2 n)
        """
        n = asked.abs() / self.step
        fraction = n - n.floor()
        size = self.step * self.response(w + cells.shift, asked > 0, cells)
        return size.square() * (fraction * (1.0 - fraction) + self.noise**2 * n)


@dataclass(frozen=True)
class Ideal(Device):
    """A perfect cell: with a chip of these, without ``read=``, a run is bit-identical to one without a chip.

    Example:
        >>> import feedbackpath as fp
        >>> fp.devices.Ideal().is_ideal
        True
    """

    is_ideal: ClassVar[bool] = True
    bound: float = math.inf

    def write(self, w: Tensor, asked: Tensor, cells: Cells, generator: torch.Generator) -> Tensor:
        """Return what was asked for."""
        return w + asked
