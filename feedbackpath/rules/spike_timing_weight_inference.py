"""Spike-timing-dependent weight inference (STDWI): what is fired before a neuron's spike shows its weights.

Ahmad, Ambrogioni & van Gerven 2020, "Overcoming the weight transport problem via spike-timing-dependent
weight inference". Cell i below keeps two averages of its spikes over time, a fast and a slow one. Whenever
neuron j above spikes, which W drives, its synapses learn::

    dB_ji = eta (alpha (fast_i - slow_i) - B_ji)

The difference of the averages is 0 on average, so that B comes to hold alpha times what cell i fired, above
its mean, just before spikes of j. In independent cells, and for weights so small that no single one makes j
spike, that is in proportion to W_ji. With e_i = fast_i - slow_i, of variance V, S_j the spikes of j, and h_j
its drive as averaged in the same way, ``h_j = sum_i W_ji e_i``, the factor is known to j itself::

    E[S_j e_i] = s_j V W_ji        s_j = E[S_j h_j] / E[h_j^2]

B takes up ``E[S_j e_i] / (s_j V)``, and settles at W. It scatters as a weight mirror's does, behind an
activation that is a spike: with n inputs and M time steps, about::

    E|B - W|^2 / |W|^2  =  c n Var[S] / (s^2 E[h^2] M) d / (2 - d)        d = rate

c is 1 plus twice the sum, over all lags, of the products of the autocorrelations of S and e: 1.7 as set here.
A cell's rate is a convex function of its drive below threshold, so that B has a share of W^2 as well, of the
order of 1 / sqrt(n): little where the threshold is near the mean of u, and n is large.

Differs from the paper: alpha is calibrated in this way; runs begin at rest, and the means over runs at each
time are taken off; all time steps of a training step are summed up before B moves; a neuron above scales its
drive to unit variance, so that it spikes at all. Drives that have something in common bias B.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from feedbackpath.errors import RuleError
from feedbackpath.mirror.estimate import Estimate
from feedbackpath.mirror.fields import Field
from feedbackpath.mirror.spikes import Cells, trace
from feedbackpath.rules.base import Facts
from feedbackpath.rules.spike_mirror import SpikeMirror, masked


@dataclass(frozen=True)
class SpikeTimingWeightInference(SpikeMirror):
    """Learn B from what the cells below fired just before each spike of a neuron above.

    Args:
        rate: The share of B that a step replaces, above 0 and at most 1.
        cells: The cells.
        fast: Time constant of the fast average, in time steps.
        slow: Time constant of the slow average.

    Example:
        >>> import torch
        >>> import feedbackpath as fp
        >>> path = fp.untie(torch.nn.Linear(20, 10), "stdwi")
        >>> for _ in range(50):
        ...     path.step()
        >>> path.matrix_angles()[""] < 10
        True
    """

    name: ClassVar[str] = "stdwi"
    facts: ClassVar[Facts] = Facts(
        paper="Ahmad, Ambrogioni & van Gerven 2020",
        equation="B <- (1 - d) B + d E[S (fast - slow)] / (s V)",
        needs="a second phase, spikes, after each update",
        verdict="transport-free",
        flops=12.19,
    )
    search_space: ClassVar[Mapping[str, Sequence[Any]]] = {
        "rate": ("log", 0.003, 0.3),
        "fast": ("log", 1.0, 8.0),
    }
    cells: Cells = Cells(runs=64, steps=50, threshold=0.25)
    fast: float = 3.0
    slow: float = 20.0

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        super().__post_init__()
        if not 1.0 <= self.fast < self.slow:
            raise RuleError(
                f"stdwi: fast must be at least 1 and below slow, not fast={self.fast}, slow={self.slow}"
            )

    def estimate(self, field: Field, spikes: Tensor, peak: Tensor) -> Estimate:
        """Return the sum of ``S_j e_i`` over time, with what its factor is taken from."""
        drive = field.run(spikes.flatten(0, 1))
        drive = drive.view(len(spikes), -1, *drive.shape[1:])
        signals = self.cells.answer(drive), self._timed(spikes), self._timed(drive)
        signals = masked(field, signals[0]), signals[1], masked(field, signals[2])
        above, e, h = ((signal - signal.mean(1, keepdim=True)).flatten(0, 1) for signal in signals)
        freedom = len(e) - len(spikes)  # a mean is taken off at each time
        answer, power = (_by_channel(h * other) for other in (above, h))
        variance = float(e.square().sum() / e[0].numel() / freedom)
        products = field.multiply(e, above)
        return Estimate(
            field.weight, products, field.pairs * freedom, answer, power, variance, len(e) * field.answers
        )

    def _timed(self, signal: Tensor) -> Tensor:
        """Return the difference of the two averages."""
        return trace(signal, self.fast) - trace(signal, self.slow)


def _by_channel(signal: Tensor) -> Tensor:
    """Sum ``[N, channels, ...]`` over all but channels."""
    return signal.sum([dim for dim in range(signal.dim()) if dim != 1])
