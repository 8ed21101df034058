"""How a pulse depends on the weight: the responses that devices are described by."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from feedbackpath.errors import ChipError
from feedbackpath.hardware.cells import Cells, Device, Values, either


def _over(slope: float, end: Values) -> Values:
    """Return a slope for each unit of weight; a cell that begins at 0 is never lowered."""
    return slope / end if isinstance(end, Tensor) or end else 0.0


COARSE = 0.05  # of its size: if a pulse changes the next one by more, the first pulses are made one by one
FIRST = 16  # pulses; by then a response that falls has fallen so far that a closed form serves


def make_first(
    device: Device, state: Tensor, pulses: Tensor, is_up: Tensor, cells: Cells
) -> tuple[Tensor, Tensor]:
    """Make the first pulses one by one; return the state and the pulses that are left."""
    sign = torch.where(is_up, device.step, -device.step).to(state)
    for _ in range(min(FIRST, math.ceil(float(pulses.max()))) if pulses.numel() else 0):
        moved = state + sign * device.response(state, is_up, cells) * pulses.clamp(max=1.0)
        within = torch.clamp(moved, cast(Any, cells.low), cast(Any, cells.high))
        state, pulses = torch.where(pulses > 0, within, state), (pulses - 1.0).clamp_min(0.0)
    return state, pulses


@dataclass(frozen=True)
class LinearStep(Device):
    """A pulse whose size falls in a straight line with the weight (aihwkit's LinearStepDevice).

    ::

        f_up(w) = 1 - slope_up w / bound        f_down(w) = 1 - slope_down w / low

    Args:
        slope_up: How much of an up pulse is lost on the way from 0 to the bound (``gamma_up``).
        slope_down: The same of a down pulse (``gamma_down``). Both 0: steps are constant.

    Example:
        >>> import feedbackpath as fp, torch
        >>> device = fp.devices.LinearStep(step=0.25)
        >>> w, random = torch.zeros(3), torch.Generator().manual_seed(0)
        >>> device.write(w, torch.tensor([0.5, -0.25, 9.0]), device.draw(w, random), random)
        tensor([ 0.5000, -0.2500,  1.0000])
    """

    slope_up: float = 0.0
    slope_down: float = 0.0

    def _slopes(self, is_up: Tensor, cells: Cells, like: Tensor) -> Tensor:
        """Return the share of a pulse that is lost for each unit of weight."""
        return either(is_up, self.slope_up / self.bound, _over(self.slope_down, self.lowest), like)

    def response(self, state: Tensor, is_up: Tensor, cells: Cells) -> Tensor:
        """Return the size of the next pulse, in steps."""
        sizes = either(is_up, cells.up, cells.down, state)
        return sizes * (1.0 - self._slopes(is_up, cells, state) * state).clamp_min(0.0)

    def after(self, state: Tensor, pulses: Tensor, is_up: Tensor, cells: Cells) -> Tensor:
        """Return the state after n pulses: the distance to where pulses vanish falls by r^n.

        With e = +-g c and k the slope, ``w_n = w + e (1 - k w) (1 - r^n) / (1 - r)``, where ``r = 1 - e k``.
        """
        ups, downs = self.step * cells.up, -self.step * cells.down
        if self.slope_up == self.slope_down == 0.0:
            return torch.addcmul(state, either(is_up, ups, downs, state), pulses)
        slopes = self._slopes(is_up, cells, state)
        # Where nothing is lost the limit is n; so small a loss as this comes to the same.
        lost = (either(is_up, ups, downs, state) * slopes).clamp_(1e-7, 1.0 - 1e-7)
        left = (1.0 - slopes * state).clamp_min_(0.0).div_(torch.where(slopes == 0.0, 1.0, slopes))
        exact = state - left * torch.expm1(pulses * torch.log1p(-lost))
        if self.slope_up and self.slope_down:
            return exact
        plain = torch.addcmul(state, either(is_up, ups, downs, state), pulses)
        return torch.where(slopes == 0.0, plain, exact)


@dataclass(frozen=True)
class SoftBounds(LinearStep):
    """A pulse that vanishes at the bound, in a straight line: each cell's own (aihwkit's SoftBoundsDevice).

    ::

        f_up(w) = 1 - w / bound        f_down(w) = 1 - w / low

    An up and a down pulse together pull a weight towards the cell's symmetry point, 0 where the cell is
    symmetric. So W and B, which get the same pulses, converge without weight decay.

    Example:
        >>> import feedbackpath as fp, torch
        >>> device, w = fp.devices.SoftBounds(step=0.1, bound=1.0), torch.tensor([0.0, 0.5])
        >>> random = torch.Generator().manual_seed(0)
        >>> device.write(w, torch.tensor([0.1, 0.1]), device.draw(w, random), random)
        tensor([0.1000, 0.5500])
    """

    slope_up: float = 1.0
    slope_down: float = 1.0

    def _slopes(self, is_up: Tensor, cells: Cells, like: Tensor) -> Tensor:
        return either(is_up, self.slope_up / cells.high, _over(self.slope_down, cells.low), like)

    def symmetry_point(self, cells: Cells) -> Values:
        """Return ``(c_up - c_down) / (c_up / high - c_down / low)``."""
        fall = cells.up * self.slope_up / cells.high - cells.down * self.slope_down / cells.low
        # A cell that moves in neither direction has none: its reference is 0.
        return (cells.up - cells.down) / (torch.as_tensor(fall).clamp_min(1e-9))


@dataclass(frozen=True)
class Exponential(Device):
    """A pulse whose size changes exponentially with the weight (aihwkit's ExpStepDevice).

    ::

        z = 2 a w / (bound - low) + b
        f_up(w) = max(0, 1 - A_up exp(gamma_up z))        f_down(w) = max(0, 1 - A_down exp(-gamma_down z))

    Args:
        a_up: A_up.
        a_down: A_down.
        gamma_up: Steepness of the change, up.
        gamma_down: Steepness of the change, down.
        a: Scale of z.
        b: Offset of z.

    Example:
        >>> import feedbackpath as fp, torch
        >>> device, w = fp.devices.ReRam(noise=0.0), torch.zeros(2)
        >>> random = torch.Generator().manual_seed(0)
        >>> moved = device.write(w, torch.tensor([0.1, -0.1]), device.draw(w, random), random)
        >>> bool(moved[0] > 0.1 and moved[1] < -0.1)
        True
    """

    a_up: float = 0.0
    a_down: float = 0.0
    gamma_up: float = 5.0
    gamma_down: float = 5.0
    a: float = 0.5
    b: float = 0.0

    def _shape(self, is_up: Tensor, cells: Cells, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return A, gamma with its sign, and 2 a / (bound - low)."""
        factor = either(is_up, self.a_up, self.a_down, like)
        gamma = either(is_up, self.gamma_up, -self.gamma_down, like)
        return factor, gamma, torch.as_tensor(2.0 * self.a / (cells.high - cells.low)).to(like)

    def response(self, state: Tensor, is_up: Tensor, cells: Cells) -> Tensor:
        """Return the size of the next pulse, in steps."""
        factor, gamma, scale = self._shape(is_up, cells, state)
        sizes = either(is_up, cells.up, cells.down, state)
        return sizes * (1.0 - factor * torch.exp(gamma * (scale * state + self.b))).clamp_min(0.0)

    @property
    def is_coarse(self) -> bool:
        """Whether a pulse changes the next one by much, somewhere in the range."""
        scale = 2.0 * self.a / (self.bound - self.lowest)
        exponents = [
            (abs(factor * gamma), gamma * (scale * end + self.b))
            for factor, gamma in ((self.a_up, self.gamma_up), (self.a_down, -self.gamma_down))
            for end in (self.lowest, self.bound)
        ]
        return self.step * abs(scale) * max(size * math.exp(min(at, 99.0)) for size, at in exponents) > COARSE

    def after(self, state: Tensor, pulses: Tensor, is_up: Tensor, cells: Cells) -> Tensor:
        """Return the state after n small pulses: ``v = exp(-gamma z)``, and v - A goes exponentially."""
        if self.is_coarse:
            state, pulses = make_first(self, state, pulses, is_up, cells)
        factor, gamma, scale = self._shape(is_up, cells, state)
        signed = either(is_up, cells.up, -1.0 * cells.down, state) * self.step
        z = scale * state + self.b
        v = torch.exp(-gamma * z)
        later = factor + (v - factor) * torch.exp(-gamma * scale * signed * pulses)
        moved = state - torch.log(later / v) / (gamma * scale)
        return torch.where(v > factor, moved, state)


@dataclass(frozen=True)
class Power(Device):
    """A pulse that goes as a power of the distance to the bound (aihwkit's PowStepDevice).

    ::

        f_up(w) = ((bound - w) / (bound - low))^gamma_up
        f_down(w) = ((w - low) / (bound - low))^gamma_down

    Args:
        gamma_up: The power, up.
        gamma_down: The power, down.

    Example:
        >>> import feedbackpath as fp, torch
        >>> device, w = fp.devices.Power(step=0.01, gamma_up=2.0), torch.zeros(1)
        >>> random = torch.Generator().manual_seed(0)
        >>> round(device.response(w, w >= 0, device.draw(w, random)).item(), 2)
        0.25
    """

    gamma_up: float = 1.0
    gamma_down: float = 1.0

    def _left(self, state: Tensor, is_up: Tensor, cells: Cells) -> tuple[Tensor, Tensor]:
        """Return the share of the range that is left in the direction of a pulse, and the range."""
        ends = either(is_up, cells.high, cells.low, state)
        span = torch.as_tensor(cells.high - cells.low).to(state)
        return ((ends - state).abs() / span).clamp_min(1e-9), span

    def response(self, state: Tensor, is_up: Tensor, cells: Cells) -> Tensor:
        """Return the size of the next pulse, in steps."""
        left, _ = self._left(state, is_up, cells)
        gamma = either(is_up, self.gamma_up, self.gamma_down, state)
        return either(is_up, cells.up, cells.down, state) * left**gamma

    def after(self, state: Tensor, pulses: Tensor, is_up: Tensor, cells: Cells) -> Tensor:
        """Return the state after n small pulses.

        With q the share of the range that is left: ``q^(1-gamma)`` grows by ``(gamma - 1) g c n / range``;
        for gamma = 1 q falls by ``exp(-g c n / range)``.
        """
        if self.step * max(self.gamma_up, self.gamma_down) / (self.bound - self.lowest) > COARSE:
            state, pulses = make_first(self, state, pulses, is_up, cells)
        left, span = self._left(state, is_up, cells)
        gamma = either(is_up, self.gamma_up, self.gamma_down, state)
        taken = either(is_up, cells.up, cells.down, state) * self.step * pulses / span
        power = torch.where((gamma - 1.0).abs() < 1e-6, 0.5, 1.0 - gamma)  # 0.5: not used there
        base = (left**power - power * taken).clamp_min(0.0)
        later = torch.where((gamma - 1.0).abs() < 1e-6, left * torch.exp(-taken), base ** (1.0 / power))
        moved: Tensor = torch.where(is_up, span, -span) * (left - torch.minimum(later, left))
        return state + moved


@dataclass(frozen=True)
class Reference(SoftBounds):
    """Soft bounds, and a reference column that holds each cell's symmetry point (zero shifting).

    A weight is the difference of a cell and its reference: up and down pulses then pull it to 0 for any
    asymmetry of the cell (Kim et al. 2019). aihwkit's SoftBoundsReferenceDevice.

    Args:
        error: Standard deviation of the references, in units of weight (``reference_std``).

    Example:
        >>> import feedbackpath as fp, torch
        >>> device = fp.devices.Reference(step=0.01, asymmetry_spread=0.3)
        >>> cells = device.draw(torch.zeros(4), torch.Generator().manual_seed(0))
        >>> up, down = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
        >>> bool(torch.allclose(*[device.response(cells.shift, way, cells) for way in (up, down)]))
        True
    """

    error: float = 0.0
    cells_per_weight: ClassVar[int] = 2

    def draw(self, like: Tensor, generator: torch.Generator) -> Cells:
        """Draw the cells, and their references."""
        cells = super().draw(like, generator)
        shift = torch.as_tensor(self.symmetry_point(cells)).to(like)
        if self.error:
            shift = shift + torch.empty_like(like).normal_(0.0, self.error, generator=generator)
        return cells._replace(shift=shift)


@dataclass(frozen=True)
class Pair(Device):
    """A weight that is the difference of two cells, each of which only gets up pulses.

    For devices that can be raised in small steps and not lowered, such as phase-change memory. If one cell
    of a pair is nearly full, both are written again, with the same difference (a refresh).

    Args:
        cell: What each of the two cells is; its weights run from 0 to ``bound``.
        full: Share of the bound at which a pair is refreshed.

    ``step``, ``bound`` and what cells scatter by are the cell's own; those of the pair itself are not used.

    Example:
        >>> import feedbackpath as fp, torch
        >>> device = fp.devices.Pair(cell=fp.devices.SoftBounds(step=0.1, low=0.0))
        >>> w, random = torch.tensor([0.2, 0.2]), torch.Generator().manual_seed(0)
        >>> device.write(w, torch.tensor([0.1, -0.1]), device.draw(w, random), random)
        tensor([0.2800, 0.1000])
    """

    cell: Device = field(default_factory=lambda: SoftBounds(low=0.0))
    full: float = 0.9
    cells_per_weight: ClassVar[int] = 2

    def __post_init__(self) -> None:
        """Take step and bound from the cell."""
        if self.cell.lowest != 0.0:
            raise ChipError(f"Pair: a cell's weights begin at 0: give it low=0.0, not {self.cell.low}")
        for name, value in (("step", self.cell.step), ("bound", self.cell.bound)):
            object.__setattr__(self, name, value)
        super().__post_init__()

    def draw(self, like: Tensor, generator: torch.Generator) -> Cells:
        """Draw both cells of each pair; the second is empty where the weight is above 0."""
        both = torch.empty_like(like.expand(2, *like.shape).contiguous())
        minus = torch.clamp(-like.detach(), min=0.0)
        return self.cell.draw(both, generator)._replace(minus=minus)

    def apply(
        self, w: Tensor, pulses: Tensor, is_up: Tensor, cells: Cells, generator: torch.Generator | None
    ) -> Tensor:
        """Return weights after so many pulses: up pulses of one cell of each pair."""
        assert cells.minus is not None
        states = torch.stack([w + cells.minus, cells.minus])
        given = torch.stack([pulses * is_up, pulses * ~is_up])
        plus, minus = self.cell.apply(
            states, given, torch.ones_like(given, dtype=torch.bool), cells._replace(minus=None), generator
        )
        new: Tensor = plus - minus
        is_full = torch.maximum(plus, minus) > self.full * self.bound
        cells.minus.copy_(torch.where(is_full, torch.clamp(-new, min=0.0), minus))
        return new

    def response(self, state: Tensor, is_up: Tensor, cells: Cells) -> Tensor:
        """Return the size of the next pulse, in steps."""
        assert cells.minus is not None
        ups = torch.ones_like(is_up).expand(2, *is_up.shape)
        plus, minus = self.cell.response(torch.stack([state + cells.minus, cells.minus]), ups, cells)
        return torch.where(is_up, plus, minus)
