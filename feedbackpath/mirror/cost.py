"""What mirroring costs beside a training step.

``flops`` are counted as in Appendix B of Akrout et al. 2019: two for each product of a weight and a signal
that is added up. A schedule needs more than that: a small layer's time goes into calls, and a
mirror's into reading and writing W and not into products. ``work`` adds both, in FLOPs of the same duration.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from feedbackpath.core.layers import UntiedWeight
from feedbackpath.core.pytorch import has_processes
from feedbackpath.mirror.designs import CODE_LENGTH, OrthogonalCodes
from feedbackpath.mirror.devices import count_devices
from feedbackpath.mirror.fields import inputs_in_mirror_mode
from feedbackpath.mirror.pairs import PAIR, can_pair
from feedbackpath.mirror.settings import Mirror

PRODUCTS_STEP = 3  # of a training step: forward, to the inputs, to the weights


@dataclass(frozen=True)
class Machine:
    """How a kind of device spends its time, in FLOPs of a training step.

    Attributes:
        per_value: For a value of W that is mirrored by pairs: reading, writing and two products.
        per_layer: For the calls of mirroring a layer.
        per_answer: Beyond that, for a value where answers to codes have to be worked out.
        per_layer_answering: Beyond that, for the calls of such a layer.
        per_value_step: For a value of W that an optimizer updates, in a training step.
        per_layer_step: For the calls of training a layer.
        per_step: For finding out, once a step, whose turn it is.
    """

    per_value: float
    per_layer: float
    per_answer: float
    per_layer_answering: float
    per_value_step: float
    per_layer_step: float
    per_step: float

    def work_of_pairs(self, values: int) -> float:
        """Return what it takes to mirror a layer of so many values by pairs."""
        return self.per_value * values + self.per_layer

    def work_of_codes(self, values: int) -> float:
        """Return what it takes where answers have to be worked out."""
        return self.work_of_pairs(values) + self.per_answer * values + self.per_layer_answering

    def work_of_noise(self, flops: float) -> float:
        """Return what it takes to fire independent noise, whose products are so many FLOPs."""
        return flops + self.per_layer + self.per_layer_answering

    def work_of_step(self, values: int, uses: float) -> float:
        """Return what it takes to train a layer, each of whose values is used so often."""
        return (PRODUCTS_STEP * 2.0 * uses + self.per_value_step) * values + self.per_layer_step

    def budget(self, share: float, step: float) -> float:
        """Return what a share of a step's work leaves for mirrors: at least half of it, in the smallest."""
        return max(share * step - self.per_step, share * step / 2.0)


# CPU: measured on a core that trains at 90 GFLOP/s, where mirroring between two steps takes 0.6 ns a value
# and 20 us a layer; 6 ns and 200 us where answers are worked out; and 110 us go into finding out what
# to mirror. CUDA: not measured, an estimate.
MACHINES = {
    "cpu": Machine(
        per_value=54.0, per_layer=1.8e6, per_answer=490.0, per_layer_answering=1.6e7,
        per_value_step=120.0, per_layer_step=2.5e7, per_step=1e7,
    ),
    "cuda": Machine(
        per_value=400.0, per_layer=3e9, per_answer=600.0, per_layer_answering=3e9,
        per_value_step=1200.0, per_layer_step=9e9, per_step=3e9,
    ),
}  # fmt: skip


def forward_flops(weight: UntiedWeight, uses: float) -> float:
    """Return the FLOPs of a forward pass in which each value of W is used so often."""
    return 2.0 * weight.weight.numel() * uses


def step_flops(weight: UntiedWeight, uses: float) -> float:
    """Return the FLOPs of a training step: forward, and backward to inputs and weights."""
    return PRODUCTS_STEP * forward_flops(weight, uses)


def code_length(weight: UntiedWeight, settings: Mirror, slope: float | None) -> int:
    """Return how many inputs fire codes together."""
    return PAIR if can_pair(weight, settings, slope) else CODE_LENGTH


