"""A path under accelerate: ``step_path(accelerator, optimizer, path)`` after ``accelerator.prepare``."""

from typing import Any

from accelerate import Accelerator

from feedbackpath.integrations import Following, follow
from feedbackpath.path import FeedbackPath


def step_path(
    accelerator: Accelerator, optimizer: Any, path: FeedbackPath, *, max_norm: float | None = None
) -> Following:
    """Step a path after each optimizer step, and let ``save_state`` and ``load_state`` take its state along.

    Args:
        accelerator: What prepared the optimizer. Under accumulation it steps when gradients are in step.
        optimizer: The prepared optimizer, made from the untied model's parameters.
        path: The path.
        max_norm: Clip by the norm of the forward weights' gradients, instead of
            ``accelerator.clip_grad_norm_``, which counts feedback weights that learn.

    Raises:
        RuleError: The optimizer holds none of the path's weights, or does not suit the rule.
    """
    accelerator.register_for_checkpointing(path)
    return follow(getattr(optimizer, "optimizer", optimizer), path, max_norm=max_norm)
