"""Whether gradients were clipped to a norm that counts B: how they were scaled after the backward pass."""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from feedbackpath.errors import KolenPollackWarning, level_outside


def size_of(gradient: Tensor) -> Tensor:
    """Return the norm and the sum of a gradient, by which ``scale_of`` knows it again."""
    return torch.stack([gradient.norm(), gradient.sum()])


def scale_of(gradient: Tensor, size: Tensor) -> float:
    """Return by what a gradient was scaled; not a number where something else was done to it.

    Example:
        >>> gradient = torch.tensor([3.0, 4.0])
        >>> scale_of(0.5 * gradient, size_of(gradient))
        0.5
    """
    norm, total = size.tolist()
    new_norm, new_total = size_of(gradient).tolist()
    scale = new_norm / norm if norm else math.nan
    return scale if abs(new_total - scale * total) <= 1e-3 * new_norm else math.nan


def warn_of_clipping(scales: Sequence[float]) -> None:
    """Warn if all gradients were scaled as clipping does it.

    Warns:
        KolenPollackWarning: Says how to clip without B.
    """
    if scales and all(map(_is_clipped, scales)):
        warnings.warn(
            f"Kolen-Pollack: gradients were scaled by {scales[0]:.3g} between the backward pass and "
            "path.step(). If that was clipping to a norm, as torch.nn.utils.clip_grad_norm_, Lightning, "
            "Hugging Face's Trainer and accelerate do it, the norm counts feedback weights too, and "
            "clips harder than under backprop: switch it off and call path.clip_grad_norm_",
            KolenPollackWarning,
            stacklevel=level_outside(),
        )


def _is_clipped(scale: float) -> bool:
    """Whether a scale is above 0 and at most 1, and none by which GradScaler unscales: 1/2, 1/4, ..."""
    return 0.0 < scale <= 1.0 and (scale == 1.0 or math.frexp(scale)[0] != 0.5)
