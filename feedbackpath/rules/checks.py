"""What is checked of an untied model while it trains: what would turn a rule into another one in silence."""

import ast
import inspect
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from feedbackpath.core.context import RuleContext
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.core.operations import PRODUCTS
from feedbackpath.errors import RuleError, UnconvertedLayerWarning, level_outside
from feedbackpath.rules.update_watch import UpdateWatch


def refuse_changed_flags(groups: Sequence[tuple[Any, list[UntiedWeight]]]) -> None:
    """Refuse a B whose ``requires_grad`` was switched, as ``model.requires_grad_(True)`` does to all.

    A fixed B would turn into a Kolen-Pollack one in silence, or a frozen W's B would go on learning.

    Raises:
        RuleError: Names the first such weight, and how to set it back.
    """
    for rule, group in groups:
        for weight in () if rule.is_tied else group:
            expected = rule.learns and weight.weight.requires_grad
            if weight.has_feedback and weight.feedback.requires_grad != expected:
                raise RuleError(
                    f"requires_grad of the feedback weight of {weight.name!r} was changed, so that "
                    f"{rule.name} no longer holds: set it back by "
                    f".{weight.feedback_name}.requires_grad_({expected})"
                )


def warn_of_older_copy(model: Any) -> None:
    """Warn if somebody has gone through ``model.parameters()`` as far as a copy made before ``untie`` goes.

    Such a copy has no B, so that from the second layer on each W of its is paired with another parameter.
    """
    if model.untied.memo.pop("paired", False):
        warnings.warn(
            "code went through model.parameters() side by side with a list that has no feedback weights. If "
            "that was an average of weights (EMA, AveragedModel) made before untie, it averages W with B: "
            "make it after untie",
            UnconvertedLayerWarning,
            stacklevel=level_outside(),
        )


def clip_by_forward_norm(
    model: nn.Module,
    groups: Sequence[tuple[Any, list[UntiedWeight]]],
    context: RuleContext,
    max_norm: float,
    norm_type: float,
) -> Tensor:
    """Scale all gradients alike, so that those of forward parameters have at most a norm; return theirs."""
    if max_norm < 0:
        raise RuleError(f"clip_grad_norm_: max_norm is {max_norm}; it must be at least 0")
    learning = [w for rule, group in groups if rule.learns for w in group if w.has_feedback]
    learned = {id(weight.feedback) for weight in learning}
    with_gradient = [p for p in model.parameters() if p.grad is not None]
    forward = [p.grad for p in with_gradient if id(p) not in learned if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(forward, norm_type)
    torch.nn.utils.clip_grads_with_norm_(with_gradient, max_norm, norm)
    for weight in learning:
        context.part(UpdateWatch).note(weight)
    return norm


def hidden_weights(model: nn.Module) -> dict[str, str]:
    """Return weights that are no matrix among the model's parameters, by path, with what they are.

    Buffers and one-dimensional parameters that a module's code puts into a product, and layers or parameters
    in a plain list or dictionary, which PyTorch does not find either.
    """
    known = {id(module) for module in model.modules()} | {id(p) for p in model.parameters()}
    found = {}
    for path, module in model.named_modules():
        multiplied, buffers = _multiplied_names(type(module)), dict(module.named_buffers(recurse=False))
        for name, tensor in [*buffers.items(), *module.named_parameters(recurse=False)]:
            is_flat = isinstance(tensor, nn.Parameter) and tensor.dim() < 2
            if (
                name in multiplied
                and not name.endswith("bias")
                and tensor.is_floating_point()
                and (is_flat or name in buffers)
            ):
                found[f"{path}.{name}".lstrip(".")] = "flat parameter" if is_flat else "buffer in a product"
        for name, value in vars(module).items():
            if not name.startswith("_") and any(id(part) not in known for part in _modules_in(value)):
                found[f"{path}.{name}".lstrip(".")] = f"layers in a plain {type(value).__name__}"
    return found


def _modules_in(value: Any) -> Iterator[nn.Module | nn.Parameter]:
    """Yield the modules, and parameters, in lists, tuples and dictionaries."""
    parts = value.values() if isinstance(value, dict) else value
    for part in parts if isinstance(value, (list, tuple, dict)) else ():
        if isinstance(part, (nn.Module, nn.Parameter)):
            yield part
        yield from _modules_in(part)


def _multiplied_names(kind: type) -> set[str]:
    """Return the attributes that the forward pass of a user's class puts into a product."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))  # type: ignore[attr-defined]
    except (OSError, TypeError, SyntaxError):
        return set()
    calls = [
        n for n in ast.walk(tree) if isinstance(n, ast.Call) and not kind.__module__.startswith("torch.")
    ]
    products: list[ast.AST] = [
        n for n in calls if getattr(n.func, "attr", getattr(n.func, "id", "")) in PRODUCTS
    ]
    products += [n for n in ast.walk(tree) if isinstance(n, ast.BinOp) and isinstance(n.op, ast.MatMult)]
    named = [n for product in products for n in ast.walk(product) if isinstance(n, ast.Attribute)]
    return {n.attr for n in named if isinstance(n.value, ast.Name) and n.value.id == "self"}
