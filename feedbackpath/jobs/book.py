"""The book of a job: what its folder holds, in memory and on disk.

What a run goes on from is its newest checkpoint. Everything else is made from that: its entry, the network's
file, the best checkpoint, the table, the figures. A resume makes right whatever a kill has left behind.
"""

import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from feedbackpath.errors import ConfigError
from feedbackpath.report import summarise, write_report
from feedbackpath.report.equivalence import look
from feedbackpath.report.tensorboard import TensorBoardLog
from feedbackpath.rules import looks_of_rules
from feedbackpath.tasks import Task
from feedbackpath.train.config import CompareConfig, RunConfig, TrainConfig
from feedbackpath.train.loop import Diverged, Measured, State
from feedbackpath.train.results import (
    Best,
    DataFacts,
    Divergence,
    Look,
    Metric,
    Results,
    Run,
    entry_to_json,
    read_results,
)
from feedbackpath.train.store import (
    Checkpoints,
    differences,
    write_json,
    write_json_lines,
    write_model,
    write_text,
)

FREE_TO_CHANGE = {  # on --resume; all else decides the numbers
    "rules", "seeds", "num_threads", "num_workers", "device", "devices", "num_nodes",
    "checkpoint_steps", "keep_checkpoints", "data_dir", "imports",
    "on_bad_image",  # until a bad image is met, both do the same, and "error" ends there
}  # fmt: skip
FREE_TO_MOVE = {"source", "classes", "chance"}
"""Facts that may be told otherwise, or not at all: a checksum says whether it is the same data."""
FILES = ("config.yaml", "history.jsonl", "model.safetensors", "report.html")  # beside results.json
LAUNCH = ".launch"
STATE = {
    "epoch": int, "consumed": int, "step": int, "tally": dict, "model": dict, "optimizer": dict, "path": dict,
    "rng": list,
}  # fmt: skip
SHARE = 20  # while a job runs, its page and its results take at most one part each in so many of the time


class Sparingly:
    """Call something now and then: seldom if it takes long.

    Args:
        call: What is called.
    """

    def __init__(self, call: Callable[[], object]) -> None:
        self._call, self._due = call, 0.0

    def __call__(self, *, now: bool = False) -> None:
        """Call it, unless that was done a moment ago."""
        started = time.perf_counter()
        if now or started >= self._due:
            self._call()
            ended = time.perf_counter()
            self._due = ended + SHARE * (ended - started)


