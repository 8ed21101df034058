"""A function over many items, in worker processes where those are wanted: results come in order."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

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
    shared memory, and the workers end with the iterator.

    Args:
        function: Applied to each item; with workers, it and its results must be picklable.
        items: What to apply it to.
        num_workers: How many processes; 0 applies it in this one, when a result is asked for.

    Raises:
        UserError: What the function raised, as itself and not as a worker's traceback.

    Example:
        >>> list(map_in_order(len, ["a", "bcd"], num_workers=0))
        [1, 3]
    """
    if num_workers == 0:
        return map(function, items)
    loader = DataLoader(
        _Results(function, items),
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_unchanged,
        # Workers are seeded from this generator; the default would be the global one, and draw from it.
        generator=torch.Generator(),
    )
    return _raise_errors(loader)


@dataclass(frozen=True)
class _Results(torch.utils.data.Dataset[Any], Generic[Item, Result]):
    """What a worker process sees: result n is made when it is asked for."""

    function: Callable[[Item], Result]
    items: Sequence[Item]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Result | UserError:
        try:
            return self.function(self.items[number])
        except UserError as error:  # DataLoader would send the text of a traceback
            return error


def _unchanged(result: Result) -> Result:
    return result


def _raise_errors(results: DataLoader[Any]) -> Iterator[Any]:
    for result in results:
        if isinstance(result, UserError):
            raise result
        yield result
