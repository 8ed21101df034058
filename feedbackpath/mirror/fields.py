"""Where noise is fired at a weight: what its layer is called with, and which products teach which weight.

A linear layer or a convolution runs its own call, so that whatever changes its forward pass changes what it
teaches. The covariance of a convolution is its exact weight gradient. Where a map ends, a weight at the
kernel's edge meets fewer inputs: each value of a covariance is averaged over the pairs that it connected
(Appendix D.2 of Akrout et al. 2019).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from feedbackpath.core.layers import UntiedWeight
from feedbackpath.errors import RuleError
from feedbackpath.layers import LocallyConnected2d
from feedbackpath.mirror.layouts import view_of

SEEN_VALUES = 6_000_000  # in float32, 24 MB: below the size from which glibc maps new memory for each tensor


class ConvGeometry(NamedTuple):
    """How a convolution walks over its input; the tuples hold one number for each spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


@dataclass(frozen=True)
class Field:
    """What is fired at one weight at once.

    Attributes:
        weight: The weight.
        shape: Of one example of noise: ``[channels, *map]`` or ``[..., inputs]``.
        answers: Of one neuron of W, or channel, to one example: the positions of its map.
        pairs: Pairs of input and answer that each value of W connects in an example; laid out as W.
        positions: Answers that count for as much as one example of a layer without a map would.
        mask: The answers that count, where padding by other values than zeros spoils some; None: all.
    """

    weight: UntiedWeight
    shape: tuple[int, ...]
    answers: int
    pairs: Tensor | float
    positions: float
    mask: Tensor | None = None

    @property
    def code_shape(self) -> tuple[int, ...]:
        """The shape of codes that are orthogonal wherever a neuron looks.

        Of local connections: a patch. Cells that are a kernel apart fire alike: no neuron sees two of them.
        """
        return (self.shape[0], *self.weight.layer.kernel_size) if is_local(self.weight) else self.shape

    @property
    def groups(self) -> int:
        """Groups of inputs that meet weights of their own."""
        if is_local(self.weight):
            return int(self.weight.layer.groups)
        if is_convolution(self.weight):
            return int(self.weight.layer.groups)
        return 1 if runs_itself(self.weight) else len(_matrix_of(self.weight, self.weight.weight))

    def lay_out(self, x: Tensor) -> Tensor:
        """Return noise as ``run`` and ``multiply`` need it, so that neither has to move it again."""
        return _cover(self.weight.layer, x) if is_local(self.weight) else x

    def run(self, x: Tensor) -> Tensor:
        """Return what the layer makes of noise ``[N, *shape]``: ``[samples, channels, ...]``.

        Linear layers, convolutions and local connections run their own call, hooks and all. A projection of
        attention, or a layer of one's own, is one product of ``as_matrix``.
        """
        weight = self.weight
        if is_local(weight):
            parts = torch.split(self.lay_out(x), _count_at_once(weight.layer))
            answers: list[Tensor] = [weight.layer(part) for part in parts]
            # As as_matrix has them: each neuron is its own.
            return torch.cat([z.permute(2, 3, 1, 0).flatten(0, 2) for z in answers], 1).mT
        if runs_itself(weight):
            z = weight.layer(x)
            if not isinstance(z, Tensor):
                raise RuleError(f"mirror mode: {weight.name!r} returns {type(z).__name__}, not a tensor")
            return z if is_convolution(weight) else z.flatten(0, -2)
        matrix = _matrix_of(weight, weight.weight.detach())
        by_group = x.reshape(-1, matrix.shape[0], matrix.shape[2]).transpose(0, 1)
        return (by_group @ matrix.mT).transpose(0, 1).flatten(1)

    def multiply(self, x: Tensor, answer: Tensor) -> Tensor:
        """Return the sum of answer times input over samples and positions, laid out as W."""
        weight = self.weight
        if is_convolution(weight):
            x, padding = pad_input(weight.layer, pad_as_layer(weight.layer, x))
            like = weight.weight.detach()
            like = like if like.dtype == x.dtype else like.to(x.dtype)
            return conv_products(geometry_of(weight.layer, padding), like, x, answer)
        if runs_itself(weight):
            return answer.mT @ x.flatten(0, -2)
        if is_local(weight):
            return local_products(weight.layer, self.lay_out(x), answer)
        products = torch.empty_like(weight.weight, dtype=answer.dtype)
        matrix = _matrix_of(weight, products)
        groups, neurons, inputs = matrix.shape
        answers = answer.view(-1, groups, neurons).permute(1, 2, 0)
        matrix.copy_(answers @ x.reshape(-1, groups, inputs).transpose(0, 1))
        return products


