"""A path in transformers' ``Trainer``: ``Trainer(..., callbacks=[StepPath(path)])``."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from feedbackpath.errors import RuleError
from feedbackpath.integrations import Following, follow, learns
from feedbackpath.path import FeedbackPath

FILE = "feedbackpath.pt"


class StepPath(TrainerCallback):
    """Step a path after each optimizer step, clip by the norm of W, and keep its state in checkpoints.

    Args:
        path: The path of the model, untied before the ``Trainer`` is made.
        max_norm: Clip by the norm of the forward weights' gradients; set ``max_grad_norm=0`` beside it.

    Raises:
        RuleError: The ``Trainer`` clips by itself, and would count feedback weights; or a checkpoint that it
            resumes from has no state of the path.
    """

    def __init__(self, path: FeedbackPath, max_norm: float | None = None) -> None:
        self._path, self._max_norm = path, max_norm
        self._following: Following | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Follow the optimizer; take up the path's state where training resumes."""
        if args.max_grad_norm and (learns(self._path) or self._max_norm is not None):
            raise RuleError(
                "TrainingArguments(max_grad_norm=1.0), the default, clips by the norm of W and B together: "
                "set it to 0, and give StepPath(path, max_norm=...)"
            )
        if state.global_step:
            file = self._file(args, state)
            if not file.exists():
                raise RuleError(f"{file} is missing: the checkpoint was saved without StepPath")
            self._path.load_state_dict(torch.load(file, weights_only=True))
        optimizer = given["optimizer"]
        inner = getattr(optimizer, "optimizer", optimizer)
        self._following = follow(inner, self._path, max_norm=self._max_norm)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Save the path's state beside the checkpoint's other files."""
        if state.is_world_process_zero:
            torch.save(self._path.state_dict(), self._file(args, state))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Follow no longer."""
        if self._following is not None:
            self._following.stop()

    def _file(self, args: TrainingArguments, state: TrainerState) -> Path:
        return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / FILE
