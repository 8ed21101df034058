"""What one pass through the steps leaves, and where two passes differ."""

import hashlib
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from feedbackpath.auditing.ledger import Made
from feedbackpath.auditing.memory import below_transforms, parts_of
from feedbackpath.auditing.report import Finding

Weights = tuple[tuple[str, str], ...]
"""Names of weights, and what they were, as digests."""

UPDATE = "update"
"""What differs where a layer's own parameters are updated otherwise without the W of other layers."""

RULES = str(Path(__file__).parent.parent / "rules")

CALLS = "calls"
"""What differs where a pass takes another course: other layers are called, or other deltas arrive."""


@dataclass
class Entry:
    """One call of a layer's forward map: what went in, as digests, and what came out.

    Attributes:
        is_answer: Whether it is one for sure; else an error has to come back, as from what trains.
        first: The same call in the forward pass, where it may be one that is done again.
        weights: Of a reading by the user's own code: the weights that were read, with their digests.
        is_sure: Whether it was one for sure when it was made.
        sources: The names of the weights.
        form: How they are laid out in the product.
        where: File and line of the call.
        step: In which step it was made; 1: before the first.
    """

    operation: str
    signals: tuple[str, ...]
    outputs: list[Tensor]
    is_answer: bool = True
    first: "Entry | None" = None
    weights: Weights = ()
    is_sure: bool = True
    sources: tuple[str, ...] = ()
    form: tuple[object, ...] = ()
    where: str = ""
    step: int = 0

    def is_feint(self, others: "Sequence[Entry]") -> bool:
        """Whether it is taken for an answer though the same weights answer in another form elsewhere."""
        alike = [other for other in others if other.is_answer and other.sources == self.sources]
        forms = {other.form for other in alike if other.form} | {self.form}
        return not self.is_sure and self.is_answer and len(forms) > 1

    @property
    def holds(self) -> bool:
        """Whether its outputs are held while W is absent."""
        return self.is_answer or (self.first is not None and self.first.holds)


class Tape:
    """Answers of the first pass, by step and call: a check of W may let another pass make more calls.

    Args:
        entries: All of them, in order.
    """

    def __init__(self, entries: "Sequence[Entry]") -> None:
        self._waiting: dict[tuple[Any, ...], deque[Entry]] = {}
        for entry in entries:
            self._waiting.setdefault(self._key(entry, entry.step), deque()).append(entry)

    @staticmethod
    def _key(entry: Entry, step: int) -> tuple[Any, ...]:
        return step, entry.operation, entry.sources, entry.signals

    def find(self, entry: Entry, step: int) -> Entry:
        """Return the next of the same calls in this step, or the last; none: one that holds nothing."""
        waiting = self._waiting.get(self._key(entry, step))
        if waiting is None:
            return Entry("", (), [], is_answer=False)
        return waiting.popleft() if len(waiting) > 1 else waiting[0]


@dataclass(frozen=True)
class Sight:
    """Something made of W that was seen where it should not be: in a delta, in a B, or leaving PyTorch."""

    sink: str
    made: Made
    operation: str
    where: str
    values: int

    @property
    def is_ours(self) -> bool:
        """Whether a rule of this library has asked a number: to check it, say."""
        return self.sink == "exit" and self.where.startswith(RULES)


