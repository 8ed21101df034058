"""Mirror mode driven by one noisy input: every B learns at once, from the signals that its own layer sees.

Akrout et al. 2019, Appendix C.4, suggest it for networks with BatchNorm and leave it untested. The model runs
forward as it is; each layer takes its own input x, drive z and answer y = phi(z), about their means::

    cov   = mean of y x^T                   E[cov] = S W C    with C the covariance of x (Gaussian drives)
    s     = mean y z / mean z^2             each neuron's own slope, the diagonal of S
    B     = S^-1 cov / v     -> W C / v     with v the mean variance of x: W itself only where C = v I
    B     = S^-1 cov C^-1    -> W           decorrelated, a regression: needs the inverse of C
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from feedbackpath.core.layers import UntiedWeight
from feedbackpath.core.modules import tapped
from feedbackpath.core.passage import forward_passage
from feedbackpath.errors import RuleError
from feedbackpath.mirror import fields
from feedbackpath.mirror.activations import Activation
from feedbackpath.mirror.estimator import Estimate, conv_products
from feedbackpath.mirror.fields import ConvGeometry
from feedbackpath.mirror.mode import MirrorMode
from feedbackpath.mirror.settings import Mirror

RIDGE = 1e-4  # of the inputs' mean variance, added to each when they are decorrelated
UNFOLDED_VALUES = 2**23  # receptive fields are laid out for so many values at once


def mirror_from_input(
    mode: MirrorMode,
    weights: Sequence[UntiedWeight],
    run: Callable[[], object],
    settings: Mirror,
    *,
    steps: int,
    decorrelate: bool,
) -> None:
    """Run the model on noise and let every B learn from it, once, from all ``steps`` forward passes together.

    Buffers and random numbers change as in any forward pass; the caller takes that back.

    Args:
        mode: Mirror mode of the model's path.
        weights: The weights whose B learns; a weight in several layers is mirrored in the one named here.
        run: Runs the model forward on a minibatch of noise.
        settings: What B makes of it: reading, forgetting, rate and decay; the rest is not used.
        steps: Forward passes.
        decorrelate: Whether the covariance is multiplied by the inverse of the inputs' covariance.

    Raises:
        RuleError: Some layers were not reached, saw one sample, or cannot be decorrelated.
    """
    settings = dataclasses.replace(settings, noise="gaussian", block_bias=False)  # biases stay as they are
    if steps < 1:
        raise RuleError(f"mirror_from_input: steps must be at least 1, not {steps}")
    if decorrelate:
        _refuse_what_cannot_be_decorrelated(weights)
    seen = look(mode, weights, run, steps=steps, with_inputs=decorrelate)
    with torch.no_grad():
        for found in [one.regress() if decorrelate else one.correlate() for one in seen]:
            mode.learn(found.weight, found, settings)


def look(
    mode: MirrorMode,
    weights: Sequence[UntiedWeight],
    run: Callable[[], object],
    *,
    steps: int,
    with_inputs: bool,
) -> list["Seen"]:
    """Run the model on noise and return what the layer of each weight has seen; no B learns.

    Args:
        mode: Mirror mode of the model's path.
        weights: The weights whose layers are looked at.
        run: Runs the model forward on a minibatch of noise.
        steps: Forward passes.
        with_inputs: Whether to take the covariance of each layer's inputs as well.
    """
    mode.find_activations(weights)
    seen = [Seen(weight, mode.activations[weight.name], with_inputs) for weight in weights]
    key = f"{mode.context.seed}/{mode.passes.get(weights[0].name, 0)}/one input"
    torch.manual_seed(zlib.crc32(key.encode()))
    with (
        _norms_in_training(mode.model),
        _signals_tapped(seen),
        forward_passage(*(weight.weight for weight in weights)),
        torch.enable_grad(),  # attention shows its projections only where a backward pass can come
    ):
        for _ in range(steps):
            run()
    missing = [repr(one.weight.name) for one in seen if not one.moments]
    if missing:
        raise RuleError(
            f"mirror_from_input: run did not reach {', '.join(missing)}; it has to run the path's own model, "
            "whole, and not under torch.no_grad or torch.inference_mode"
        )
    return seen


class _Moments(NamedTuple):
    """Sums over samples and positions, all about the mean of each neuron over its minibatch.

    Attributes:
        products: Sum of y x, laid out as the rows of W that they belong to.
        pairs: How many products each value is the sum of, less the degrees of freedom that means take.
        drive_answer: Sum of z y by output channel.
        drive_power: Sum of z^2 by output channel.
        input_power: Sum of x^2 over all inputs.
        inputs: How many squares those are, less the degrees of freedom that means take.
        fields: Sum of x x^T over receptive fields ``[groups, n, n]``; empty where not needed.
        samples: How many receptive fields those are.
    """

    products: Tensor
    pairs: Tensor
    drive_answer: Tensor
    drive_power: Tensor
    input_power: Tensor
    inputs: Tensor
    fields: Tensor
    samples: Tensor


class Seen:
    """What the layer of one weight sees and answers while noise passes.

    Args:
        weight: The weight.
        activation: What follows its layer.
        with_inputs: Whether to take the covariance of the layer's inputs as well.
    """

    def __init__(self, weight: UntiedWeight, activation: Activation, with_inputs: bool) -> None:
        self.weight = weight
        self.activation = activation
        self.with_inputs = with_inputs
        self.moments: dict[int, _Moments] = {}  # by the first of the rows of W that they belong to

    @torch.no_grad()
    def add(self, x: Tensor, z: Tensor, rows: slice) -> None:
        """Add what one use of the weight shows: its input and its drive."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        x, z = x.detach().to(dtype), z.detach().to(dtype)
        measure = _measure_convolution if isinstance(self.weight.layer, _ConvNd) else _measure_dense
        found, old = measure(self, x, z), self.moments.get(rows.start or 0)
        both = found if old is None else _Moments(*(a + b for a, b in zip(old, found, strict=True)))
        self.moments[rows.start or 0] = both

    def correlate(self) -> Estimate:
        """Return the covariance of answers and inputs, which tells of ``W C``; 0 where only padding came."""
        covariances = [part.products / part.pairs.clamp_min(1.0) for part in self._parts()]
        return self._estimate(covariances, [part.input_power / part.inputs for part in self._parts()])

    def regress(self) -> Estimate:
        """Return that covariance times the inverse of the inputs', which tells of W.

        Raises:
            RuleError: The layer saw no more samples than it has inputs.
        """
        for part in self._parts():
            if part.samples <= part.fields.shape[1]:
                raise RuleError(
                    f"mirror_from_input: {self.weight.name!r} saw {int(part.samples)} samples of "
                    f"{part.fields.shape[1]} inputs, and decorrelating takes more samples than inputs: raise "
                    "steps or the minibatch"
                )
        ones = [part.samples.new_ones(()) for part in self._parts()]
        return self._estimate([_regress(part) for part in self._parts()], ones)

    def input_covariances(self) -> list[Tensor]:
        """Return C ``[groups, n, n]`` of each part of the weight that has inputs of its own.

        Each column is averaged over the pairs that ``correlate`` averages its input's weight over.
        """
        return [
            part.fields / _spread_over_fields(part.pairs.clamp_min(1.0), part.fields)
            for part in self._parts()
        ]

    def _parts(self) -> list[_Moments]:
        return [self.moments[first] for first in sorted(self.moments)]

    def _estimate(self, covariances: Sequence[Tensor], variances: Sequence[Tensor]) -> Estimate:
        parts = self._parts()
        covariance = fields.make_estimate(self.weight, parts[0].products.dtype)
        covariance.copy_(torch.cat(list(covariances)))
        return Estimate(
            self.weight,
            covariance,
            torch.cat([part.drive_answer for part in parts]),
            torch.cat([part.drive_power for part in parts]),
            torch.cat([v.expand_as(part.drive_power) for v, part in zip(variances, parts, strict=True)]),
            int(parts[0].samples),
        )


