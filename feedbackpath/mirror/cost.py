"""What mirroring costs: what the simulation computes, and what a brain or a chip would pay.

The simulation's work is counted in FLOPs as in Appendix B of Akrout et al. 2019: two for each product of a
weight and a signal that is added up. Both follow from layers' sizes and uses alone, on every machine.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from feedbackpath.core.context import RuleContext
from feedbackpath.core.layers import Recurrent, UntiedWeight
from feedbackpath.core.pytorch import has_processes
from feedbackpath.mirror.fields import Field, is_local

PRODUCTS_STEP = 3  # of a training step: forward, to the inputs, to the weights


def forward_flops(weight: UntiedWeight, uses: float) -> float:
    """Return ``2 V u``: the FLOPs of a forward pass in which each of W's V values is used u times."""
    return 2.0 * weight.weight.numel() * uses


def step_flops(weight: UntiedWeight, uses: float) -> float:
    """Return ``6 V u``: the FLOPs of a training step, forward and backward to inputs and weights."""
    return PRODUCTS_STEP * forward_flops(weight, uses)


def mirror_flops(weight: UntiedWeight, samples: float) -> float:
    """Return ``4 V N``: the FLOPs of a pass, noise forward through W and its covariance with the answer.

    Args:
        weight: The weight to mirror.
        samples: N, noise that meets each value of W: examples times positions; 1 by the exact read-out's
            shortcut, twice the inputs where pairs are drawn as a whole. Of all devices whose noise is
            averaged; noise that is the same on all counts once.
    """
    return 2.0 * forward_flops(weight, samples)


@dataclass(frozen=True)
class Dues:
    """What one pass through one layer costs a network of real neurons and synapses.

    Attributes:
        samples: Patterns of noise that the layer's neurons fire.
        reads: Products of such a pattern, or its part in one receptive field, with W: uses of W's array.
        writes: Changes of each synapse of B, if it learns from each read as equation 7 has it.
        spikes: Signals that neurons send: noise, and the answers to it.
    """

    samples: int = 0
    reads: int = 0
    writes: int = 0
    spikes: int = 0

    def __add__(self, other: "Dues") -> "Dues":
        """Return the dues of both."""
        return Dues(
            self.samples + other.samples,
            self.reads + other.reads,
            self.writes + other.writes,
            self.spikes + other.spikes,
        )


def dues_of(field: Field, examples: int) -> Dues:
    """Return what a network pays for a pass of so many examples."""
    reads, fired = examples * field.answers, examples * torch.Size(field.shape).numel()
    return Dues(examples, reads, reads, fired + reads * channels_of(field.weight))


def channels_of(weight: UntiedWeight) -> int:
    """Return how many neurons answer at one position of a layer's map."""
    if is_local(weight):
        return weight.weight.shape[:3].numel()
    if weight.transposed:
        return int(weight.weight.shape[1] * weight.layer.groups)
    return len(weight.weight)


class UseCounter:
    """Counts how often each weight's values are used while a model runs, and notes the inputs' shapes.

    Use it as a context manager, or call ``stop``: it listens to the layers until then.

    Args:
        weights: The weights to count.
        path: Leaves out what runs while this path is being measured; None: all that runs is counted.

    Attributes:
        uses: The counts, by the weight's name.
        sent: Those of them whose error goes back through the weight's place to an earlier layer.
        inputs: How many values the weight met.
        shapes: Of the input that the weight met last.
    """

    def __init__(self, weights: Sequence[UntiedWeight], path: RuleContext | None = None) -> None:
        self.uses: dict[str, float] = {}
        self.sent: dict[str, float] = {}
        self.inputs: dict[str, float] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._path = path
        self._names = {(id(weight.layer), weight.weight_name): weight.name for weight in weights}
        self._layers: list[Any] = list({id(weight.layer): weight.layer for weight in weights}.values())
        for layer in self._layers:
            layer.untied.taps = (*layer.untied.taps, self._count)

    def __enter__(self) -> Self:
        """Count on."""
        return self

    def __exit__(self, *_: object) -> None:
        """Listen no longer, whatever happened."""
        self.stop()

    def stop(self) -> None:
        """Listen no longer."""
        for layer in self._layers:
            layer.untied.taps = tuple(tap for tap in layer.untied.taps if tap != self._count)
        self._layers.clear()

    def share(self) -> None:
        """Add up over the processes of a job: all then have the same counts, and minibatches as large.

        So the noise that is fired, and with it the course of training, does not depend on how many devices
        share a minibatch.
        """
        if not has_processes():
            return
        told: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(told, (self.uses, self.shapes))
        counts, shapes = [uses for uses, _ in told], [seen for _, seen in told]
        self.uses = {n: sum(count.get(n, 0.0) for count in counts) for count in counts for n in count}
        for name in dict.fromkeys(name for seen in shapes for name in seen):
            all_seen = [seen[name] for seen in shapes if name in seen]
            self.shapes[name] = (sum(shape[0] for shape in all_seen), *all_seen[0][1:])

    def __getstate__(self) -> dict[str, Any]:
        """Let a copy, which comes along with a copy of the layers, count nothing."""
        return {**self.__dict__, "_layers": [], "_path": None}

    def _count(self, weight: UntiedWeight, x: Tensor, output: Tensor, rows: slice) -> None:
        """Note the positions at which a weight was used: of the output, or, transposed, of the input.

        Where a part of a packed weight is used, its values are that part of all.
        """
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not self._layers:
            return
        if self._path is not None and self._path.is_measuring:
            return
        signal = x if weight.transposed else output
        kernel_dims = len(weight.layer.kernel_size) if hasattr(weight.layer, "kernel_size") else 0
        positions, seen = signal.numel() / signal.shape[-1 - kernel_dims], tuple(x.shape)
        if is_local(weight):  # what it sees are patches of a map [..., N], each value of W once
            positions, seen = x.shape[-1], (x.shape[-1], weight.layer.in_channels, *weight.layer.input_size)
        size = len(weight.weight)
        share = len(range(*rows.indices(size))) / size
        name = self._names[id(weight.layer), weight.weight_name]
        values = math.prod(seen) * share
        for known, count in ((self.uses, positions * share), (self.inputs, values)):
            known[name] = known.get(name, 0.0) + count
        if x.requires_grad:
            self.sent[name] = self.sent.get(name, 0.0) + positions * share
        is_recurrent = isinstance(weight.layer, Recurrent)  # its state, or its layers', has another size
        self.shapes[name] = (*seen[:-1], weight.weight.shape[1]) if is_recurrent else seen
