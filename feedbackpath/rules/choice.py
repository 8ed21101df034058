"""Which rule governs which layer."""

import fnmatch
from collections.abc import Iterable, Mapping

from torch import nn

from feedbackpath.core.layers import list_weights
from feedbackpath.errors import UntieError
from feedbackpath.rules import resolve_rule
from feedbackpath.rules.base import Rule


def choose_rules(
    names: Iterable[str], rule: str | Rule, overrides: Mapping[str, str | Rule]
) -> dict[str, Rule]:
    """Return the rule of each layer.

    Args:
        names: Layer paths.
        rule: The rule of all.
        overrides: Glob patterns of layer paths to rules; the last match counts.

    Raises:
        UntieError: A pattern matches nothing.
        RuleError: A rule does not exist.
    """
    rules = dict.fromkeys(names, resolve_rule(rule))
    refuse_unmatched(overrides, "override", rules)
    for pattern, override in overrides.items():
        matches = [name for name in rules if fnmatch.fnmatchcase(name, pattern)]
        rules |= dict.fromkeys(matches, resolve_rule(override))
    return rules


def refuse_unmatched(patterns: Iterable[str], what: str, names: Iterable[str]) -> None:
    """Refuse a pattern that matches no layer: it would have no effect, in silence."""
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise UntieError(f"the {what} {pattern!r} matches no layer; layers are {', '.join(names)}")


def find_unserved(layers: Mapping[str, nn.Module], rules: Mapping[str, Rule]) -> dict[str, str]:
    """Return the paths of layers that their rule cannot govern, with what is to be said of them."""
    return {
        name: f"{type(layer).__name__}, by {rules[name].name}"
        for name, layer in layers.items()
        if not rules[name].serves(list_weights(name, layer))
    }
