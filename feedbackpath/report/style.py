"""The looks of each rule, the same in every figure: a colour that all readers can tell, a dash, a marker."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from zlib import crc32

from feedbackpath.train.results import Look

DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}  # in the words of matplotlib and of plotly
MARKERS = {
    "o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down", "P": "cross",
    "X": "x",
}  # fmt: skip


@dataclass(frozen=True)
class RuleStyle:
    """How a rule is drawn and called.

    Args:
        rule: Its name.
        label: Its name in full.
        colour: Hexadecimal colour.
        dash: Line style, a key of `DASHES`.
        marker: Marker, a key of `MARKERS`.
        refused: The colour that it sets and that another rule of the page has.
    """

    rule: str
    label: str
    colour: str
    dash: str
    marker: str
    refused: str | None = None

    @property
    def legend(self) -> str:
        """Its full name, with its short one where they differ."""
        return self.label if self.label == self.rule else f"{self.label} ({self.rule})"


Styles = dict[str, RuleStyle]
_BUILT_IN = {  # colours from the palettes of Okabe and Ito (2008), and below of Tol (2021)
    "bp": ("backprop", "#000000", "-", "o"),
    "fa": ("feedback alignment", "#E69F00", ":", "s"),
    "ss": ("sign-symmetry", "#CC79A7", "-.", "^"),
    "kp": ("Kolen–Pollack", "#0072B2", "-", "v"),
    "wm": ("weight mirror", "#009E73", "--", "D"),
    "wm-exact": ("exact read-out", "#999999", "-.", "D"),
    "mirror-kp": ("mirror, then Kolen–Pollack", "#56B4E9", "--", "P"),
    "mirror-fa": ("mirror, then feedback alignment", "#D55E00", ":", "X"),
    "fa-lowrank": ("feedback alignment of low rank", "#F0E442", "-.", "s"),
    "fa-sparse": ("sparse feedback alignment", "#DDCC77", "--", "s"),
    "sc": ("sign-concordant feedback", "#AA4499", ":", "^"),
    "sa": ("symmetric alignment", "#661100", "--", "^"),
    "ia": ("information alignment", "#117733", "-.", "D"),
    "aa": ("activation alignment", "#88CCEE", ":", "D"),
    "dfa": ("direct feedback alignment", "#CC6677", "-", "X"),
    "drtp": ("direct random target projection", "#BBBBBB", "-.", "X"),
    "dkp": ("direct Kolen–Pollack", "#004488", "--", "v"),
    "pfa": ("product feedback alignment", "#EE7733", "-", "P"),
    "pal": ("phaseless alignment", "#EE3377", "--", "o"),
    "dtp": ("difference target propagation", "#AA3377", "-.", "s"),
    "rdd": ("regression discontinuity", "#228833", ":", "P"),
    "stdwi": ("spike-timing weight inference", "#CCBB44", "-", "D"),
    "kh": ("competing hidden units", "#AAAA00", "--", "X"),
}
ORDER = tuple(_BUILT_IN)
"""The order of built-in rules in every table, legend and row of panels of a page; users' rules follow."""
_OTHER_COLOURS = ("#332288", "#882255", "#999933", "#44AA99", "#666666")


def choose_styles(rules: Iterable[str], looks: Mapping[str, Look]) -> Styles:
    """Choose the styles of the rules of one page, so that no two look alike.

    Built-in rules keep theirs. Users' rules that set a colour have it unless a rule before them does. The
    others get what is free, beginning at a place that depends on their name alone, so that a rule seldom
    changes its looks from page to page. Five of them have colours of their own; more differ in markers.

    Args:
        rules: Their names, in the order of the page.
        looks: The labels and colours that users have set.

    Example:
        >>> styles = choose_styles(["kp", "mine"], {"mine": Look(label="my rule", colour="#0072b2")})
        >>> [style.legend for style in styles.values()]
        ['Kolen–Pollack (kp)', 'my rule (mine)']
        >>> styles["mine"].refused, styles["mine"].colour
        ('#0072B2', '#882255')
    """
    rules = list(dict.fromkeys(rules))
    styles = {rule: RuleStyle(rule, *_BUILT_IN[rule]) for rule in rules if rule in _BUILT_IN}
    theirs = {rule: looks.get(rule) or Look() for rule in rules if rule not in styles}
    for rule in sorted(theirs, key=lambda rule: theirs[rule].colour is None):
        styles[rule] = _choose(rule, theirs[rule], list(styles.values()))
    return {rule: styles[rule] for rule in rules}


def in_order(rules: Iterable[str]) -> list[str]:
    """Return rules, each once, in the order that all figures have.

    Example:
        >>> in_order(["mine", "wm", "kp", "bp", "wm"])
        ['bp', 'kp', 'wm', 'mine']
    """
    ranks = {rule: rank for rank, rule in enumerate(ORDER)}
    return sorted(dict.fromkeys(rules), key=lambda rule: ranks.get(rule, len(ranks)))


def style_of(rule: str) -> RuleStyle:
    """Return a rule's style where it is alone, or among built-in rules."""
    return choose_styles([rule], {})[rule]


def legend_label(rule: str) -> str:
    """Return a rule's full name, with its short one where they differ."""
    return style_of(rule).legend


def _choose(rule: str, look: Look, others: Sequence[RuleStyle]) -> RuleStyle:
    """Choose the first style that shares neither its colour, nor colour and marker, with another's."""
    label = look.label if look.label and look.label not in {style.label for style in others} else rule
    number = crc32(rule.encode())
    wanted = [look.colour.upper()] if look.colour else []
    colours = wanted + _rotated(_OTHER_COLOURS, number)
    dash, markers = _rotated(list(DASHES), number // 7)[0], _rotated(list(MARKERS), number // 31)
    taken = {style.colour for style in others} | {(style.colour, style.marker) for style in others}
    marker, colour = min(product(markers, colours), key=lambda pair: (pair[1] in taken, pair[::-1] in taken))
    return RuleStyle(rule, label, colour, dash, marker, *(other for other in wanted if other != colour))


def _rotated(values: Sequence[str], number: int) -> list[str]:
    first = number % len(values)
    return [*values[first:], *values[:first]]
