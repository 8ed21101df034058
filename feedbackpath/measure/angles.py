"""How well B agrees with W: matrix angles and gains, as in Section 6 of Akrout et al. 2019."""

import math
from collections.abc import Sequence

from torch import Tensor

from feedbackpath.core.layers import UntiedWeight

CHANCE_DEVIATIONS = 1.645  # of a normal distribution, beyond which one value in twenty lies


def angle_deg(one: Tensor, other: Tensor) -> float:
    """Return the angle between two tensors taken as vectors, in degrees, exact for small angles too.

    ``angle = 2 atan2(|u - v|, |u + v|)`` with u, v of length 1: an arc cosine would lose all digits below
    0.02 degrees in float32. NaN where a tensor is zero or not finite.

    Example:
        >>> import torch
        >>> round(angle_deg(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])), 3)
        45.0
    """
    u, v = (x.detach().double().flatten() for x in (one, other))
    u, v = u / u.norm(), v / v.norm()
    return math.degrees(2.0 * math.atan2((u - v).norm().item(), (u + v).norm().item()))


def chance_angle_deg(size: int) -> float:
    """Return the angle, in degrees, that one in twenty pairs of random vectors of a size is below.

    The cosine of two random vectors of n values has mean 0 and standard deviation 1/√n, so the angle is
    ``acos(1.645 / √n)``: an angle above it cannot be distinguished from chance.

    Example:
        >>> [round(chance_angle_deg(size)) for size in (10, 100, 10_000)]
        [59, 81, 89]
    """
    return math.degrees(math.acos(min(1.0, CHANCE_DEVIATIONS / math.sqrt(size))))


def matrix_angles(weights: Sequence[UntiedWeight]) -> dict[str, float]:
    """Return each weight's angle between B and W, in degrees: 0 is alignment, 90 is chance."""
    return {
        weight.name: 0.0 if weight.is_tied else angle_deg(weight.feedback, weight.weight)
        for weight in _alike(weights)
    }


def gains(weights: Sequence[UntiedWeight]) -> dict[str, float]:
    """Return each weight's gain <B, W> / <W, W>: 1 if B is as large as W along the direction of W."""
    found = {}
    for weight in _alike(weights):
        w, b = (x.detach().double().flatten() for x in (weight.weight, weight.feedback))
        found[weight.name] = (b @ w / (w @ w)).item()
    return found


def _alike(weights: Sequence[UntiedWeight]) -> list[UntiedWeight]:
    """Return the weights whose B can be compared with W: those that send errors locally."""
    return [weight for weight in weights if weight.layer.untied.send_back.is_local]
