"""feedbackpath: deep learning without weight transport, for PyTorch.

Names are looked up when first used, so that ``feedbackpath --help`` answers without importing torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from feedbackpath.auditing import AuditError, Report, audit
    from feedbackpath.core.context import RuleContext
    from feedbackpath.core.layers import UntiedWeight
    from feedbackpath.core.sendback import Broadcast, Local, SendBack, Target
    from feedbackpath.errors import (
        ChipError,
        ConfigError,
        DataError,
        ForgottenStepWarning,
        KolenPollackWarning,
        MirrorWarning,
        RuleError,
        UnconvertedLayerWarning,
        UntieError,
        UserError,
    )
    from feedbackpath.hardware import Chip, Read, Wiring, devices
    from feedbackpath.jobs.recorder import Recorder
    from feedbackpath.kinds import register_layer
    from feedbackpath.layers import LocallyConnected2d, RectifiedTanh, SynapticScaling
    from feedbackpath.mirror import Mirror, When
    from feedbackpath.mirror.passage import forward_passage
    from feedbackpath.models import register_model
    from feedbackpath.moments import share_moments
    from feedbackpath.path import FeedbackPath, untie
    from feedbackpath.rules import (
        RULES,
        ActivationAlignment,
        Backprop,
        CompetingUnits,
        DifferenceTargetPropagation,
        DirectFeedbackAlignment,
        DirectKolenPollack,
        DirectRandomTargetProjection,
        ExactMirror,
        FeedbackAlignment,
        InformationAlignment,
        KolenPollack,
        LowRankFeedbackAlignment,
        MirrorFeedbackAlignment,
        MirrorKolenPollack,
        PhaselessAlignment,
        ProductFeedbackAlignment,
        RegressionDiscontinuity,
        Rule,
        SignConcordance,
        SignSymmetry,
        SparseFeedbackAlignment,
        SpikeTimingWeightInference,
        SymmetricAlignment,
        WeightMirror,
        draw_feedback,
        register_rule,
    )
    from feedbackpath.tasks import Task, register_task

__version__ = "0.1.0"
__all__ = [
    "RULES",
    "ActivationAlignment",
    "AuditError",
    "Backprop",
    "Broadcast",
    "CompetingUnits",
    "Chip",
    "ChipError",
    "ConfigError",
    "DataError",
    "DifferenceTargetPropagation",
    "DirectFeedbackAlignment",
    "DirectKolenPollack",
    "DirectRandomTargetProjection",
    "ExactMirror",
    "FeedbackAlignment",
    "FeedbackPath",
    "ForgottenStepWarning",
    "InformationAlignment",
    "KolenPollack",
    "KolenPollackWarning",
    "Local",
    "LocallyConnected2d",
    "LowRankFeedbackAlignment",
    "Mirror",
    "MirrorFeedbackAlignment",
    "MirrorKolenPollack",
    "MirrorWarning",
    "PhaselessAlignment",
    "ProductFeedbackAlignment",
    "Read",
    "Recorder",
    "RectifiedTanh",
    "RegressionDiscontinuity",
    "Report",
    "Rule",
    "RuleContext",
    "RuleError",
    "SendBack",
    "SignConcordance",
    "SignSymmetry",
    "SparseFeedbackAlignment",
    "SpikeTimingWeightInference",
    "SymmetricAlignment",
    "SynapticScaling",
    "Target",
    "Task",
    "UnconvertedLayerWarning",
    "UntieError",
    "UntiedWeight",
    "UserError",
    "WeightMirror",
    "When",
    "Wiring",
    "audit",
    "devices",
    "draw_feedback",
    "forward_passage",
    "register_layer",
    "register_model",
    "register_rule",
    "register_task",
    "share_moments",
    "untie",
]
_HOMES = {
    "core.context": ("RuleContext",),
    "core.layers": ("UntiedWeight",),
    "mirror.passage": ("forward_passage",),
    "core.sendback": ("Broadcast", "Local", "SendBack", "Target"),
    "hardware": ("Chip", "Read", "Wiring", "devices"),
    "jobs.recorder": ("Recorder",),
    "kinds": ("register_layer",),
    "layers": ("LocallyConnected2d", "RectifiedTanh", "SynapticScaling"),
    "mirror": ("Mirror", "When"),
    "models": ("register_model",),
    "moments": ("share_moments",),
    "tasks": ("Task", "register_task"),
    "path": ("FeedbackPath", "untie"),
    "auditing": ("AuditError", "Report", "audit"),
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        home = next((home for home, names in _HOMES.items() if name in names), None)
        if home is None:
            home = "errors" if name.endswith(("Error", "Warning")) else "rules"
        value = getattr(importlib.import_module(f"feedbackpath.{home}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'feedbackpath' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
