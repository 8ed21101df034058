"""A layer's weight as matrices of receptive fields, and the noise maps that drive a convolution."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from feedbackpath.core.layers import UntiedWeight, is_channels_last

MAP_POSITIONS = 64  # positions in a noise map: 64 along a line, 8 x 8 in a plane, 4 x 4 x 4 in space


class ConvGeometry(NamedTuple):
    """How a convolution walks over its input; the tuples hold one number for each spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


def as_matrix(tensor: Tensor, weight: UntiedWeight) -> Tensor:
    """View a tensor laid out as W as ``[groups, neurons, inputs]``, the values of one receptive field each.

    Inputs are in the order of memory, so that no copy is made of a dense tensor, channels last or not. A
    transposed convolution is seen from one input position: each output position is a neuron of its own.
    """
    view = weight.kind.as_matrix
    assert view is not None, f"no mirror can run {weight.name}"
    return view(weight.layer, tensor)


def as_rows(tensor: Tensor, weight: UntiedWeight) -> Tensor:
    """View a tensor laid out as W as ``[neurons, inputs]``: groups make no difference to a neuron alone.

    A view of a dense tensor, but a copy for transposed convolutions, whose neurons are not in order.
    """
    matrix = as_matrix(tensor, weight)
    return matrix.reshape(-1, matrix.shape[-1])


def make_estimate(weight: UntiedWeight, dtype: torch.dtype, scratch: Tensor | None = None) -> Tensor:
    """Allocate a tensor with W's shape and order of inputs, of which ``as_matrix`` is a view."""
    w = weight.weight
    flat = w.new_empty(w.numel(), dtype=dtype) if scratch is None else scratch[: w.numel()]
    if is_channels_last(w) and not weight.transposed:
        return torch.as_strided(flat, w.shape, w.stride())
    return flat.view(w.shape)


def is_laid_out_alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape have their values in the same order in memory."""
    strides = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(own == others for size, own, others in strides if size > 1)


def count_groups(weight: UntiedWeight) -> int:
    """Return the groups of a convolution; 1 elsewhere."""
    return weight.layer.groups if isinstance(weight.layer, _ConvNd) else 1


def inputs_in_mirror_mode(weight: UntiedWeight, field: str) -> int:
    """Return how many inputs drive a neuron at once when noise is fired.

    A transposed convolution's output position is reached by one input position alone where one receptive
    field is driven, and by the kernel's size over the stride's where whole maps are.
    """
    if not weight.transposed:
        return weight.fan_in
    one_position = weight.weight.shape[0] // count_groups(weight)
    stride = weight.layer.stride if field == "map" and isinstance(weight.layer, _ConvNd) else ()
    return max(one_position, weight.fan_in // math.prod(stride)) if stride else one_position


def count_channels(weight: UntiedWeight) -> int:
    """Return the output channels: activations with a setting a channel need them in dimension 1."""
    first, second = weight.weight.shape[:2]
    return second * count_groups(weight) if weight.transposed else first


def outputs_per_channel(weight: UntiedWeight) -> int:
    """Return the neurons of ``as_matrix`` that share a channel: the kernel's positions, if transposed."""
    return weight.fan_out // weight.weight.shape[1] if weight.transposed else 1


def per_neuron(values: Tensor, weight: UntiedWeight) -> Tensor:
    """Spread one value a channel over the neurons of ``as_matrix``: ``[groups, neurons, 1]``."""
    groups = count_groups(weight)
    by_group = values.reshape(groups, -1, 1)
    return by_group.repeat_interleave(outputs_per_channel(weight), 1) if weight.transposed else by_group


def open_bias(weight: UntiedWeight, is_blocked: bool) -> Tensor | None:
    """Return the bias that moves a layer in mirror mode: its own, unless it is blocked (equation 12).

    None for a packed attention projection, whose answer is linear.
    """
    if is_blocked or not isinstance(weight.layer, nn.Linear | _ConvNd):
        return None
    return weight.layer.bias


def unpadded(layer: _ConvNd) -> ConvGeometry:
    """Return the layer's geometry without padding: every weight then meets equally many inputs."""
    zeros = (0,) * len(layer.kernel_size)
    return ConvGeometry(layer.stride, zeros, layer.dilation, layer.transposed, zeros, layer.groups)


def map_side(layer: _ConvNd) -> int:
    """Return how many positions a noise map has along each dimension."""
    return round(math.pow(MAP_POSITIONS, 1 / len(layer.kernel_size)))


def map_size(layer: _ConvNd) -> list[int]:
    """Return the size of an input map that gives ``map_side`` positions a dimension without padding."""
    side = map_side(layer)
    if layer.transposed:
        return [side] * len(layer.kernel_size)
    sizes = zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
    return [(side - 1) * stride + dilation * (kernel - 1) + 1 for kernel, stride, dilation in sizes]


def pad_input(layer: _ConvNd, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Do the padding that ``ConvGeometry`` cannot tell of; return what is left for the convolution to do.

    ``x`` is the input of the layer's operation: where that pads in another way than by zeros, it has done so.
    """
    none = (0,) * len(layer.kernel_size)
    if layer.padding_mode != "zeros":
        return x, none
    if not isinstance(layer.padding, str):
        return x, layer.padding
    if layer.padding == "valid":
        return x, none
    totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    # As torch does: an odd total puts its one extra zero at the end, dimensions listed last first.
    extra = [side for total in reversed(totals) for side in (0, total % 2)]
    return F.pad(x, extra) if any(extra) else x, tuple(total // 2 for total in totals)
