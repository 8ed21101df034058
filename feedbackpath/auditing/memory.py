"""The memory of a tensor, whatever its layout and whoever wraps it: most is asked of plain tensors only."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

COMPRESSED = {
    torch.sparse_csr: ("crow_indices", "col_indices"), torch.sparse_bsr: ("crow_indices", "col_indices"),
    torch.sparse_csc: ("ccol_indices", "row_indices"), torch.sparse_bsc: ("ccol_indices", "row_indices"),
}  # fmt: skip
_C: Any = torch._C
_opaque: Any = torch._mkldnn  # type: ignore[attr-defined]


def unwrapped(tensor: Tensor) -> Tensor:
    """Return what a tensor is below the transforms of ``torch.func``: with all samples of ``vmap``, say."""
    while _C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _C._functorch.get_unwrapped(tensor)
    return tensor


@contextmanager
def below_transforms() -> Iterator[None]:
    """Run operators on what ``unwrapped`` returns: transforms would wrap their results."""
    with _C._DisableFuncTorch():
        yield


def copy_of(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor, below the transforms of ``torch.func``."""
    with below_transforms():
        return unwrapped(tensor).detach().clone()


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's values lie in memory by strides."""
    return tensor.layout == torch.strided and not tensor.is_nested


def values_of(tensor: Tensor) -> Tensor:
    """Return the tensor that holds a tensor's values: of one that is sparse, those that it has."""
    tensor = unwrapped(tensor)
    if tensor.layout == torch.sparse_coo:
        return tensor.detach()._values()  # those of one that is not coalesced, too
    if tensor.layout in COMPRESSED or tensor.is_nested:
        return tensor.detach().values()
    return tensor


def parts_of(tensor: Any) -> list[Tensor]:
    """Return plain tensors that together tell what a tensor is, values first; its shape tells the rest."""
    tensor = unwrapped(tensor).detach()
    if tensor.layout == torch.sparse_coo:
        return [tensor._values(), tensor._indices()]
    if tensor.layout in COMPRESSED:
        return [tensor.values(), *(getattr(tensor, name)() for name in COMPRESSED[tensor.layout])]
    if tensor.layout == torch.jagged:
        return [tensor.values(), tensor.offsets()]
    if tensor.is_nested:
        return [tensor.values(), tensor._nested_tensor_size()]
    return [tensor if tensor.layout == torch.strided else tensor.to_dense()]


def place_of(tensor: Tensor) -> int:
    """Return a number of the memory that a tensor's values are in; of one that shows none, its own."""
    return int(_holder(tensor)._cdata)


def address_of(tensor: Tensor) -> int:
    """Return where that memory begins: an array may share it."""
    holder = _holder(tensor)
    return int(holder._cdata if isinstance(holder, Tensor) else holder.data_ptr())


def size_of(tensor: Tensor) -> int:
    """Return how many values that memory has room for."""
    holder = _holder(tensor)
    return int(holder.numel() if isinstance(holder, Tensor) else holder.nbytes() // tensor.element_size())


def watch(tensor: Tensor) -> Any:
    """Return a weak reference to that memory: it keeps the number from reuse, and tells by ``expired``."""
    holder = _holder(tensor)
    if isinstance(holder, Tensor):
        return _C._WeakTensorRef(holder)
    return StorageWeakRef(holder)  # type: ignore[no-untyped-call]


def _holder(tensor: Tensor) -> Any:
    """Return the storage of a tensor's values, or, where there is none, the tensor that holds them."""
    if type(tensor) not in (Tensor, nn.Parameter) and tensor.is_nested:
        tensor = values_of(tensor)
    try:  # to ask for the layout first would take longer
        return tensor.untyped_storage()
    except NotImplementedError:
        values = values_of(tensor)
        return values if values.layout == _opaque else values.untyped_storage()
