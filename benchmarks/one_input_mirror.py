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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from one_input_moments import Moments, measure
from torch import Tensor, nn

from feedbackpath.core.context import RuleContext
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.core.modules import tapped
from feedbackpath.errors import RuleError
from feedbackpath.measure.deltas import left_as_it_was
from feedbackpath.mirror import Mirror, MirrorMode
from feedbackpath.mirror.activations import Activation
from feedbackpath.mirror.estimate import Estimate
from feedbackpath.mirror.passage import forward_passage
from feedbackpath.mirror.readings import learn


def mirror_from_input(
    context: RuleContext,
    weights: Sequence[UntiedWeight],
    run: Callable[[], object],
    settings: Mirror,
    *,
    steps: int = 1,
    decorrelate: bool = False,
) -> None:
    """Run the model on noise and let every B learn from it, once, from all ``steps`` forward passes together.

    BatchNorm uses the statistics of the noise. All but B is left as it was. What ``run`` draws from the
    global random numbers depends on the path's seed, and on how often it has mirrored, alone.

    Args:
        context: What a rule may know of the path.
        weights: The weights whose B learns; a weight in several layers is mirrored in the one named here.
        run: Runs the model forward on a minibatch of noise.
        settings: What B makes of it: reading, forgetting, rate and decay; the rest is not used.
        steps: Forward passes.
        decorrelate: Whether the covariance is multiplied by the inverse of the inputs' covariance, so that B
            goes to W where drives are Gaussian. No synapse can do that by itself: it takes all inputs of a
            neuron together.

    Raises:
        RuleError: Some layers were not reached, saw one sample, or cannot be decorrelated.

    Example:
        >>> import feedbackpath as fp
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.BatchNorm1d(20), nn.Linear(20, 10))
        >>> path = fp.untie(model, "fa")
        >>> for decorrelate in (False, True):
        ...     run = lambda: model(torch.randn(20_000, 30))
        ...     mirror_from_input(
        ...         path.context, path.weights, run, Mirror(forgetting=1), decorrelate=decorrelate
        ...     )
        ...     {name: angle < 10 for name, angle in path.matrix_angles().items()}
        {'0': True, '3': False}
        {'0': True, '3': True}
    """
    settings = dataclasses.replace(settings, noise="gaussian", block_bias=False)  # biases stay as they are
    if decorrelate:
        _refuse_what_cannot_be_decorrelated(weights)
    mode = context.part(MirrorMode)
    with left_as_it_was(weights, context.model), torch.no_grad():
        seen = look(mode, weights, run, steps=steps, with_inputs=decorrelate)
        for found in [one.regress() if decorrelate else one.correlate() for one in seen]:
            learn(mode, found, settings)


def look(
    mode: MirrorMode,
    weights: Sequence[UntiedWeight],
    run: Callable[[], object],
    *,
    steps: int,
    with_inputs: bool,
) -> list["Seen"]:
    """Run the model on noise and return what the layer of each weight has seen; no B learns.

    Buffers and random numbers change as in any forward pass.

    Args:
        mode: Mirror mode of the path.
        weights: The weights whose layers are looked at.
        run: Runs the model forward on a minibatch of noise.
        steps: Forward passes.
        with_inputs: Whether to take the covariance of each layer's inputs as well.
    """
    mode.find_activations(weights)
    seen = [Seen(weight, mode.activations[weight.name], with_inputs) for weight in weights]
    key = f"{mode.path.seed}/{mode.passes.get(weights[0].name, 0)}/one input"
    seed_devices(zlib.crc32(key.encode()), {weight.weight.device for weight in weights})
    with (
        mode.path.measuring(),
        _norms_in_training(mode.path.model),
        _signals_tapped(seen),
        forward_passage(*(weight.weight for weight in weights)),
        torch.enable_grad(),  # attention shows its projections only where a backward pass can come
    ):
        for _ in range(steps):
            run()
    missing = [repr(one.weight.name) for one in seen if not one.moments]
    if missing:
        raise RuleError(
            f"one input: run did not reach {', '.join(missing)}; it has to run the path's own model, whole, "
            "and not under torch.no_grad or torch.inference_mode"
        )
    return seen


def seed_devices(seed: int, devices: Iterable[torch.device]) -> None:
    """Seed the global random numbers of the CPU and of some devices, and of no other."""
    torch.default_generator.manual_seed(seed)
    for device in devices:
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)


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
                    f"one input: {self.weight.name!r} saw {int(part.samples)} samples of "
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
        return Estimate(
            self.weight,
            torch.cat(list(covariances)),
            1.0,
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
            f"one input: the inputs of transposed convolutions ({', '.join(refused)}) cannot be "
            "decorrelated; give these layers another rule, or leave decorrelate out"
        )
