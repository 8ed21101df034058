"""Devices for ``fp.Chip``: how a cell answers a write. ``fp.devices.SoftBounds(step=1e-3, noise=0.3)``.

The classes are in ``cells``, ``responses`` and ``measured``. Presets are functions whose keyword arguments
change a setting. Their numbers are those of the package aihwkit (IBM, ``simulator/presets/devices.py``),
which fitted them to the measurements named here. Without noise and spread, 200 pulses lead a cell to where
they lead it in that package (version 1.1.0), within 2% of the way. What that package has in addition: noise
between what is stored and what is read (``write_noise_std``), and spread of slopes and lifetimes.
"""

from dataclasses import replace
from typing import Any, cast

from feedbackpath.hardware.cells import Cells, Device, Ideal
from feedbackpath.hardware.measured import Measured
from feedbackpath.hardware.responses import Exponential, LinearStep, Pair, Power, Reference, SoftBounds

__all__ = [
    "Capacitor", "Cells", "Device", "EcRam", "Exponential", "HfO2", "Ideal", "LinearStep", "Measured", "PCM",
    "Pair", "Power", "ReRam", "Reference", "SoftBounds",
]  # fmt: skip


def EcRam(**changes: Any) -> LinearStep:  # noqa: N802 (called as classes are)
    """Return an electrochemical cell: small, nearly symmetric steps (Tang et al., IEDM 2018).

    Example:
        >>> import feedbackpath as fp
        >>> fp.devices.EcRam(noise=0.0).step
        0.002
    """
    preset = LinearStep(
        step=0.002, noise=0.3, spread=0.1, asymmetry_spread=0.01, bound=1.1724, low=-0.8276,
        bound_spread=0.05, slope_up=0.1153, slope_down=0.5085,
    )  # fmt: skip
    return replace(preset, **changes)


def ReRam(**changes: Any) -> Exponential:  # noqa: N802
    """Return a resistive cell: noisy, and asymmetric steps (Gong et al., Nat. Commun. 2018; ReRamES).

    That package's ``up_down`` u = 0.259359 makes down pulses smaller, by 1 - u, and leaves up pulses as they
    are: in the terms here a step of 0.00135 (1 - u) and an asymmetry of 1 / (1 - u) - 1.

    Example:
        >>> import feedbackpath as fp
        >>> fp.devices.ReRam().noise
        5.0
    """
    preset = Exponential(
        step=0.00099987, noise=5.0, spread=0.2, asymmetry=0.35018, asymmetry_spread=0.0675, bound_spread=0.3,
        a_up=-1.18445, a_down=-0.081404, gamma_up=5.0, gamma_down=5.0, a=-0.5, b=-0.5,
    )  # fmt: skip
    return replace(preset, **changes)


def Capacitor(**changes: Any) -> LinearStep:  # noqa: N802
    """Return a capacitor: linear steps, and charge that leaks away (Li et al., VLSI 2018).

    Example:
        >>> import feedbackpath as fp
        >>> fp.devices.Capacitor().lifetime
        1000000.0
    """
    preset = LinearStep(
        step=0.005, noise=0.3, spread=0.1, asymmetry_spread=0.06, bound_spread=0.07, lifetime=1e6,
        slope_up=0.05, slope_down=0.05,
    )  # fmt: skip
    return replace(preset, **changes)


def PCM(**changes: Any) -> Pair:  # noqa: N802
    """Return pairs of phase-change cells, which can only be raised (Nandakumar et al. 2020).

    Changes are settings of the cell.

    Example:
        >>> import feedbackpath as fp
        >>> fp.devices.PCM().cell.step
        0.01
    """
    cell = Exponential(
        step=0.01, noise=0.6, spread=0.2, asymmetry_spread=0.05, bound=2.0, low=0.0, bound_spread=0.1,
        a_up=-27.235, a_down=-2.235, gamma_up=2.5, gamma_down=2.5, a=-1.0, b=0.0,
    )  # fmt: skip
    return Pair(cell=replace(cell, **changes))


def HfO2(**changes: Any) -> Reference:  # noqa: N802
    """Return hafnium oxide cells with a reference column: few, large steps (Gong, Rasch et al., IEDM 2022).

    The array's bounds scatter by 0.43 above and 0.60 below; here by 0.5.

    Example:
        >>> import feedbackpath as fp
        >>> fp.devices.HfO2().step
        0.4622
    """
    preset = Reference(
        step=0.4622, noise=0.2174, spread=0.7125, asymmetry_spread=0.01, bound_spread=0.5, error=0.05
    )
    return replace(preset, **changes)


PRESETS = {
    "ideal": Ideal, "linear": LinearStep, "soft": SoftBounds, "reference": Reference, "ecram": EcRam,
    "reram": ReRam, "capacitor": Capacitor, "pcm": PCM, "hfo2": HfO2,
}  # fmt: skip
"""Devices by the names that the command line has for them."""


def device_named(name: str, **changes: Any) -> Device:
    """Return a preset by its name on the command line, or a measured response by its file ``*.csv``."""
    if name.endswith(".csv"):
        return Measured.from_csv(name, **changes)
    return cast(Device, PRESETS[name](**changes))  # type: ignore[operator]
