"""What each tensor is made of: the book that provenance keeps.

A value made of W alone (a copy, a transpose, a sign, a cast, a norm, a slice, W_t - W_(t-1)) is *weight*.
W that meets activity going forward makes *activity*. Met anywhere else, it stays weight: a delta that W has
touched is made of weight. Everything is known by the memory that holds it, so that views, ``.data``,
``detach`` and in-place operations are seen through.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Kind = Literal["constant", "feedback", "activity", "scale", "weight"]


@dataclass(frozen=True)
class Made:
    """What a value is made of.

    Attributes:
        kind: Its kind; ``"scale"``: a declared parameter, of a norm or a bias.
        sources: Names of the forward weights, or declared parameters, in it.
        is_sign: Whether only the signs of those weights are.
        operation: The operator by which weight met something else; empty before.
        where: File and line of that call.
    """

    kind: Kind
    sources: tuple[str, ...] = ()
    is_sign: bool = False
    operation: str = ""
    where: str = ""


ACTIVITY, CONSTANT, FEEDBACK = Made("activity"), Made("constant"), Made("feedback")


class Ledger:
    """Knows of each piece of memory what is in it.

    Memory is known by a weak reference to it, which also keeps its number from being given anew.
    """

    def __init__(self) -> None:
        self._made: dict[int, tuple[StorageWeakRef, Made]] = {}
        self._fixed: dict[int, Made] = {}

    def fix(self, tensor: Tensor, made: Made) -> None:
        """Say once and for all what a parameter is, whatever is written into it."""
        if tensor.numel():
            self._fixed[_address(tensor)] = made

    def fixed(self, tensor: Tensor) -> Made | None:
        """Return what a parameter was said to be; None of other tensors."""
        return self._fixed.get(_address(tensor))

    def look_up(self, tensor: Tensor) -> Made:
        """Return what a tensor is made of; one that came from outside is activity: data, or a signal."""
        fixed = self.fixed(tensor)
        if fixed is not None:
            return fixed
        entry = self._made.get(_key(tensor))
        return ACTIVITY if entry is None else entry[1]

    def enter(self, tensor: Tensor, made: Made) -> None:
        """Note what a tensor now holds."""
        self._made[_key(tensor)] = (_weak(tensor), made)

    def forget_freed(self) -> None:
        """Drop what is gone."""
        self._made = {key: entry for key, entry in self._made.items() if not _is_gone(entry[0])}


def join(parts: Iterable[Made], *, is_forward: bool, operation: str, where: str) -> Made:
    """Return what comes of an operation on values so made.

    Args:
        parts: What its inputs are made of.
        is_forward: Whether it is a part of a forward pass.
        operation: Its name.
        where: File and line of its call.
    """
    inputs = list(parts)
    kinds = {made.kind for made in inputs}
    if "weight" in kinds and not (is_forward and "activity" in kinds):
        return _join_weights(inputs, operation, where)
    for kind in ("activity", "scale", "feedback"):
        if kind in kinds:
            names = dict.fromkeys(name for made in inputs if kind == "scale" for name in made.sources)
            return Made(kind, tuple(names))
    return CONSTANT


def _join_weights(inputs: list[Made], operation: str, where: str) -> Made:
    weights = [made for made in inputs if made.kind == "weight"]
    sources = tuple(dict.fromkeys(name for made in weights for name in made.sources))
    is_sign = all(made.is_sign for made in weights)
    first_met = next((made for made in weights if made.operation), None)
    if first_met is not None:
        return dataclasses.replace(first_met, sources=sources, is_sign=is_sign)
    is_meeting = any(made.kind in ("activity", "feedback") for made in inputs)
    met = {"operation": operation, "where": where} if is_meeting else {}
    return Made("weight", sources, is_sign, **met)


def _is_gone(reference: StorageWeakRef) -> bool:
    return bool(reference.expired())  # type: ignore[no-untyped-call]


def _weak(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())
