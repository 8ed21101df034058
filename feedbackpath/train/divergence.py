"""Where a loss that is no longer finite began."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

LOSS_ITSELF = "the loss itself: every layer's output is finite"


@torch.no_grad()
def find_origin(model: nn.Module, compute_loss: Callable[[], Tensor]) -> str:
    """Return, in words, the first place in the network where a value is not finite.

    Args:
        model: The network, with the weights that gave the loss.
        compute_loss: Runs it forward on the data that gave the loss.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> _ = nn.init.constant_(model[0].bias, float("inf"))
        >>> find_origin(model, lambda: model(torch.ones(1, 2)).sum())
        "'bias' of layer '0'"
    """
    for name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if not parameter.isfinite().all():
                return f"{parameter_name!r} of layer {name!r}"
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not output.isfinite().all():
                found.append(f"the output of layer {name!r}")

        return look

    leaves = {name: module for name, module in model.named_modules() if not any(module.children())}
    hooks = [module.register_forward_hook(watch(name)) for name, module in leaves.items()]
    try:
        compute_loss()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else LOSS_ITSELF