def _measure_dense(seen: Seen, x: Tensor, z: Tensor) -> _Moments:
    """Measure a dense layer's inputs ``[..., in]`` and drives ``[..., out]``: all of them are samples."""
    x, z = x.reshape(-1, x.shape[-1]), z.reshape(-1, z.shape[-1])
    x, y, z = (_about_mean(signal, seen.weight) for signal in (x, seen.activation(z), z))
    return _Moments(
        y.mT @ x,
        x.new_tensor(len(x) - 1.0),
        *_drive_sums(z, y),
        x.square().sum(),
        x.new_tensor((len(x) - 1.0) * x.shape[1]),
        (x.mT @ x)[None] if seen.with_inputs else x.new_empty(0),
        x.new_tensor(float(len(x))),
    )


def _measure_convolution(seen: Seen, x: Tensor, z: Tensor) -> _Moments:
    """Measure a convolution's input ``[N, C_in, ...]`` and drive ``[N, C_out, ...]``.

    Each position is a neuron with a mean of its own, for a border is driven otherwise than the middle. A
    weight is averaged over the pairs that it connects, as in Appendix D.2: fewer where it meets a padding.
    """
    weight, layer = seen.weight, seen.weight.layer
    assert isinstance(layer, _ConvNd)
    if x.dim() == len(layer.kernel_size) + 1:
        x, z = x[None], z[None]
    x, y, z = (_about_mean(signal, weight) for signal in (x, seen.activation(z), z))
    num_samples, freedom, num_inputs, input_power = len(x), len(x) - 1.0, x[0].numel(), x.square().sum()
    x, geometry = _walk(layer, x, z)
    shape = weight.weight.shape
    ones = x.new_ones(1, 1, *x.shape[2:]), x.new_ones(1, 1, *z.shape[2:])
    pairs = conv_products(geometry._replace(groups=1), x.new_empty(1, 1, *shape[2:]), *ones)
    return _Moments(
        conv_products(geometry, x.new_empty(shape), x, y),
        pairs * freedom,
        *_drive_sums(z, y),
        input_power,
        x.new_tensor(freedom * num_inputs),
        _field_products(x, geometry, shape[2:]) if seen.with_inputs else x.new_empty(0),
        x.new_tensor(float(num_samples * z[0, 0].numel())),
    )


