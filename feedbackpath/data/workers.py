"""A function over many items, in worker processes where those are wanted: results come in order."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader

from feedbackpath.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(
    function: Callable[[Item], Result], items: Sequence[Item], num_workers: int
) -> Iterator[Result]:
    """Apply a function to items, ahead of their use in worker processes, and yield its results in order.

    PyTorch's DataLoader runs the workers: each computes with one thread, results that hold tensors travel in
    shared memory, and the workers end with the iterator. Without workers, an item is worked on when its
    result is asked for. A `UserError` of the function is raised as itself, not as a worker's traceback.
    """
    if num_workers == 0:
        yield from map(function, items)
        return
    results = DataLoader(
        _Results(function, items),
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_unchanged,
        # Workers are seeded from this generator; the default would be the global one, and draw from it.
        generator=torch.Generator(),
    )
    for result in results:
        if isinstance(result, UserError):
            raise result
        yield result


@dataclass(frozen=True)
class _Results(torch.utils.data.Dataset[Any]):
    """What a worker process sees: result n is made when it is asked for."""

    function: Callable[[Any], Any]
    items: Sequence[Any]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Any:
        try:
            return self.function(self.items[number])
        except UserError as error:  # DataLoader would send the text of a traceback
            return error


def _unchanged(result: Any) -> Any:
    return result
