"""The rules, one a file, and the table that names them."""

import difflib

from feedbackpath.errors import RuleError
from feedbackpath.rules.backprop import Backprop
from feedbackpath.rules.base import FeedbackKind, Rule, draw_feedback
from feedbackpath.rules.feedback_alignment import FeedbackAlignment
from feedbackpath.rules.kolen_pollack import KolenPollack
from feedbackpath.rules.mirror_feedback_alignment import MirrorFeedbackAlignment
from feedbackpath.rules.mirror_kolen_pollack import MirrorKolenPollack
from feedbackpath.rules.sign_symmetry import SignSymmetry
from feedbackpath.rules.weight_mirror import WeightMirror

RULES: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (
        Backprop,
        FeedbackAlignment,
        SignSymmetry,
        KolenPollack,
        WeightMirror,
        MirrorKolenPollack,
        MirrorFeedbackAlignment,
    )
}

__all__ = [
    "RULES",
    "Backprop",
    "FeedbackAlignment",
    "FeedbackKind",
    "KolenPollack",
    "MirrorFeedbackAlignment",
    "MirrorKolenPollack",
    "Rule",
    "SignSymmetry",
    "WeightMirror",
    "draw_feedback",
    "register_rule",
    "resolve_rule",
]


def register_rule(rule: type[Rule]) -> type[Rule]:
    """Add a rule class to the table under its ``name``; usable as a decorator.

    Raises:
        RuleError: Another rule has that name.
    """
    name = rule.name
    if RULES.get(name, rule) is not rule:
        raise RuleError(f"a rule named {name!r} exists already ({RULES[name].__name__}); choose another name")
    RULES[name] = rule
    return rule


def resolve_rule(rule: "str | Rule") -> Rule:
    """Return the rule of that name, with its default settings, or the rule itself.

    Raises:
        RuleError: No rule has that name.

    Example:
        >>> resolve_rule("kp")
        KolenPollack()
    """
    if isinstance(rule, type):
        raise RuleError(f"a rule is an object, not a class: pass {rule.__name__}()")
    if not isinstance(rule, str):
        if not hasattr(rule, "feedback_kind"):
            raise RuleError(f"{rule!r} is no rule: pass a name ({', '.join(RULES)}) or a Rule")
        return rule
    if rule in RULES:
        return RULES[rule]()
    close = difflib.get_close_matches(rule, RULES, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise RuleError(f"unknown rule {rule!r}; known rules are {', '.join(RULES)}{hint}")
