"""Matrices that a model holds besides its parameters and buffers: as attributes, in closures, as globals."""

import functools
import types
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from feedbackpath.auditing.ledger import UNKNOWN, Made
from feedbackpath.auditing.memory import address_of
from feedbackpath.auditing.operators import call_site
from feedbackpath.auditing.record import Record
from feedbackpath.core.operations import is_matrix

DEPTH = 6  # of lists in functions in lists
OURS = ("torch", "feedbackpath", "builtins")


class Constants:
    """Finds those that multiply signals through which errors come back.

    Args:
        model: The model.
        record: Where they are noted.
    """

    def __init__(self, model: nn.Module, record: Record) -> None:
        self._model, self._record = model, record
        self._is_held: dict[int, bool] = {}

    def see(self, operands: Sequence[tuple[Tensor, Made]]) -> None:
        """Look at the operands of a product that is in no backward pass."""
        if not any(
            made.kind == "activity" and made is not UNKNOWN and t.requires_grad for t, made in operands
        ):
            return
        for tensor, made in operands:
            is_constant = made is UNKNOWN or made.kind == "constant"
            if is_constant and not tensor.requires_grad and is_matrix(tensor) and self._holds(tensor):
                self._record.matrices.setdefault(call_site(), list(tensor.shape))

    def _holds(self, tensor: Tensor) -> bool:
        address = address_of(tensor)
        if address not in self._is_held:
            self._is_held[address] = address in held_by(self._model)
        return self._is_held[address]


def held_by(model: nn.Module) -> set[int]:
    """Return the addresses of the memory of all tensors and arrays that a model's own code can reach."""
    seen: set[int] = set()
    return {
        address
        for module in model.modules()
        for value in (vars(module), [vars(kind).get("forward") for kind in type(module).__mro__])
        for address in _addresses(value, seen, DEPTH)
    }


def _addresses(value: Any, seen: set[int], depth: int) -> Iterator[int]:
    if isinstance(value, nn.Parameter):
        return
    if isinstance(value, Tensor):
        yield address_of(value)
    elif isinstance(value, np.ndarray):
        yield value.ctypes.data
    elif depth and id(value) not in seen:
        seen.add(id(value))
        for part in _parts(value):
            yield from _addresses(part, seen, depth - 1)


def _parts(value: Any) -> Iterator[Any]:
    """Yield what a container holds, or what a function can reach; of other objects, their attributes."""
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | tuple | set):
        yield from value
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, types.MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, types.FunctionType):
        if not (value.__module__ or "").startswith(OURS):
            yield from (cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell))
            yield from (value.__defaults__, value.__kwdefaults__)
            yield from (value.__globals__.get(name) for name in value.__code__.co_names)
    elif isinstance(value, nn.Module) or not (
        isinstance(value, type | types.ModuleType) or type(value).__module__.startswith(OURS)
    ):
        yield from getattr(value, "__dict__", {}).values()


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
