"""The one training loop: one rule, one seed, told as a stream of events."""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feedbackpath.data import Dataset, Split, minibatches
from feedbackpath.errors import ConfigError
from feedbackpath.models import build_model
from feedbackpath.path import FeedbackPath, untie
from feedbackpath.train.config import CompareConfig
from feedbackpath.train.rules import make_rule

EVALUATION_BATCH = 500


@dataclass(frozen=True)
class Step:
    """A training step was done; ``loss`` is its mean cross-entropy in nats."""

    epoch: int
    step: int
    num_steps: int
    loss: float


@dataclass(frozen=True)
class Measured:
    """The network was measured: after its first mirroring (epoch 0) and after each epoch.

    ``record`` is a history entry of ``results.json``; ``resume_state`` goes into a checkpoint.
    """

    epoch: int
    record: dict[str, Any]
    resume_state: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Diverged:
    """The loss is no longer finite; the run ends."""

    epoch: int
    step: int


Event = Step | Measured | Diverged


def train(
    config: CompareConfig, rule: str, seed: int, dataset: Dataset, resume_state: dict[str, Any] | None = None
) -> Iterator[Event]:
    """Train one network by one rule and yield what happens.

    Initial forward weights and the order of samples depend on the seed alone, so that all rules of a seed
    share them.

    Args:
        config: The settings.
        rule: The rule's name.
        seed: The seed of weights, feedback weights, order and augmentation.
        dataset: The data, made for the same seed.
        resume_state: A ``Measured.resume_state`` to go on from; the events after it are the same as if
            the run had not been broken.
    """
    run = _Run(config, rule, seed, dataset)
    first_epoch = 1
    if resume_state is None:
        started = time.perf_counter()
        if run.path.mirrors:
            run.path.mirror()
        yield run.measure(epoch=0, train_loss=None, started=started)
    else:
        run.load_state(resume_state)
        first_epoch = resume_state["epoch"] + 1
    for epoch in range(first_epoch, config.epochs + 1):
        started, losses = time.perf_counter(), []
        for loss in run.train_epoch(epoch):
            if not math.isfinite(loss):
                yield Diverged(epoch, run.step)
                return
            losses.append(loss)
            yield Step(epoch, run.step, run.num_steps, loss)
        yield run.measure(epoch, sum(losses) / max(len(losses), 1), started)
        if run.step >= run.num_steps:
            return


