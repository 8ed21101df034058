"""What is checked of an untied model while it trains: what would turn a rule into another one in silence."""

import ast
import inspect
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from feedbackpath.core.layers import UntiedWeight, kind_of
from feedbackpath.core.modules import FeedbackModule
from feedbackpath.core.operations import PRODUCTS
from feedbackpath.errors import RuleError, UnconvertedLayerWarning, UntieError, level_outside


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


def refuse_sharded(weights: Sequence[UntiedWeight]) -> None:
    """Refuse weights that were sharded after they were untied: a process sees its own part of each alone.

    Raises:
        UntieError: Names the first such weight.
    """
    for weight in weights:
        if hasattr(weight.weight, "full_tensor"):
            raise UntieError(
                f"the weight of {weight.name!r} is sharded over processes (FSDP, tensor parallelism), and "
                "rules, mirrors and measures would see one part of it: use DistributedDataParallel"
            )


def name_newcomers(model: nn.Module, known: set[str], step: int) -> None:
    """Warn of layers that came into a model after it was untied: errors go back through their weights.

    Args:
        model: The untied model.
        known: Paths to layers without feedback weights that have been named; new ones are added.
        step: The number of the step. It takes time to look, so that this is done ever more seldom.
    """
    if step & (step - 1):
        return
    newcomers = plain_layers(model) - known
    known |= newcomers
    if newcomers:
        warnings.warn(
            f"{', '.join(map(repr, sorted(newcomers)))} came into the model after it was untied: errors "
            "go back through the weights there; untie the model after its last layer is in place",
            UnconvertedLayerWarning,
            stacklevel=level_outside(),
        )


def plain_layers(model: nn.Module) -> set[str]:
    """Return the paths to the layers that own weights and have no feedback weights."""
    return {
        name
        for name, module in model.named_modules()
        if kind_of(module).weights(module)
        and not (isinstance(module, FeedbackModule) and module.untied.weights)
    }


def hidden_weights(model: nn.Module) -> dict[str, str]:
    """Return weights that are no matrix among the model's parameters, by path, with what they are.

    Buffers and one-dimensional parameters that a module's code puts into a product, and layers or parameters
    in a plain list or dictionary, which PyTorch does not find either.
    """
    known = {id(module) for module in model.modules()} | {id(p) for p in model.parameters()}
    found = {}
    for path, module in model.named_modules():
        multiplied = _multiplied_names(type(module))
        for name, tensor in [*module.named_buffers(recurse=False), *module.named_parameters(recurse=False)]:
            is_flat = isinstance(tensor, nn.Parameter) and tensor.dim() < 2
            if (
                name in multiplied
                and not name.endswith("bias")
                and tensor.is_floating_point()
                and (is_flat or name in module._buffers)
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
