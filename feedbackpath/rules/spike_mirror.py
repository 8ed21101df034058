"""What rules share that learn B from spikes: after each update of W, cells fire, and B learns from it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from feedbackpath.core.context import RuleContext
from feedbackpath.core.layers import Recurrent, UntiedWeight
from feedbackpath.errors import RuleError
from feedbackpath.mirror.estimate import Estimate
from feedbackpath.mirror.fields import Field, make_field, per_neuron
from feedbackpath.mirror.passage import forward_passage
from feedbackpath.mirror.spikes import Cells
from feedbackpath.rules.base import Rule, Weights
from feedbackpath.rules.weight_mirror import can_mirror


@dataclass(frozen=True)
class SpikeMirror(Rule):
    """Let the inputs of each layer spike after each update of W, and B learn from what arrives.

    With e what the spikes of a step tell of W, ``B <- (1 - d) B + d e``. d is 1 / k in step k until that
    falls to ``rate``: a plain average at first. A convolution's cells make the smallest map that holds a
    receptive field. On several devices all fire the same spikes, and nothing is sent.

    Args:
        rate: The share of B that a step replaces, above 0 and at most 1.
        cells: The cells, and how long they are run.
    """

    group: ClassVar[str] = "mirrors"
    is_mirrorable: ClassVar[bool] = False
    rate: float = 0.02
    cells: Cells = Cells(runs=512, steps=10)

    def __post_init__(self) -> None:
        """Refuse a rate that is none."""
        if not 0.0 < self.rate <= 1.0:
            raise RuleError(f"{self.name}: rate must lie above 0 and be at most 1, not {self.rate}")

    def serves(self, weights: Weights) -> bool:
        """Layers that a mirror can run: recurrent layers and unknown ones are left to backprop."""
        return can_mirror(weights) and not isinstance(weights[0].layer, Recurrent)

    def estimate(self, field: Field, spikes: Tensor, peak: Tensor) -> Estimate:
        """Return what the spikes ``[steps, runs, *shape]`` of cells with peaks of u tell of W."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, weights: Weights, context: RuleContext) -> None:
        """Let cells fire at every layer; neurons that do not answer keep their B."""
        for weight in weights:
            found = self.look(weight, context)
            answers = per_neuron(~found.is_silent, weight)
            told = found.at_gain_one().to(weight.feedback.dtype)
            share = max(self.rate, 1.0 / context.steps)
            weight.feedback.lerp_(torch.where(answers, told, weight.feedback), share)

    @torch.no_grad()
    def look(self, weight: UntiedWeight, context: RuleContext) -> Estimate:
        """Let the cells of one layer fire; return what they tell."""
        field, generator = make_field(weight, None), context.generator(weight, self.name)
        like = weight.weight.detach()
        spikes, peak = self.cells.fire(field.shape, like, generator)
        with forward_passage(weight.weight):
            return self.estimate(field, spikes, peak)


def masked(field: Field, answers: Tensor) -> Tensor:
    """Return answers with 0 for those that padding by other values than zeros spoils."""
    return answers if field.mask is None else answers * field.mask
