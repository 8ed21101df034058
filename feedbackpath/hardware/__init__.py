"""Arrays that hold weights: devices that write, converters that read, and the chip of both."""

from feedbackpath.hardware import devices
from feedbackpath.hardware.chip import Chip
from feedbackpath.hardware.readout import Read
from feedbackpath.hardware.wiring import Wiring

__all__ = ["Chip", "Read", "Wiring", "devices"]
