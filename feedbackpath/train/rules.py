"""Make a rule from its name and the settings of a config file."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from feedbackpath.errors import ConfigError
from feedbackpath.rules import RULES, Rule, resolve_rule


def make_rule(name: str, settings: Mapping[str, Any]) -> Rule:
    """Return a rule with settings, such as ``{"mirror": {"reading": "printed"}}`` for ``wm``.

    Raises:
        RuleError: The rule does not exist, or a setting's value makes no sense.
        ConfigError: The rule has no such setting.
    """
    resolve_rule(name)
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
    known = list(inspect.signature(kind).parameters)
    for setting in settings:
        if setting not in known:
            raise ConfigError(f"{owner} has no setting {setting!r}; it has {', '.join(known) or 'none'}")


def _change(owner: str, defaults: Any, settings: Mapping[str, Any]) -> Any:
    """Return settings with some changed; a mapping changes settings within settings.

    A value of another type than the default's is refused: dataclasses take anything.
    """
    _check_names(owner, type(defaults), settings)
    hints, changed = get_type_hints(type(defaults)), {}
    for setting, value in settings.items():
        default = getattr(defaults, setting)
        if dataclasses.is_dataclass(default) and isinstance(value, Mapping):
            changed[setting] = _change(f"{owner}.{setting}", default, value)
        elif _fits(value, hints[setting]):
            changed[setting] = value
        else:
            raise ConfigError(f"{owner}: {setting} cannot be {value!r}; the default is {default!r}")
    return dataclasses.replace(defaults, **changed)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; a whole number will do for a float, a name for a Literal."""
    if get_origin(hint) is Literal:
        return isinstance(value, str)
    kinds = get_args(hint) or (hint,)
    return type(value) in kinds or (float in kinds and type(value) is int)
