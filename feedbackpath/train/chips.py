"""Make a chip from the settings of a config."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from feedbackpath.errors import ConfigError
from feedbackpath.hardware import Chip, Costs, Counter, Read, Wiring
from feedbackpath.hardware.devices import Device, device_named
from feedbackpath.path import FeedbackPath
from feedbackpath.train.config import ChipSettings
from feedbackpath.train.results import ArrayCounts
from feedbackpath.train.settings import read_settings

OF_THE_CHIP = ("read", "wiring", "update", "verify", "feedback")


def make_chip(config: ChipSettings, seed: int) -> Chip | None:
    """Return the chip of a config; None: it has none.

    ``chip_settings`` maps settings of the device to values, and beside them ``read`` (signals to settings of
    ``Read``), ``wiring``, ``update``, ``verify``, and ``feedback``: settings of B's devices that differ.

    Raises:
        ConfigError: There is no such setting.
        ChipError: A value makes no sense.
    """
    if config.chip is None:
        return None
    settings = dict(config.chip_settings)
    own = {name: settings.pop(name) for name in OF_THE_CHIP if name in settings}
    common = {"bits": config.read_bits, "noise": config.read_noise}
    common = {name: value for name, value in common.items() if value is not None}
    told = _mapping("read", own.get("read", {}))
    signals = dict.fromkeys(("forward", "backward"), common) | {
        signal: (common if signal in ("forward", "backward") else {}) | _mapping(f"read.{signal}", value)
        for signal, value in told.items()
    }
    feedback = own.get("feedback")
    return Chip(
        _make(config.chip, settings),
        {signal: _of(Read, f"read.{signal}", value) for signal, value in signals.items()},
        feedback_device=None
        if feedback is None
        else _make(config.chip, settings | _mapping("feedback", feedback)),
        wiring=_of(Wiring, "wiring", own.get("wiring", {})),
        update=own.get("update", "net"),
        verify=own.get("verify", 0),
        seed=seed,
    )


def counter_of(path: FeedbackPath) -> Counter | None:
    """Begin to count what the arrays of a path's chip do; None: it has none, or that is not modelled."""
    return path.chip.counting() if path.chip is not None and path.chip.can_count else None


def counts_of(counter: Counter | None) -> dict[str, ArrayCounts] | None:
    """Return what was counted in a step, as result files have it, and begin anew; None: nothing."""
    if counter is None:
        return None
    found = counter.counts() if counter.steps else {}
    counter.reset()
    return {array: ArrayCounts(**dataclasses.asdict(counts)) for array, counts in found.items()} or None


def read_costs(file: Path) -> Costs:
    """Read what operations and parts take from a YAML file; what it does not name stays as it is.

    Raises:
        ConfigError: The file cannot be read, or names what ``Costs`` has not.
        ChipError: A value makes no sense.
    """
    return Costs(**read_settings(file, [field.name for field in dataclasses.fields(Costs)]))


def _make(name: str, settings: Mapping[str, Any]) -> Device:
    try:
        return device_named(name, **settings)
    except TypeError as error:
        known = sorted(field.name for field in dataclasses.fields(device_named(name)))
        raise ConfigError(
            f"chip_settings: {error}; --chip {name} has {', '.join(known)}, and {', '.join(OF_THE_CHIP)}"
        ) from None


def _of(kind: type[Any], owner: str, settings: Any) -> Any:
    chosen, known = _mapping(owner, settings), [field.name for field in dataclasses.fields(kind)]
    for name in chosen:
        if name not in known:
            raise ConfigError(f"chip_settings: {owner} has no {name!r}; it has {', '.join(known)}")
    return kind(**chosen)


def _mapping(owner: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"chip_settings: {owner} must map settings to values, not {value!r}")
    return dict(cast(Mapping[str, Any], value))
