"""What a running job shows: a bar with what is going on, and the table growing as rules finish."""

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from feedbackpath.report.table import rich_table


class LiveView:
    """A live display on a terminal; one plain line an epoch where the output goes to a file.

    Args:
        console: Where to print.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.results: dict[str, Any] = {"runs": []}
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            console=console,
        )
        self.task = self.progress.add_task("starting", state="")
        self.live = Live(self._draw(), console=console, refresh_per_second=4, transient=True)
        self._clock = _TimeLeft()
        self._error = "–"

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()

    def start_run(self, results: dict[str, Any], run: dict[str, Any]) -> None:
        """Show that a run begins, or goes on."""
        self.results = results
        self.rule, self.seed = run["rule"], run["seed"]
        self._error = "–"
        self._clock.start_run(results, run)
        self.progress.reset(self.task, description=f"{self.rule}  seed {self.seed}", state="")
        self._refresh()

    def show_step(self, step: Any) -> None:
        """Show a training step (``train.loop.Step``)."""
        left = self._clock.seconds_left(step.step, step.num_steps)
        doing = "mirror mode" if step.loss is None else f"loss {step.loss:.3f}"
        speed = f"{step.images_per_second:.0f} img/s"
        state = f"epoch {step.epoch}  {doing}  error {self._error}  {speed}  {_format_time(left)} left"
        self.progress.update(self.task, completed=step.step, total=step.num_steps, state=state)

    def show_measured(self, measured: Any) -> None:
        """Show what was measured after an epoch (``train.loop.Measured``)."""
        record = measured.record
        self._error = f"{record['test_error']:.1f}%"
        if not self.console.is_terminal and record["train_loss"] is not None:
            self.console.print(
                f"{self.rule} seed {self.seed} epoch {record['epoch']}: loss {record['train_loss']:.3f}, "
                f"error {self._error}, {record['seconds']:.1f} s"
            )
        self._refresh()

    def show_note(self, note: str) -> None:
        """Show a line that a reader of the results has to know."""
        self.console.print(note, highlight=False)

    def end_run(self) -> None:
        """Show that a run has ended: its row is in the table now."""
        self._clock.end_run()
        self._refresh()

    def _draw(self) -> Group:
        return Group(rich_table(self.results), self.progress)

    def _refresh(self) -> None:
        self.live.update(self._draw())


class _TimeLeft:
    """Estimates the time left from the runs of this session; every run is taken to last as long."""

    def __init__(self) -> None:
        self._ended_seconds: list[float] = []

    def start_run(self, results: dict[str, Any], run: dict[str, Any]) -> None:
        self._started = time.perf_counter()
        self._first_step: int | None = None
        self._waiting = sum(other["status"] in ("waiting", "interrupted") for other in results["runs"])

    def end_run(self) -> None:
        self._ended_seconds.append(time.perf_counter() - self._started)

    def seconds_left(self, step: int, num_steps: int) -> float:
        if self._first_step is None:
            self._first_step = step - 1
        per_step = (time.perf_counter() - self._started) / (step - self._first_step)
        whole_run = [*self._ended_seconds, per_step * num_steps]
        return per_step * (num_steps - step) + self._waiting * sum(whole_run) / len(whole_run)


def _format_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
