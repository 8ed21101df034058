"""Tuning: the same number of trials for every rule, on validation data alone.

Each rule has a declared search space: learning rate and weight decay, which all share, and what its class
adds by ``search_space``. Trial k of every rule takes the k-th point of one scrambled Sobol sequence (Sobol
1967; Owen 1998): learning rates and decays are the same for all, and no rule gets a better search. A trial
may train with several seeds, the same ones for all trials; their mean counts. The test split is never looked
at.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from feedbackpath.errors import ConfigError, UserError
from feedbackpath.jobs.book import metric_of, refuse_to_overwrite
from feedbackpath.jobs.imports import import_files
from feedbackpath.jobs.run import prepare
from feedbackpath.jobs.signals import Interrupted, StopRequest
from feedbackpath.rules import RULES, resolve_rule
from feedbackpath.train.config import CompareConfig, RunConfig
from feedbackpath.train.engine import Engine
from feedbackpath.train.faults import first_fault
from feedbackpath.train.loop import Diverged, Measured, Paused, train
from feedbackpath.train.results import Metric
from feedbackpath.train.rules import make_rule
from feedbackpath.train.store import locked, write_json, write_text

Span = Sequence[Any]
"""``("log", low, high)``, ``("linear", low, high)`` or ``("choice", one, another, ...)``."""

SHARED: dict[str, dict[str, Span]] = {
    "sgd": {"lr": ("log", 0.01, 1.0), "weight_decay": ("log", 1e-4, 1e-2)},
    "adamw": {"lr": ("log", 1e-4, 1e-2), "weight_decay": ("log", 1e-2, 1.0)},
}
"""What is searched for every rule, by optimizer."""


class Trial(BaseModel):
    """One training run of the search: a trial, or one seed of it."""

    model_config = ConfigDict(extra="forbid")

    rule: str
    number: int
    repeat: int = Field(0, description="which of the trial's seeds, counted from the search's seed")
    settings: dict[str, Any] = Field(description="of the optimizer; those after a dot are the rule's own")
    status: Literal["finished", "diverged"]
    validation: float | None = Field(description="the metric on validation data after the last epoch")
    seconds: float


class Choice(NamedTuple):
    """What a search found: settings, and their validation metric (with several seeds, its mean)."""

    settings: dict[str, Any]
    validation: float


class Search(BaseModel):
    """The content of ``tune.json``."""

    model_config = ConfigDict(extra="forbid")

    command: str
    metric: Metric
    seed: int
    trials_per_rule: int
    spaces: dict[str, dict[str, list[Any]]] = Field(description="the search space of each rule")
    config: dict[str, Any]
    data: dict[str, Any]
    trials: list[Trial] = Field(default_factory=list)

    def best(self, rule: str) -> Choice | None:
        """Return a rule's settings with the best mean over seeds, the first of equals, if none diverged."""
        choices = []
        for number in range(self.trials_per_rule):
            runs = [trial for trial in self.trials if (trial.rule, trial.number) == (rule, number)]
            values = [run.validation for run in runs if run.validation is not None]
            if len(values) == self.config.get("seeds", 1):
                choices.append(Choice(runs[0].settings, fmean(values)))
        sign = 1 if self.metric.lower_is_better else -1
        return min(choices, key=lambda choice: sign * choice.validation, default=None)


def space_of(
    rule: str, config: CompareConfig, lr_range: tuple[float, float] | None = None
) -> dict[str, Span]:
    """Return a rule's search space: what all share, then its own, without what the config gives the rule.

    Raises:
        ConfigError: The rule declares a span that makes no sense.
    """
    own: Mapping[str, Span] = RULES[resolve_rule(rule).name].search_space
    given = config.rule_settings.get(rule, {})
    shared = SHARED[config.optimizer] | ({"lr": ("log", *lr_range)} if lr_range else {})
    space = shared | {f"{rule}.{name}": span for name, span in own.items() if name not in given}
    for name, span in space.items():
        kind, *values = span
        is_range = kind in ("log", "linear") and len(values) == 2 and values[0] < values[1]
        if not (is_range or (kind == "choice" and values)) or (kind == "log" and values[0] <= 0):
            raise ConfigError(
                f"search space of {rule}: {name} is {span!r}; give ('log', low, high), ('linear', low, high) "
                "or ('choice', one, another)"
            )
    for name, (_, *values) in own.items():
        try:
            for value in values:
                make_rule(rule, {name: value})
        except UserError as error:
            raise ConfigError(
                f"search space of {rule}: {name} cannot be searched ({error}); give {rule} a search_space of "
                "its own"
            ) from error
    if len(space) > MOST_SETTINGS:
        raise ConfigError(f"search space of {rule} has {len(space)} settings; give {MOST_SETTINGS} at most")
    return space