def mirror_flops(weight: UntiedWeight, settings: Mirror, slope: float | None) -> float:
    """Return the FLOPs of one mirroring: noise forward through W, and its covariance with the answer.

    Codes of a pair or group of inputs meet those inputs' weights alone; the others are silent. Noise that
    devices fire each for itself counts on all of them, as a training step does; noise that is the same on
    all, once.

    Args:
        weight: The weight to mirror.
        settings: How.
        slope: The ``odd_slope`` of the activation that follows.
    """
    if isinstance(settings.design, OrthogonalCodes):
        return 2.0 * forward_flops(weight, code_length(weight, settings, slope))
    inputs = inputs_in_mirror_mode(weight, settings.field)
    return 2.0 * forward_flops(weight, settings.total_samples_for(inputs, count_devices(settings)))


def mirror_work(weight: UntiedWeight, settings: Mirror, slope: float | None) -> float:
    """Return what one mirroring costs on the weight's device.

    Args:
        weight: The weight to mirror.
        settings: How.
        slope: The ``odd_slope`` of the activation that follows.
    """
    machine, values = _machine(weight), weight.weight.numel()
    if not isinstance(settings.design, OrthogonalCodes):
        return machine.work_of_noise(mirror_flops(weight, settings, slope))
    by_pairs = can_pair(weight, settings, slope)
    return machine.work_of_pairs(values) if by_pairs else machine.work_of_codes(values)


def step_work(weight: UntiedWeight, uses: float) -> float:
    """Return what a training step costs on the weight's device."""
    return _machine(weight).work_of_step(weight.weight.numel(), uses)


def mirror_budget(weights: Sequence[UntiedWeight], uses: Mapping[str, float], share: float) -> float:
    """Return what mirrors may take of a training step, on average.

    Args:
        weights: All that one rule governs.
        uses: How often a training step uses each value of a weight, by name.
        share: Of a step's work.
    """
    step = sum(step_work(weight, uses.get(weight.name, 0.0)) for weight in weights)
    return _machine(weights[0]).budget(share, step)


def _machine(weight: UntiedWeight) -> Machine:
    return MACHINES.get(weight.weight.device.type, MACHINES["cuda"])


_is_measuring = False


@contextmanager
def measuring() -> Iterator[None]:
    """Say that the model runs to be measured, and not to be trained, for a while."""
    global _is_measuring
    before, _is_measuring = _is_measuring, True
    try:
        yield
    finally:
        _is_measuring = before


class UseCounter:
    """Counts how often each weight's values are used in a training step, by watching one.

    Args:
        weights: The weights to count.
        in_training: Count where the model trains; else where it runs to be measured.
    """

    def __init__(self, weights: Sequence[UntiedWeight], *, in_training: bool = True) -> None:
        self.uses: dict[str, float] = {}
        self._in_training = in_training
        self._hooks: list[RemovableHandle] = []
        for weight in weights:
            count = partial(self._count, weight.name, weight.transposed)
            self._hooks.append(weight.layer.register_forward_hook(count))

    def stop(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def share(self) -> dict[str, float]:
        """Return the counts, added up over the processes of a job: all then have the same.

        So the layers whose turn it is, and with them the course of training, do not depend on how many
        devices share a minibatch.
        """
        if not has_processes():
            return dict(self.uses)
        counts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(counts, self.uses)
        names = {name: None for count in counts for name in count}
        return {name: sum(count.get(name, 0.0) for count in counts) for name in names}

    def _count(
        self, name: str, is_transposed: bool, layer: nn.Module, inputs: tuple[Tensor, ...], output: Any
    ) -> None:
        """Note the positions at which a layer was used: of the output, or, transposed, of the input."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if _is_measuring == self._in_training:
            return
        signal = inputs[0] if is_transposed else output[0] if isinstance(output, tuple) else output
        kernel_dims = len(layer.kernel_size) if isinstance(layer, nn.modules.conv._ConvNd) else 0
        channels = signal.shape[-1 - kernel_dims]
        self.uses[name] = self.uses.get(name, 0.0) + signal.numel() / channels
