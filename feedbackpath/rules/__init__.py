"""The rules, one per file. A rule is imported when it is asked for; ``registry.py`` has the table."""

import importlib
from typing import TYPE_CHECKING, Any

from feedbackpath.rules.base import Rule, Weights, draw_feedback
from feedbackpath.rules.registry import OWN, RULES, looks_of_rules, register_rule, resolve_rule

if TYPE_CHECKING:
    from feedbackpath.rules.activation_alignment import ActivationAlignment
    from feedbackpath.rules.backprop import Backprop
    from feedbackpath.rules.competing_units import CompetingUnits
    from feedbackpath.rules.difference_target_propagation import DifferenceTargetPropagation
    from feedbackpath.rules.direct_feedback_alignment import DirectFeedbackAlignment
    from feedbackpath.rules.direct_kolen_pollack import DirectKolenPollack
    from feedbackpath.rules.direct_random_target_projection import DirectRandomTargetProjection
    from feedbackpath.rules.exact_mirror import ExactMirror
    from feedbackpath.rules.feedback_alignment import FeedbackAlignment
    from feedbackpath.rules.information_alignment import InformationAlignment
    from feedbackpath.rules.kolen_pollack import KolenPollack
    from feedbackpath.rules.low_rank_feedback_alignment import LowRankFeedbackAlignment
    from feedbackpath.rules.mirror_feedback_alignment import MirrorFeedbackAlignment
    from feedbackpath.rules.mirror_kolen_pollack import MirrorKolenPollack
    from feedbackpath.rules.phaseless_alignment import PhaselessAlignment
    from feedbackpath.rules.product_feedback_alignment import ProductFeedbackAlignment
    from feedbackpath.rules.regression_discontinuity import RegressionDiscontinuity
    from feedbackpath.rules.sign_concordance import SignConcordance
    from feedbackpath.rules.sign_symmetry import SignSymmetry
    from feedbackpath.rules.sparse_feedback_alignment import SparseFeedbackAlignment
    from feedbackpath.rules.spike_timing_weight_inference import SpikeTimingWeightInference
    from feedbackpath.rules.symmetric_alignment import SymmetricAlignment
    from feedbackpath.rules.weight_mirror import WeightMirror

__all__ = [
    "RULES",
    "ActivationAlignment",
    "Backprop",
    "CompetingUnits",
    "DifferenceTargetPropagation",
    "DirectFeedbackAlignment",
    "DirectKolenPollack",
    "DirectRandomTargetProjection",
    "ExactMirror",
    "FeedbackAlignment",
    "InformationAlignment",
    "KolenPollack",
    "LowRankFeedbackAlignment",
    "MirrorFeedbackAlignment",
    "MirrorKolenPollack",
    "PhaselessAlignment",
    "ProductFeedbackAlignment",
    "RegressionDiscontinuity",
    "Rule",
    "SignConcordance",
    "SignSymmetry",
    "SparseFeedbackAlignment",
    "SpikeTimingWeightInference",
    "SymmetricAlignment",
    "WeightMirror",
    "Weights",
    "draw_feedback",
    "looks_of_rules",
    "register_rule",
    "resolve_rule",
]


def __getattr__(name: str) -> Any:
    for file, kind in OWN.values():
        if kind == name:
            return getattr(importlib.import_module(f"feedbackpath.rules.{file}"), kind)
    raise AttributeError(f"module 'feedbackpath.rules' has no attribute {name!r}")
