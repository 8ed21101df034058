"""The one training loop: one rule, one seed, told as a stream of events."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from feedbackpath.data import Split, minibatches
from feedbackpath.data.dataset import leave_out_unreadable
from feedbackpath.errors import CheckpointError, DataError
from feedbackpath.measure.deltas import Delta
from feedbackpath.moments import share_moments, why_apart
from feedbackpath.tasks import Task
from feedbackpath.train.build import make_network, make_optimizer, make_path, run_once
from feedbackpath.train.chips import counter_of, counts_of
from feedbackpath.train.config import TrainConfig
from feedbackpath.train.divergence import LOSS_ITSELF, find_origin
from feedbackpath.train.engine import Engine
from feedbackpath.train.results import Entry, Layers
from feedbackpath.train.schedule import Schedule

EVALUATION_BATCH = 500
MEASURED_SAMPLES = 256  # delta angles are measured on so many samples at most

State = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """A training step was done, or (``loss`` is None) a pass of mirror mode; the loss is a mean in nats."""

    epoch: int
    step: int
    num_steps: int
    loss: float | None
    samples_per_second: float


@dataclass(frozen=True)
class Measured:
    """The network was measured: before the first epoch (epoch 0) and after each.

    ``state`` is what a checkpoint holds.
    """

    entry: Entry
    state: State = field(repr=False)


@dataclass(frozen=True)
class Paused:
    """A moment between two steps to save ``state``; ``is_last`` where a stop was asked for."""

    step: int
    state: State = field(repr=False)
    is_last: bool = False


@dataclass(frozen=True)
class Diverged:
    """The loss is no longer finite; the run ends before the update that would have spoiled the weights."""

    epoch: int
    step: int
    learning_rate: float
    origin: str


Event = Step | Measured | Paused | Diverged


def train(
    config: TrainConfig,
    rule: str,
    seed: int,
    task: Task,
    engine: Engine,
    *,
    state: State | None = None,
    must_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Train one network by one rule and yield what happens.

    Initial forward weights and the order of samples depend on the seed alone, so that all rules of a seed
    share them. Every process of a job runs this with the same arguments, and yields the same events.

    Args:
        config: The settings.
        rule: The rule's name.
        seed: The seed of weights, feedback weights, order and augmentation.
        task: Data, loss and metric, made for the same seed.
        engine: This process's part of the job.
        state: The state of an earlier event to go on from; the events after it are the same, bit for bit,
            as if the run had not been broken.
        must_stop: Asked after each step; the run ends where it says yes on any process.
    """
    run = Training(config, rule, seed, task, engine, must_stop)
    if state is None:
        yield run.begin()
    else:
        run.load_state(state)
    while not run.is_finished:
        for event in run.go_through_epoch():
            yield event
            if isinstance(event, Diverged) or (isinstance(event, Paused) and event.is_last):
                return


@dataclass
class _Tally:
    """What has been counted in the epoch that is going on."""

    loss_sum: float = 0.0
    samples: int = 0
    unreadable: int = 0
    seconds: float = 0.0

    @property
    def mean_loss(self) -> float:
        """Mean loss of the samples that could be read."""
        return self.loss_sum / max(self.samples - self.unreadable, 1)


