"""A rule's hooks are found by name: one with another name would never be called, in silence."""

import difflib
import inspect
import warnings

from feedbackpath.errors import level_outside

ALIKE = 0.85  # of 1, by difflib: "after_backwards" has 0.97, "steps" 0.89, "restart" 0.83


def warn_of_misspelt(rule: type, base: type) -> None:
    """Warn of a method or class attribute of a rule that looks like a hook and is none.

    Settings, properties, and names that begin with an underscore, are the rule's own affair; so is what looks
    like a hook that the rule has.

    Warns:
        UserWarning: Names the class, the attribute and the hook.
    """
    names = [name for name in {**vars(base), **inspect.get_annotations(base)} if not name.startswith("_")]
    missing = [name for name in names if getattr(rule, name, None) is getattr(base, name, None)]
    settings = {n for n, kind in inspect.get_annotations(rule).items() if "ClassVar" not in str(kind)}
    for name, value in list(vars(rule).items()):
        known = name in settings or name in names or any(hasattr(parent, name) for parent in rule.__bases__)
        if known or name.startswith("_") or isinstance(value, property):
            continue
        close = difflib.get_close_matches(name, missing, n=1, cutoff=ALIKE)
        close += [hook for hook in missing if sorted(hook) == sorted(name)]
        if close:
            warnings.warn(
                f"{rule.__name__}.{name} is no hook of a rule, and is never called; did you mean "
                f"{close[0]!r}? If it is a method of your own, let its name begin with an underscore",
                UserWarning,
                stacklevel=level_outside(),
            )
