"""A path in Lightning: ``Trainer(callbacks=[StepPath(path)])``."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from feedbackpath.errors import RuleError
from feedbackpath.integrations import Following, follow, holds, learns
from feedbackpath.path import FeedbackPath


class StepPath(Callback):
    """Step a path after each optimizer step, clip by the norm of W, and keep its state in checkpoints.

    Untie the network before ``fit``; ``configure_optimizers`` runs after that.

    Args:
        path: The path of the module, or of a network in it.
        max_norm: Clip by the norm of the forward weights' gradients, instead of ``gradient_clip_val``.

    Raises:
        RuleError: Lightning clips by itself, and would count feedback weights; or no optimizer holds weights.
    """

    def __init__(self, path: FeedbackPath, max_norm: float | None = None) -> None:
        self._path, self._max_norm = path, max_norm
        self._following: list[Following] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the optimizers that update the path's weights."""
        if trainer.gradient_clip_val and (learns(self._path) or self._max_norm is not None):
            raise RuleError(
                "Trainer(gradient_clip_val=...) clips by the norm of W and B together: leave it out, and "
                "give StepPath(path, max_norm=...)"
            )
        chosen = [optimizer for optimizer in trainer.optimizers if holds(optimizer, self._path)]
        if not chosen:
            raise RuleError(
                "no optimizer of the module has a weight of the path's model: untie the module's own network"
            )
        self._following = [follow(optimizer, self._path) for optimizer in chosen]

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Clip; gradients are there only within the optimizer's step."""
        if self._max_norm is not None and holds(optimizer, self._path):
            self._path.clip_grad_norm_(self._max_norm)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Follow no longer."""
        while self._following:
            self._following.pop().stop()

    def state_dict(self) -> dict[str, Any]:
        """Return the path's state, for checkpoints."""
        return self._path.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up the path's state from a checkpoint."""
        self._path.load_state_dict(state_dict)