def point_of(space: Mapping[str, Span], number: int, seed: int) -> dict[str, Any]:
    """Return the settings of a trial: a point of a Sobol sequence, the same for all rules in what they share.

    Example:
        >>> point = point_of({"lr": ("log", 0.01, 1.0)}, number=0, seed=0)
        >>> 0.01 <= point["lr"] <= 1.0
        True
    """
    engine = torch.quasirandom.SobolEngine(MOST_SETTINGS, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
    shares = engine.draw(number + 1)[number].tolist()
    return {name: _value_at(span, share) for (name, span), share in zip(space.items(), shares, strict=False)}


MOST_SETTINGS = 16  # dimensions of the sequence: fixed, so that further settings change none before them
NOT_CHOSEN = {"seed", "evaluate_on", "select_best", "checkpoint_steps", "keep_checkpoints"}


def _value_at(span: Span, share: float) -> Any:
    kind, *values = span
    if kind == "choice":
        return values[min(int(share * len(values)), len(values) - 1)]
    low, high = values
    return float(f"{low * (high / low) ** share if kind == 'log' else low + (high - low) * share:.3g}")


def tune(
    config: CompareConfig,
    out: Path,
    *,
    trials: int,
    resume: bool,
    command: str,
    tell: Callable[[Search, Trial], None],
    lr_range: tuple[float, float] | None = None,
) -> Search:
    """Search settings for every rule of a config, and keep every trial in ``tune.json``.

    ``chosen.yaml`` has each rule's best settings, for ``feedbackpath compare --config``.

    Args:
        config: The settings that are not searched; every trial trains with each of its seeds.
        out: The folder.
        trials: Trials of each rule.
        resume: Go on with what the folder holds, if it holds anything.
        command: The command line, for the result file.
        tell: Called after each trial.
        lr_range: The lowest and the highest learning rate of the search, for every rule; by default, those of
            ``SHARED``.

    Raises:
        ConfigError: The range makes no sense, or the folder holds another search, or is in use.
        Interrupted: SIGINT or SIGTERM came; finished trials are kept.
    """
    if lr_range is not None and not 0 < lr_range[0] < lr_range[1] < math.inf:
        low, high = lr_range
        raise ConfigError(f"lr-range is {low:g} to {high:g}: give the lowest, above 0, and then the highest")
    import_files(config.imports)
    engine = Engine(config) if config.devices * config.num_nodes == 1 else None  # it would start the others
    if engine is None or engine.world_size > 1:
        raise ConfigError(
            "tune uses one device: on several, start one search on each, with its own rules and folder"
        )
    kept = _read_search(out, trials, resume=resume)
    if kept is not None:  # rules that an earlier call has searched stay part, so that all get as many trials
        config = config.model_copy(update={"rules": tuple(dict.fromkeys([*kept.spaces, *config.rules]))})
    task, _ = prepare(config, engine)
    spaces = {rule: space_of(rule, config, lr_range) for rule in config.rules}
    search = Search(
        command=command,
        metric=metric_of(task),
        seed=config.seed,
        trials_per_rule=trials,
        spaces={rule: {name: list(span) for name, span in space.items()} for rule, space in spaces.items()},
        config=config.model_dump(mode="json"),
        data={"name": config.data, **task.facts},
    )
    with locked(out), StopRequest() as stop:
        if kept is not None:
            kept = _read_search(out, trials, resume=resume) or kept  # another process may have added trials
            _refuse_another_search(out, search, kept)
            search.trials = kept.trials
        done = {(trial.number, trial.rule, trial.repeat) for trial in search.trials}
        for run in product(range(trials), config.rules, range(config.seeds)):
            if run in done:
                continue
            number, rule, repeat = run
            point = point_of(spaces[rule], number, config.seed)
            trial = _try(config, rule, number, repeat, point, task, engine, stop)
            search.trials.append(trial)
            _write(search, out)
            tell(search, trial)
        _write(search, out)
    return search


def shared_and_own(point: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a trial's settings that all rules have, and the rule's own, without the rule's name before them.

    Example:
        >>> shared_and_own({"lr": 0.1, "kp.scale": "he"})
        ({'lr': 0.1}, {'scale': 'he'})
    """
    shared = {name: value for name, value in point.items() if "." not in name}
    return shared, {name.partition(".")[2]: value for name, value in point.items() if "." in name}


def settings_for(config: CompareConfig, rule: str, point: Mapping[str, Any]) -> CompareConfig:
    """Return a config with a trial's settings, those of the rule among ``rule_settings``."""
    shared, own = shared_and_own(point)
    rule_settings = config.rule_settings | ({rule: config.rule_settings.get(rule, {}) | own} if own else {})
    by_rule = config.by_rule | {rule: config.by_rule.get(rule, {}) | shared}
    changed = {"rule_settings": rule_settings, "by_rule": by_rule}
    return CompareConfig.model_validate(config.model_dump() | changed)


def given_in_vain(config: CompareConfig) -> dict[str, float]:
    """Return what a config gives and the search replaces, for all rules or for one.

    Example:
        >>> given_in_vain(CompareConfig(lr=0.3, by_rule={"kp": {"lr": 0.5, "momentum": 0.5}}))
        {'lr': 0.3, 'by_rule.kp.lr': 0.5}
    """
    default, searched = CompareConfig(), SHARED[config.optimizer]
    given = {name: getattr(config, name) for name in searched}
    own = {
        f"by_rule.{rule}.{name}": value
        for rule, settings in config.by_rule.items()
        for name, value in settings.items()
        if name in searched
    }
    return {name: value for name, value in given.items() if value != getattr(default, name)} | own


def _try(
    config: CompareConfig,
    rule: str,
    number: int,
    repeat: int,
    point: dict[str, Any],
    task: Any,
    engine: Engine,
    stop: StopRequest,
) -> Trial:
    """Train once and measure on validation data."""
    started = time.perf_counter()
    settings = (
        settings_for(config, rule, point).for_rule(rule).model_copy(update={"evaluate_on": "validation"})
    )
    value: float | None = None
    status: Literal["finished", "diverged"] = "finished"
    for event in train(settings, rule, config.seed + repeat, task, engine, must_stop=lambda: bool(stop)):
        if isinstance(event, Measured):
            value = event.entry.test
        elif isinstance(event, Diverged):
            value, status = None, "diverged"
        elif isinstance(event, Paused) and event.is_last:
            raise Interrupted(128 + stop.number)
    return Trial(
        rule=rule,
        number=number,
        repeat=repeat,
        settings=point,
        status=status,
        validation=value,
        seconds=time.perf_counter() - started,
    )


def _read_search(out: Path, trials: int, *, resume: bool) -> Search | None:
    """Return what a folder holds, if anything."""
    file = out / "tune.json"
    if not file.exists():
        refuse_to_overwrite(out, ["chosen.yaml"])
        return None
    if not resume:
        raise ConfigError(f"{out} already has a search: continue it by --resume, or choose another --out")
    try:
        kept = Search.model_validate_json(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, not JSON, or not a search
        fault = first_fault(error) if isinstance(error, ValidationError) else str(error)
        raise ConfigError(f"{file} is damaged: {fault[:200]}; choose another --out") from None
    most = max((trial.number + 1 for trial in kept.trials), default=0)
    if trials < most:
        raise ConfigError(
            f"{out} holds {most} trials of a rule, and every rule needs the same number: give --trials {most}"
        )
    return kept


def _refuse_another_search(out: Path, search: Search, kept: Search) -> None:
    for name in ("seed", "config", "data", "metric"):
        there, now = kept.model_dump(mode="json")[name], search.model_dump(mode="json")[name]
        if isinstance(there, dict):
            free = {"rules", "num_threads", "num_workers", "device", "data_dir", "imports", "source"}
            there = {key: value for key, value in there.items() if key not in free}
            now = {key: value for key, value in now.items() if key not in free}
        if there != now:
            raise ConfigError(f"{out} has a search with another {name}; choose another --out")
    for rule, space in kept.spaces.items():
        if search.spaces.setdefault(rule, space) != space:
            raise ConfigError(f"{out} holds a search of {rule} over another space; choose another --out")


def _write(search: Search, out: Path) -> None:
    write_json(out / "tune.json", search.model_dump(mode="json"))
    default = RunConfig().model_dump(mode="json")  # what was given holds for what is done with the choice
    config = deepcopy(search.config)
    left = NOT_CHOSEN | SHARED[search.config["optimizer"]].keys()
    given = {k: v for k, v in config.items() if k in default and k not in left and v != default[k]}
    by_rule: dict[str, dict[str, Any]] = given.pop("by_rule", {})
    rule_settings: dict[str, dict[str, Any]] = given.pop("rule_settings", {})
    for rule in search.spaces:
        best = search.best(rule)
        shared, own = shared_and_own(best.settings if best else {})
        for place, found in ((by_rule, shared), (rule_settings, own)):
            if found:
                place.setdefault(rule, {}).update(found)
    chosen = given | {"by_rule": by_rule} | ({"rule_settings": rule_settings} if rule_settings else {})
    header = f"# Best of {search.trials_per_rule} trials each, by {search.metric.name} on validation data\n"
    write_text(out / "chosen.yaml", header + yaml.safe_dump(chosen, sort_keys=False))


def in_words(settings: Mapping[str, Any]) -> str:
    """Write the settings of a trial in a line.

    Example:
        >>> in_words({"lr": 0.1, "wm.mirror": {"forgetting": 0.6}}), in_words({"wm.mirror": {}})
        ('lr 0.1, forgetting 0.6', 'mirror as by default')
    """
    return ", ".join(_one_in_words(name.split(".")[-1], value) for name, value in settings.items())


def _one_in_words(name: str, value: object) -> str:
    if not isinstance(value, Mapping):
        return f"{name} {value}"
    return in_words(value) if value else f"{name} as by default"


class Row(NamedTuple):
    """A line of the table that ``tune`` prints."""

    rule: str
    trials: int
    best: Choice | None


def rows_of(search: Search) -> list[Row]:
    """Return each rule's number of trials and its best one."""
    return [
        Row(rule, len({trial.number for trial in search.trials if trial.rule == rule}), search.best(rule))
        for rule in search.spaces
    ]
