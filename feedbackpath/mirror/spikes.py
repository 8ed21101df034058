"""Spikes of leaky integrate-and-fire cells: the noise of rules that learn B from spikes.

Each input of a layer is a cell. Noise drives it; a is its leak, ``1 - 1 / time_constant``::

    u_t = a u_{t-1} + I_t                   what the cell would come to without spikes
    v_t = a v_{t-1} + I_t                   its potential; at v_t >= threshold it spikes, and v_t becomes 0
    I_t = sqrt(1 - a^2) (sqrt(1 - common) xi_t + sqrt(common) zeta_t)

xi is each cell's own and zeta common to all cells of a run, of unit variance, so that u comes to have unit
variance. Every run begins at u = v = 0.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from feedbackpath.errors import RuleError
from feedbackpath.mirror.settings import refuse_no_count


@dataclass(frozen=True)
class Cells:
    """Settings of the cells.

    Args:
        runs: How often all of them are run, from rest.
        steps: Time steps of a run.
        time_constant: Of the potential, in time steps.
        threshold: In standard deviations of u.
        common: The share of the variance of the drive that all cells of a layer have in common.
    """

    runs: int
    steps: int
    time_constant: float = 5.0
    threshold: float = 1.0
    common: float = 0.0

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        refuse_no_count("Cells: runs", self.runs, least=64)
        refuse_no_count("Cells: steps", self.steps)
        if not self.time_constant >= 1.0:
            raise RuleError(f"Cells: time_constant must be at least 1 step, not {self.time_constant}")
        if not 0.0 <= self.common < 1.0:
            raise RuleError(f"Cells: common must be at least 0 and below 1, not {self.common}")

    def leak(self, potential: Tensor, current: Tensor) -> Tensor:
        """Return what one step makes of a potential."""
        return (1.0 - 1.0 / self.time_constant) * potential + current

    def fire(self, shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Run cells; return their spikes ``[steps, runs, *shape]`` and the peak of u ``[runs, *shape]``."""
        u, v = (like.new_zeros((self.runs, *shape)) for _ in range(2))
        peak, spikes = torch.full_like(u, -math.inf), u.new_empty((self.steps, *u.shape))
        size = math.sqrt(1.0 - (1.0 - 1.0 / self.time_constant) ** 2)
        for step in range(self.steps):
            own, shared = u.new_empty(u.shape), u.new_empty((self.runs, *(1 for _ in shape)))
            own.normal_(generator=generator)
            shared.normal_(generator=generator)
            current = size * (math.sqrt(1.0 - self.common) * own + math.sqrt(self.common) * shared)
            u, v = self.leak(u, current), self.leak(v, current)
            spikes[step] = v >= self.threshold
            v = torch.where(spikes[step] > 0, 0.0, v)
            peak = torch.maximum(peak, u)
        return spikes, peak

    def answer(self, drive: Tensor) -> Tensor:
        """Return the spikes of cells that get a drive ``[steps, runs, ...]``, each in units of its own drive.

        A cell takes the mean off its drive, and divides by its standard deviation, so that it spikes as
        often as the cells that noise drives.
        """
        mean, deviation = drive.mean((0, 1)), drive.std((0, 1))
        size = math.sqrt(1.0 - (1.0 - 1.0 / self.time_constant) ** 2)
        currents = size * (drive - mean) / deviation.clamp(min=torch.finfo(drive.dtype).tiny)
        v, spikes = torch.zeros_like(drive[0]), torch.empty_like(drive)
        for step, current in enumerate(currents):
            v = self.leak(v, current)
            spikes[step] = v >= self.threshold
            v = torch.where(spikes[step] > 0, 0.0, v)
        return spikes


def trace(spikes: Tensor, time_constant: float) -> Tensor:
    """Return an exponential average over time steps, the first dimension; it begins at the average of all.

    Example:
        >>> trace(torch.tensor([0.0, 1.0, 0.0, 0.0]), 2.0)
        tensor([0.1250, 0.5625, 0.2812, 0.1406])
    """
    kept, average = torch.empty_like(spikes), spikes.mean(0)
    for step, now in enumerate(spikes):
        average = torch.lerp(average, now, 1.0 / time_constant)
        kept[step] = average
    return kept
