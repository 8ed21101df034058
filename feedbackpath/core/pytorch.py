"""What the core takes from inside PyTorch: names that begin with an underscore, each with a fallback.

PyTorch does not promise to keep these. Where one is missing, the fallback gives the same gradients, more
slowly or with more memory. ``tests/test_pytorch.py`` runs every fallback.
"""

import functools
import operator
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


def _find(path: str) -> Any:
    """Return what a dotted name inside torch stands for; None where this version has no such thing."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


_top_hooks = _find("_C._autograd._top_saved_tensors_default_hooks")
_transforms = _find("_C._are_functorch_transforms_active")
_lazy_clone = _find("_lazy_clone")
_engine = _find("autograd.Variable._execution_engine")
_graph_task = _find("_C._current_graph_task_id")


def outer_hooks() -> Hooks | None:
    """Return the saved-tensor hooks that are in force: those of checkpointing or ``save_on_cpu``, say.

    Fallback: none. Tensors saved by untied operations then go past such hooks, and a rule that broadcasts
    errors is refused under checkpointing.
    """
    return None if _top_hooks is None else _top_hooks(True)


def is_traced() -> bool:
    """Whether ``torch.compile`` or a transform of ``torch.func`` looks at what is computed.

    Fallback: compilation alone; ``torch.func`` then refuses saved-tensor hooks with an error of its own.
    """
    return torch.compiler.is_compiling() or (_transforms is not None and _transforms())


def is_in_backward() -> bool:
    """Whether a backward pass is running in this thread: checkpointing recomputes a forward pass in it.

    Fallback: no. A rule that broadcasts errors then fails under checkpointing, with an error of torch's.
    """
    return _graph_task is not None and not torch.compiler.is_compiling() and _graph_task() != -1


def backward_id() -> int | None:
    """Return a number of the backward pass that is running; fallback: None."""
    return None if _graph_task is None else _graph_task()


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function in which ``torch.compile`` is to compile nothing by itself.

    Importing Dynamo takes a second: a process that has not done so compiles nothing.
    """
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args)
        if not disabled:
            disabled.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return disabled[0](*args)

    return call


# How often a tensor was written to. Fallback: 0, and a change between forward and backward goes unnoticed.
version_of: Callable[[Tensor], int] = (
    operator.attrgetter("_version") if hasattr(Tensor, "_version") else lambda tensor: 0
)


def share(gradient: Tensor) -> Tensor:
    """Return a tensor of the same values whose memory is the other's, until one of the two is written to.

    Autograd would copy a tensor that goes to two parameters. So would whoever clips or unscales gradients in
    place; an update only reads them. Fallback: a copy, as of what torch.load returns: its memory has no
    allocator, and PyTorch needs one to part the two.
    """
    if _lazy_clone is None or type(gradient) is not Tensor or torch.is_grad_enabled() or is_traced():
        return gradient.clone()
    try:
        return _lazy_clone(gradient) if gradient.untyped_storage().resizable() else gradient.clone()
    except RuntimeError:  # memory of an allocator that PyTorch cannot share
        return gradient.clone()


def after_backward(call: Callable[[], None]) -> None:
    """Call something when the backward pass that is running has ended, after all that was so queued before.

    Without ``can_wait`` there is no such thing.
    """
    # DistributedDataParallel queues its own end, perhaps after this: queueing anew goes behind it.
    _engine.queue_callback(lambda: _engine.queue_callback(call))


def can_wait() -> bool:
    """Whether ``after_backward`` works. Fallback: it does not, and B is sent between devices as W is."""
    return _engine is not None


def random_state(like: Tensor) -> Tensor:
    """Return the state of the random numbers of a tensor's device."""
    return torch.cuda.get_rng_state(like.device) if like.is_cuda else torch.get_rng_state()


@contextmanager
def random_numbers_from(state: Tensor, like: Tensor) -> Iterator[None]:
    """Draw the same random numbers once more, and then go on where they were."""
    with torch.random.fork_rng([like.device] if like.is_cuda else []):
        if like.is_cuda:
            torch.cuda.set_rng_state(state, like.device)
        else:
            torch.set_rng_state(state)
        yield


def rewired(function: Any, **names: Any) -> Callable[..., Any]:
    """Return a function of PyTorch's that finds something else behind some of the names in its code."""
    seen = {**function.__globals__, **names}
    copy = types.FunctionType(function.__code__, seen, None, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def has_processes() -> bool:
    """Whether this process is one of a job, whose processes can send each other tensors."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
