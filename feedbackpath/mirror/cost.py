"""What mirroring costs beside a training step, in FLOPs.

They are counted as in Appendix B of Akrout et al. 2019: two for each product of a weight and a signal that is
added up. Nothing else counts, so they are functions of layers' sizes and uses, the same on every machine.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from feedbackpath.core.context import RuleContext
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.core.pytorch import has_processes
from feedbackpath.mirror.designs import CODE_LENGTH, OrthogonalCodes
from feedbackpath.mirror.devices import count_devices
from feedbackpath.mirror.fields import inputs_in_mirror_mode
from feedbackpath.mirror.pairs import PAIR, can_pair
from feedbackpath.mirror.settings import Mirror

PRODUCTS_STEP = 3  # of a training step: forward, to the inputs, to the weights


def forward_flops(weight: UntiedWeight, uses: float) -> float:
    """Return ``2 V u``: the FLOPs of a forward pass in which each of W's V values is used u times."""
    return 2.0 * weight.weight.numel() * uses


def step_flops(weight: UntiedWeight, uses: float) -> float:
    """Return ``6 V u``: the FLOPs of a training step, forward and backward to inputs and weights."""
    return PRODUCTS_STEP * forward_flops(weight, uses)


def code_length(weight: UntiedWeight, settings: Mirror, slope: float | None) -> int:
    """Return how many inputs fire codes together."""
    return PAIR if can_pair(weight, settings, slope) else CODE_LENGTH


def mirror_flops(weight: UntiedWeight, settings: Mirror, slope: float | None) -> float:
    """Return ``4 V N``: the FLOPs of a pass, noise forward through W and its covariance with the answer.

    N is the samples of noise that meet each value of W. Codes of a pair or group of inputs meet those inputs'
    weights alone, for the others are silent: N is the length of the codes. Noise that devices fire each for
    itself counts on all of them, as a training step does; noise that is the same on all, once.

    Args:
        weight: The weight to mirror.
        settings: How.
        slope: The ``odd_slope`` of the activation that follows.
    """
    if isinstance(settings.design, OrthogonalCodes):
        return 2.0 * forward_flops(weight, code_length(weight, settings, slope))
    inputs = inputs_in_mirror_mode(weight, settings.field)
    return 2.0 * forward_flops(weight, settings.total_samples_for(inputs, count_devices(settings)))


class UseCounter:
    """Counts how often each weight's values are used while a model runs.

    Use it as a context manager, or call ``stop``: it listens to the layers until then.

    Args:
        weights: The weights to count.
        path: Leaves out what runs while this path is being measured; None: all that runs is counted.

    Attributes:
        uses: The counts, by the weight's name.
    """

    def __init__(self, weights: Sequence[UntiedWeight], path: RuleContext | None = None) -> None:
        self.uses: dict[str, float] = {}
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
        positions = signal.numel() / signal.shape[-1 - kernel_dims]
        size = len(weight.weight)
        share = len(range(*rows.indices(size))) / size
        name = self._names[id(weight.layer), weight.weight_name]
        self.uses[name] = self.uses.get(name, 0.0) + positions * share
