"""The reading: what B makes of what noise told of W (Akrout et al. 2019, Algorithm 1; ``Mirror.reading``)."""

import torch
from torch import Tensor

from feedbackpath.mirror import fields
from feedbackpath.mirror.context import MirrorContext
from feedbackpath.mirror.covariance import Estimate
from feedbackpath.mirror.settings import Mirror


def learn(context: MirrorContext, found: Estimate, settings: Mirror, share: float | None = None) -> None:
    """Let one B learn from what a pass found, and count the pass.

    With s each neuron's mean slope, d = ``forgetting``, eta = ``rate`` and lambda = ``decay``::

        calibrated    B <- (1 - d) B + d cov / (sigma^2 s)       settles at W
        inside        B <- B + eta (cov - lambda B)              settles at sigma^2 s / lambda times W
        printed       B <- (1 - lambda) B + eta cov              settles at sigma^2 s eta / lambda times W
        scaled        B <- B + eta cov, then back to its norm    settles in the direction of W

    Args:
        context: What mirror mode knows of the path.
        found: What noise told of W. It is used up: its covariance is worked on in place.
        settings: Which reading, and its numbers.
        share: d of ``"calibrated"``; None: ``forgetting``, and 1 / n at pass n until it falls to that.
    """
    weight, feedback = found.weight, found.weight.feedback
    passes = context.passes.get(weight.name, 0)
    if settings.reading == "calibrated":
        if share is None:
            share = max(settings.share_replaced, 1.0 / (passes + 1))
        _move_to_estimate(found, share, _find_dead(context, found, settings))
    elif settings.reading == "scaled":
        norm = feedback.norm()
        feedback.add_(found.covariance, alpha=settings.rate).mul_(norm / feedback.norm())
    else:
        feedback.mul_(1.0 - settings.share_replaced).add_(found.covariance, alpha=settings.rate)
    context.passes[weight.name] = passes + 1


def _move_to_estimate(found: Estimate, share: float, dead: Tensor | None) -> None:
    """B <- (1 - d) B + d cov / (sigma^2 s); neurons that do not answer keep their feedback weights."""
    weight, feedback = found.weight, found.weight.feedback
    kept = None if dead is None else fields.per_neuron(dead, weight)
    estimate = found.at_gain_one()
    if kept is not None:
        old = fields.as_matrix(feedback.to(estimate.dtype), weight)
        fields.as_matrix(estimate, weight).copy_(torch.where(kept, old, fields.as_matrix(estimate, weight)))
    if share == 1.0:
        if estimate.data_ptr() != feedback.data_ptr():
            feedback.copy_(estimate)
    else:
        feedback.lerp_(estimate.to(feedback.dtype), share)


def _find_dead(context: MirrorContext, found: Estimate, settings: Mirror) -> Tensor | None:
    """Return which channels do not answer; warn once of a layer that has some. None: there are none."""
    if not context.may_be_dead(found.weight, settings):
        return None
    is_dead = found.is_dead
    num_dead = int(is_dead.sum())
    if not num_dead:
        return None
    context.warn_once(
        "dead",
        found.weight.name,
        f"{num_dead} of {len(is_dead)} neurons of {found.weight.name!r} do not answer to noise; their B "
        "stays as it is there (blocked biases or a larger sigma may help)",
    )
    return is_dead
