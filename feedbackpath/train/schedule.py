"""The learning rate and the weight decay of each step."""

import math

import torch

from feedbackpath.errors import ConfigError
from feedbackpath.train.config import TrainConfig

EARLY_SHARE = 0.1  # of the training steps: those that hold the early e-folds


class Schedule:
    """Learning rate: linear warm-up, then a half cosine to 0, steps, or constant. Decay: early, then usual.

    With ``early_efolds``, the first tenth of the steps have a decay of their own. By this decay alone, the
    difference that Kolen-Pollack learning starts with, W - B, shrinks by so many factors of e in them::

        early_efolds = sum over these steps of lr_t wd / (1 - momentum)        (AdamW: without momentum)

    Args:
        config: The settings.
        steps_per_epoch: Training steps per epoch.
        num_steps: Training steps in all.
        epochs_before: Epochs of mirror mode alone that came first; the milestones count them too.

    Raises:
        ConfigError: The early e-folds are too many for so few steps.

    Example:
        >>> schedule = Schedule(TrainConfig(lr=0.1, warmup_epochs=0), 10, 20)
        >>> [round(schedule.learning_rate(step), 3) for step in (0, 10, 20)]
        [0.1, 0.05, 0.0]
        >>> steps = TrainConfig(lr=0.1, warmup_epochs=0, schedule="steps", milestones=(1, 3))
        >>> [round(Schedule(steps, 10, 50).learning_rate(step), 4) for step in (9, 10, 30)]
        [0.1, 0.01, 0.001]
        >>> early = TrainConfig(optimizer="adamw", lr=0.01, weight_decay=0.1, early_efolds=5)
        >>> schedule = Schedule(early, 500, 10_000)
        >>> round(sum(schedule.learning_rate(t) * schedule.weight_decay(t) for t in range(1000)), 6)
        5.0
        >>> schedule.weight_decay(1000)
        0.1
    """

    def __init__(
        self, config: TrainConfig, steps_per_epoch: int, num_steps: int, *, epochs_before: int = 0
    ) -> None:
        self.config, self.steps_per_epoch, self.num_steps = config, steps_per_epoch, num_steps
        self.epochs_before = epochs_before
        self.early_steps = 0 if config.early_efolds is None else math.ceil(EARLY_SHARE * num_steps)
        self.early_decay = self._spread(config.early_efolds or 0.0)

    @classmethod
    def over(cls, config: TrainConfig, samples: int, mirror_epochs: int = 0) -> "Schedule":
        """Return the schedule of a run over so many training samples."""
        # A last minibatch of one sample is left out: BatchNorm has no variance there.
        steps_per_epoch = math.ceil((samples - 1) / config.batch_size)
        num_steps = max(config.epochs - mirror_epochs, 0) * steps_per_epoch
        num_steps = min(num_steps, config.max_steps or num_steps)
        return cls(config, steps_per_epoch, num_steps, epochs_before=mirror_epochs)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, from 0."""
        config = self.config
        warmup = min(config.warmup_epochs * self.steps_per_epoch, self.num_steps)
        if step < warmup:
            return config.peak_lr * (step + 1) / (warmup + 1)
        if config.schedule == "constant":
            return config.peak_lr
        if config.schedule == "steps":
            done = self.epochs_before + step // self.steps_per_epoch
            return config.peak_lr * 0.1 ** sum(done >= milestone for milestone in config.milestones)
        share = (step - warmup) / max(self.num_steps - warmup, 1)
        return config.peak_lr * 0.5 * (1.0 + math.cos(math.pi * share))

    def weight_decay(self, step: int) -> float:
        """Return the weight decay of a step, from 0."""
        return self.early_decay if step < self.early_steps else self.config.weight_decay

    def set_rates(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Give an optimizer the learning rate and the decay of a step; return the rate."""
        lr, decay = self.learning_rate(step), self.weight_decay(step)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = lr, decay
        return lr

    def _spread(self, efolds: float) -> float:
        """Return the one decay that gives so many e-folds in the early steps."""
        if self.early_steps == 0:
            return 0.0
        momentum = self.config.momentum if self.config.optimizer == "sgd" else 0.0
        rates = [self.learning_rate(step) for step in range(self.early_steps)]
        decay = efolds * (1.0 - momentum) / sum(rates)
        # From twice this bound on a weight oscillates, and the sum above says nothing: see docs/balance.md.
        if max(rates) * decay > (1.0 - math.sqrt(momentum)) ** 2 / 2:
            raise ConfigError(
                f"--early-efolds {efolds:g}: too many for a tenth of the training steps (all: "
                f"{self.num_steps}), because the decay would be too strong; give fewer, or more epochs"
            )
        return decay