class _Run:
    """A network, its feedback path and its optimizer while they train."""

    def __init__(self, config: CompareConfig, rule: str, seed: int, dataset: Dataset) -> None:
        self.config, self.seed, self.dataset = config, seed, dataset
        self.dtype = torch.float64 if config.precision == "64-true" else torch.float32
        self.model = make_network(config, seed, dataset).to(self.dtype)
        self.path = make_path(config, rule, seed, self.model)
        self.optimizer = make_optimizer(self.model, config)
        self.path.check_optimizer(self.optimizer)
        # A last minibatch of one sample is left out: BatchNorm has no variance there.
        self.steps_per_epoch = math.ceil((len(dataset.train) - 1) / config.batch_size)
        num_steps = config.epochs * self.steps_per_epoch
        self.num_steps = min(num_steps, config.max_steps or num_steps)
        self.step = 0

    def train_epoch(self, epoch: int) -> Iterator[float]:
        """Train for an epoch, yielding the loss of each step."""
        # Whatever is random inside the model (dropout) then depends on seed and epoch alone.
        torch.manual_seed(self.seed * 1_000_003 + epoch)
        self.model.train()
        for x, y in self._training_batches(epoch):
            if self.step >= self.num_steps:
                return
            yield self._train_step(x, y)

    def _train_step(self, x: Tensor, y: Tensor) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.steps_per_epoch, self.num_steps, self.config)
        loss = self._loss(x, y)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        if self.config.clip_norm is not None:
            self.path.clip_grad_norm_(self.config.clip_norm)
        self.optimizer.step()
        self.path.step()
        self.step += 1
        return loss.item()

    def measure(self, epoch: int, train_loss: float | None, started: float) -> Measured:
        """Measure test error, angles and gains."""
        record = {
            "epoch": epoch,
            "train_loss": train_loss,
            "test_error": self._error_percent(getattr(self.dataset, self.config.evaluate_on)),
            "matrix_angle_deg": self.path.matrix_angles(),
            "delta_angle_deg": self._delta_angles(epoch),
            "gain": self.path.gains(),
            "seconds": time.perf_counter() - started,
        }
        return Measured(epoch, record, self._state(epoch))

    def load_state(self, state: dict[str, Any]) -> None:
        """Go back to where ``state`` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.path.load_state_dict(state["path"])
        self.step = state["step"]

    def _state(self, epoch: int) -> dict[str, Any]:
        return {
            "epoch": epoch,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "path": self.path.state_dict(),
        }

    def _training_batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return minibatches(
            self.dataset.train,
            batch_size=self.config.batch_size,
            seed=self.seed,
            epoch=epoch,
            shuffle=True,
        )

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        with self._autocast():
            return F.cross_entropy(self.model(self._place(x)), y.to(self.config.device))

    def _place(self, x: Tensor) -> Tensor:
        return x.to(self.config.device, self.dtype, memory_format=torch.channels_last)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.precision != "bf16-mixed":
            return nullcontext()
        return torch.autocast(torch.device(self.config.device).type, torch.bfloat16)

    def _delta_angles(self, epoch: int) -> dict[str, float]:
        """Measure on a minibatch of training data, in training mode, as the network is trained."""
        self.model.train()
        x, y = next(self._training_batches(epoch))
        return self.path.delta_angles(lambda: self._loss(x, y))

    @torch.no_grad()
    def _error_percent(self, split: Split) -> float:
        self.model.eval()
        wrong = 0
        for x, y in minibatches(split, batch_size=EVALUATION_BATCH, seed=0, epoch=0, shuffle=False):
            with self._autocast():
                predicted = self.model(self._place(x)).argmax(1)
            wrong += int((predicted != y.to(predicted.device)).sum())
        return 100.0 * wrong / len(split)


def make_network(config: CompareConfig, seed: int, dataset: Dataset) -> nn.Module:
    """Build the network of a config for a dataset, on its device; the weights depend on the seed alone.

    Raises:
        ConfigError: There is no such model or device, or the model cannot take the data.
    """
    torch.manual_seed(seed)
    try:
        model = build_model(
            config.model,
            sample_shape=dataset.sample_shape,
            num_classes=dataset.num_classes,
            norm=config.norm,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    try:
        torch.zeros(1).to(config.device).item()  # refuses devices that hold no values, as meta does
        model.to(config.device)
    except (RuntimeError, AssertionError) as error:  # torch was built without the device, or lacks it
        raise ConfigError(f"device {config.device!r} cannot be used: {str(error).splitlines()[0]}") from None
    return cast(nn.Module, cast(Any, model).to(memory_format=torch.channels_last))


def make_path(config: CompareConfig, rule: str, seed: int, model: nn.Module) -> FeedbackPath:
    """Untie a network by a rule with the config's settings and overrides."""
    settings = config.rule_settings.get(rule, {})
    return untie(model, make_rule(rule, settings), overrides=config.overrides, seed=seed)


def make_optimizer(model: nn.Module, config: CompareConfig) -> torch.optim.Optimizer:
    """Make the optimizer of a config for all parameters that learn, feedback weights among them."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov and config.momentum > 0,
        weight_decay=config.weight_decay,
    )


def learning_rate(step: int, steps_per_epoch: int, num_steps: int, config: CompareConfig) -> float:
    """Return the learning rate of a step: linear warm-up, then a half cosine to 0, or constant.

    Example:
        >>> config = CompareConfig(lr=0.1, warmup_epochs=0)
        >>> [round(learning_rate(step, 10, 20, config), 3) for step in (0, 10, 20)]
        [0.1, 0.05, 0.0]
    """
    warmup = min(config.warmup_epochs * steps_per_epoch, num_steps)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return config.lr
    share = (step - warmup) / max(num_steps - warmup, 1)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * share))
