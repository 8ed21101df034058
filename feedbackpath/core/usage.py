"""How a module's own code uses a parameter: whether it only ever adds it, so that no error passes through it.

A position embedding is a matrix that is added to a signal. It needs no feedback weight, and that can be read
off the module's code. Where the code cannot be read, or says anything else, a parameter counts as one that
multiplies.
"""

import ast
import inspect
import textwrap

from torch import nn

# They show a parameter in another shape, or a part of it.
_SHOWN = frozenset(
    [
        "expand",
        "repeat",
        "unsqueeze",
        "squeeze",
        "view",
        "reshape",
        "to",
        "type_as",
        "flatten",
        "permute",
        "transpose",
        "contiguous",
        "float",
        "half",
        "double",
        "bfloat16",
        "interpolate",
    ]
)
_JOINED = frozenset(["cat", "concat", "stack", "embedding"])


def is_only_added(module: nn.Module, name: str) -> bool:
    """Whether a module's code adds, joins or looks up a parameter of its own, and does nothing else with it.

    Example:
        >>> class Positions(nn.Module):
        ...     def forward(self, x):
        ...         return x + self.positions[: len(x)]
        >>> is_only_added(Positions(), "positions")  # doctest: +SKIP
        True
    """
    parents: dict[ast.AST, ast.AST] = {}
    uses = []
    for method in _code_of(type(module)):
        own = method.args.args[0].arg if method.args.args else "self"
        for node in ast.walk(method):
            parents |= dict.fromkeys(ast.iter_child_nodes(node), node)
            if _reads(node, own, name):
                uses.append(node)
    return bool(uses) and all(_is_added(use, parents) for use in uses)


def _code_of(kind: type) -> tuple[ast.FunctionDef, ...]:
    """Return the methods of a class, of which the constructor says nothing of how signals pass."""
    methods = []
    for base in kind.__mro__:
        if base is nn.Module or base.__module__.startswith("torch."):
            break
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError, IndentationError):
            return ()
        found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        methods += [
            node for node in found if not node.name.startswith(("__init__", "reset", "init", "_init"))
        ]
    return tuple(methods)


def _reads(node: ast.AST, own: str, name: str) -> bool:
    """Whether an expression is ``self.name``, with ``own`` as the name of self."""
    if not isinstance(node, ast.Attribute) or node.attr != name:
        return False
    return isinstance(node.value, ast.Name) and node.value.id == own


def _is_added(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Follow a value outwards to the operation that takes it up."""
    parent = parents.get(node)
    if isinstance(parent, ast.BinOp):
        return isinstance(parent.op, (ast.Add, ast.Sub))
    if isinstance(parent, ast.AugAssign):
        return isinstance(parent.op, (ast.Add, ast.Sub))
    if isinstance(parent, ast.Subscript):
        return parent.value is node and _is_added(parent, parents)
    if isinstance(parent, ast.Attribute):
        call = parents.get(parent)
        if parent.attr in ("shape", "dtype", "device", "size", "dim", "ndim"):
            return True
        is_shown = parent.attr in _SHOWN and isinstance(call, ast.Call) and call.func is parent
        return is_shown and call is not None and _is_added(call, parents)
    if isinstance(parent, (ast.List, ast.Tuple)):
        return _is_added(parent, parents)
    if isinstance(parent, ast.Call) and node is not parent.func:
        function = parent.func
        called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        return called in _JOINED
    return False
