"""What needs no clock: graph breaks and bytes between devices. The same on every machine."""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from feedbackpath.bench.workloads import TrainingStep

TRACING_BACKEND = "aot_eager"  # traces forward and backward passes as any other, and needs no compiler
SETTLING = 2  # steps until DistributedDataParallel has ordered its buckets anew, and said so to all devices


def count_graph_breaks(step: TrainingStep) -> int:
    """Return how often ``torch.compile`` leaves its graph in a step's forward and backward pass.

    0 means that ``fullgraph=True`` is accepted, and that autograd functions are traced both ways.
    """
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    plain, step.forward = step.forward, torch.compile(step.model, backend=TRACING_BACKEND)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Dynamo's, of what it does itself while it traces
            step()
        return sum(counters["graph_break"].values())
    finally:
        step.forward = plain
        torch._dynamo.reset()


def count_collective_bytes(step: TrainingStep) -> dict[str, int]:
    """Return the bytes that one device gives to each kind of collective operation in a step.

    The step runs under DistributedDataParallel in a group of one process, after others in which buckets and
    schedules settle. Whatever else communicates, a mirror say, counts too.

    Returns:
        By operation of ``torch.distributed``: ``"allreduce_"`` has the gradients, and ``"broadcast_"`` the
        buffers of BatchNorm.
    """
    with _group_of_one():
        plain, step.forward = step.forward, nn.parallel.DistributedDataParallel(step.model)
        try:
            for _ in range(SETTLING):
                step()
            with _Collectives() as seen:
                step()
        finally:
            step.forward = plain
    return dict(seen.num_bytes)


@contextmanager
def _group_of_one() -> Iterator[None]:
    """Be the only process of a group, unless there is a group already."""
    if torch.distributed.is_initialized():
        yield
        return
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


class _Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the tensors that are given to collective operations, by operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function.namespace == "c10d":
            # The first argument: what is sent, or where it is put together.
            self.num_bytes[function.overloadpacket.__name__] += _bytes_of(args[0])
        return function(*args, **(kwargs or {}))


def _bytes_of(tree: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
