"""Counts of what arrays do in a training step, and its energy and area.

An array of V cells that n inputs drive and m outputs leave is read vector by vector. With u vectors a step::

    reads u    products u V    DAC u n    ADC u m         forward; backward with n and m exchanged

In a convolution each position of each map is such a vector. Values moved are those that are brought to an
array: a map's values once for each array that it goes to, and the changes that a write asks for.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from feedbackpath.errors import ChipError

Phase = Literal["forward", "backward", "update", "mirror"]
PHASES: tuple[Phase, ...] = get_args(Phase)
ARRAYS = ("W", "B", "one")
"""Those of W, those of B, and for comparison one that holds W alone, is read both ways and trained by bp."""


@dataclass(frozen=True)
class Work:
    """What arrays do in a training step, on average.

    Attributes:
        reads: Vectors that are sent through an array.
        products: Products of a cell and a signal in them.
        dac: Values that are converted on their way in.
        adc: Values that are converted on their way out.
        writes: Cells that are changed, each write of a cell counted.
        pulses: Pulses in these writes; ideal cells take none.
        moved: Values that are brought to an array.
    """

    reads: float = 0.0
    products: float = 0.0
    dac: float = 0.0
    adc: float = 0.0
    writes: float = 0.0
    pulses: float = 0.0
    moved: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        """Return the work of both."""
        return Work(*(one + more for one, more in zip(numbers_of(self), numbers_of(other), strict=True)))

    def __mul__(self, factor: float) -> "Work":
        """Return the work of so many times."""
        return Work(*(factor * one for one in numbers_of(self)))


def numbers_of(work: Work) -> tuple[float, ...]:
    """Return the numbers of a ``Work``, in order."""
    return tuple(getattr(work, one.name) for one in dataclasses.fields(work))


def reading(vectors: float, inputs: int, outputs: int, cells: int, moved: float = 0.0) -> Work:
    """Return the work of sending vectors through an array: see the module."""
    return Work(vectors, vectors * cells, vectors * inputs, vectors * outputs, moved=moved)


@dataclass(frozen=True)
class ArrayCounts:
    """The arrays of one kind, of all layers together.

    Attributes:
        cells: Their cells; pairs and reference columns have two for each weight.
        dacs: Converters of signals that go in: one for each line that is driven in training.
        adcs: Converters of signals that come out, likewise.
        work: By phase, what they do in a training step.
    """

    cells: int = 0
    dacs: int = 0
    adcs: int = 0
    work: Mapping[Phase, Work] = field(default_factory=dict)

    @property
    def total(self) -> Work:
        """The work of all phases."""
        return sum(self.work.values(), Work())

    def __add__(self, other: "ArrayCounts") -> "ArrayCounts":
        """Return both as one."""
        known = {*self.work, *other.work}
        work = {p: self.work.get(p, Work()) + other.work.get(p, Work()) for p in PHASES if p in known}
        return ArrayCounts(self.cells + other.cells, self.dacs + other.dacs, self.adcs + other.adcs, work)


@dataclass(frozen=True)
class Costs:
    """What one operation takes, in picojoules, and one part, in square micrometres: replace them by your own.

    The defaults that are published are those of ISAAC (Shafiee et al., ISCA 2016, Table I; 32 nm, arrays of
    128 x 128, read in 100 ns for each bit of the inputs; here one cell a weight) and of Horowitz (ISSCC 2014;
    45 nm). They are of different designs, and say no more than where most of the energy goes.

    Args:
        product_pj: One cell in one read. ISAAC: 0.3 mW an array for 100 ns and 16,384 cells, 8 bits.
        dac_pj: One value of 8 bits. ISAAC: 4 mW for 1,024 drivers of one bit, 100 ns, 8 bits.
        adc_pj: One output. ISAAC: 2 mW at 1.2 GS/s, a conversion for each of 8 bits of the inputs.
        pulse_pj: One pulse. An example, not a measurement: 1 V, 10 uA, 100 ns.
        moved_pj: One value of 8 bits. Horowitz: 10 pJ for 64 bits of an SRAM of 8 KB.
        cell_um2: One cell. ISAAC: 25 um^2 an array.
        dac_um2: The converter of one input. ISAAC: 170 um^2 for 1,024.
        adc_um2: The converter of one output. ISAAC: one of 1,200 um^2 serves 128 outputs in turns.

    Example:
        >>> from feedbackpath.hardware import Costs
        >>> from feedbackpath.hardware.counts import Work
        >>> Costs(pulse_pj=0.1).energy_pj(Work(pulses=1000.0))
        100.0
    """

    product_pj: float = 0.0146
    dac_pj: float = 3.1
    adc_pj: float = 13.3
    pulse_pj: float = 1.0
    moved_pj: float = 1.25
    cell_um2: float = 0.0015
    dac_um2: float = 0.17
    adc_um2: float = 9.4

    def __post_init__(self) -> None:
        """Refuse what is no energy and no area."""
        for one in dataclasses.fields(self):
            value = getattr(self, one.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < math.inf:
                raise ChipError(f"Costs: {one.name} must be a number of 0 or more, not {value!r}")

    def energy_pj(self, work: Work) -> float:
        """Return the energy of some work: the sum of its operations, each times its own."""
        return (
            self.product_pj * work.products + self.dac_pj * work.dac + self.adc_pj * work.adc
            + self.pulse_pj * work.pulses + self.moved_pj * work.moved
        )  # fmt: skip

    def area_um2(self, arrays: ArrayCounts) -> float:
        """Return the area of some arrays and their converters."""
        return self.cell_um2 * arrays.cells + self.dac_um2 * arrays.dacs + self.adc_um2 * arrays.adcs
