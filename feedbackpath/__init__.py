"""feedbackpath: deep learning without weight transport, for PyTorch."""

from feedbackpath.errors import (
    ConfigError,
    DataError,
    KolenPollackWarning,
    RuleError,
    UnconvertedLayerWarning,
    UntieError,
    UserError,
)
from feedbackpath.layers import UntiedWeight
from feedbackpath.mirror import Mirror
from feedbackpath.path import FeedbackPath, untie
from feedbackpath.rules import (
    RULES,
    Backprop,
    Clock,
    FeedbackAlignment,
    KolenPollack,
    MirrorKolenPollack,
    Rule,
    SignSymmetry,
    WeightMirror,
    draw_feedback,
    register_rule,
)

__version__ = "0.1.0"
__all__ = [
    "RULES",
    "Backprop",
    "Clock",
    "ConfigError",
    "DataError",
    "FeedbackAlignment",
    "FeedbackPath",
    "KolenPollack",
    "KolenPollackWarning",
    "Mirror",
    "MirrorKolenPollack",
    "Rule",
    "RuleError",
    "SignSymmetry",
    "UnconvertedLayerWarning",
    "UntieError",
    "UntiedWeight",
    "UserError",
    "WeightMirror",
    "draw_feedback",
    "register_rule",
    "untie",
]
