"""Mirror mode: noise goes forward through W, and B learns W from what comes out."""

from feedbackpath.mirror.activations import find_activations
from feedbackpath.mirror.mode import MirrorMode
from feedbackpath.mirror.plan import LayerPlan
from feedbackpath.mirror.settings import Mirror, When

__all__ = ["LayerPlan", "Mirror", "MirrorMode", "When", "find_activations"]