def is_convolution(weight: UntiedWeight) -> bool:
    """Whether a weight is a convolution's, transposed or not."""
    return isinstance(weight.layer, _ConvNd)


def runs_itself(weight: UntiedWeight) -> bool:
    """Whether noise passes through the layer's own call: not where it takes more than one input."""
    return isinstance(weight.layer, nn.Linear | _ConvNd)


def is_local(weight: UntiedWeight) -> bool:
    """Whether a weight is that of connections to a part of a map, each with a value of its own."""
    return isinstance(weight.layer, LocallyConnected2d)


def _cover(layer: LocallyConnected2d, x: Tensor) -> Tensor:
    """Cover a layer's map with patches ``[N, C, *kernel]`` of codes; a whole map stays as it is.

    Samples come to lie side by side in memory, as the layer needs them; it would move them value by value.
    Where they do so already, nothing is copied.
    """
    if x.shape[2:] != layer.input_size:
        counts = (-(-size // k) for size, k in zip(layer.input_size, layer.kernel_size, strict=True))
        x = x.repeat(1, 1, *counts)[:, :, : layer.input_size[0], : layer.input_size[1]]
    return x.flatten(1).mT.contiguous().mT.view(x.shape)


def _count_at_once(layer: LocallyConnected2d) -> int:
    """Count the examples to run together: what all neurons see of many takes new memory, which is slow."""
    return max(1, SEEN_VALUES // (layer.weight.numel() // (layer.out_channels // layer.groups)))


def make_field(weight: UntiedWeight, seen: Sequence[int] | None) -> Field:
    """Return what is fired at a weight.

    Args:
        weight: The weight.
        seen: Shape of the input that training called its layer with; None: not known. Noise takes that
            shape, if each value of W meets an input there. Else a convolution gets the smallest map that
            holds a whole receptive field, and other layers get a vector.
    """
    if is_local(weight):
        return Field(weight, (weight.layer.in_channels, *weight.layer.input_size), 1, 1.0, 1.0)
    if not is_convolution(weight):
        inputs = weight.layer.in_features if runs_itself(weight) else _count_inputs(weight)
        if not runs_itself(weight):  # groups of inputs, one after another, each with neurons of its own
            inputs *= len(_matrix_of(weight, weight.weight))
        shape = tuple(seen[1:]) if seen is not None and len(seen) > 1 and seen[-1] == inputs else (inputs,)
        answers = math.prod(shape[:-1])
        return Field(weight, shape, answers, float(answers), float(answers))
    layer, dims = weight.layer, len(weight.layer.kernel_size)
    sizes = [tuple(seen[2:])] if seen is not None and len(seen) == dims + 2 else []
    for size in (*sizes, least_map(layer)):
        pairs, reached, mask, positions = _connect(layer, size)
        if bool((pairs > 0).all()):
            break
    w = weight.weight
    dtype = torch.promote_types(w.dtype, torch.float32)
    return Field(
        weight, (layer.in_channels, *size), reached, pairs.to(w.device, dtype), positions,
        None if mask is None else mask.to(w.device, dtype),
    )  # fmt: skip


def _connect(layer: _ConvNd, size: tuple[int, ...]) -> tuple[Tensor, int, Tensor | None, float]:
    """Count the pairs that one example connects: see ``Field``.

    A weight's estimate scatters by the inputs of each answer that it is averaged over, and answers at the
    border of a map have fewer of them.
    """
    kernel = layer.kernel_size
    x, w = torch.ones(1, 1, *size, device="cpu"), torch.ones(1, 1, *kernel, device="cpu")
    is_zeros = layer.padding_mode == "zeros"
    if is_zeros:
        x, padding = pad_input(layer, x)
    else:
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice), (0,) * len(kernel)
    geometry = geometry_of(layer, padding)._replace(groups=1)
    reach = torch.convolution(x, w, None, *geometry)
    mask = None if is_zeros else (reach > math.prod(kernel) - 0.5).to(x.dtype)
    counted = torch.ones_like(reach) if mask is None else mask
    source = x if is_zeros else torch.ones_like(x)
    pairs, scatter = (
        conv_products(geometry, w, source, counted * y) for y in (1.0, reach / math.prod(kernel))
    )
    positions = 1.0 / float((scatter / pairs**2).mean()) if bool((pairs > 0).all()) else 0.0
    return pairs, int(counted.sum()), mask, positions


def least_map(layer: _ConvNd) -> tuple[int, ...]:
    """Return the size of the smallest map in which every value of a kernel meets an input."""
    sizes = []
    for k, s, d, p in zip(layer.kernel_size, layer.stride, layer.dilation, _left_padding(layer), strict=True):
        before = math.ceil(p / s)  # answers, or inputs, that padding spoils
        if layer.transposed:
            sizes.append(1 + 2 * before)
        else:
            whole = before * s - p + d * (k - 1) + 1
            sizes.append(whole if layer.padding_mode == "zeros" else max(whole, p + 1))
    return tuple(sizes)


def _left_padding(layer: _ConvNd) -> tuple[int, ...]:
    if layer.padding == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    return layer.padding if isinstance(layer.padding, tuple) else (0,) * len(layer.kernel_size)


def geometry_of(layer: _ConvNd, padding: tuple[int, ...]) -> ConvGeometry:
    """Return how a layer walks over an input that is padded by so many zeros."""
    return ConvGeometry(
        layer.stride, padding, layer.dilation, layer.transposed, layer.output_padding, layer.groups
    )


def pad_as_layer(layer: _ConvNd, x: Tensor) -> Tensor:
    """Pad an input as a layer does that pads by other values than zeros."""
    if layer.padding_mode == "zeros":
        return x
    return F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)


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


def conv_products(geometry: ConvGeometry, like: Tensor, x: Tensor, answer: Tensor) -> Tensor:
    """Sum answer times input over samples and positions: exactly a convolution's weight gradient.

    Args:
        geometry: How the convolution walks over its input.
        like: A tensor of W's shape; its values make no difference.
        x: Input ``[N, C_in, ...]``.
        answer: Answers ``[N, C_out, ...]``.
    """
    gradients: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        answer, x, like, None, *geometry, (False, True, False)
    )
    return gradients[1]


