"""An estimate from orthogonal codes: exact where answers to a code and its negative are odd.

Behind other activations it is exact in the limit of weak codes. ``feedbackpath.mirror.pairs`` is the short
way, for activations behind which the length of the codes makes no difference.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from feedbackpath.core.layers import UntiedWeight
from feedbackpath.mirror import fields
from feedbackpath.mirror.activations import Activation, is_channelwise
from feedbackpath.mirror.covariance import Estimate, Receive, make_receiver
from feedbackpath.mirror.designs import CODE_LENGTH, orthogonal_codes
from feedbackpath.mirror.rates import Rates

CHUNK_VALUES = 2**15  # answers that a CPU works on at once: they stay in its cache


def estimate_with_codes(
    weight: UntiedWeight,
    activation: Activation,
    rates: Rates,
    *,
    sigma: float,
    block_bias: bool,
    scratch: Tensor | None = None,
) -> Estimate:
    """Fire orthogonal codes, one group of inputs after the other: see ``OrthogonalCodes``.

    Each input's covariance is taken over the codes of its own group. Neurons are worked through some at a
    time, so that their answers stay in a CPU's cache.

    Args:
        weight: The weight to mirror.
        activation: What follows its layer.
        rates: How noise and answers travel.
        sigma: The codes' strength.
        block_bias: Whether the layer's bias is left out meanwhile (equation 12).
        scratch: Memory for the covariance, at least as large as W; made anew where not given.
    """
    dtype = torch.promote_types(weight.weight.dtype, torch.float32)
    codes = rates.send(sigma * orthogonal_codes(weight.weight.device, dtype), in_pairs=True)
    covariance = fields.make_estimate(weight, dtype, scratch)
    source = fields.as_rows(weight.weight.detach(), weight)
    target = (
        torch.empty_like(source, dtype=dtype) if weight.transposed else fields.as_rows(covariance, weight)
    )
    size = _rows_at_once(source, weight, activation)
    receive = make_receiver(weight, activation, rates, block_bias, dtype, in_pairs=True)
    sums = _fire_codes(source, target, codes, receive, fields.outputs_per_channel(weight), size)
    if weight.transposed:
        matrix = fields.as_matrix(covariance, weight)
        matrix.copy_(target.view(matrix.shape))
    return Estimate(weight, covariance, *sums, sigma**2, CODE_LENGTH)


def _fire_codes(
    source: Tensor, target: Tensor, codes: Tensor, receive: Receive, rows_per_channel: int, size: int
) -> tuple[Tensor, Tensor]:
    """Write covariances of answers with codes into ``target``; return sums of z (y - mean y) and of z^2.

    Args:
        source: W as ``[neurons, inputs]``.
        target: Where cov goes, in the same form.
        codes: ``[CODE_LENGTH, CODE_LENGTH]`` as they arrive.
        receive: What channels answer to a drive.
        rows_per_channel: Neurons that share a channel.
        size: Neurons to work on at once.
    """
    decode = codes.mT / (2.0 * CODE_LENGTH)  # a mean over each code and its negative
    sums = []
    for number, (part, place) in enumerate(
        zip(torch.split(source, size), torch.split(target, size), strict=True)
    ):
        rows = slice(number * size, number * size + len(part))
        drive = _in_groups(part).to(codes.dtype) @ codes
        z = drive.view(1, len(part) // rows_per_channel, -1)
        answer = receive(z, rows) - receive(-z, rows)
        sums.append((torch.linalg.vecdot(answer, z), torch.linalg.vecdot(z, z)))
        _decode(answer.view_as(drive), decode, place)
    drive_answer, drive_power = (torch.cat(parts, 1)[0] for parts in zip(*sums, strict=True))
    return drive_answer / 2.0, drive_power


def _in_groups(rows: Tensor) -> Tensor:
    """View ``[neurons, inputs]`` as ``[neurons * groups, CODE_LENGTH]``; zeros fill up the last group."""
    missing = -rows.shape[1] % CODE_LENGTH
    return (F.pad(rows, (0, missing)) if missing else rows).reshape(-1, CODE_LENGTH)


def _decode(answer: Tensor, decode: Tensor, place: Tensor) -> None:
    """Write the covariance of answers with their codes into ``place``, ``[neurons, inputs]``."""
    if place.shape[1] % CODE_LENGTH == 0 and place.is_contiguous():
        torch.mm(answer, decode, out=place.view(-1, CODE_LENGTH))
    else:
        place.copy_((answer @ decode).view(len(place), -1)[:, : place.shape[1]])


def _rows_at_once(rows: Tensor, weight: UntiedWeight, activation: Activation) -> int:
    """Return how many neurons to work on at once: all where their activation, or place in W, asks for it."""
    is_small = rows.device.type != "cpu" or rows.numel() <= CHUNK_VALUES
    if is_small or weight.transposed or is_channelwise(activation):
        return len(rows)
    return max(1, CHUNK_VALUES // rows.shape[1])
