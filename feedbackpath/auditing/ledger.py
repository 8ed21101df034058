"""What each tensor is made of: the book that the audit keeps while steps run.

A value that W has a part in is *weight*: a copy, a cast, a norm, a product with a delta. Only where a layer's
own forward map meets a signal, W makes *activity*. Everything is known by the memory that holds it, so that
views, ``.data``, ``detach`` and in-place operations are seen through.
"""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from feedbackpath.auditing.memory import place_of, size_of, values_of, watch

Kind = Literal["constant", "feedback", "activity", "other", "weight"]


@dataclass(frozen=True)
class Made:
    """What a value is made of.

    Attributes:
        kind: Its kind; ``"other"``: parameters and buffers without feedback weights, and nothing else.
        sources: Names of the forward weights, or other parameters, in it.
        is_sign: Whether only the signs of those weights are.
        is_product: Whether it holds products of a weight and a signal that have not been summed.
        signals: Digests of those signals.
        operation: The operator by which weight met something else; empty before.
        where: File and line of that call.
    """

    kind: Kind
    sources: tuple[str, ...] = ()
    is_sign: bool = False
    is_product: bool = False
    signals: tuple[str, ...] = ()
    operation: str = ""
    where: str = ""

    @property
    def is_tracked(self) -> bool:
        """Whether it is made of forward parameters or buffers."""
        return self.kind in ("weight", "other")


@dataclass(frozen=True, eq=False)
class Root:
    """Signals.

    Attributes:
        size: How many.
    """

    size: int


ACTIVITY, CONSTANT, FEEDBACK = Made("activity"), Made("constant"), Made("feedback")
UNKNOWN = Made("activity")  # by where it is, not by what it says
_RANK: tuple[Kind, ...] = ("constant", "feedback", "other", "activity", "weight")


class Ledger:
    """Knows of each piece of memory what is in it, by a weak reference that keeps its number from reuse."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Any, Made]] = {}
        self._fixed: dict[int, tuple[Any, dict[tuple[int, int], Made]]] = {}
        self._roots: dict[int, tuple[Any, Root]] = {}

    def release(self) -> None:
        """Forget what parameters are: they are about to be told anew."""
        self._fixed.clear()

    def fix(self, tensor: Tensor, made: Made) -> None:
        """Say what a parameter is, whatever is written into it; several may share one piece of memory."""
        if tensor.numel():
            self._fixed.setdefault(place_of(tensor), (watch(tensor), {}))[1][_span(tensor)] = made

    def fixed(self, tensor: Tensor) -> Made | None:
        """Return what the parameters in a tensor's memory were said to be; None: there are none."""
        entry = self._fixed.get(place_of(tensor))
        if entry is None:
            return None
        low, high = _span(tensor)
        met = [made for (start, end), made in entry[1].items() if start < high and low < end]
        return max(met, key=lambda made: _RANK.index(made.kind), default=None)

    def look_up(self, tensor: Tensor) -> Made:
        """Return what a tensor is made of; one that came from outside is data, or a signal."""
        fixed = self.fixed(tensor)
        if fixed is not None:
            return fixed
        entry = self._made.get(place_of(tensor))
        return UNKNOWN if entry is None else entry[1]

    def enter(self, tensor: Tensor, made: Made) -> None:
        """Note what a tensor now holds."""
        self._made[place_of(tensor)] = (watch(tensor), made)

    def root_of(self, tensor: Tensor) -> "Root":
        """Return the signals that a tensor holds, perhaps several times, and transformed one by one."""
        return self._roots.setdefault(place_of(tensor), (watch(tensor), Root(size_of(tensor))))[1]

    def enter_root(self, tensor: Tensor, root: "Root") -> None:
        """Note what signals a tensor now holds."""
        self._roots[place_of(tensor)] = watch(tensor), root

    def forget_freed(self) -> None:
        """Drop what is gone."""
        self._made = {key: entry for key, entry in self._made.items() if not entry[0].expired()}
        self._roots = {key: entry for key, entry in self._roots.items() if not entry[0].expired()}


def join(parts: Iterable[Made], operation: str, where: str) -> Made:
    """Return what comes of an operation on values so made, unless it is a layer's forward map."""
    inputs = list(parts)
    kinds: list[Kind] = [made.kind for made in inputs]
    kind: Kind = max(kinds, key=_RANK.index, default="constant")
    if kind not in ("weight", "other"):
        is_data = kind == "activity" and all(made is UNKNOWN or made.kind == "constant" for made in inputs)
        return UNKNOWN if is_data else Made(kind)
    tracked = [made for made in inputs if made.kind == kind]
    met = next((made for made in tracked if made.operation), None)
    if met is None and any(made.kind in ("activity", "feedback") for made in inputs):
        met = Made(kind, operation=operation, where=where)
    return dataclasses.replace(
        met or Made(kind),
        sources=tuple(dict.fromkeys(name for made in tracked for name in made.sources)),
        is_sign=all(made.is_sign for made in tracked),
        is_product=any(made.is_product for made in tracked),
        signals=tuple(digest for made in tracked for digest in made.signals),
    )


def num_stored(tensor: Tensor) -> int:
    """Return how many values a tensor has in memory: one that is expanded repeats some."""
    tensor = values_of(tensor)
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride) if tensor.numel() else 0


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the first byte that a tensor takes of its memory, and the one behind its last."""
    tensor = values_of(tensor)
    if tensor.layout != torch.strided:
        return 0, 1  # it is all that its place holds
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * tensor.element_size()
    return start, start + (int(reach) + 1) * tensor.element_size() if tensor.numel() else start
