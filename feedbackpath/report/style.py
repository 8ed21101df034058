"""The looks of each rule, the same in every figure: a colour that all readers can tell, a dash, a marker."""

from dataclasses import dataclass
from zlib import crc32


@dataclass(frozen=True)
class RuleStyle:
    """How a rule is drawn and called.

    Args:
        label: Its name in full.
        colour: Hexadecimal colour, from the palette of Okabe and Ito (2008) for the built-in rules.
        dash: Line style, in the words of matplotlib; `DASHES` has plotly's.
        marker: Marker, in the words of matplotlib; `MARKERS` has plotly's.
    """

    label: str
    colour: str
    dash: str
    marker: str


DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}
MARKERS = {
    "o": "circle",
    "s": "square",
    "^": "triangle-up",
    "D": "diamond",
    "v": "triangle-down",
    "P": "cross",
    "X": "x",
}

_STYLES = {
    "bp": RuleStyle("backprop", "#000000", "-", "o"),
    "fa": RuleStyle("feedback alignment", "#E69F00", ":", "s"),
    "ss": RuleStyle("sign-symmetry", "#CC79A7", "-.", "^"),
    "wm": RuleStyle("weight mirror", "#009E73", "--", "D"),
    "kp": RuleStyle("Kolen–Pollack", "#0072B2", "-", "v"),
    "mirror-fa": RuleStyle("mirror, then feedback alignment", "#D55E00", ":", "X"),
    "mirror-kp": RuleStyle("mirror, then Kolen–Pollack", "#56B4E9", "--", "P"),
}
_OTHER_COLOURS = ("#332288", "#882255", "#999933", "#44AA99", "#666666")


def style_of(rule: str) -> RuleStyle:
    """Return a rule's style; a rule not built in gets one that depends on its name alone.

    Example:
        >>> style_of("kp").label
        'Kolen–Pollack'
        >>> style_of("my-rule") == style_of("my-rule")
        True
    """
    if rule in _STYLES:
        return _STYLES[rule]
    number = crc32(rule.encode())
    colour = _OTHER_COLOURS[number % len(_OTHER_COLOURS)]
    dash = list(DASHES)[number // 7 % len(DASHES)]
    return RuleStyle(rule, colour, dash, list(MARKERS)[number // 31 % len(MARKERS)])


def legend_label(rule: str) -> str:
    """Return a rule's full name, with its short one where they differ."""
    label = style_of(rule).label
    return label if label == rule else f"{label} ({rule})"
