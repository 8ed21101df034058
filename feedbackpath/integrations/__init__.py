"""A path inside other people's training loops: one step of it for each step of the optimizer.

``follow`` serves any loop. What Lightning, transformers' ``Trainer`` and accelerate need beside it is in a
file for each, which imports that package: nothing else here does, and none is required.
"""

from typing import Any

import torch

from feedbackpath.errors import RuleError
from feedbackpath.path import FeedbackPath


class Following:
    """Steps a path whenever an optimizer has stepped: once under accumulation, not when a step is skipped.

    Made by ``follow``.
    """

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def stop(self) -> None:
        """Stop calling ``path.step()``."""
        while self._handles:
            self._handles.pop().remove()


def follow(
    optimizer: torch.optim.Optimizer, path: FeedbackPath, *, max_norm: float | None = None
) -> Following:
    """Call ``path.step()`` after each step of an optimizer, and clip gradients before it.

    Args:
        optimizer: A torch optimizer; of accelerate's, the one inside.
        path: The path of the model that it trains.
        max_norm: Clip by the norm of the forward weights' gradients (``path.clip_grad_norm_``); None: do not.
            Not for loops that compute the loss within ``optimizer.step``.

    Raises:
        RuleError: The optimizer holds none of the path's weights, or does not suit the rule.

    Example:
        >>> import feedbackpath as fp
        >>> model = torch.nn.Linear(3, 2)
        >>> path = fp.untie(model, "kp")
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
        >>> following = follow(optimizer, path, max_norm=1.0)
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> path.context.steps
        1
    """
    if not holds(optimizer, path):
        raise RuleError(
            f"{type(optimizer).__name__} has no weight of the path's model: make it from "
            "model.parameters(), after untie"
        )
    path.check_optimizer(optimizer)
    handles = [optimizer.register_step_post_hook(lambda *_: path.step())]
    if max_norm is not None:
        handles.append(optimizer.register_step_pre_hook(lambda *_: (path.clip_grad_norm_(max_norm), None)[1]))
    return Following(handles)


def holds(optimizer: torch.optim.Optimizer, path: FeedbackPath) -> bool:
    """Whether an optimizer updates a weight of a path."""
    weights = {id(weight.weight) for weight in path.weights}
    return any(id(p) in weights for group in optimizer.param_groups for p in group["params"])


def learns(path: FeedbackPath) -> bool:
    """Whether feedback weights have gradients of their own, which others' clipping would count."""
    return any(rule.learns for rule, _ in path.groups)