@dataclass
class Record:
    """What one pass left.

    Attributes:
        tape: The outputs of layers and of mirror passages, call by call.
        seen: By step, what must be the same in every pass: (kind, layer, digest), in order.
        sights: Traces of W, by layer; they explain what is found.
        uses: Parameters and buffers that multiply activities, with their sizes.
        scales: Those that do so number by number: of norms, say.
        activities: Outputs of each layer in the first step, in values.
        sizes: Values of each thing that was seen.
        answers: Answers to noise by each layer in mirror mode, in values.
        probes: Signals that were sent through each layer to read it, in the step that sent most.
        deltas: Those of the first step, in full.
        feedback: Each B before the first step, and after it.
        error: What a step raised.
        aliases: Every B that is W, or lies in its memory.
        declared: Scalars that the backward pass takes besides, by kind of layer.
        transposed: By layer, whether W counts inputs first.
        parameters: Digests of all W and of what is trained besides: before the first step, and after each.
        layers: Numbers of the layers that they belong to; None: to no layer.
        updated: Their digests after each call of an optimizer.
        weights: Names of all W.
        start: What the model was when it was untied, in the first pass with ``build``.
        numbers: The numbers by which ``Early`` knows its parameters.
        carriers: What of it was another then while W was absent.
        alike: Whether what was loaded into a W was loaded into a B as well.
        matrices: Matrices that the model holds besides its parameters and buffers, by the line where they
            multiply signals, with their shapes.
        repeats: Scales of norms that multiply signals which have been repeated, by the line.
        strays: Layers that ran in a thread where nobody watches.
    """

    tape: list[Entry] = field(default_factory=list)
    seen: list[list[tuple[str, str, str]]] = field(default_factory=list)
    sights: dict[tuple[str, ...], Sight] = field(default_factory=dict)
    uses: dict[str, int] = field(default_factory=dict)
    scales: dict[str, int] = field(default_factory=dict)
    activities: dict[str, int] = field(default_factory=dict)
    sizes: dict[tuple[str, str], int] = field(default_factory=dict)
    answers: dict[str, int] = field(default_factory=dict)
    probes: dict[str, int] = field(default_factory=dict)
    deltas: list[tuple[str, Tensor]] = field(default_factory=list)
    feedback: list[dict[str, Tensor]] = field(default_factory=list)
    error: BaseException | None = None
    aliases: list[Finding] = field(default_factory=list)
    declared: dict[str, int] = field(default_factory=dict)
    transposed: dict[str, bool] = field(default_factory=dict)
    parameters: list[dict[str, str]] = field(default_factory=list)
    layers: dict[str, int | None] = field(default_factory=dict)
    updated: list[dict[str, str]] = field(default_factory=list)
    weights: set[str] = field(default_factory=set)
    start: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    carriers: list[str] = field(default_factory=list)
    alike: bool = False
    matrices: dict[str, list[int]] = field(default_factory=dict)
    repeats: dict[str, str] = field(default_factory=dict)
    strays: list[str] = field(default_factory=list)

    def add_sight(self, sink: str, made: Made, operation: str, where: str, values: int) -> None:
        """Note a trace of W."""
        for layer in made.sources:
            sight = Sight(sink, made, operation, where, values)
            self.sights.setdefault((layer, sink, operation, where), sight)

    def doubt_readings(self) -> None:
        """Take no reading for an answer if the weight was another at the time: its transpose, say."""
        for entry in self.tape:
            for name, digest in entry.weights:
                if digest not in [digests.get(name) for digests in (*self.parameters, *self.updated)]:
                    entry.is_answer = False

    @property
    def doubt(self) -> str:
        """Why this pass leaves something open, whatever others do; empty: it does not."""
        for where, shape in self.matrices.items():
            return (
                f"a matrix of shape {shape} that is no parameter and no buffer multiplies signals of the "
                f"model at {where}, and errors come back through it: make it a buffer if it is a weight, or "
                "hand it to the model as an argument if it is data"
            )
        for where, name in self.repeats.items():
            return (
                f"signals are repeated before {name!r} scales them at {where}: a matrix acts so, too, if "
                "they are added afterwards; scale them before, or use a layer"
            )
        for entry in self.tape:
            if entry.is_feint(self.tape):
                return (
                    f"a part of the model that is called by itself multiplies by W of {entry.sources[0]!r} "
                    f"at {entry.where}, in another way than elsewhere: let the model's own forward pass do it"
                )
        return ""

    def count_probes(self, layer: str, count: int) -> None:
        """Note signals that were sent through a layer to read it."""
        if count:
            self.probes[layer] = self.probes.get(layer, 0) + count


def updates_that_differ(record: Record, other: Record, present: Iterable[str]) -> list[tuple[str, str]]:
    """Return (kind, name) of those present parameters that are updated otherwise, in the first such step.

    Args:
        record: Of all W present.
        other: Of a pass without some.
        present: Names of those that should be as they were.
    """
    for ours, theirs in zip(record.parameters, other.parameters, strict=False):
        found = [(UPDATE, name) for name in present if name in ours and ours[name] != theirs.get(name)]
        if found:
            return found
    return []


def weights_that_came_back(record: Record, other: Record, absent: Iterable[str]) -> list[str]:
    """Return which weights are W again after some step, though noise stood in for them before."""
    pairs = list(zip(record.parameters, other.parameters, strict=False))[1:]
    return [
        name
        for name in absent
        if any(name in ours and ours[name] == theirs.get(name) for ours, theirs in pairs)
    ]


def digest_of(value: object, *, with_signs: bool = False) -> str:
    """Return what tells two values apart to the last bit; a tensor's zeros may have either sign.

    Args:
        value: A tensor, or something that has a repr.
        with_signs: Whether zeros count with their sign: where an update of 0 of either sign changes no bit,
            that of parameters, and a copy is saved.
    """
    if not isinstance(value, Tensor):
        return repr(value)
    with below_transforms():
        parts = [_digest_of_part(part, with_signs) for part in parts_of(value)]
    return "".join(parts) if len(parts) == 1 else f"{tuple(value.shape)}{''.join(parts)}"


def _digest_of_part(tensor: Tensor, with_signs: bool) -> str:
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    tensor = tensor + 0 if tensor.is_floating_point() and not with_signs else tensor
    memory: Any = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{tuple(tensor.shape)}{tensor.dtype}{hashlib.sha256(memory).hexdigest()}"


def first_differences(record: Record, other: Record) -> list[tuple[str, str]]:
    """Return (kind, layer) of what differs in the first step in which anything does.

    What comes later, and deltas upstream of the first that differs, follow from these. A pass that was
    stopped by an error is compared as far as it came.
    """
    for ours, theirs in zip(record.seen, other.seen, strict=False):
        is_cut = other.error is not None and theirs is other.seen[-1]
        found: list[tuple[str, str]] = []
        for (kind, layer, digest), (their_kind, their_layer, their_digest) in zip(ours, theirs, strict=False):
            if (kind, layer) != (their_kind, their_layer):
                return [*found, (CALLS, layer)]
            if digest != their_digest and (kind != "delta" or "delta" not in [k for k, _ in found]):
                found.append((kind, layer))
        if len(ours) != len(theirs) and not is_cut:
            found.append((CALLS, ours[-1][1] if ours else ""))
        if found:
            return list(dict.fromkeys(found))
    return []
