"""Which device a job computes on."""

import torch

from feedbackpath.errors import ConfigError


def usable_device(name: str) -> torch.device:
    """Return the device of that name.

    Raises:
        ConfigError: There is no such device here, or it holds no values, as ``meta`` does.
    """
    try:
        torch.zeros(1).to(name).item()
        device = torch.device(name)
    except (
        Exception
    ) as error:  # torch was built without the device, or lacks it: each has an error of its own
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if "device type at start of device string" in reason:  # followed by all that torch ever ran on
            reason = "there is no such device"
        choice = "cpu, or cuda" if torch.cuda.is_available() else "cpu; no CUDA device is usable here"
        raise ConfigError(f"device {name!r} cannot be used: {reason}; choose {choice}") from None
    if device.type == "cpu" and device.index is not None:
        raise ConfigError(f"device {name!r} cannot be used: CPUs have no numbers; choose cpu")
    return device