class ResultsBook:
    """The results of a job.

    Args:
        out: The job's folder.
        config: The settings.
        task: What is learned; its data says whether it is the same.
        command: The command line.
        resume: Whether to go on with what the folder holds.

    Attributes:
        keeps_models: Whether the folder is to hold a trained network, not results alone.

    Raises:
        ConfigError: The folder holds results already, of another job or without ``resume``.
    """

    def __init__(
        self,
        out: Path,
        config: CompareConfig | RunConfig,
        task: Task,
        command: str,
        *,
        resume: bool,
    ) -> None:
        self.out, self.is_writer, self.keeps_models = out, False, isinstance(config, RunConfig)
        self.tensorboard: TensorBoardLog | None = None
        self._write_page = Sparingly(lambda: write_report(self.results, out, figures=False))
        self._write_results = Sparingly(self._write_files)
        old = read_results(out) if (out / "results.json").exists() else None
        if old is not None and not resume:
            raise ConfigError(
                f"{out} already has results: continue them by --resume, or choose another --out"
            )
        if old is None and not (out / "checkpoints").exists():
            refuse_to_overwrite(out, FILES, {"config.yaml": config.to_yaml()})
        facts = facts_of(config, task)
        if old is not None:
            _refuse_other_settings(out, config, old, facts)
        seeds = range(config.seed, config.seed + config.seeds)
        runs = {(run.rule, run.seed): run for run in (old.runs if old else [])}
        for rule, seed in [(rule, seed) for seed in seeds for rule in config.rules]:
            runs.setdefault((rule, seed), Run(rule=rule, seed=seed))
        if isinstance(config, CompareConfig):  # rules that an earlier call has run stay part of the job
            config = config.model_copy(update={"rules": tuple(dict.fromkeys(rule for rule, _ in runs))})
        self.config = config
        self.results = Results(
            command=command,
            versions=describe_versions(),
            device=describe_device(config),
            data=facts,
            model=config.model,
            metric=metric_of(task),
            config=config.model_dump(mode="json"),
            looks=_looks_of({rule for rule, _ in runs}, old),
            runs=list(runs.values()),
            equivalence=old.equivalence if old else [],
        )

    def open(self, *, is_writer: bool) -> None:
        """Begin to write, in the one process that does."""
        self.is_writer = is_writer
        if is_writer:
            write_text(self.out / "config.yaml", self.config.to_yaml())
            if (launch := launch_of_torchrun()) is not None:
                write_text(self.out / LAUNCH, launch)
            for run in self.results.runs:
                if run.status == "finished" and not self.keeps_models:
                    self.checkpoints_of(run).remove()  # a kill may have come before that
                elif run.status == "finished":
                    self.take_up(run)
                    run.status = "finished"
            if self.keeps_models:
                self.tensorboard = TensorBoardLog(self.out / "tensorboard")
        self.save()

    def checkpoints_of(self, run: Run) -> Checkpoints:
        """Return where a run keeps what it needs to go on."""
        return checkpoints_of(self.out, self.config, run.rule, run.seed, self.results.data)

    def take_up(self, run: Run) -> tuple[State | None, list[str]]:
        """Return the state that a run left, or None, with notes on damaged ones; set everything to it.

        Raises:
            ConfigError: The checkpoint is of other settings, or of another rule, seed or data.
        """
        kept, damaged = self.checkpoints_of(run).load_newest()
        if kept is not None or not run.is_ended:  # one that has ended may have lost its checkpoints
            found = Run(rule=run.rule, seed=run.seed) if kept is None else Run.model_validate(kept["run"])
            _become(run, found)
        run.status = "running"
        if kept is not None and self.is_writer:
            self.checkpoints_of(run).prune()
            self._write_networks(run, kept["state"])
        if self.is_writer:
            self._write_page()
        onward = "going on from the one before" if kept else "beginning this run anew"
        notes = [f"checkpoint {path} is damaged: {onward}" for path in damaged]
        return None if kept is None else kept["state"], notes

    def record(self, run: Run, measured: Measured) -> None:
        """Enter a measurement and keep the state, so that the run can go on from here."""
        entry = measured.entry
        run.seconds += entry.seconds
        if entry.epoch == 0:
            run.start = entry
        else:
            run.history.append(entry)
            run.test = entry.test
        _enter_if_best(run, self.results.metric)
        self.save_state(run, measured.state)
        if self.is_writer:
            self._write_networks(run, measured.state)
            self._write_page()
        if self.tensorboard is not None:
            self.tensorboard.add(run, entry, self.results.metric)

    def save_state(self, run: Run, state: State) -> None:
        """Keep a state to go on from; ``results.json`` may follow later, for all of it can be made again."""
        if self.is_writer:
            content = {"run": run.model_dump(mode="json"), "state": state}
            self.checkpoints_of(run).save(content, (state["epoch"], state["consumed"]))
            self._write_results()

    def record_divergence(self, run: Run, event: Diverged) -> None:
        """Enter where a run diverged."""
        run.diverged_epoch = event.epoch
        run.divergence = Divergence(step=event.step, learning_rate=event.learning_rate, origin=event.origin)

    def end(self, run: Run, status: Any) -> None:
        """Enter how a run ended; one that finished needs no checkpoint any more, if only results count."""
        run.status = status
        self.save()
        if self.is_writer and status == "finished" and not self.keeps_models:
            self.checkpoints_of(run).remove()
        if self.is_writer:
            self._write_page(now=True)

    def close(self) -> None:
        """Write everything, figures too."""
        margin = getattr(self.config, "equivalence", None)
        if margin is not None and all(run.is_ended for run in self.results.runs):
            look(self.results, margin, self.config.seeds)
        self.save()
        if self.is_writer:
            write_report(self.results, self.out)
        if self.tensorboard is not None:
            self.tensorboard.close()

    def save(self) -> None:
        """Write ``results.json`` and ``history.jsonl``."""
        if self.is_writer:
            self._write_results(now=True)

    def _write_files(self) -> None:
        if not (self.out / "config.yaml").exists():  # somebody has removed the folder meanwhile
            write_text(self.out / "config.yaml", self.config.to_yaml())
        write_results(self.results, self.out)

    def _write_networks(self, run: Run, state: State) -> None:
        """Write the network as of a state, and keep the state as the best one if its epoch is the best."""
        is_epochs_end = state["consumed"] == 0
        if run.best is not None and is_epochs_end and run.best.epoch == state["epoch"] - 1:
            self.checkpoints_of(run).save_best({"run": run.model_dump(mode="json"), "state": state})
        if self.keeps_models:
            write_model(self.out / "model.safetensors", state["model"])


def write_results(results: Results, folder: Path) -> None:
    """Write ``results.json`` and ``history.jsonl``, after averaging what has finished."""
    results.summary = summarise(results.runs)
    write_json(folder / "results.json", results.to_json())
    lines = [
        {"rule": run.rule, "seed": run.seed, **entry_to_json(entry, results.metric)}
        for run in results.runs
        for entry in run.history
    ]
    write_json_lines(folder / "history.jsonl", lines)


