"""Which dimension of a weight counts inputs, where no layer was registered: read off the layer's own code.

``F.linear(x, self.weight)`` has the outputs first, ``x @ self.weight`` and ``torch.addmm(bias, x,
self.weight)`` the inputs. A weight of three dimensions is one matrix for each expert, taken out by
``self.weights[expert]`` or used at once by ``torch.bmm``.
"""

import ast
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from feedbackpath.core.layers import UNKNOWN, UntiedWeight, kind_of
from feedbackpath.core.operations import names_in
from feedbackpath.core.usage import methods_of, parents_in, reads

View = Callable[[nn.Module, Tensor], Tensor]

_CAST = names_in("to type_as float half double bfloat16 contiguous")
_SIZES = names_in("shape dtype device size dim ndim numel")
_TURNED = names_in("T mT t transpose")
# Where an operation takes W, and whether its outputs come first there.
_PLACES = {
    ("linear", 1): True, ("addmm", 2): False, ("baddbmm", 2): False, ("matmul", 1): False, ("mm", 1): False,
    ("bmm", 1): False, ("matmul", 0): True, ("mm", 0): True, ("bmm", 0): True,
}  # fmt: skip


def view_of(weight: UntiedWeight) -> View | None:
    """Return how a layer's weight is viewed as ``[groups, neurons, inputs]``; None: nobody can tell.

    Example:
        >>> import torch
        >>> from feedbackpath.core.layers import list_weights
        >>> (weight,) = list_weights("fc", nn.Linear(3, 2))
        >>> view_of(weight)(weight.layer, weight.weight).shape
        torch.Size([1, 2, 3])
    """
    kind = kind_of(weight.layer)
    if kind is not UNKNOWN:
        return kind.as_matrix
    plain: type[nn.Module] = getattr(weight.layer, "plain_type", type(weight.layer))
    return _view_in_code(plain, weight.weight_name, weight.weight.dim())  # type: ignore[arg-type]


@functools.cache
def _view_in_code(kind: type[nn.Module], name: str, dims: int) -> View | None:
    """Return the view that all uses of a weight in a class's code agree on."""
    told: set[Any] = set()
    for method in methods_of(kind):
        own = method.args.args[0].arg if method.args.args else "self"
        parents = parents_in(method)
        told |= {_use(node, parents, is_turned=False) for node in parents if reads(node, own, name)}
    told.discard("size")
    if told == {True} and dims in (2, 3):
        return lambda layer, w: w if w.dim() == 3 else w[None]
    if told == {False} and dims in (2, 3):
        return lambda layer, w: w.mT if w.dim() == 3 else w.mT[None]
    return None


def _use(node: ast.AST, parents: dict[ast.AST, ast.AST], *, is_turned: bool) -> Any:
    """Follow W outwards to its product: True: outputs come first; "size": it is not used; None: not known."""
    parent = parents.get(node)
    if isinstance(parent, ast.Subscript) and parent.value is node:
        return _use(parent, parents, is_turned=is_turned)
    if isinstance(parent, ast.Attribute):
        call = parents.get(parent)
        is_called = isinstance(call, ast.Call) and call.func is parent
        if parent.attr in _SIZES:
            return "size"
        if parent.attr in _TURNED or parent.attr in _CAST:
            after = call if is_called and call is not None else parent
            return _use(after, parents, is_turned=is_turned != (parent.attr in _TURNED))
        return None
    outputs_first: bool | None = None
    if isinstance(parent, ast.BinOp) and isinstance(parent.op, ast.MatMult):
        outputs_first = parent.left is node
    elif isinstance(parent, ast.Call) and node in parent.args:
        function = parent.func
        called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        is_method = isinstance(function, ast.Attribute) and getattr(function.value, "id", "") not in _MODULES
        is_method = is_method and not isinstance(getattr(function, "value", None), ast.Attribute)
        outputs_first = _PLACES.get((called, parent.args.index(node) + is_method))
    elif isinstance(parent, ast.keyword) and parent.arg == "weight":
        outputs_first = True
    return None if outputs_first is None else outputs_first != is_turned


_MODULES = names_in("torch F nn functional")
