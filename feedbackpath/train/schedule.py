"""The learning rate of each step."""

import math

from feedbackpath.train.config import TrainConfig


def learning_rate(
    step: int, steps_per_epoch: int, num_steps: int, config: TrainConfig, *, epochs_before: int = 0
) -> float:
    """Return the learning rate of a step: linear warm-up, then a half cosine to 0, steps, or constant.

    Args:
        step: Which training step, from 0.
        steps_per_epoch: Training steps per epoch.
        num_steps: Training steps in all.
        config: The settings.
        epochs_before: Epochs of mirror mode alone that came first; the milestones count them too.

    Example:
        >>> config = TrainConfig(lr=0.1, warmup_epochs=0)
        >>> [round(learning_rate(step, 10, 20, config), 3) for step in (0, 10, 20)]
        [0.1, 0.05, 0.0]
        >>> config = TrainConfig(lr=0.1, warmup_epochs=0, schedule="steps", milestones=(1, 3))
        >>> [round(learning_rate(step, 10, 50, config), 4) for step in (9, 10, 30)]
        [0.1, 0.01, 0.001]
    """
    warmup = min(config.warmup_epochs * steps_per_epoch, num_steps)
    if step < warmup:
        return config.peak_lr * (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return config.peak_lr
    if config.schedule == "steps":
        done = epochs_before + step // steps_per_epoch
        return config.peak_lr * 0.1 ** sum(done >= milestone for milestone in config.milestones)
    share = (step - warmup) / max(num_steps - warmup, 1)
    return config.peak_lr * 0.5 * (1.0 + math.cos(math.pi * share))
