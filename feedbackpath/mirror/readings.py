"""What B makes of what noise told of W: the readings of ``Mirror`` (Akrout et al. 2019, Algorithm 1)."""

import torch
from torch import Tensor

from feedbackpath.core.layers import UntiedWeight
from feedbackpath.mirror import fields
from feedbackpath.mirror.estimator import Estimate
from feedbackpath.mirror.settings import Mirror


def learn_from(
    weight: UntiedWeight, found: Estimate, settings: Mirror, share: float, dead: Tensor | None
) -> None:
    """Let B learn from what was found, as the reading says.

    Args:
        weight: The weight whose B learns.
        found: What noise told of W.
        settings: Which reading, and its numbers.
        share: d, the share of B that is replaced; not asked for by ``"scaled"``.
        dead: Which channels do not answer; None: all do.
    """
    feedback, covariance = weight.feedback, found.covariance
    if settings.reading == "calibrated":
        _move_to_estimate(weight, found, share, dead)
    elif settings.reading == "scaled":
        norm = feedback.norm()
        feedback.add_(covariance, alpha=settings.rate).mul_(norm / feedback.norm())
    else:
        feedback.mul_(1.0 - share).add_(covariance, alpha=settings.rate)


def _move_to_estimate(weight: UntiedWeight, found: Estimate, share: float, dead: Tensor | None) -> None:
    """B <- (1 - d) B + d cov / (sigma^2 s); neurons that do not answer keep their feedback weights."""
    kept = None if dead is None else fields.per_neuron(dead, weight)
    estimate = found.at_gain_one()
    if kept is not None:
        old = fields.as_matrix(weight.feedback.to(estimate.dtype), weight)
        fields.as_matrix(estimate, weight).copy_(torch.where(kept, old, fields.as_matrix(estimate, weight)))
    if share == 1.0:
        if estimate.data_ptr() != weight.feedback.data_ptr():
            weight.feedback.copy_(estimate)
    else:
        weight.feedback.lerp_(estimate.to(weight.feedback.dtype), share)
