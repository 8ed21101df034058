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
    if isinstance(chosen.get("mirror"), Mapping):
        defaults = getattr(resolve_rule(name), "mirror", Mirror())
        _check_names("mirror", Mirror, chosen["mirror"])
        chosen["mirror"] = dataclasses.replace(defaults, **chosen["mirror"])
    _check_names(name, RULES[name], chosen)
    return cast(Rule, cast(Any, RULES[name])(**chosen))


def _check_names(owner: str, kind: type, settings: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    for setting in settings:
        if setting not in known:
            raise ConfigError(f"{owner} has no setting {setting!r}; it has {', '.join(known) or 'none'}")
