"""What to do where no rule has the name that was given."""

import difflib
import re
from collections.abc import Collection, Iterator, Mapping

from feedbackpath.rules.base import Rule


def advise(name: str, rules: Collection[str], files: Mapping[str, tuple[str, str]]) -> str:
    """Return the next step, as it follows a message; nothing where no rule has a similar name.

    Args:
        name: The name that was given.
        rules: Names of all rules.
        files: File and class of the library's own, by name: a file is called as its rule is in full.

    Example:
        >>> from feedbackpath.rules.registry import OWN
        >>> advise("KP", OWN, OWN), advise("feedback alignment", OWN, OWN)
        ("; did you mean 'kp'?", "; did you mean 'fa'?")
        >>> advise("bp,kp", OWN, OWN)
        '; name one rule here: feedbackpath compare takes several'
    """
    if "," in name:
        return "; name one rule here: feedbackpath compare takes several"
    for kind in _subclasses(Rule):
        if vars(kind).get("name") == name:
            return f"; {kind.__name__} has that name: write @fp.register_rule above that class"
    known = {file: rule for rule, (file, _) in files.items()}
    known.update({_plain(rule): rule for rule in rules})
    close = difflib.get_close_matches(_plain(name), known, n=1)
    return f"; did you mean {known[close[0]]!r}?" if close else ""


def _plain(name: str) -> str:
    return re.sub(r"\W", "_", name.lower())


def _subclasses(kind: type[Rule]) -> Iterator[type[Rule]]:
    for derived in kind.__subclasses__():
        yield derived
        yield from _subclasses(derived)
