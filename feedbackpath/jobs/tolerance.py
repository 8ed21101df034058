"""Find the worst value of each imperfection of a chip at which a rule's error stays near its ideal.

A value passes if the mean error over the seeds is at most ``margin`` points above that of the same seeds on
an ideal chip. No further seeds run once a value has failed, whatever they would give. The search bisects on a
logarithmic scale. Every run that ends is written down, and a search that is begun again takes it from there.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from feedbackpath.errors import ConfigError
from feedbackpath.jobs.book import metric_of
from feedbackpath.jobs.imports import import_files
from feedbackpath.jobs.run import make_task, prepare
from feedbackpath.jobs.signals import Interrupted, StopRequest
from feedbackpath.report.table import in_two_digits
from feedbackpath.rules import RULES
from feedbackpath.train.config import CompareConfig
from feedbackpath.train.engine import Engine
from feedbackpath.train.loop import Diverged, Measured, Paused, train
from feedbackpath.train.store import locked, write_text

Settings = dict[str, Any]


class Imperfection(NamedTuple):
    """One thing that is wrong with a chip.

    Attributes:
        meaning: What its value is.
        mildest: Where the search begins.
        worst: Where it ends.
        chip: Devices of the arrays.
        settings: ``chip_settings`` at a value.
        of_learners: Whether it only concerns rules whose B gets updates of W's.
    """

    meaning: str
    mildest: float
    worst: float
    chip: str
    settings: Callable[[float], Settings]
    of_learners: bool = False


def _device(chip: str, name: str) -> tuple[str, Callable[[float], Settings]]:
    return chip, lambda value: {"step": FINE_STEP, name: value}


def _signals(*names: str) -> tuple[str, Callable[[float], Settings]]:
    return "ideal", lambda value: {"read": {name: {"noise": value} for name in names}}


FINE_STEP = 1e-3
IMPERFECTIONS = {
    "step": Imperfection(
        "smallest change, in units of weight", 1e-3, 1.0, "linear", lambda value: {"step": value}
    ),
    "noise": Imperfection("noise of a pulse, in its size", 0.3, 300.0, *_device("linear", "noise")),
    "spread": Imperfection("spread of the step", 0.03, 10.0, *_device("linear", "spread")),
    "asymmetry": Imperfection("excess of up over down pulses", 0.01, 10.0, *_device("soft", "asymmetry")),
    "asymmetry_spread": Imperfection(
        "spread of up and of down pulses", 0.01, 10.0, *_device("soft", "asymmetry_spread")
    ),
    "reference": Imperfection(
        "error of reference columns, up and down spread 0.3", 0.003, 3.0, "reference",
        lambda value: {"step": FINE_STEP, "asymmetry_spread": 0.3, "error": value},
    ),
    "leak": Imperfection(
        "share of a weight that leaks away in an update", 1e-5, 0.3, "linear",
        lambda value: {"step": FINE_STEP, "lifetime": 1.0 / value},
    ),
    "stuck": Imperfection("share of cells that are stuck", 1e-3, 1.0, *_device("linear", "stuck")),
    "read_noise": Imperfection("noise of reads, both passes", 0.01, 10.0, *_signals("forward", "backward")),
    "forward_noise": Imperfection("noise of reads, forward", 0.01, 10.0, *_signals("forward")),
    "backward_noise": Imperfection("noise of reads, backward", 0.01, 100.0, *_signals("backward")),
    "update_noise": Imperfection("noise of each side's update signals", 0.01, 100.0, *_signals("update")),
    "swapped": Imperfection(
        "share of B's inputs wired to others", 0.02, 1.0, "ideal",
        lambda value: {"wiring": {"swapped": value}}, of_learners=True,
    ),
    "lost": Imperfection(
        "share of updates that do not reach B", 0.01, 0.999, "ideal",
        lambda value: {"wiring": {"arrives": 1.0 - value}}, of_learners=True,
    ),
}  # fmt: skip


class Trial(BaseModel):
    """One training run."""

    model_config = ConfigDict(extra="forbid")

    rule: str
    imperfection: str | None
    value: float | None
    seed: int
    error: float | None  # None: it diverged


class Tolerance(BaseModel):
    """What a search has found: ``tolerance.json``.

    Attributes:
        found: Rules to imperfections to the worst value that passed; None: none did.
        ended: Whether the worst value that was tried passed, likewise: then more may be tolerated.
    """

    model_config = ConfigDict(extra="forbid")

    config: Settings
    margin: float
    bisections: int
    unit: str = ""
    trials: list[Trial] = []
    found: dict[str, dict[str, float | None]] = {}
    ended: dict[str, list[str]] = {}

    def errors(self, rule: str, imperfection: str | None, value: float | None) -> list[float]:
        """Return the errors of all seeds; a run that diverged counts as infinite."""
        trials = [t for t in self.trials if (t.rule, t.imperfection, t.value) == (rule, imperfection, value)]
        return [math.inf if trial.error is None else trial.error for trial in trials]


def find_tolerance(
    config: CompareConfig,
    out: Path,
    *,
    imperfections: Sequence[str],
    margin: float,
    bisections: int,
    resume: bool,
    tell: Callable[[str], None],
) -> Tolerance:
    """Search every rule and imperfection; see the module.

    Raises:
        ConfigError: There is no such imperfection, the folder holds another search, the task's metric rises,
            or a rule diverged on an ideal chip.
        Interrupted: SIGINT or SIGTERM came; what has ended is kept.
    """
    unknown = [name for name in imperfections if name not in IMPERFECTIONS]
    if unknown or not imperfections:
        what = f"there is no {', '.join(unknown)}" if unknown else "none is given"
        raise ConfigError(f"--imperfections: {what}; choose from {', '.join(IMPERFECTIONS)}")
    if config.chip is not None:
        raise ConfigError("--chip has no effect here: each imperfection is tried alone; leave it out")
    import_files(config.imports)
    engine = Engine(config)
    task, _ = prepare(config, engine)
    metric = metric_of(task)
    if not metric.lower_is_better:
        raise ConfigError(
            f"hardware tolerance needs a metric that falls; {metric.name} of {config.data} rises"
        )
    with locked(out), StopRequest() as stop:
        search = _Search(config, out, margin, bisections, resume, engine, stop, tell)
        search.kept.unit = metric.unit
        for rule in config.rules:
            for name in imperfections:
                if IMPERFECTIONS[name].of_learners and not RULES[rule].learns:
                    continue
                if name not in search.kept.found.get(rule, {}):
                    search.bisect(rule, name)
    return search.kept


class _Search:
    """A search that goes on."""

    def __init__(
        self, config: CompareConfig, out: Path, margin: float, bisections: int, resume: bool, engine: Engine,
        stop: StopRequest, tell: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.config, self.engine, self.stop, self.tell = config, engine, stop, tell
        self.file = out / "tolerance.json"
        told = config.model_dump(mode="json", exclude={"rules", "num_threads"})
        self.kept = Tolerance(config=told, margin=margin, bisections=bisections)
        if self.file.exists():
            before = Tolerance.model_validate_json(self.file.read_text(encoding="utf-8"))
            if not resume:
                raise ConfigError(
                    f"{out} already has a search: continue it by --resume, or choose another --out"
                )
            if (before.config, before.margin, before.bisections) != (told, margin, bisections):
                raise ConfigError(f"{out} has a search with other settings: choose another --out")
            self.kept = before

    def bisect(self, rule: str, name: str) -> None:
        """Find the worst value that passes, and write it down."""
        what = IMPERFECTIONS[name]
        found: float | None = None
        if self.passes(rule, name, what.worst):
            found = what.worst
            self.kept.ended.setdefault(rule, []).append(name)
        elif self.passes(rule, name, what.mildest):
            found, fails = what.mildest, what.worst
            for _ in range(self.kept.bisections):
                middle = float(f"{math.sqrt(found * fails):.3g}")
                if self.passes(rule, name, middle):
                    found = middle
                else:
                    fails = middle
        self.kept.found.setdefault(rule, {})[name] = found
        self._save()

    def passes(self, rule: str, name: str, value: float) -> bool:
        """Whether a rule stays within the margin of its own ideal."""
        ideal = self._mean(rule, None, None)
        if ideal == math.inf:
            raise ConfigError(
                f"{rule} diverged on an ideal chip: give it a lower learning rate, and another --out"
            )
        limit = ideal + self.kept.margin
        error, unit = self._mean(rule, name, value, limit), self.kept.unit
        self.tell(f"{rule}, {name} {value:g}: {error:.2f}{unit} (ideal {ideal:.2f}{unit})")
        return error <= limit

    def _mean(self, rule: str, name: str | None, value: float | None, limit: float = math.inf) -> float:
        """Return the mean over seeds, or over the first ones if it must then end above the limit."""
        known = {t.seed for t in self.kept.trials if (t.rule, t.imperfection, t.value) == (rule, name, value)}
        for seed in range(self.config.seed, self.config.seed + self.config.seeds):
            # A share of errors is never below 0. A run that diverged counts as infinite.
            so_far = sum(self.kept.errors(rule, name, value))
            if so_far > limit * self.config.seeds and (self.kept.unit == "%" or so_far == math.inf):
                break
            if seed not in known:
                error = self._train(rule, name, value, seed)
                self.kept.trials.append(
                    Trial(rule=rule, imperfection=name, value=value, seed=seed, error=error)
                )
                self._save()
        errors = self.kept.errors(rule, name, value)
        return sum(errors) / len(errors)

    def _train(self, rule: str, name: str | None, value: float | None, seed: int) -> float | None:
        config = self.config.for_rule(rule)
        if name is not None and value is not None:
            what = IMPERFECTIONS[name]
            told = {"chip": what.chip, "chip_settings": what.settings(value)}
            config = config.model_copy(update=told)
        last: float | None = None
        task = make_task(config, seed)
        for event in train(config, rule, seed, task, self.engine, must_stop=lambda: bool(self.stop)):
            if isinstance(event, Measured):
                last = event.entry.test
            elif isinstance(event, Diverged):
                return None
            elif isinstance(event, Paused) and event.is_last:
                raise Interrupted(128 + self.stop.number)
        return last if last is not None and math.isfinite(last) else None

    def _save(self) -> None:
        write_text(self.file, self.kept.model_dump_json(indent=1) + "\n")


def table_of(kept: Tolerance) -> tuple[list[str], list[list[str]]]:
    """Return the tolerance map as text: imperfections down, rules across."""
    names = dict.fromkeys(name for found in kept.found.values() for name in found)
    rows = [[name, *(_cell(kept, rule, name) for rule in kept.found)] for name in names]
    return ["imperfection", *kept.found], rows


def _cell(kept: Tolerance, rule: str, name: str) -> str:
    if name not in kept.found[rule]:
        return "–"
    value = kept.found[rule][name]
    if value is None:
        return f"< {IMPERFECTIONS[name].mildest:g}"
    return f"{'≥ ' * (name in kept.ended.get(rule, []))}{in_two_digits(value)}"
