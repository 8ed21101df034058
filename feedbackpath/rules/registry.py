"""The table of rules by name. A rule's file is imported when the rule is asked for."""

import importlib
import re
from collections.abc import Iterator, MutableMapping

from feedbackpath.arguments import refuse_name, shown
from feedbackpath.errors import RuleError
from feedbackpath.rules.advice import advise
from feedbackpath.rules.base import Rule

OWN = {  # name: file and class
    "bp": ("backprop", "Backprop"),
    "fa": ("feedback_alignment", "FeedbackAlignment"),
    "ss": ("sign_symmetry", "SignSymmetry"),
    "kp": ("kolen_pollack", "KolenPollack"),
    "wm": ("weight_mirror", "WeightMirror"),
    "wm-exact": ("exact_mirror", "ExactMirror"),
    "mirror-kp": ("mirror_kolen_pollack", "MirrorKolenPollack"),
    "mirror-fa": ("mirror_feedback_alignment", "MirrorFeedbackAlignment"),
    "fa-lowrank": ("low_rank_feedback_alignment", "LowRankFeedbackAlignment"),
    "fa-sparse": ("sparse_feedback_alignment", "SparseFeedbackAlignment"),
    "sc": ("sign_concordance", "SignConcordance"),
    "sa": ("symmetric_alignment", "SymmetricAlignment"),
    "ia": ("information_alignment", "InformationAlignment"),
    "aa": ("activation_alignment", "ActivationAlignment"),
    "dfa": ("direct_feedback_alignment", "DirectFeedbackAlignment"),
    "drtp": ("direct_random_target_projection", "DirectRandomTargetProjection"),
    "dkp": ("direct_kolen_pollack", "DirectKolenPollack"),
    "pfa": ("product_feedback_alignment", "ProductFeedbackAlignment"),
    "pal": ("phaseless_alignment", "PhaselessAlignment"),
    "dtp": ("difference_target_propagation", "DifferenceTargetPropagation"),
    "rdd": ("regression_discontinuity", "RegressionDiscontinuity"),
    "stdwi": ("spike_timing_weight_inference", "SpikeTimingWeightInference"),
    "kh": ("competing_units", "CompetingUnits"),
}


class _Rules(MutableMapping[str, type[Rule]]):
    """The table of rules by name: the library's own, and those that users registered."""

    def __init__(self) -> None:
        self._found: dict[str, type[Rule] | None] = dict.fromkeys(OWN)

    def __getitem__(self, name: str) -> type[Rule]:
        rule = self._found[name]
        if rule is None:
            file, kind = OWN[name]
            rule = self._found[name] = getattr(importlib.import_module(f"feedbackpath.rules.{file}"), kind)
        return rule

    def __setitem__(self, name: str, rule: type[Rule]) -> None:
        self._found[name] = rule

    def __delitem__(self, name: str) -> None:
        del self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


RULES = _Rules()


def register_rule(rule: type[Rule]) -> type[Rule]:
    """Add a rule class to the table under its ``name``; usable as a decorator.

    Reports call it by its class attribute ``label`` and draw it in its ``colour``, ``#RRGGBB``, where it has
    them. A colour that another rule of the same page has gives way, and the page says so.

    Raises:
        RuleError: It is no rule, another rule has that name, or its label or colour is none.
    """
    if not (isinstance(rule, type) and issubclass(rule, Rule)) or not isinstance(
        getattr(rule, "name", None), str
    ):
        raise RuleError(f"{shown(rule)} is not a rule: derive a class from fp.Rule and give it a name")
    name = rule.name
    refuse_name(name, "a rule", RuleError)
    if name in RULES and RULES[name] is not rule:
        raise RuleError(f"a rule named {name!r} exists already ({RULES[name].__name__}); choose another name")
    if rule.label is not None and not isinstance(rule.label, str):
        raise RuleError(f"the label of the rule {name!r} is {rule.label!r}; give a string, or leave it out")
    if rule.colour is not None and not re.fullmatch("#[0-9A-Fa-f]{6}", str(rule.colour)):
        raise RuleError(f"the colour of the rule {name!r} is {rule.colour!r}; give it as '#RRGGBB'")
    RULES[name] = rule
    return rule


def what_of(rule: type[Rule]) -> str:
    """Return what a rule does: the first line of its docstring, without markup.

    Example:
        >>> import feedbackpath as fp
        >>> what_of(fp.RULES["fa"])
        'Draw B once and leave it; W may learn to agree with it.'
    """
    text = vars(rule).get("__doc__") or ""
    if text.startswith(f"{rule.__name__}("):  # what a dataclass says of itself
        return ""
    first = next(iter(text.strip().splitlines()), "")
    return re.sub(r":[a-z:]+:(?=`)|`|\*\*", "", first)


def looks_of_rules() -> dict[str, dict[str, str | None]]:
    """Return label, colour and first line of the docstring of the users' rules that have any, by name."""
    theirs = {name: RULES[name] for name in RULES if name not in OWN}
    looks = {
        name: {"label": rule.label, "colour": rule.colour, "what": what_of(rule) or None}
        for name, rule in theirs.items()
    }
    return {name: look for name, look in looks.items() if any(look.values())}


def resolve_rule(rule: "str | Rule") -> Rule:
    """Return the rule of that name, with its default settings, or the rule itself.

    Raises:
        RuleError: No rule has that name, or the rule cannot be compared with others.

    Example:
        >>> resolve_rule("bp")
        Backprop()
    """
    if isinstance(rule, type):
        raise RuleError(f"a rule is an object, not a class: pass {rule.__name__}()")
    if not isinstance(rule, str):
        if not isinstance(rule, Rule):
            raise RuleError(
                f"{shown(rule)} is not a rule: pass a name ({', '.join(RULES)}) or an object of a "
                "subclass of Rule"
            )
        try:
            hash(rule)
        except TypeError as error:
            what = (
                f"the rule {type(rule).__name__} has no hash, so that its layers cannot be grouped ({error})"
            )
            raise RuleError(f"{what}: make it a frozen dataclass, with settings that have one") from error
        return rule
    if rule in RULES:
        return RULES[rule]()
    raise RuleError(
        f"unknown rule {shown(rule)}; known rules are {', '.join(RULES)}{advise(rule, RULES, OWN)}"
    )
