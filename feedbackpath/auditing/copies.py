"""Copies of weights, wherever in this process they are."""

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from feedbackpath.auditing.memory import is_plain, values_of

SAME = 16  # places of one value in a flat tensor that are looked at


def copies_of(
    weights: Sequence[Tensor],
    others: Iterable[Tensor],
    spared: Iterable[Tensor] = (),
    tensors: Iterable[Any] | None = None,
) -> Iterator[Tensor]:
    """Yield tensors, of all in this process, that hold what a weight holds, if not in the same precision.

    A weight that is written anew in each step, from a copy in higher precision, is no weight: the copy is.
    What equals one of the others too, a B, is no copy; nor are those that are spared, weights themselves.
    """
    known = {id(tensor) for tensor in (*weights, *others, *spared)}
    wanted = by_size(weights)
    beside = [tensor.detach() for tensor in others]
    for thing in things() if tensors is None else tensors:
        if type(thing) not in (Tensor, nn.Parameter) or id(thing) in known or not thing.is_floating_point():
            continue
        for copied, weight in _alike(values_of(thing), wanted):
            value = copied.detach().flatten()
            same = (b.flatten().to(value) for b in beside if b.numel() == len(value))
            if copied.data_ptr() != weight.data_ptr() and not any(torch.equal(value, b) for b in same):
                yield copied


def _alike(tensor: Tensor, wanted: Mapping[int, Sequence[Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a tensor with a weight that it holds; of a flat one that holds several, its parts with theirs."""
    if not is_plain(tensor):
        return
    found = next((w for w in wanted.get(tensor.numel(), ()) if holds(tensor, w)), None)
    if found is not None:
        yield tensor, found
    for size, weights in wanted.items() if tensor.dim() == 1 else ():
        for weight in weights if size < len(tensor) else ():
            mark = int(weight.flatten().ne(0).int().argmax())
            places = tensor.detach().to(weight).eq(weight.flatten()[mark]).nonzero().flatten() - mark
            parts = (tensor[place : place + size] for place in places[:SAME].tolist() if place >= 0)
            part = next((p for p in parts if len(p) == size and holds(p, weight.flatten())), None)
            if part is not None:
                yield part, weight


def by_size(weights: Sequence[Tensor]) -> dict[int, list[Tensor]]:
    """Return weights by their size, but for those of few values: another may be like them by chance."""
    found: dict[int, list[Tensor]] = {}
    for weight in map(values_of, weights):
        if is_plain(weight) and weight.numel() > 3 and len(set(head(weight).tolist())) > 3:
            found.setdefault(weight.numel(), []).append(weight.detach())
    return found


def holds(tensor: Tensor, weight: Tensor) -> bool:
    """Whether a tensor holds the values of a weight, if not in the same precision."""
    own, other = values_of(tensor).detach(), values_of(weight).detach()
    if not (is_plain(own) and is_plain(other)) or not torch.equal(head(own).to(other), head(other)):
        return False
    return torch.equal(own.flatten().to(other), other.flatten())


def head(tensor: Tensor) -> Tensor:
    """Return the first values of a tensor, 64 or all: to flatten the whole may copy it."""
    rows = tensor if tensor.dim() < 2 else tensor[: 64 // max(tensor[0].numel(), 1) + 1]
    return rows.flatten()[:64]


def are_parallel(one: Tensor, other: Tensor) -> bool:
    """Whether one tensor is a multiple of the other, to rounding."""
    a, b = one.detach().double().flatten(), other.double().flatten()
    return a.shape == b.shape and bool(abs(a @ b) > (1 - 1e-9) * a.norm() * b.norm())


_frozen: list[Any] = []


def things() -> list[Any]:
    """Return all objects of this process, but for those that ``freeze`` has seen to be of no interest."""
    return gc.get_objects() + _frozen  # a list begun before would hold itself, and all the others, for long


def freeze() -> None:
    """Let nothing look again at what there is already, in a process of our own: it is large, and stays."""
    gc.collect()
    _frozen.extend(t for t in gc.get_objects() if issubclass(type(t), (Tensor, torch.optim.Optimizer)))
    gc.freeze()
