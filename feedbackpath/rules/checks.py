"""What is checked of an untied model while it trains: what would turn a rule into another one in silence."""

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from feedbackpath.core.layers import UntiedWeight, kind_of
from feedbackpath.core.modules import FeedbackModule
from feedbackpath.errors import RuleError, UnconvertedLayerWarning, UntieError


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
            stacklevel=3,
        )


def plain_layers(model: nn.Module) -> set[str]:
    """Return the paths to the layers that own weights and have no feedback weights."""
    return {
        name
        for name, module in model.named_modules()
        if kind_of(module).weights(module)
        and not (isinstance(module, FeedbackModule) and module.untied.weights)
    }
