"""Make a rule from its name and the settings of a config file."""

import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import Any, cast

from feedbackpath.errors import ConfigError
from feedbackpath.rules import RULES, Rule, resolve_rule

NUMBER_AS_TEXT = re.compile(r"([-+]?\d+)(\.\d*)?e([-+]?)(\d+)", re.IGNORECASE)


def make_rule(name: str, settings: Mapping[str, Any]) -> Rule:
    """Return a rule with settings, such as ``{"mirror": {"reading": "printed"}}`` for ``wm``.

    Raises:
        RuleError: The rule does not exist, or a setting's value makes no sense.
        ConfigError: The rule has no such setting.
    """
    resolve_rule(name)
    _refuse_numbers_as_text(name, settings)
    chosen = dict(settings)
    started = {key: chosen[key] for key in ("start",) if key in chosen}
    for part in {"mirror", "cells"} & chosen.keys():
        if not isinstance(chosen[part], Mapping):
            raise ConfigError(f"{name}: {part} must map settings to values, not {chosen[part]!r}")
        _check_names(name, RULES[name], {part: None, **started})
        defaults = getattr(cast(Any, RULES[name])(**started), part)
        chosen[part] = _change(part, defaults, chosen[part])
    _check_names(name, RULES[name], chosen)
    return cast(Rule, cast(Any, RULES[name])(**chosen))


def _check_names(owner: str, kind: type, settings: Mapping[str, Any]) -> None:
    known = [name for name in inspect.signature(kind).parameters if name not in ("args", "kwargs")]
    for setting in settings:
        if setting not in known:
            raise ConfigError(f"{owner} has no setting {setting!r}; it has {', '.join(known) or 'none'}")


def _change(owner: str, defaults: Any, settings: Mapping[str, Any]) -> Any:
    """Return settings with some changed; a mapping changes settings within settings."""
    _check_names(owner, type(defaults), settings)
    changed = {}
    for setting, value in settings.items():
        default = getattr(defaults, setting)
        if dataclasses.is_dataclass(default) and isinstance(value, Mapping):
            changed[setting] = _change(f"{owner}.{setting}", default, value)
        else:
            changed[setting] = value
    return dataclasses.replace(defaults, **changed)


def _refuse_numbers_as_text(owner: str, settings: Mapping[str, Any]) -> None:
    """Refuse what looks like a number and is text: YAML wants a point and a sign in 1.0e-2."""
    for setting, value in settings.items():
        if isinstance(value, Mapping):
            _refuse_numbers_as_text(f"{owner}.{setting}", value)
        elif isinstance(value, str) and (found := NUMBER_AS_TEXT.fullmatch(value)):
            written = f"{found[1]}{found[2] or '.0'}e{found[3] or '+'}{found[4]}"
            raise ConfigError(f"{owner}: {setting} is {value!r}, which YAML reads as text; write {written}")
