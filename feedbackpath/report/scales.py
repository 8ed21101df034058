"""The axes of figures and charts: their scales, ends and ticks."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Any

import numpy as np

from feedbackpath.train.results import Metric

ERROR = Metric()
MOST_TICKS = 10  # of an axis for the metric
ANGLE_TICKS = (0, 1, 5, 15, 30, 60, 90, 180)


def axis_title(metric: Metric) -> str:
    """Return the title of an axis for the metric, such as ``test error (%)``."""
    return metric.label + (f" ({metric.unit})" if metric.unit else "")


def error_axis(
    values: Iterable[float], metric: Metric = ERROR
) -> tuple[str, tuple[float, float], list[float]]:
    """Return the scale of an axis for values of a metric, its ends and its ticks.

    It is logarithmic where lower is better and all are positive; else linear, and the library chooses ticks.
    """
    smallest, largest = min(values := list(values)), max(values)
    if smallest == 0 and metric.lower_is_better:
        return "linear", (0.0, max(1.05 * largest, 1.0 if metric.unit == "%" else 0.0) or 1.0), []
    if smallest < 0 or not metric.lower_is_better:
        room = 0.05 * (largest - smallest) or 0.5
        return "linear", (smallest - room, largest + room), []
    high = 1.15 * largest
    decades = range(floor(log10(smallest)) - 1, floor(log10(high)) + 1)
    for digits in ((1, 2, 3, 5), (1,)):
        marks = [float(f"{digit}e{decade}") for decade in decades for digit in digits]
        below = max(mark for mark in marks if mark <= smallest)  # every value has a tick below it
        ticks = [mark for mark in marks if below <= mark <= high]
        if len(ticks) <= MOST_TICKS:
            break
    return "log", (min(below / 1.1, high / 6), high), ticks


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
    steady ones steady; beyond 3 it is logarithmic above 1.
    """
    values = [*values, 0.0]
    low, high = min(values), max(values)
    if quantity != "gain":
        top = 1.05 * max(high, 20.0)
        ticks = [float(tick) for tick in ANGLE_TICKS if tick <= top]
        return LayerScale("square-root scale", _signed_sqrt, _signed_square, (-0.002 * top, top), ticks)
    if max(-low, high) <= 3:
        step = 0.25 if max(-low, high) <= 1.25 else 0.5
        ends = min(1.1 * low, -0.06), max(1.04 * high, 1.25)
        first, last = ceil(ends[0] / step), floor(ends[1] / step)
        return LayerScale("", _same, _same, ends, [step * n for n in range(first, last + 1)])
    powers = [10.0**power for power in range(ceil(log10(max(-low, high))) + 1)]
    ends = min(1.5 * low, -0.1), max(1.5 * high, 1.25)
    marks = (*(-power for power in reversed(powers)), 0.0, *powers)
    ticks = [mark for mark in marks if ends[0] <= mark <= ends[1]]
    return LayerScale("log scale above 1", _log_above_one, _power_above_one, ends, ticks)


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
