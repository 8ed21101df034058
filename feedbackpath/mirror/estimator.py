"""The estimate: one layer's neurons fire noise, and it is seen what that tells of W.

How noise is fired: ``feedbackpath.mirror.codes``, ``.noise``, and ``.pairs`` for the short way. What is made
of the estimate: ``feedbackpath.mirror.readings``.
"""

import torch
from torch import Tensor

from feedbackpath.core.layers import UntiedWeight
from feedbackpath.mirror import fields
from feedbackpath.mirror.codes import estimate_with_codes
from feedbackpath.mirror.context import MirrorContext
from feedbackpath.mirror.covariance import Estimate
from feedbackpath.mirror.designs import Design
from feedbackpath.mirror.devices import average_over_devices, count_devices, own_rank
from feedbackpath.mirror.noise import estimate_with_noise
from feedbackpath.mirror.pairs import Pairs, can_pair
from feedbackpath.mirror.passage import forward_passage
from feedbackpath.mirror.rates import RATES
from feedbackpath.mirror.settings import Mirror


def estimate(context: MirrorContext, weight: UntiedWeight, settings: Mirror) -> Estimate:
    """Let a layer's neurons fire noise once, and return the covariance of their answers with it.

    ``E[cov] = sigma^2 S W``, S the neurons' slopes (Akrout et al. 2019, equation 11). Where each device of a
    job fires its own noise, this is the average over all of them.

    Args:
        context: What mirror mode knows of the path.
        weight: The weight to look at; W and B stay as they are, but for the values that an exact mirror is
            about to replace: the estimate may take up B's memory.
        settings: The noise.
    """
    with forward_passage(weight.weight):
        found = _fire(context, weight, settings)
    if count_devices(settings) > 1:
        average_over_devices(found)
    return found


def _fire(context: MirrorContext, weight: UntiedWeight, settings: Mirror) -> Estimate:
    activation, design = context.activations[weight.name], settings.design
    rates = RATES[settings.rates](settings.baseline, not settings.baseline_known)
    sigma, block_bias = settings.deviation, settings.block_bias
    if not isinstance(design, Design):
        place = None if context.may_be_dead(weight, settings) else _own_memory(weight, settings)
        return estimate_with_codes(
            weight, activation, rates, sigma=sigma, block_bias=block_bias, scratch=place
        )
    inputs = fields.inputs_in_mirror_mode(weight, settings.field)
    return estimate_with_noise(
        weight, activation, rates, design=design, field=settings.field,
        num_samples=settings.samples_for(inputs, count_devices(settings)), sigma=sigma,
        block_bias=block_bias, generator=context.generator(weight, own_rank(settings)),
    )  # fmt: skip


def _own_memory(weight: UntiedWeight, settings: Mirror) -> Tensor | None:
    """Return B's own memory for the estimate that replaces it, where it can hold one; else None."""
    feedback = weight.feedback.detach()
    if not settings.is_exact or feedback.dtype not in (torch.float32, torch.float64):
        return None
    memory = feedback.as_strided((feedback.numel(),), (1,))
    place = fields.make_estimate(weight, feedback.dtype, memory)
    return memory if fields.is_laid_out_alike(place, feedback) else None


def replace_by_pairs(context: MirrorContext, weight: UntiedWeight, settings: Mirror) -> bool:
    """Mirror a weight the short way, estimate and reading in one, if that is open; return whether it was.

    It is open behind odd answers (``can_pair``), once the neurons have answered before.
    """
    if context.may_be_dead(weight, settings):
        return False
    pairs = context.pairs.get(weight.name)
    if pairs is None or not pairs.are_of(weight, settings):
        if not can_pair(weight, settings, context.odd_slopes[weight.name]):
            return False
        pairs = context.pairs[weight.name] = Pairs(weight, settings)
    if not pairs.can_fire:
        return False
    with forward_passage(weight.weight):
        pairs.fire()
    context.passes[weight.name] += 1
    return True