class Training:
    """A network, its feedback path and its optimizer while they train.

    Its position is ``(epoch, consumed)``: the epoch that is going on, from 1, and the samples of it that
    have been used; a finished epoch is written as ``(epoch + 1, 0)``.
    """

    def __init__(
        self,
        config: TrainConfig,
        rule: str,
        seed: int,
        task: Task,
        engine: Engine,
        must_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config, self.seed, self.task, self.engine = config, seed, task, engine
        self.must_stop, self.is_stopping = must_stop, False
        self.model = engine.place_model(make_network(config, seed, task))
        self.path = make_path(config, rule, seed, self.model)
        run_once(self.path, task)
        self.optimizer = make_optimizer(self.path, config)
        self.mirror_epochs = config.mirror_epochs if self.path.mirrors else 0
        self.schedule = Schedule.over(config, len(task.train), self.mirror_epochs)
        self.num_steps = self.schedule.num_steps
        self.epoch, self.consumed, self.step, self.tally = 1, 0, 0, _Tally()
        self.schedule.set_rates(self.optimizer, 0)
        self.path.check_optimizer(self.optimizer)
        if why_apart(self.path, self.optimizer) is None:
            share_moments(self.path, self.optimizer)
        self.wrapped_model, self.wrapped_optimizer = engine.set_up(self.model, self.optimizer)
        self.counter = counter_of(self.path)

    @property
    def is_mirroring(self) -> bool:
        """Whether this epoch is one of mirror mode alone."""
        return self.epoch <= self.mirror_epochs

    @property
    def is_finished(self) -> bool:
        """Whether all epochs, or steps, are done."""
        return self.epoch > self.config.epochs or (self.step >= self.num_steps and not self.is_mirroring)

    def begin(self) -> Measured:
        """Mirror for the first time, where the rule does and no epoch is set aside for it; measure."""
        started = time.perf_counter()
        if self.path.mirrors and not self.mirror_epochs:
            self.path.mirror()
        return self._measure(0, None, started)

    def go_through_epoch(self) -> Iterator[Event]:
        """Train, or mirror, to the end of the epoch that is going on, and measure."""
        started = time.perf_counter() - self.tally.seconds  # as if the epoch had run in one piece
        if self.consumed == 0:
            # Whatever is random inside the model (dropout) then depends on seed, epoch and rank alone.
            torch.manual_seed(self.seed * 1_000_003 + self.epoch + 7_919_000_003 * self.engine.rank)
        self.model.train()
        for event in self._mirror_steps() if self.is_mirroring else self._training_steps():
            self.tally.seconds = time.perf_counter() - started
            yield event
            if self.is_stopping or self._is_time_to_save():
                yield Paused(self.step, self.state(), is_last=self.is_stopping)
        yield self._end_epoch(None if self.is_mirroring else self.tally.mean_loss, started)

    def load_state(self, state: State) -> None:
        """Go back to where ``state`` was taken.

        Raises:
            CheckpointError: It is of another network, or of none.
        """
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.path.load_state_dict(state["path"])
            self.epoch, self.consumed, self.step = state["epoch"], state["consumed"], state["step"]
            self.tally = _Tally(**state["tally"])
            if self.engine.rank < len(state["rng"]):
                self.engine.set_rng_state(state["rng"][self.engine.rank])
        except Exception as error:  # whatever a state of another form leads to
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"the checkpoint does not fit this run ({reason}); delete it") from error

    def state(self) -> State:
        """Return all that a run goes on from, the same on every process."""
        self.engine.share_buffers(self.model)
        return {
            "epoch": self.epoch,
            "consumed": self.consumed,
            "step": self.step,
            "tally": asdict(self.tally),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "path": self.path.state_dict(),
            "rng": self.engine.gather(self.engine.rng_state()),
        }

    def _mirror_steps(self) -> Iterator[Event]:
        """Go through as many passes of mirror mode as the epoch has minibatches (Appendix D.2)."""
        while self.consumed < len(self.task.train) - 1:
            self.path.mirror(steps=1)
            self._count(min(self.config.batch_size, len(self.task.train) - self.consumed))
            (stop,) = self.engine.sum([self.must_stop()])
            self.is_stopping = stop > 0
            yield Step(self.epoch, self.step, self.num_steps, None, self._speed())

    def _training_steps(self) -> Iterator[Event]:
        for x, y in self._batches(self.task.train, start=self.consumed):
            if self.step >= self.num_steps:
                return
            yield self._train_step(x, y)

    def _train_step(self, x: Tensor, y: Tensor) -> Step | Diverged:
        """Do one step on this process's share of a minibatch."""
        lr = self.schedule.set_rates(self.optimizer, self.step)
        expected = min(self.config.batch_size, len(self.task.train) - self.consumed)
        self.optimizer.zero_grad()
        own_sum = self._accumulate_gradients(x, y, expected)
        loss_sum, samples, stop = self.engine.sum([own_sum, len(y), self.must_stop()])
        loss = loss_sum / max(samples, 1.0)
        if not math.isfinite(loss):
            return Diverged(self.epoch, self.step + 1, lr, self._find_origin(x, y))
        if samples != expected:
            self._scale_gradients(expected / max(samples, 1.0))
        if self.config.clip_norm is not None:
            self.path.clip_grad_norm_(self.config.clip_norm)
        self.wrapped_optimizer.step()
        self.path.step()
        self.step += 1
        self.is_stopping = stop > 0
        self._count(expected)
        self.tally.loss_sum += loss_sum
        self.tally.unreadable += expected - int(samples)
        return Step(self.epoch, self.step, self.num_steps, loss, self._speed())

    def _accumulate_gradients(self, x: Tensor, y: Tensor, expected: int) -> Tensor:
        """Add up gradients of the mean loss over ``expected`` samples; return the sum of its losses."""
        # Averaging over the processes then gives the mean over all samples.
        weight = self.engine.world_size / expected
        if len(y) == 0:  # another process has samples, and waits for this one
            x, y, weight = x.new_zeros(2, *x.shape[1:]), y.new_zeros(2), 0.0
        size = self.config.micro_batch_size or len(y)
        parts = list(zip(torch.split(x, size), torch.split(y, size), strict=True))
        total = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        for index, (part_x, part_y) in enumerate(parts):
            with self.engine.accumulating(self.wrapped_model, is_last=index == len(parts) - 1):
                loss = self._loss(self.wrapped_model, part_x, part_y)
                self.engine.backward(loss * (len(part_y) * weight))
            total += loss.detach() * (len(part_y) if weight else 0)
        return total

    def _scale_gradients(self, factor: float) -> None:
        """Turn a mean over all samples of a minibatch into the mean over those that could be read."""
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad *= factor

    def _find_origin(self, x: Tensor, y: Tensor) -> str:
        compute_loss = partial(self._loss, self.model, x, y)
        origins = self.engine.gather(find_origin(self.model, compute_loss) if len(y) else LOSS_ITSELF)
        return next((origin for origin in origins if origin != LOSS_ITSELF), LOSS_ITSELF)

    def _count(self, samples: int) -> None:
        self.consumed += samples
        self.tally.samples += samples

    def _speed(self) -> float:
        return self.tally.samples / max(self.tally.seconds, 1e-9)

    def _is_time_to_save(self) -> bool:
        every = self.config.checkpoint_steps
        is_epochs_end = self.consumed >= len(self.task.train) - 1
        passes = math.ceil(self.consumed / self.config.batch_size)  # of mirror mode, which takes no steps
        done = passes if self.is_mirroring else self.step
        return every is not None and done % every == 0 and not is_epochs_end

    def _end_epoch(self, loss: float | None, started: float) -> Measured:
        epoch, unreadable = self.epoch, self.tally.unreadable
        _refuse_if_none_is_readable(self.tally.samples, unreadable, f"training, epoch {epoch}")
        self.epoch, self.consumed, self.tally = epoch + 1, 0, _Tally()
        measured = self._measure(epoch, loss, started)
        if self.config.on_bad_image == "skip":
            measured.entry.unreadable_images = unreadable
        return measured

    def _measure(self, epoch: int, train_loss: float | None, started: float) -> Measured:
        """Measure the metric, angles and gains."""
        self.engine.share_buffers(self.model)
        test, unreadable = self._measure_readable(getattr(self.task, self.config.evaluate_on))
        deltas = self._deltas(epoch).items()
        entry = Entry(
            epoch=epoch,
            train_loss=train_loss,
            test=test,
            unreadable_test_images=unreadable if self.config.on_bad_image == "skip" else None,
            validation=self.measure_metric(self.task.validation) if self.config.select_best else None,
            matrix_angle_deg=_finite(self.path.matrix_angles()),
            delta_angle_deg=_finite({name: delta.angle_deg for name, delta in deltas}),
            delta_chance_deg=_finite({name: delta.chance_deg for name, delta in deltas}),
            delta_norm_ratio=_finite({name: delta.norm_ratio for name, delta in deltas}),
            gain=_finite(self.path.gains()),
            counts=counts_of(self.counter),
        )
        entry.seconds = time.perf_counter() - started
        return Measured(entry, self.state())

    def _deltas(self, epoch: int) -> dict[str, Delta]:
        """Measure on a minibatch of training data, in training mode, as the network is trained."""
        self.model.train()
        num_samples = min(self.config.batch_size, MEASURED_SAMPLES, len(self.task.train))
        x, y = next(self._batches(self.task.train, epoch=epoch, num_samples=num_samples))
        return self.path.deltas(lambda: self._loss(self.model, x, y)) if len(y) else {}

    def measure_metric(self, split: Split) -> float:
        """Return the mean score over what can be read of a split (nothing: a DataError)."""
        return self._measure_readable(split)[0]

    @torch.no_grad()
    def _measure_readable(self, split: Split) -> tuple[float, int]:
        """Return the mean score over a split, and how many of its samples could not be read."""
        self.model.eval()
        readable = 0
        total = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        for x, y in self._batches(split, epoch=0, batch_size=EVALUATION_BATCH, shuffle=False):
            if self.config.on_bad_image == "skip":
                x, y = leave_out_unreadable(x, y)
            readable += len(y)
            if len(y):
                with self.engine.autocast():
                    total += self.task.score(self.model(self.engine.place(x)), self.engine.place(y)).sum()
        summed, num_readable = self.engine.sum([total, readable])
        unreadable = len(split) - int(num_readable)
        _refuse_if_none_is_readable(len(split), unreadable, "evaluation")
        return summed / num_readable, unreadable

    def _loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with self.engine.autocast():
            return self.task.loss(model(self.engine.place(x)), self.engine.place(y))

    def _batches(
        self, split: Split, *, epoch: int | None = None, batch_size: int | None = None, **options: Any
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over this process's share of minibatches, on its device."""
        batches = minibatches(
            split,
            batch_size=batch_size or self.config.batch_size,
            seed=self.seed,
            epoch=self.epoch if epoch is None else epoch,
            num_workers=self.config.num_workers,
            rank=self.engine.rank,
            world_size=self.engine.world_size,
            **({"shuffle": True} | options),
        )
        for x, y in batches:
            yield split.prepare(x.to(self.engine.device)), y.to(self.engine.device)


def _finite(numbers: dict[str, float]) -> Layers:
    return {layer: number if math.isfinite(number) else None for layer, number in numbers.items()}


def _refuse_if_none_is_readable(samples: int, unreadable: int, what: str) -> None:
    """Refuse to go on with numbers that are of no image at all."""
    if unreadable and unreadable == samples:
        raise DataError(
            f"{what}: none of {samples} images could be read: feedbackpath data check DIR says why; "
            "continue by --resume when the original files are back"
        )
