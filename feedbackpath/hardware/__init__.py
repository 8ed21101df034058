"""Arrays that hold weights: devices that write, converters that read, and the chip of both."""

from feedbackpath.hardware import devices
from feedbackpath.hardware.chip import Chip
from feedbackpath.hardware.counter import Counter
from feedbackpath.hardware.counts import ArrayCounts, Costs, Work
from feedbackpath.hardware.readout import Read
from feedbackpath.hardware.wiring import Wiring

__all__ = ["ArrayCounts", "Chip", "Costs", "Counter", "Read", "Wiring", "Work", "devices"]
