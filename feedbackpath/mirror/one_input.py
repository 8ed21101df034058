"""Mirror mode driven by one noisy input: every B learns at once, from the signals that its own layer sees.

Akrout et al. 2019, Appendix C.4, suggest it for networks with BatchNorm and leave it untested. The model runs
forward as it is; each layer takes its own input x, drive z and answer y = phi(z), about their means::

    cov   = mean of y x^T                   E[cov] = S W C    with C the covariance of x (Gaussian drives)
    s     = mean y z / mean z^2             each neuron's own slope, the diagonal of S
    B     = S^-1 cov / v     -> W C / v     with v the mean variance of x: W itself only where C = v I
    B     = S^-1 cov C^-1    -> W           decorrelated, a regression: needs the inverse of C
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from feedbackpath.core.layers import UntiedWeight
from feedbackpath.core.modules import tapped
from feedbackpath.core.pytorch import seed_devices
from feedbackpath.errors import RuleError
from feedbackpath.mirror import fields
from feedbackpath.mirror.activations import Activation
from feedbackpath.mirror.context import MirrorContext
from feedbackpath.mirror.covariance import Estimate
from feedbackpath.mirror.moments import Moments, measure
from feedbackpath.mirror.passage import forward_passage
from feedbackpath.mirror.readings import learn
from feedbackpath.mirror.settings import Mirror, refuse_no_count


def mirror_from_input(
    context: MirrorContext,
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
        context: What mirror mode knows of the path.
        weights: The weights whose B learns; a weight in several layers is mirrored in the one named here.
        run: Runs the model forward on a minibatch of noise.
        settings: What B makes of it: reading, forgetting, rate and decay; the rest is not used.
        steps: Forward passes.
        decorrelate: Whether the covariance is multiplied by the inverse of the inputs' covariance.

    Raises:
        RuleError: Some layers were not reached, saw one sample, or cannot be decorrelated.
    """
    settings = dataclasses.replace(settings, noise="gaussian", block_bias=False)  # biases stay as they are
    refuse_no_count("mirror_from_input: steps", steps)
    if decorrelate:
        _refuse_what_cannot_be_decorrelated(weights)
    seen = look(context, weights, run, steps=steps, with_inputs=decorrelate)
    with torch.no_grad():
        for found in [one.regress() if decorrelate else one.correlate() for one in seen]:
            learn(context, found, settings)


def look(
    context: MirrorContext,
    weights: Sequence[UntiedWeight],
    run: Callable[[], object],
    *,
    steps: int,
    with_inputs: bool,
) -> list["Seen"]:
    """Run the model on noise and return what the layer of each weight has seen; no B learns.

    Args:
        context: What mirror mode knows of the path.
        weights: The weights whose layers are looked at.
        run: Runs the model forward on a minibatch of noise.
        steps: Forward passes.
        with_inputs: Whether to take the covariance of each layer's inputs as well.
    """
    context.find_activations(weights)
    seen = [Seen(weight, context.activations[weight.name], with_inputs) for weight in weights]
    key = f"{context.path.seed}/{context.passes.get(weights[0].name, 0)}/one input"
    seed_devices(zlib.crc32(key.encode()), {weight.weight.device for weight in weights})
    with (
        context.path.measuring(),
        _norms_in_training(context.path.model),
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
        self.moments: dict[int, Moments] = {}  # by the first of the rows of W that they belong to

    @torch.no_grad()
    def add(self, x: Tensor, z: Tensor, rows: slice) -> None:
        """Add what one use of the weight shows: its input and its drive."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        x, z = x.detach().to(dtype), z.detach().to(dtype)
        found = measure(self.weight, self.activation, x, z, self.with_inputs)
        first = rows.start or 0
        self.moments[first] = self.moments[first].add(found) if first in self.moments else found

    def correlate(self) -> Estimate:
        """Return the covariance of answers and inputs, which tells of ``W C``; 0 where only padding came."""
        variances = [part.input_power / part.inputs for part in self._parts()]
        return self._estimate([part.correlate() for part in self._parts()], variances)

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
        return self._estimate([part.regress() for part in self._parts()], ones)

    def input_covariances(self) -> list[Tensor]:
        """Return C ``[groups, n, n]`` of each part of the weight that has inputs of its own.

        Each column is averaged over the pairs that ``correlate`` averages its input's weight over.
        """
        return [part.input_covariance() for part in self._parts()]

    def _parts(self) -> list[Moments]:
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
