"""Make a rule from its name and the settings of a config file."""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from feedbackpath.errors import ConfigError
from feedbackpath.mirror import Mirror
from feedbackpath.rules import RULES, Rule, resolve_rule


def make_rule(name: str, settings: Mapping[str, Any]) -> Rule:
    """Return a rule with settings, such as ``{"mirror": {"reading": "printed"}}`` for ``wm``.

    Raises:
        RuleError: The rule does not exist, or a setting's value makes no sense.
        ConfigError: The rule has no such setting.
    """
    resolve_rule(name)
    chosen = dict(settings)
    if "mirror" in chosen:
        if not isinstance(chosen["mirror"], Mapping):
            raise ConfigError(f"{name}: mirror must map settings to values, not {chosen['mirror']!r}")
        defaults = getattr(resolve_rule(name), "mirror", Mirror())
        _check_names("mirror", Mirror, chosen["mirror"])
        _check_types(chosen["mirror"])
        chosen["mirror"] = dataclasses.replace(defaults, **chosen["mirror"])
    _check_names(name, RULES[name], chosen)
    return cast(Rule, cast(Any, RULES[name])(**chosen))


def _check_names(owner: str, kind: type, settings: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    for setting in settings:
        if setting not in known:
            raise ConfigError(f"{owner} has no setting {setting!r}; it has {', '.join(known) or 'none'}")


def _check_types(settings: Mapping[str, Any]) -> None:
    """Refuse a mirror setting of another type than the default's: dataclasses take anything."""
    for setting, value in settings.items():
        default = getattr(Mirror(), setting)
        kinds = (int, type(None)) if setting == "samples" else (type(default),)
        is_whole = float in kinds and type(value) is int
        if type(value) not in kinds and not is_whole:
            raise ConfigError(f"mirror: {setting} cannot be {value!r}; the default is {default!r}")
