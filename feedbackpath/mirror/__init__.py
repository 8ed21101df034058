"""Mirror mode: noise goes forward through W, and B learns W from what comes out."""

from feedbackpath.mirror.activations import find_activations
from feedbackpath.mirror.mode import Mirror, MirrorMode

__all__ = ["Mirror", "MirrorMode", "find_activations"]
