"""What a running job shows: a bar with what is going on, and the table growing as rules finish."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from feedbackpath.report.table import MISSING, format_metric, rich_table
from feedbackpath.train.loop import Measured, Step
from feedbackpath.train.results import Results, Run


class LiveView:
    """A live display on a terminal; one plain line per epoch where the output goes to a file.

    Args:
        console: Where to print.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.results = Results(runs=[])
        self.progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}", markup=False),
            console=console,
        )
        self.task = self.progress.add_task("starting", state="")
        self.live = Live(self._draw(), console=console, refresh_per_second=4, transient=True)
        self._clock = _TimeLeft()

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()

    def start_run(self, results: Results, run: Run) -> None:
        """Show that a run begins, or goes on."""
        self.results, self.run = results, run
        self._metric = f"{results.metric.words} {MISSING}"
        self._clock.start_run(results)
        self.progress.reset(self.task, description=f"{run.rule}  seed {run.seed}", state="")
        self._refresh()

    def show_step(self, step: Step) -> None:
        """Show a training step."""
        left = self._clock.seconds_left(step.step, step.num_steps)
        doing = "mirror mode" if step.loss is None else f"loss {step.loss:.3f}"
        speed = f"{step.samples_per_second:.0f} samples/s"
        state = f"epoch {step.epoch}  {doing}  {self._metric}  {speed}  {_format_time(left)} left"
        self.progress.update(self.task, completed=step.step, total=step.num_steps, state=state)

    def show_measured(self, measured: Measured) -> None:
        """Show what was measured after an epoch."""
        entry, metric = measured.entry, self.results.metric
        self._metric = f"{metric.words} {format_metric(metric, entry.test)}"
        if not self.console.is_terminal and entry.train_loss is not None:
            self.console.print(
                f"{self.run.rule} seed {self.run.seed} epoch {entry.epoch}: loss {entry.train_loss:.3f}, "
                f"{self._metric}, {entry.seconds:.1f} s"
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

    def start_run(self, results: Results) -> None:
        self._started = time.perf_counter()
        self._first_step: int | None = None
        self._waiting = sum(other.status in ("waiting", "interrupted") for other in results.runs)

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
