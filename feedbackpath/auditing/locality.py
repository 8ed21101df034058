"""Locality: whose signals the update of a feedback weight takes.

One neuron of each layer is disturbed, and nothing else: the delta that arrives at its output, or, in mirror
mode, its synapses; all other activities and deltas are held. Only the B of its own synapses may then differ.
A factor that all others share tells of a scalar common to the layer, or to the network: a clipped norm.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from feedbackpath.auditing.chain import Chain
from feedbackpath.auditing.record import Record
from feedbackpath.auditing.subject import Subject
from feedbackpath.layers import LocallyConnected2d

STRENGTH = 1.5  # of a disturbed neuron's signal
ROUNDING = 8  # units in the last place of B
UNEXPLAINED = 0.05  # of a difference, at most, where a common factor of gradient or decay makes it
OWN = "own pre- and postsynaptic signals"
UNMOVED = "none in this step"


class Disturbed(Chain):  # type: ignore[no-untyped-call]
    """A pass in which neuron 0 of every layer sends another delta, and is another one in mirror mode.

    What ``build`` does before the step is left as it is: only one step may make the difference.

    Args:
        subject: Whose step it is.
        deltas: Those of the first pass: all but the disturbed neurons' are held.
    """

    watches = False

    def __init__(self, subject: Subject, deltas: Sequence[tuple[str, Tensor]]) -> None:
        super().__init__(subject)
        self._deltas = iter(deltas)

    def _see(self, kind: str, layer: str, value: object, *, with_signs: bool = False) -> None:
        """Nothing is compared bit by bit."""

    def _see_delta(self, layer: str, delta: Tensor) -> Tensor | None:
        if not self._has_begun:
            return None
        name, held = next(self._deltas, ("", delta))
        if held.shape != delta.shape:
            raise NotImplementedError("torch.func.vmap takes no deltas from outside")
        disturbed = (held if name == layer else delta).clone()
        axis = _channel_axis(self.subject.layer_named(layer), disturbed)
        disturbed.select(axis, 0).mul_(STRENGTH)
        return disturbed

    def enter_passage(self, weights: tuple[Tensor, ...]) -> None:
        """Disturb the synapses of one neuron while noise passes."""
        super().enter_passage(weights)
        self._scale(weights, STRENGTH)

    def leave_passage(self, weights: tuple[Tensor, ...]) -> None:
        """Make them what they were."""
        self._scale(weights, 1.0 / STRENGTH)
        super().leave_passage(weights)

    @property
    def _has_begun(self) -> bool:
        return len(self.record.seen) > 1

    @torch.no_grad()
    def _scale(self, weights: tuple[Tensor, ...], factor: float) -> None:
        if not self._has_begun:
            return
        names = {id(weight.weight): weight for weight in self.subject.path.weights}
        for weight in weights:
            if id(weight) in names:
                _rows_of_first_neuron(weight, names[id(weight)].transposed).mul_(factor)


def describe_locality(reference: Record, disturbed: Record, transposed: Mapping[str, bool]) -> dict[str, str]:
    """Return, by layer, what its B's update takes.

    Args:
        reference: What the first pass left.
        disturbed: What the first step left with neurons disturbed.
        transposed: By layer, whether W counts inputs first.
    """
    found = {}
    if len(reference.feedback) < 2 or len(disturbed.feedback) < 2:
        return {}
    before, first, after = reference.feedback[0], reference.feedback[1], disturbed.feedback[1]
    for name, old in before.items():
        plain, other = first[name] - old, after[name] - old
        others = torch.ones_like(plain, dtype=torch.bool)
        _rows_of_first_neuron(others, transposed[name]).fill_(False)
        rounding = ROUNDING * torch.finfo(old.dtype).eps * float(first[name].norm())
        found[name] = _compare(plain, other, old, others, rounding)
    return found


def _compare(plain: Tensor, disturbed: Tensor, old: Tensor, others: Tensor, rounding: float) -> str:
    """Say what an update took, from how it differs where nothing of the synapse's own was disturbed."""
    if not bool((plain != 0).any()):
        return UNMOVED
    mine, theirs = plain[others].double(), disturbed[others].double()
    difference = theirs - mine
    if bool(difference.norm() <= rounding):
        return OWN
    # A factor on all gradients scales the update, but not the part of it that is decay, which is B's own.
    causes, difference = torch.stack([mine, old[others].double()], 1).cpu(), difference.cpu()
    explained = causes @ torch.linalg.lstsq(causes, difference[:, None], driver="gelsd").solution[:, 0]
    if bool((difference - explained).norm() <= UNEXPLAINED * difference.norm()):
        return f"{OWN}, and a scalar common to all (a norm, say)"
    return "NOT LOCAL: signals of other neurons too"


def _rows_of_first_neuron(weight: Tensor, transposed: bool) -> Tensor:
    """Return the part of W, or of what is laid out as W, that belongs to output neuron 0."""
    return weight[:, 0] if transposed else weight[0]


def _channel_axis(layer: Any, output: Tensor) -> int:
    if isinstance(layer, LocallyConnected2d):
        return 0  # of [positions, neurons, N]: W's first rows hold the first position
    kernel = getattr(layer, "kernel_size", None)
    return output.dim() - 1 - len(kernel) if kernel is not None else output.dim() - 1
