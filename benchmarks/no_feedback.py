"""A control whose hidden layers do not learn: `--import benchmarks/no_feedback.py --rules no-feedback`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import feedbackpath as fp
from feedbackpath.rules.base import Scale
from feedbackpath.rules.feedback_alignment import FeedbackAlignment


@fp.register_rule
@dataclass(frozen=True)
class NoFeedback(FeedbackAlignment):
    """Keep every B at 0: no error passes a layer, and only the output layer learns."""

    name: ClassVar[str] = "no-feedback"
    label: ClassVar[str] = "no feedback (control)"
    colour: ClassVar[str] = "#888888"
    search_space: ClassVar[Mapping[str, Sequence[Any]]] = {}
    scale: Scale = "zero"