def _about_mean(signal: Tensor, weight: UntiedWeight) -> Tensor:
    """Take the mean over the minibatch off each neuron's signal."""
    if len(signal) < 2:
        raise RuleError(f"mirror_from_input: {weight.name!r} saw one sample; run the model on a minibatch")
    return signal - signal.mean(0)


def _drive_sums(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of z y and of z^2 by channel, dimension 1."""
    z, y = (signal.transpose(0, 1).flatten(1) for signal in (z, y))
    return torch.linalg.vecdot(z, y), torch.linalg.vecdot(z, z)


def _walk(layer: _ConvNd, x: Tensor, z: Tensor) -> tuple[Tensor, ConvGeometry]:
    """Return a convolution's input, padded as far as the layer does that itself, and its geometry."""
    if not layer.transposed:
        x, padding = fields.pad_as_layer(layer, x)
        nothing = (0,) * len(padding)
        return x, ConvGeometry(layer.stride, padding, layer.dilation, False, nothing, layer.groups)
    sizes = zip(x.shape[2:], z.shape[2:], layer.kernel_size, layer.stride, layer.padding, layer.dilation,
                strict=True)  # fmt: skip
    extra = tuple(
        out - ((size - 1) * stride - 2 * int(padding) + dilation * (kernel - 1) + 1)
        for size, out, kernel, stride, padding, dilation in sizes
    )
    paddings = tuple(int(padding) for padding in layer.padding)
    return x, ConvGeometry(layer.stride, paddings, layer.dilation, True, extra, layer.groups)


def _field_products(x: Tensor, geometry: ConvGeometry, kernel: Sequence[int]) -> Tensor:
    """Sum x x^T over all receptive fields: ``[groups, n, n]``, n = C_in / groups times the kernel's size."""
    dims = len(kernel)
    x = F.pad(x, [side for padding in reversed(geometry.padding) for side in (padding, padding)])
    for dim, (size, stride, dilation) in enumerate(
        zip(kernel, geometry.stride, geometry.dilation, strict=True), start=2
    ):
        x = x.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
    x = x.reshape(len(x), geometry.groups, -1, *x.shape[2:])  # [N, groups, C, positions..., kernel...]
    x = x.movedim(1, 0).movedim(2, 2 + dims)  # [groups, N, positions..., C, kernel...]
    num_inputs = x.shape[2 + dims] * math.prod(kernel)
    total = x.new_zeros(geometry.groups, num_inputs, num_inputs)
    at_once = max(1, UNFOLDED_VALUES * x.shape[1] // x.numel())
    for part in torch.split(x, at_once, 1):
        laid_out = part.reshape(geometry.groups, -1, num_inputs)
        total += laid_out.mT @ laid_out
    return total


def _regress(moments: _Moments) -> Tensor:
    """Return cov (C + ridge v I)^-1, laid out as the products."""
    products, covariance = moments.products, moments.fields
    variance = covariance.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    damped = covariance + RIDGE * variance * torch.eye(covariance.shape[1]).to(covariance)
    by_group = products.reshape(len(covariance), -1, covariance.shape[1])
    solved: Tensor = torch.linalg.solve(damped, by_group.mT)
    return solved.mT.reshape(products.shape)


def _spread_over_fields(pairs: Tensor, covariance: Tensor) -> Tensor:
    """Spread the number of pairs of each place of a kernel over the inputs of a receptive field."""
    return pairs.clamp_min(1.0).flatten().repeat(covariance.shape[-1] // pairs.numel())


@contextmanager
def _signals_tapped(seen: Sequence[Seen]) -> Iterator[None]:
    """Let layers show their signals while a model runs."""
    by_place = {(id(one.weight.layer), one.weight.weight_name): one for one in seen}

    def tap(weight: UntiedWeight, x: Tensor, output: Tensor, rows: slice) -> None:
        if (id(weight.layer), weight.weight_name) in by_place:
            by_place[id(weight.layer), weight.weight_name].add(x, output, rows)

    with tapped([one.weight.layer for one in seen], tap):
        yield


@contextmanager
def _norms_in_training(model: nn.Module) -> Iterator[None]:
    """Let BatchNorm use the statistics of the noise, as in training; those of data would not fit it."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and not m.training]
    try:
        for norm in norms:
            norm.train()
        yield
    finally:
        for norm in norms:
            norm.eval()


def _refuse_what_cannot_be_decorrelated(weights: Sequence[UntiedWeight]) -> None:
    refused = [repr(weight.name) for weight in weights if weight.transposed]
    if refused:
        raise RuleError(
            f"mirror_from_input: the inputs of transposed convolutions ({', '.join(refused)}) cannot be "
            "decorrelated; give these layers another rule, or leave decorrelate out"
        )
