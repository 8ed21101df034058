"""Replay: a step is done again with other forward weights in all that follows the forward pass.

Activities are those of the first time, for W is itself while signals go forward, a mirror's noise among
them; and every delta that arrives at a layer is set to what it was then. So each layer is judged by itself:
what it sends back, and the B that it ends with, must be the same to the last bit.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from feedbackpath.auditing.subject import (
    Subject,
    deltas_seen,
    differing,
    forward_passes_seen,
    preserve_version,
)
from feedbackpath.mirror.passage import LISTENERS

Corruption = Literal["none", "noise", "nan"]
CORRUPTIONS: tuple[Corruption, ...] = ("noise", "nan")


@dataclass
class Record:
    """What one run of a step left.

    Attributes:
        deltas: Layer and delta, in the order in which they arrived.
        feedback: Each B at the end, by layer.
        passing: Forward weights as they were when signals passed through them after the first delta.
        changed: Layers whose arriving delta was not that of the record it was compared with.
    """

    deltas: list[tuple[str, Tensor]] = field(default_factory=list)
    feedback: dict[str, Tensor] = field(default_factory=dict)
    passing: list[list[Tensor]] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)


class Replay:
    """One run of a step, first time or again.

    Args:
        subject: Whose step it is.
        reference: What the first run left; None: this is the first.
        corruption: What W is replaced by from the first delta on, while no signal goes forward.
    """

    def __init__(self, subject: Subject, reference: Record | None, corruption: Corruption) -> None:
        self.subject, self.reference, self.corruption = subject, reference, corruption
        self.record = Record()
        self._weights = list(subject.forward_weights.values())
        self._position = {id(weight): index for index, weight in enumerate(self._weights)}
        self._passing: list[int] = []
        self._has_begun = False
        self._set_aside: list[Tensor] = []
        self._num_passes = self._depth = 0

    def run(self, step: Callable[[], object]) -> Record:
        """Do the step."""
        LISTENERS.append(self)
        try:
            with (
                deltas_seen(self.subject.path, self._see_output),
                forward_passes_seen(
                    self.subject.model,
                    lambda module: self._enter(module.parameters()),
                    lambda _: self._leave(),
                ),
            ):
                step()
        finally:
            LISTENERS.remove(self)
        self.record.feedback = {name: b.detach().clone() for name, b in self.subject.feedback_weights.items()}
        return self.record

    def enter_passage(self, weights: tuple[Tensor, ...]) -> None:
        """Let W be itself: signals go forward."""
        self._enter(weights)

    def leave_passage(self, weights: tuple[Tensor, ...]) -> None:
        """They have passed."""
        self._leave()

    def _see_output(self, layer: str, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda delta: self._see_delta(layer, delta))  # type: ignore[no-untyped-call]

    def _see_delta(self, layer: str, delta: Tensor) -> Tensor | None:
        if not self._has_begun:
            self._has_begun = True
            self._corrupt()
        index = len(self.record.deltas)
        self.record.deltas.append((layer, delta.detach().clone()))
        if self.reference is None or index >= len(self.reference.deltas):
            return None
        name, expected = self.reference.deltas[index]
        if name != layer or any(differing([delta], [expected])):
            self.record.changed.append(layer)
        return expected.clone() if name == layer else None

    def _enter(self, weights: Iterable[Tensor]) -> None:
        self._depth += 1
        if self._depth > 1 or not self._has_begun:
            return
        self._passing = [self._position[id(w)] for w in weights if id(w) in self._position]
        if self.reference is None:
            self.record.passing.append([self._weights[i].detach().clone() for i in self._passing])
        elif self.corruption != "none" and self._num_passes < len(self.reference.passing):
            self._set_aside = self._put(self._passing, self.reference.passing[self._num_passes])
        self._num_passes += 1

    def _leave(self) -> None:
        self._depth -= 1
        if self._depth == 0 and self._set_aside:
            self._put(self._passing, self._set_aside)
            self._set_aside = []

    def _corrupt(self) -> None:
        """Replace W."""
        if self.corruption != "none":
            generator = torch.Generator().manual_seed(1)
            values = [_corrupted(weight, self.corruption, generator) for weight in self._weights]
            self._put(range(len(values)), values)

    @torch.no_grad()
    def _put(self, positions: Sequence[int], values: Sequence[Tensor]) -> list[Tensor]:
        """Give some of W other values, unseen by autograd; return those that they had."""
        chosen = [self._weights[position] for position in positions]
        before = [weight.detach().clone() for weight in chosen]
        for weight, value in zip(chosen, values, strict=True):
            with preserve_version(weight):
                weight.copy_(value)
        return before


def _corrupted(weight: Tensor, corruption: Corruption, generator: torch.Generator) -> Tensor:
    if corruption == "nan":
        return torch.full_like(weight, float("nan"))
    noise = torch.randn(weight.shape, generator=generator).to(weight)
    return noise * weight.detach().std(correction=0).clamp_min(1e-3)
