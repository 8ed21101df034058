"""A rule's hooks are found by name: one with another name would never be called, in silence."""

import difflib
import inspect

from feedbackpath.errors import RuleError

ALIKE = 0.85  # of 1, by difflib: "after_backwards" has 0.97, "restart" 0.83
SHORT = 0.75  # for names of five letters or fewer, in which one slip weighs more: "stpe" has 0.75


def refuse_misspelt(rule: type, base: type) -> None:
    """Refuse a rule that has a method or class attribute which looks like a hook and is none.

    Settings, and names that begin with an underscore, are the rule's own affair.

    Raises:
        RuleError: Names the class, the attribute and the hook.
    """
    hooks = [name for name in {**vars(base), **inspect.get_annotations(base)} if not name.startswith("_")]
    told = inspect.get_annotations(rule)
    settings = {name for name, kind in told.items() if "ClassVar" not in str(kind)}
    missing = [name for name in hooks if name not in vars(rule)]
    for name in vars(rule).keys() - settings - set(hooks):
        if name.startswith("_") or any(hasattr(parent, name) for parent in rule.__bases__):
            continue
        found = difflib.get_close_matches(name, missing, n=1, cutoff=SHORT if len(name) <= 5 else ALIKE)
        if found:
            raise RuleError(
                f"{rule.__name__}.{name} is no hook of a rule, and would never be called; did you mean "
                f"{found[0]!r}? If it is a method of your own, let its name begin with an underscore"
            )
