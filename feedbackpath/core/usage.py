"""What a module's own code does with parameters, read off that code without running it.

Two questions are asked. A position embedding is a matrix that is added to a signal: no error passes through
it, and it needs no feedback weight (``is_only_added``). A network that only calls its layers never holds one
of their weights in its hands, so that nobody has to watch each of its operations (``quiet_modules``). Where
code cannot be read, or says anything else, the answer is no.
"""

import ast
import inspect
import math
import textwrap
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from feedbackpath.core.operations import SHAPED_ALIKE, is_matrix, names_in

# They show a parameter in another shape, a part of it, or what becomes of its values one by one.
_SHOWN = names_in(
    """expand repeat unsqueeze squeeze view reshape to type_as flatten permute transpose contiguous
    float half double bfloat16 clone tanh sigmoid relu gelu silu dropout"""
)
_JOINED = names_in("cat concat stack embedding append") | SHAPED_ALIKE
_CONVOLUTION, _DECODER = nn.modules.conv._ConvNd, nn.TransformerDecoder
_TAKERS = (nn.Linear, _CONVOLUTION, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, _DECODER)
# Where operations come from. None of them takes a weight out of a module.
_OPERATIONS = (torch, nn, F, torch.linalg, torch.fft, torch.special, torch.utils.checkpoint, math)
_BUILTINS = names_in(
    """len range zip enumerate reversed sum min max abs round pow int float bool str tuple list isinstance
    print ValueError RuntimeError TypeError AssertionError NotImplementedError"""
)
_PLAIN = (bool, int, float, str, torch.Size, torch.dtype, torch.device, types.NoneType)
# What may be read of a value that is not known: if it is a module or a container, no weight has such a name.
_OF_TENSORS = frozenset(name for name in dir(Tensor) if not name.startswith("_")) | {"append"}
_NOT_IN_A_PASS = names_in("__init__ __repr__ __annotate__ __annotate_func__ __getstate__ __setstate__")
_UNKNOWN, _REFUSED = object(), object()
_Parents = dict[ast.AST, ast.AST]


class _Method(NamedTuple):
    """A method as it is read; ``holders`` name what holds a parameter, and ``takers`` layers of torch's."""

    name: str
    own: str  # what it calls the module
    parents: _Parents
    holders: set[str]  # the parameter's own name, locals, methods that return it
    takers: list[str]  # all that they are given is activity


def is_only_added(module: nn.Module, name: str) -> bool:
    """Whether a module adds, joins or looks up a parameter of its own, or hands it to layers as activity."""
    holders, before, is_used = {name}, 0, False
    takers = [name for name, child in module.named_children() if isinstance(child, _TAKERS)]
    methods = [
        _Method(m.name, m.args.args[0].arg if m.args.args else "self", parents_in(m), holders, takers)
        for m in methods_of(type(module))
    ]
    while len(holders) > before:
        before = len(holders)
        for method in methods:
            for node in method.parents:
                is_local = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
                is_read = is_local and f"{method.name}.{node.id}" in holders  # type: ignore[attr-defined]
                if is_read or any(reads(node, method.own, held) for held in holders):
                    is_used, call = True, method.parents[node]
                    value = call if isinstance(call, ast.Call) and call.func is node else node
                    if not _is_added(value, method):
                        return False
    return is_used


def quiet_modules(model: nn.Module) -> set[int]:
    """Return the ids of the modules whose forward pass takes up no weight but inside the layer that owns it.

    Such code calls modules, torch's operations, methods of tensors, and functions of which the same is true.
    """
    known = {id(module) for module in model.modules()}
    own = {id(module): _Reading(module, known).is_quiet() for module in model.modules()}
    quiet = {id(module) for module in model.modules() if all(own[id(part)] for part in module.modules())}
    # Attention takes up the weight of its output projection. It alone does, and those about it stay quiet.
    return quiet - {id(module) for module in model.modules() if isinstance(module, nn.MultiheadAttention)}