def checkpoints_of(out: Path, config: TrainConfig, rule: str, seed: int, data: DataFacts) -> Checkpoints:
    """Return where a run of a job keeps what it needs to go on, and refuses what is of another."""
    own = config.for_rule(rule)
    settings = own.model_dump(mode="json", exclude=FREE_TO_CHANGE | {"rule", "seed", "by_rule"})
    fingerprint = {"rule": rule, "seed": seed, **settings, **_facts_that_count(data)}
    folder = out / "checkpoints" / f"{rule}-seed{seed}"
    return Checkpoints(
        folder, fingerprint, config.keep_checkpoints, check=partial(_check_content, rule, seed)
    )


def _check_content(rule: str, seed: int, content: dict[str, Any]) -> None:
    """Fail where a checkpoint is whole and yet not one that a run can go on from."""
    run, state = Run.model_validate(content["run"]), content["state"]
    if (run.rule, run.seed) != (rule, seed):
        raise ValueError(f"it belongs to {run.rule!r}, seed {run.seed}")
    if not all(isinstance(state[name], kind) for name, kind in STATE.items()):
        raise ValueError("its state is not that of a run")


def refuse_to_overwrite(folder: Path, names: Iterable[str], ours: Mapping[str, str] | None = None) -> None:
    """Refuse a folder in which a job would write over files that no job has left there.

    Args:
        folder: The folder; it holds no results.
        names: What the job would write.
        ours: What it would write into some of them: where they hold that already, nothing is lost.

    Raises:
        ConfigError: One of them is there.
    """
    for name in names:
        file = folder / name
        if file.exists() and not (ours and name in ours and file.read_bytes() == ours[name].encode()):
            raise ConfigError(
                f"{file} exists, is not from a job, and would be overwritten; choose another --out"
            )


def launch_of_torchrun() -> str | None:
    """Return what tells this start of torchrun, its restarts too, from every other; None without torchrun."""
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    if not all(name in os.environ for name in names):
        return None
    parts = [os.environ[name] for name in names]
    is_alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return " ".join([*parts, str(os.getppid()) if is_alone else "on several machines"])


def is_of_this_launch(folder: Path) -> bool:
    """Whether a folder holds what an earlier attempt of the same start of torchrun has begun there."""
    mark = folder / LAUNCH
    return mark.exists() and mark.read_text(encoding="utf-8", errors="replace") == launch_of_torchrun()


def _become(run: Run, other: Run) -> None:
    for name in type(run).model_fields:
        setattr(run, name, getattr(other, name))


def _enter_if_best(run: Run, metric: Metric) -> None:
    """Note the epoch with the best validation metric."""
    entry = run.history[-1] if run.history else None
    if entry is None or entry.validation is None:
        return
    sign = 1 if metric.lower_is_better else -1
    if run.best is None or sign * entry.validation < sign * run.best.validation:
        run.best = Best(epoch=entry.epoch, validation=entry.validation, test=entry.test)


def _looks_of(rules: set[str], old: Results | None) -> dict[str, Look]:
    """Return the looks that users have set; a rule of an earlier call may not be registered any more."""
    known = {rule: Look(**look) for rule, look in looks_of_rules().items()}
    return {rule: look for rule, look in ((old.looks if old else {}) | known).items() if rule in rules}


def _facts_that_count(data: DataFacts) -> dict[str, Any]:
    return {
        f"the data's {name}": of for name, of in data.model_dump(mode="json", exclude=FREE_TO_MOVE).items()
    }


def metric_of(task: Task) -> Metric:
    """Return what a task is judged by, as result files have it."""
    return Metric(name=task.metric, unit=task.unit, lower_is_better=task.lower_is_better)


def facts_of(config: TrainConfig, task: Task) -> DataFacts:
    """Return what a task's data says of itself, under the name that the config has for it."""
    return DataFacts(**{"name": config.data, **task.facts, **task.guessing})


def _refuse_other_settings(
    out: Path, config: CompareConfig | RunConfig, old: Results, facts: DataFacts
) -> None:
    """Refuse to mix results of different settings or data in one folder."""
    if ("rule" in old.config) != isinstance(config, RunConfig):
        made, now = ("train", "compare") if "rule" in old.config else ("compare", "train")
        raise ConfigError(f"{out} was made by {made}, and {now} cannot continue it; choose another --out")
    new = config.model_dump(mode="json", exclude=FREE_TO_CHANGE)
    there = type(config)().model_dump(mode="json") | old.config  # an older version had fewer settings
    differing = differences({name: there[name] for name in new}, new)
    differing += differences(_facts_that_count(old.data), _facts_that_count(facts))
    if differing:
        raise ConfigError(f"{out} was run with other settings: {', '.join(differing)}; choose another --out")


def describe_versions() -> dict[str, str]:
    """Return the versions that numbers may depend on."""
    packages = ("feedbackpath", "torch", "numpy", "matplotlib", "pillow")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}


def describe_device(config: TrainConfig) -> str:
    """Return the name of the device that a config is run on."""
    if torch.device(config.device).type == "cuda":
        return torch.cuda.get_device_name(config.device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
