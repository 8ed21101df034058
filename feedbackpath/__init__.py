"""feedbackpath: deep learning without weight transport, for PyTorch.

Names are looked up when first used, so that ``feedbackpath --help`` answers without importing torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from feedbackpath.auditing import AuditError, Report, audit
    from feedbackpath.core.context import RuleContext
    from feedbackpath.errors import (
        ConfigError,
        DataError,
        KolenPollackWarning,
        MirrorWarning,
        RuleError,
        UnconvertedLayerWarning,
        UntieError,
        UserError,
    )
    from feedbackpath.layers import UntiedWeight
    from feedbackpath.mirror import Mirror, When
    from feedbackpath.passage import forward_passage
    from feedbackpath.path import FeedbackPath, untie
    from feedbackpath.rules import (
        RULES,
        Backprop,
        FeedbackAlignment,
        KolenPollack,
        MirrorFeedbackAlignment,
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
    "AuditError",
    "Backprop",
    "ConfigError",
    "DataError",
    "FeedbackAlignment",
    "FeedbackPath",
    "KolenPollack",
    "KolenPollackWarning",
    "Mirror",
    "MirrorFeedbackAlignment",
    "MirrorKolenPollack",
    "MirrorWarning",
    "Report",
    "Rule",
    "RuleContext",
    "RuleError",
    "SignSymmetry",
    "UnconvertedLayerWarning",
    "UntieError",
    "UntiedWeight",
    "UserError",
    "WeightMirror",
    "When",
    "audit",
    "draw_feedback",
    "forward_passage",
    "register_rule",
    "untie",
]
_HOMES = ("errors", "core.context", "layers", "mirror", "passage", "path", "rules", "auditing")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for home in _HOMES:
            module = importlib.import_module(f"feedbackpath.{home}")
            if hasattr(module, name):
                globals()[name] = getattr(module, name)
                return globals()[name]
    raise AttributeError(f"module 'feedbackpath' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