class _Reading:
    """Reads the forward pass of a module, and whatever it calls."""

    def __init__(self, module: nn.Module, known: set[int]) -> None:
        self._module, self._known = module, known
        self._called: list[tuple[types.FunctionType, nn.Module | None]] = []  # grows while it is read

    def is_quiet(self) -> bool:
        """Whether no weight is taken up in it."""
        module = self._module
        held = [*vars(module).items(), *module.named_parameters(recurse=False)]
        for kind in _own_bases(type(module)):
            held += vars(kind).items()
        unclear = nn.ParameterList, nn.ParameterDict, nn.utils.parametrize.ParametrizationList
        if isinstance(module, unclear) or vars(module).keys() & {"forward", "weight"}:
            return False
        if any(_may_hide_a_weight(name, value) for name, value in held):
            return False
        self._called = [(type(module).forward, module)]  # type: ignore[list-item]
        return all(self._calls_quietly(function, owner) for function, owner in self._called)

    def _calls_quietly(self, function: types.FunctionType, owner: nn.Module | None) -> bool:
        if function.__module__.startswith("torch."):
            return function.__name__ in ("forward", "_forward_unimplemented")
        if not isinstance(function, types.FunctionType):
            return False
        tree = _tree_of(function)
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        is_bare = not (function.__code__.co_freevars or hasattr(function, "__wrapped__"))
        if (
            not isinstance(tree, ast.FunctionDef)
            or not is_bare
            or not all(is_plain(default) for default in defaults)
        ):
            return False
        scope = _Scope(tree, function.__globals__, owner)
        return all(self._allows(node, scope) for node in scope.parents)

    def _allows(self, node: ast.AST, scope: "_Scope") -> bool:
        """Whether an expression holds no weight, as far as it alone shows."""
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.Global, ast.Nonlocal, ast.ClassDef)):
            return False
        if not isinstance(node, (ast.Attribute, ast.Name)):
            return True
        if not isinstance(node.ctx, ast.Load):
            return isinstance(node, ast.Name) and node.id != scope.own
        value = scope.value_of(node)
        if isinstance(value, nn.Module):
            return id(value) in self._known
        if isinstance(value, Tensor):
            return not is_matrix(value) or scope.is_added_to_activity(node) or scope.is_handed_on(node, value)
        if value is _UNKNOWN or is_plain(value) or _is_operation(value):
            return True
        function = getattr(value, "__func__", value)
        if not isinstance(function, types.FunctionType):
            return False
        if (function, getattr(value, "__self__", None)) not in self._called:
            self._called.append((function, getattr(value, "__self__", None)))
        return True


class _Scope:
    """What names stand for in the code of one function.

    Args:
        tree: Its code.
        outside: The names of the file that it stands in.
        owner: The module whose method it is.
    """

    def __init__(self, tree: ast.FunctionDef, outside: dict[str, Any], owner: nn.Module | None) -> None:
        self.parents = parents_in(tree)
        self.owner, self._outside = owner, outside
        self.own = tree.args.args[0].arg if owner is not None and tree.args.args else None
        self._local = {node.arg for node in self.parents if isinstance(node, ast.arg)}
        names = [node for node in self.parents if isinstance(node, ast.Name)]
        self._local |= {name.id for name in names if isinstance(name.ctx, ast.Store)}
        self._local |= {node.name for node in self.parents if isinstance(node, ast.FunctionDef)}

    def value_of(self, node: ast.AST) -> Any:
        """Return what an expression stands for.

        ``_UNKNOWN``: a value that is made as the code runs; ``_REFUSED``: nothing that is looked into.
        """
        if isinstance(node, ast.Name):
            if node.id == self.own:
                return self.owner
            is_harmless = node.id in self._local or node.id in _BUILTINS
            return self._outside.get(node.id, _UNKNOWN if is_harmless else _REFUSED)
        if not isinstance(node, ast.Attribute):
            return _UNKNOWN
        holder = self.value_of(node.value)
        if isinstance(holder, nn.Module):
            return _held_by(holder, node.attr)
        if isinstance(holder, types.ModuleType):
            return getattr(holder, node.attr, _REFUSED) if holder in _OPERATIONS else _REFUSED
        is_value = holder is _UNKNOWN or isinstance(holder, Tensor) or is_plain(holder)
        return _UNKNOWN if is_value and node.attr in _OF_TENSORS else _REFUSED

    def is_handed_on(self, node: ast.AST, value: Tensor) -> bool:
        """Whether a buffer goes into one of torch's own modules, as a mask does."""
        parent = self.parents[node]
        call = self.parents[parent] if isinstance(parent, ast.keyword) else parent
        taker = self.value_of(call.func) if isinstance(call, ast.Call) else None
        is_torchs = isinstance(taker, nn.Module) and type(taker).__module__.startswith("torch.nn.")
        return is_torchs and type(value) is Tensor and not value.requires_grad

    def is_added_to_activity(self, node: ast.AST) -> bool:
        """Whether an expression is added to what a module has just computed."""
        parent = self.parents[node]
        if not (isinstance(parent, ast.BinOp) and isinstance(parent.op, ast.Add)):
            return False
        other = parent.left if parent.right is node else parent.right
        return isinstance(other, ast.Call) and isinstance(self.value_of(other.func), nn.Module)


