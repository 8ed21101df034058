"""Records your own training loop, in the same table, figures and page as the library's runs."""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from pydantic import ValidationError

from feedbackpath.arguments import checked, checked_methods
from feedbackpath.errors import ConfigError
from feedbackpath.jobs.book import describe_versions, refuse_to_overwrite, write_results
from feedbackpath.measure.deltas import Delta
from feedbackpath.path import FeedbackPath
from feedbackpath.report import write_report
from feedbackpath.train.faults import first_fault
from feedbackpath.train.results import DataFacts, Entry, Metric, Results, Run, read_results
from feedbackpath.train.store import locked


@checked_methods(ConfigError)
class Recorder:
    """Writes the measurements of your own loop into a folder: ``results.json``, a page, figures.

    Runs of several rules and seeds share a folder, one recorder each; ``feedbackpath report`` reads it.

    Args:
        folder: The folder; made if it is not there.
        rule: The run's rule.
        seed: The run's seed.
        metric: What the run is judged by, such as ``"test_error"``.
        unit: The unit, printed after its numbers.
        lower_is_better: Whether smaller numbers are better.
        model: The network's name, for titles.
        data: The data's name, for titles.
        config: Settings that the page should show.
        resume: Continue this rule and seed if the folder has them; an epoch that is recorded again
            replaces the earlier one and all after it.

    Raises:
        ConfigError: The folder is in use, holds this rule and seed already, or numbers of another metric.

    Example:
        >>> import tempfile
        >>> with Recorder(tempfile.mkdtemp(), rule="kp", metric="test_error") as record:
        ...     record.epoch(1, train_loss=0.3, value=4.2)
        ...     record.epoch(2, train_loss=0.2, value=3.6)
        >>> record.results.runs[0].test
        3.6
    """

    @checked(ConfigError)
    def __init__(
        self,
        folder: str | Path,
        *,
        rule: str,
        seed: int = 0,
        metric: str = "test_error",
        unit: str = "%",
        lower_is_better: bool = True,
        model: str = "",
        data: str = "",
        config: dict[str, Any] | None = None,
        resume: bool = False,
    ) -> None:
        self.folder = Path(folder)
        with ExitStack() as stack, _refusing_bad_values():
            stack.enter_context(locked(self.folder))
            judged_by = Metric(name=metric.removeprefix("test_"), unit=unit, lower_is_better=lower_is_better)
            titles = Results(runs=[], model=model, data=DataFacts(name=data), config=config or {})
            given = {"model": model, "data": data, "config": config}
            self._titles = {name: getattr(titles, name) for name, value in given.items() if value}
            self._take_up(rule, seed, judged_by, resume=resume)
            self._mark = time.perf_counter()
            self._save()
            self._stack = stack.pop_all()  # kept until the recorder is closed

    def epoch(
        self,
        number: int,
        *,
        value: float,
        train_loss: float | None = None,
        validation: float | None = None,
        path: FeedbackPath | None = None,
        deltas: Mapping[str, Delta] | None = None,
    ) -> None:
        """Record what was measured after an epoch; number 0 is before the first.

        Args:
            number: The epoch.
            value: The metric on the test split.
            train_loss: Mean training loss of the epoch.
            validation: The metric on the validation split.
            path: The path whose matrix angles and gains are recorded.
            deltas: What ``path.deltas`` returned.
        """
        if self.run.status != "running":
            raise ConfigError(
                f"the recorder of {self.run.name} is closed: to continue, make another with resume=True"
            )
        if not self.run.history and number not in (0, 1) and self.run.start is None:
            raise ConfigError(f"the first epoch of {self.run.name} is {number}: begin with 1, or with 0")
        now, of_layer = time.perf_counter(), (deltas or {}).items()
        value, train_loss, validation = map(_detached, (value, train_loss, validation))
        with _refusing_bad_values():
            entry = Entry(
                epoch=number,
                train_loss=train_loss,
                test=value,
                validation=validation,
                matrix_angle_deg=dict(path.matrix_angles()) if path else {},
                delta_angle_deg={name: delta.angle_deg for name, delta in of_layer},
                delta_chance_deg={name: delta.chance_deg for name, delta in of_layer},
                delta_norm_ratio={name: delta.norm_ratio for name, delta in of_layer},
                gain=dict(path.gains()) if path else {},
                seconds=now - self._mark,
            )
        if number == 0:
            self.run.start, self.run.history = entry, []
        else:
            self.run.history = [old for old in self.run.history if old.epoch < number] + [entry]
            self.run.test = entry.test
        self.run.seconds += entry.seconds
        self._save()
        write_report(self.results, self.folder, figures=False)
        self._mark = time.perf_counter()

    def close(self, status: Literal["finished", "interrupted", "diverged"] = "finished") -> None:
        """End the run and write the figures.

        Args:
            status: ``"finished"``, ``"interrupted"`` or ``"diverged"``.
        """
        if status not in ("finished", "interrupted", "diverged"):
            raise ConfigError(f"status is {status!r}: choose finished, interrupted or diverged")
        if self.run.status != "running":  # closed already
            return
        self.run.status = status
        if status == "diverged":
            self.run.diverged_epoch = len(self.run.history) + 1
        self._save()
        write_report(self.results, self.folder)
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("finished" if kind is None else "interrupted")

    def _take_up(self, rule: str, seed: int, metric: Metric, *, resume: bool) -> None:
        self.results = Results(runs=[], metric=metric, versions=describe_versions())
        if (self.folder / "results.json").exists():
            self.results = read_results(self.folder)
        else:
            refuse_to_overwrite(self.folder, ["history.jsonl", "report.html"])
        if self.results.runs and self.results.metric != metric:
            raise ConfigError(
                f"{self.folder} holds test_{self.results.metric.name} ({self.results.metric.unit!r}), not "
                f"test_{metric.name} ({metric.unit!r}): choose another folder"
            )
        found = [run for run in self.results.runs if (run.rule, run.seed) == (rule, seed)]
        if found and not resume:
            raise ConfigError(
                f"{self.folder} holds {rule}, seed {seed} already: choose another seed or folder, or pass "
                "resume=True"
            )
        self.run = found[0] if found else Run(rule=rule, seed=seed)
        if not found:
            self.results.runs.append(self.run)
        self.run.status = "running"

    def _save(self) -> None:
        """Write the results; other recorders of this process may have written theirs meanwhile."""
        if (self.folder / "results.json").exists():
            theirs = read_results(self.folder)
            others = [run for run in theirs.runs if (run.rule, run.seed) != (self.run.rule, self.run.seed)]
            self.results = theirs.model_copy(update={"runs": [*others, self.run]})
        self.results = self.results.model_copy(update=self._titles)
        write_results(self.results, self.folder)


@contextmanager
def _refusing_bad_values() -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        raise ConfigError(f"{first_fault(error)}; nothing was recorded") from None
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror or error}; choose another folder") from None


def _detached(number: Any) -> Any:
    """Return a number; of a tensor, one that autograd does not warn of when it is read."""
    return number.detach() if isinstance(number, torch.Tensor) else number
