"""Regression discontinuity design (RDD): the jump at its threshold shows a neuron what its spike does.

Guerguiev, Kording & Richards 2020, "Spike-based causal inference for weight alignment". A cell that just
reached its threshold and one that just did not have had the same input, but one has spiked. With u_i the
largest value of a cell's potential, had it not been reset, and z_j the drive of neuron j above, both of one
window of time, four numbers for each synapse fit z_j on both sides of the threshold theta, within a margin::

    z_j ~ c1 u_i + c2,  theta - margin <= u_i < theta        z_j ~ c3 u_i + c4,  theta <= u_i < theta + margin
    beta_ij = (c3 theta + c4) - (c1 theta + c2)              estimate of W_ji times the effect of one spike

The other cells' spikes are no different just above theta and just below, even if the cells' inputs have
something in common: they do not bias beta where z is piecewise linear in u. Cell i spikes once in a window
in which it just reached theta, so that beta is W_ji itself. It scatters as an intercept at the end of a
margin does. With n inputs of variance V, and N1, N2 windows on the two sides, for evenly spread u::

    E|B - W|^2 / |W|^2  =  4 n V (1 / N1 + 1 / N2) d / (2 - d)        d = rate

Differs from the paper: the four numbers are those of least squares, once for each step, and not of a descent
along the way; B takes up beta itself, and not a multiple; every window begins at rest. The paper's text was
not at hand: equations are those of the code of Ahmad et al. (2020), who compare with it, and are tested by
what the paper states.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from feedbackpath.errors import RuleError
from feedbackpath.mirror.estimate import Estimate
from feedbackpath.mirror.fields import Field
from feedbackpath.rules.base import Facts
from feedbackpath.rules.spike_mirror import SpikeMirror, masked

LEAST_WINDOWS = 3  # that a line is drawn through, on each side


@dataclass(frozen=True)
class RegressionDiscontinuity(SpikeMirror):
    """Learn B from the difference that a spike makes: windows in which a cell just spiked or just did not.

    Args:
        rate: The share of B that a step replaces, above 0 and at most 1.
        cells: The cells. Each run is a window.
        margin: How far from the threshold a window counts, in standard deviations of u.

    Example:
        >>> import feedbackpath as fp
        >>> path = fp.untie(torch.nn.Linear(20, 10), "rdd")
        >>> for _ in range(50):
        ...     path.step()
        >>> path.matrix_angles()[""] < 15
        True
    """

    name: ClassVar[str] = "rdd"
    facts: ClassVar[Facts] = Facts(
        paper="Guerguiev, Kording & Richards 2020",
        equation="B <- (1 - d) B + d beta, beta the jump at the threshold",
        needs="a second phase, spikes, after each update",
        verdict="transport-free",
        flops=2.79,
    )
    search_space: ClassVar[Mapping[str, Sequence[Any]]] = {
        "rate": ("log", 0.003, 0.3),
        "margin": ("log", 0.1, 1.0),
    }
    margin: float = 0.5

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        super().__post_init__()
        if not self.margin > 0.0:
            raise RuleError(f"rdd: margin must be above 0, not {self.margin}")

    def estimate(self, field: Field, spikes: Tensor, peak: Tensor) -> Estimate:
        """Return beta: the drives of the layer above, weighted by what each says of the two intercepts."""
        weight, off = field.weight, peak - self.cells.threshold
        z = masked(field, field.run(spikes.sum(0)))
        above = _intercept(off, (off >= 0.0) & (off < self.margin))
        below = _intercept(off, (off < 0.0) & (off >= -self.margin))
        one = z.new_ones(z.shape[1])
        products = field.multiply(above - below, z)
        return Estimate(weight, products, field.pairs, one, one, 1.0, len(peak))


def _intercept(off: Tensor, counts: Tensor) -> Tensor:
    """Return the weights ``[windows, ...]`` by which a line through some windows has its value at off = 0.

    A cell with too few such windows tells nothing: its weights are 0.
    """
    near, number = torch.where(counts, off, 0.0), counts.sum(0).clamp(min=1).to(off.dtype)
    mean = near.sum(0) / number
    about = torch.where(counts, off - mean, 0.0)
    spread = about.square().sum(0).clamp(min=torch.finfo(off.dtype).tiny)
    line = torch.where(counts, 1.0 / number, 0.0) - mean * about / spread
    return torch.where(counts.sum(0) >= LEAST_WINDOWS, line, 0.0)