def _held_by(module: nn.Module, name: str) -> Any:
    parameters, buffers = module.named_parameters(recurse=False), module.named_buffers(recurse=False)
    held = vars(module) | dict(parameters) | dict(buffers) | dict(module.named_children())
    if name in held:
        return held[name]
    found = inspect.getattr_static(type(module), name, _REFUSED)
    return types.MethodType(found, module) if isinstance(found, types.FunctionType) else found


def is_plain(value: Any) -> bool:
    """Whether a value is a number, a name, a size and so on: nothing that holds a weight or runs."""
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(is_plain, value)))


def _is_operation(value: Any) -> bool:
    """Whether something is torch's own operation, or one of the modules that operations are taken from."""
    if isinstance(value, types.ModuleType):
        return value in _OPERATIONS
    return any(getattr(source, getattr(value, "__name__", ""), None) is value for source in _OPERATIONS)


def _may_hide_a_weight(name: str, value: Any) -> bool:
    """Whether code could get at an attribute of a module without naming it as a module's."""
    is_implicit = name.startswith("__") and callable(value) and name not in _NOT_IN_A_PASS
    is_made = isinstance(value, Tensor) and value.grad_fn is not None  # by a hook before each pass: pruning
    return is_implicit or is_made or (name in _OF_TENSORS and not is_plain(value))


def _tree_of(code: Any) -> ast.stmt | None:
    """Return the code of a function or class, without its annotations; None: it cannot be read."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(code))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    for node in ast.walk(tree):
        vars(node).update(dict.fromkeys({"annotation", "returns"} & vars(node).keys()))
    return tree


def _own_bases(kind: type) -> list[type]:
    """Return a class and its bases that are not torch's."""
    return [base for base in kind.__mro__ if base is not object and not base.__module__.startswith("torch.")]


def methods_of(kind: type) -> Iterator[ast.FunctionDef]:
    """Yield the methods of a class; none where the code of one of its bases cannot be read.

    Constructors say nothing of how signals pass.
    """
    trees = [tree for base in _own_bases(kind) if (tree := _tree_of(base)) is not None]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    for node in nodes if len(trees) == len(_own_bases(kind)) else ():
        if isinstance(node, ast.FunctionDef) and not node.name.startswith(
            ("__init__", "reset", "init", "_init")
        ):
            yield node


def parents_in(tree: ast.AST) -> _Parents:  # noqa: D103 (its name says it)
    return {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}


def reads(node: ast.AST, own: str, name: str) -> bool:
    """Whether an expression is ``self.name``, with ``own`` as the name of self."""
    if not isinstance(node, ast.Attribute) or node.attr != name:
        return False
    return isinstance(node.value, ast.Name) and node.value.id == own


def _is_added(node: ast.AST, method: _Method) -> bool:
    """Follow a value outwards to the operation that takes it up, or to a name that holds it from there on."""
    parent = method.parents.get(node)
    if isinstance(parent, ast.BinOp):  # with what is made of the module's own parameters it stays a weight
        names = _names_in(parent.left if parent.right is node else parent.right)
        return isinstance(parent.op, (ast.Add, ast.Sub)) and names != {method.own}
    if isinstance(parent, ast.Assign):
        method.holders.update(f"{method.name}.{name}" for name in _names_in(parent.targets[0]))
        return True
    if isinstance(parent, ast.Return) and method.name != "forward":
        method.holders.add(method.name)
        return True
    if isinstance(parent, ast.AugAssign):
        return isinstance(parent.op, (ast.Add, ast.Sub))
    if isinstance(parent, ast.Subscript):
        return parent.value is node and _is_added(parent, method)
    if isinstance(parent, ast.Attribute):
        call = method.parents.get(parent)
        if parent.attr in ("shape", "dtype", "device", "size", "dim", "ndim"):
            return True
        is_shown = parent.attr in _SHOWN and isinstance(call, ast.Call) and call.func is parent
        return is_shown and _is_added(call, method)  # type: ignore[arg-type]
    if isinstance(parent, ast.Compare):
        return True
    if isinstance(parent, ast.keyword):
        return parent.arg in ("attn_mask", "hx")
    if isinstance(parent, (ast.List, ast.Tuple, ast.IfExp)):
        return _is_added(parent, method)
    if isinstance(parent, ast.Call) and node is not parent.func:
        function = parent.func
        called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if called in _SHOWN or any(part in called for part in ("interpolate", "resample", "norm")):
            return _is_added(parent, method)
        return called in _JOINED or any(reads(function, method.own, taker) for taker in method.takers)
    return False


def _names_in(code: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(code) if isinstance(node, ast.Name)}
