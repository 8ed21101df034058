"""Which rule governs which layer."""

import fnmatch
import warnings
from collections.abc import Iterable, Mapping

from torch import nn

from feedbackpath.core.layers import list_weights
from feedbackpath.core.surgery import Survey
from feedbackpath.errors import UnconvertedLayerWarning, UntieError, class_name, level_outside, pattern_of
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


def find_left(found: Survey, rules: Mapping[str, Rule]) -> dict[str, str]:
    """Return the paths of layers that keep backprop without having been asked to, with what is to be said."""
    left = {name: kind for name, kind in found.unconverted.items() if not rules[name].is_tied}
    for name, layer in found.convertible.items():
        if not rules[name].serves(list_weights(name, layer)):
            left[name] = f"{class_name(type(layer))}, by {rules[name].name}"
    return left


def name_left(left: Mapping[str, str], *, is_error: bool) -> None:
    """Name layers that keep backprop, those that differ by numbers alone together.

    Raises:
        UntieError: The same, in place of a warning.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name, why in left.items():
        groups.setdefault((pattern_of(name), why), []).append(name)
    named = [
        f"{names[0]!r} ({why})" if len(names) == 1 else f"{pattern!r} ({len(names)} times {why})"
        for (pattern, why), names in groups.items()
    ]
    message = f"no untied form exists for {', '.join(named)}: errors still go back through the weights there"
    if left and is_error:
        raise UntieError(f"{message}; replace these layers, or give them another rule by overrides=")
    if left:
        warnings.warn(message, UnconvertedLayerWarning, stacklevel=level_outside())


def note_left(model: nn.Module, names: Iterable[str]) -> None:
    """Let the forward pass know which weights have no B: these have been named, and are no strangers."""
    parameters = [p for name in names for p in model.get_submodule(name).parameters(recurse=False)]
    model.__dict__["untied"].memo["left"] = parameters


def rule_names(rules: Mapping[str, Rule]) -> dict[str, str]:
    """Return the names of the rules of layers."""
    return {layer: name_of(rule) for layer, rule in rules.items()}


def name_of(rule: Rule) -> str:
    """Return a rule's name, or that of its class: a rule that is not in the table need not have one."""
    return getattr(rule, "name", type(rule).__name__)


def refuse_other_rules(rules: Mapping[str, Rule], saved: Mapping[str, str] | None) -> None:
    """Refuse the state of a path whose layers had other rules: what these keep would mean something else.

    A state of before rules had their names in it passes.

    Raises:
        UntieError: Names the first layer that differs.
    """
    if saved is None:
        return
    own = rule_names(rules)
    differing = [layer for layer in {**own, **saved} if own.get(layer) != saved.get(layer)]
    if differing:
        layer = differing[0]
        raise UntieError(
            f"this state is of another path: there {layer!r} has {_told(saved, layer)}, here "
            f"{_told(own, layer)}; untie the model as it was when the state was saved"
        )


def _told(names: Mapping[str, str], layer: str) -> str:
    return f"the rule {names[layer]!r}" if layer in names else "no rule"
