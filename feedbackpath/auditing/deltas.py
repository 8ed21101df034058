"""Deltas as they arrive at an output, and as hooks of the step's own leave them."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from feedbackpath.auditing.memory import copy_of
from feedbackpath.auditing.operators import tensors_in
from feedbackpath.auditing.record import Entry


def watch(output: Tensor, see: Callable[[Tensor], Tensor | None]) -> None:
    """See every delta of an output; if a later hook makes something else of it, that too.

    Args:
        output: It requires a gradient.
        see: Called with the delta; what it returns goes on in its place, unless that is None.
    """
    arrived: list[Tensor] = []
    number = output.output_nr

    def see_first(delta: Tensor) -> Tensor | None:
        changed = see(delta)
        arrived[:] = [delta if changed is None else changed]
        return changed

    def see_again(deltas: Any) -> None:
        if arrived and deltas[number] is not arrived.pop():
            see(deltas[number])

    output.register_hook(see_first)  # type: ignore[no-untyped-call]
    if output.grad_fn is not None:
        output.grad_fn.register_prehook(see_again)


def wait_for_error(output: Any, doubted: Sequence[Entry]) -> None:
    """Take products of one call for answers of the model if they train: if an error comes back."""

    def confirm(delta: Tensor) -> None:
        if copy_of(delta).ne(0).any():
            for entry in doubted:
                entry.is_answer, entry.weights = True, ()

    for tensor in tensors_in(output):
        if tensor.requires_grad:
            tensor.register_hook(confirm)  # type: ignore[no-untyped-call]