def local_products(layer: LocallyConnected2d, x: Tensor, answer: Tensor) -> Tensor:
    """Sum answer times input over samples, for each synapse of a local layer: laid out as W.

    Of a row of neurons each sees a row of its patch as a run of memory, so that nothing has to be copied to
    where it is multiplied.

    Args:
        layer: The layer.
        x: Input ``[N, C_in, H, W]``.
        answer: Answers ``[N, neurons]``, as ``as_groups`` orders them.
    """
    groups, (high, wide), (rows, columns) = layer.groups, layer.output_size, layer.kernel_size
    (down, along), inputs = layer.padding, layer.in_channels // layer.groups
    by_place = x.reshape(len(x), groups, inputs, *layer.input_size).permute(1, 3, 4, 2, 0)
    lines = F.pad(by_place, (0, 0, 0, 0, along, along, down, down)).contiguous().flatten(2, 3)
    products = torch.empty_like(layer.weight, dtype=answer.dtype)
    laid_out = products.view(high, wide, groups, -1, inputs, rows, columns)
    answers = answer.mT.reshape(high, wide, groups, -1, len(x))
    for group, line, row in itertools.product(range(groups), range(high), range(rows)):
        source = lines[group, line * layer.stride[0] + row]  # [W * inputs, N]
        seen = source.unfold(0, columns * inputs, layer.stride[1] * inputs)[:wide]
        told = torch.bmm(answers[line, :, group], seen)
        laid_out[line, :, group, :, :, row] = told.view(wide, -1, columns, inputs).mT
    return products


def per_neuron(values: Tensor, weight: UntiedWeight) -> Tensor:
    """Spread one value a channel, or neuron of ``as_matrix``, over what is laid out as W."""
    w = weight.weight
    if is_convolution(weight) and weight.transposed:
        groups = weight.layer.groups
        by_input = values.view(groups, -1).repeat_interleave(w.shape[0] // groups, 0)
        return by_input[(..., *(None,) * (w.dim() - 2))]
    if runs_itself(weight):
        return values.view(-1, *(1,) * (w.dim() - 1))
    spread = torch.empty_like(w, dtype=values.dtype)
    matrix = _matrix_of(weight, spread)
    matrix.copy_(values.view(matrix.shape[0], -1, 1).expand_as(matrix))
    return spread


def inputs_of(weight: UntiedWeight) -> int:
    """Return how many values of W a neuron sums over at most."""
    if is_convolution(weight) and weight.transposed:
        return weight.weight[:, 0].numel() // int(weight.layer.groups)
    return _count_inputs(weight)


def _count_inputs(weight: UntiedWeight) -> int:
    return weight.weight[0].numel() if runs_itself(weight) else _matrix_of(weight, weight.weight).shape[2]


def _matrix_of(weight: UntiedWeight, tensor: Tensor) -> Tensor:
    view = view_of(weight)
    assert view is not None, f"no mirror can run {weight.name}"
    matrix: Tensor = view(weight.layer, tensor)
    return matrix
