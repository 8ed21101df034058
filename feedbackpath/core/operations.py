"""Torch's operations by what they do with a weight, and the tensors among an operation's arguments."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Call = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def names_in(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


_CONVOLUTIONS = names_in("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d")
_MATRIX = names_in("matmul __matmul__ __rmatmul__ mm bmm addmm addbmm baddbmm einsum")
# A sum over products of a weight and a signal, linear in each.
PRODUCTS = (
    _CONVOLUTIONS
    | _MATRIX
    | names_in("linear bilinear mv addmv tensordot dot vdot inner outer ger kron chain_matmul multi_dot")
    | names_in("linalg_multi_dot linalg_vecdot vecdot addr addr_ addmm_ addbmm_ baddbmm_ addmv_ _sparse_mm")
)
# They multiply many factors in an order of their own, and keep what comes of it.
CHAINS = names_in("einsum chain_matmul multi_dot linalg_multi_dot")
_DIVISIONS = names_in("div div_ divide divide_ true_divide true_divide_ __truediv__ __itruediv__")
# One product for each pair of values.
SCALES = _DIVISIONS | names_in("mul mul_ multiply multiply_ __mul__ __rmul__ __imul__")
LINEAR_IN_EACH = PRODUCTS | SCALES
RECURRENT = names_in("lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")
# Their first argument is activity, even where it is a parameter: a learned query, say.
INPUT_FIRST = RECURRENT | _CONVOLUTIONS | {"linear"}
# Autocast casts their weights, on every device.
CAST_BY_AUTOCAST = RECURRENT | _CONVOLUTIONS | _MATRIX | {"linear"}
# What they take of a weight is looked up, or scales each neuron by its own number.
NO_WEIGHTS = names_in("embedding embedding_bag layer_norm rms_norm group_norm batch_norm instance_norm")
# They take a tensor's shape, or draw at random: what comes out is made of no weight.
SHAPED_ALIKE = names_in(
    """zeros_like ones_like empty_like full_like rand_like randn_like randint_like
    new_zeros new_ones new_empty new_full new_tensor new_empty_strided"""
)
AT_RANDOM = names_in(
    """dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout
    bernoulli normal poisson"""
)
# They multiply nothing: no error passes through a weight there.
ADDITIVE = names_in(
    """add add_ sub sub_ subtract rsub __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__
    cat concat stack hstack vstack where maximum minimum
    __setitem__ index_put index_put_ copy_ scatter scatter_add"""
)
# What they return is no value of a weight.
NO_VALUES = names_in("grad _grad grad_fn register_hook requires_grad_ retain_grad backward")


def is_matrix(parameter: Tensor) -> bool:
    """Whether at least two of a parameter's dimensions are larger than 1, and its values are real numbers.

    A scale for each channel, ``[1, C, 1, 1]``, is none.
    """
    return sum(size > 1 for size in parameter.shape) > 1 and parameter.is_floating_point()


def holds_values(tensor: Tensor) -> bool:
    """Whether a tensor may hold values of a weight, or what was made of them, such as a spectrum."""
    return tensor.is_floating_point() or tensor.is_complex()


def is_linear(name: str, args: Args, weights: Sequence[Tensor]) -> bool:
    """Whether an operation is linear in each of its factors. A weight that divides is no factor."""
    is_divisor = name in _DIVISIONS and any(w is x for w in weights for x in args[1:])
    return name in LINEAR_IN_EACH and not is_divisor


def writes(name: str, kwargs: Kwargs) -> bool:
    """Whether an operation writes to one of its arguments."""
    is_in_place = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    return is_in_place or kwargs.get("out") is not None


def activity_in(name: str, args: Args, kwargs: Kwargs) -> list[Tensor]:
    """Return the input of an operation of ``INPUT_FIRST``, and the state that a recurrence begins with."""
    is_packed = len(args) > 3 and isinstance(args[3], (list, tuple))  # its weights, behind the batch sizes
    number = 1 if name not in RECURRENT else 2 + is_packed
    return tensors_in((args[:number], kwargs.get("input"), kwargs.get("hx")))


def name_of(func: Call) -> str:
    """Return an operation's name; that of the attribute where one is read."""
    name: str = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        return getattr(getattr(func, "__self__", None), "__name__", "")
    return name


def run(func: Call, args: Args, kwargs: Mapping[str, Any]) -> Any:
    """Run an operation."""
    if func is torch.Tensor.unflatten and torch.compiler.is_compiling():
        return args[0].unflatten(*args[1:], **kwargs)  # Dynamo cannot follow its call of super()
    return func(*args, **kwargs)


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in an argument, in lists and dictionaries too."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in tensors_in(part)]
    return []


def replaced(value: Any, others: Sequence[tuple[Tensor, Any]]) -> Any:
    """Return an argument with some of its tensors replaced.

    Args:
        value: The argument; lists and dictionaries are gone through.
        others: Tensors, and what takes their places.
    """
    if isinstance(value, Tensor):
        for tensor, other in others:
            if value is tensor:
                return other
        return value
    if isinstance(value, dict):
        return {key: replaced(part, others) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [replaced(part, others) for part in value]
        if isinstance(value, list):
            return parts
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value
