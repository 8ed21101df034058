"""The axes of figures and charts: their scales, ends and ticks."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from math import ceil, floor, isclose, log10
from typing import Any

import numpy as np

from feedbackpath.train.results import Metric

ERROR = Metric()
MOST_TICKS = 10  # of an axis for the metric
ANGLE_TICKS = (0, 1, 5, 15, 30, 60, 90, 120, 180)
ROOM = 0.04  # of an axis, beyond its first and last tick: no line lies on the frame
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def axis_title(metric: Metric) -> str:
    """Return the title of an axis for the metric, such as ``test error (%)``."""
    return metric.label + (f" ({metric.unit})" if metric.unit else "")


def write_number(value: float) -> str:
    """Write a number as ticks show it: plainly, or as a power of ten.

    Example:
        >>> [write_number(value) for value in (-0.5, 0.001, 1e-5, 2048, 1e5)]
        ['−0.5', '0.001', '10⁻⁵', '2048', '10⁵']
    """
    power = round(log10(value)) if value > 0 else 0
    if abs(power) > 3 and isclose(value, 10.0**power):
        return "10" + str(power).translate(_SUPERSCRIPTS)
    return f"{value:g}".replace("-", "−")


def write_numbers(values: Sequence[float]) -> list[str]:
    """Write the ticks of a linear axis, all with as many decimals.

    Example:
        >>> write_numbers([-0.5, 0.0, 0.5]), write_numbers([0.0, 15.0]), write_numbers([0.0, 5e-05])
        (['−0.5', '0.0', '0.5'], ['0', '15'], ['0.00000', '0.00005'])
    """
    decimals = max(len(f"{Decimal(f'{value:g}'):f}".partition(".")[2]) for value in values)
    return [f"{value:.{decimals}f}".replace("-", "−") for value in values]


def ticks_around(values: Iterable[float], step: float) -> list[float]:
    """Return multiples of a step that reach around all values.

    Example:
        >>> ticks_around([-0.1, 1.55], 0.5), ticks_around([0.2, 0.9], 0.25)
        ([-0.5, 0.0, 0.5, 1.0, 1.5, 2.0], [0.0, 0.25, 0.5, 0.75, 1.0])
    """
    low, high = min(values := list(values)), max(values)
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return [round(step * n, 12) for n in range(first, max(last, first + 1) + 1)]


def with_room(ticks: Sequence[float]) -> tuple[float, float]:
    """Return the ends of a linear axis with these ticks."""
    room = ROOM * (ticks[-1] - ticks[0])
    return ticks[0] - room, ticks[-1] + room


def error_axis(
    values: Iterable[float], metric: Metric = ERROR
) -> tuple[str, tuple[float, float], list[float]]:
    """Return the scale of an axis for values of a metric, its ends and its ticks, which reach around them.

    It is logarithmic where lower is better and all are positive; else linear.
    """
    smallest, largest = min(values := list(values)), max(values)
    if smallest <= 0 or not metric.lower_is_better:
        if smallest == 0 and metric.lower_is_better and metric.unit == "%":
            largest = max(largest, 1.0)
        ticks = ticks_around([smallest, largest], _nice_step(largest - smallest))
        return "linear", with_room(ticks), ticks
    decades = range(floor(log10(smallest)) - 1, floor(log10(largest)) + 2)
    for digits in ((1, 2, 3, 5), (1,)):
        marks = [float(f"{digit}e{decade}") for decade in decades for digit in digits]
        below = max(mark for mark in marks if mark <= smallest)
        above = min(mark for mark in marks if mark >= largest)
        low = min(below / 1.1, above / 6)
        ticks = [mark for mark in marks if low <= mark <= above]
        if len(ticks) <= MOST_TICKS:
            break
    return "log", (low, 1.1 * above), ticks


def _nice_step(span: float) -> float:
    """Return 1, 2 or 5 times a power of ten, of which a span has two to six."""
    decade = 10.0 ** floor(log10(span or 1.0))
    return next(step * decade for step in (0.2, 0.5, 1.0, 2.0) if span <= 5.5 * step * decade)


def minor_ticks(ends: tuple[float, float]) -> list[float]:
    """Return the marks of a log axis between its ends: 1, 2, …, 9 times each power of ten."""
    decades = range(floor(log10(ends[0])), ceil(log10(ends[1])))
    marks = [float(f"{digit}e{decade}") for decade in decades for digit in range(1, 10)]
    return [mark for mark in marks if ends[0] <= mark <= ends[1]]


def epoch_ticks(last: int, most: int) -> list[int]:
    """Return ticks of an axis of epochs, from 0 to the last epoch, in about as many steps at most.

    Example:
        >>> epoch_ticks(10, 4), epoch_ticks(6, 4), epoch_ticks(11, 4)
        ([0, 5, 10], [0, 2, 4, 6], [0, 3, 6, 9, 11])
    """
    least = max(1, ceil(last / most))
    step = next((step for step in range(least, last // 2 + 1) if last % step == 0), least)
    return [tick for tick in range(0, last, step) if last - tick > step / 2] + [last]


@dataclass(frozen=True)
class LayerScale:
    """The axis that the panels of a quantity of layers share.

    Attributes:
        name: How it is scaled, for the axis' title; empty: linearly.
        forward: Maps values to places on the axis.
        inverse: Maps places to values.
        ends: Its lower and its upper end.
        ticks: Its ticks.
    """

    name: str
    forward: Callable[[Any], Any]
    inverse: Callable[[Any], Any]
    ends: tuple[float, float]
    ticks: list[float]


def scale_of(quantity: str, values: Iterable[float]) -> LayerScale:
    """Return the axis for a quantity, one of `QUANTITIES`, given all of its values.

    Angles have a square-root axis: 1° and 90° can both be read on it, and it begins below 0°, so that no line
    lies on the frame. Gains have a linear one, of at least 0 to 1.25, so that small gains look small and
    steady ones steady; beyond 3 it is logarithmic above 1. Ticks reach around all values.
    """
    values = [*values, 0.0]
    low, high = min(values), max(values)
    if quantity != "gain":
        top = next((tick for tick in ANGLE_TICKS if tick >= max(high, 20.0)), ANGLE_TICKS[-1])
        ticks = [float(tick) for tick in ANGLE_TICKS if tick <= top]
        return LayerScale(
            "square-root scale", _signed_sqrt, _signed_square, (-0.002 * top, 1.05 * top), ticks
        )
    if max(-low, high) <= 3:
        step = 0.25 if max(-low, high) <= 1.25 else 0.5
        ticks = ticks_around([low, high, 1.25], step)
        return LayerScale("", _same, _same, with_room(ticks), ticks)
    powers = [10.0**power for power in range(ceil(log10(max(-low, high))) + 1)]
    marks = [*(-power for power in reversed(powers)), 0.0, *powers]
    first = max(mark for mark in marks if mark <= low)
    last = min(mark for mark in marks if mark >= max(high, 1.0))
    ends = min(1.5 * first, -0.1), 1.5 * last
    return LayerScale(
        "log scale above 1", _log_above_one, _power_above_one, ends, [m for m in marks if first <= m <= last]
    )


def describe_flat(means: Sequence[float]) -> str:
    """Say of angles that no axis tells from 0 how small they are; empty where there are larger ones.

    Example:
        >>> describe_flat([2e-6, 0.0]), describe_flat([0.0]), describe_flat([2e-6, 5.0])
        ('all below 0.00001°', 'all 0°', '')
    """
    largest = max(means, default=1.0)
    if largest > 0.1:
        return ""
    if largest <= 0:
        return "all 0°"
    decimals = -ceil(log10(largest))
    return f"all below {10.0**-decimals:.{decimals}f}°"


def _same(value: Any) -> Any:
    return value


def _signed_sqrt(value: Any) -> Any:
    return np.sign(value) * np.sqrt(np.abs(value))


def _signed_square(value: Any) -> Any:
    return np.sign(value) * np.square(value)


def _log_above_one(value: Any) -> Any:
    size = np.abs(value)
    return np.sign(value) * np.where(size <= 1, size, 1 + np.log10(np.maximum(size, 1)))


def _power_above_one(value: Any) -> Any:
    size = np.abs(value)
    return np.sign(value) * np.where(size <= 1, size, 10.0 ** (np.maximum(size, 1) - 1))
