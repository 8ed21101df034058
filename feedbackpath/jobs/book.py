"""The main job: train the same network by several rules and show how each learns."""

import json
import platform
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from feedbackpath.data import Dataset, load_dataset
from feedbackpath.errors import ConfigError
from feedbackpath.report import SCHEMA, read_results, summarise, write_report
from feedbackpath.report.live import LiveView
from feedbackpath.train.checkpoint import (
    load_checkpoint,
    save_checkpoint,
    write_json,
    write_json_lines,
    write_text,
)
from feedbackpath.train.config import CompareConfig
from feedbackpath.train.loop import Diverged, Measured, Step, make_network, make_path, train
from feedbackpath.train.rules import make_rule

FREE_TO_CHANGE = {"rules", "seeds", "num_threads", "device"}  # on --resume; all else decides the numbers
ENDED = ("finished", "diverged")


class Interrupted(BaseException):
    """The user or the system asked the job to stop; what was done is kept.

    Like KeyboardInterrupt no Exception, so that no code on the way takes it for an error of its own.

    Attributes:
        exit_code: 130 after SIGINT, 143 after SIGTERM.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def compare(
    config: CompareConfig, out: Path, *, resume: bool, command: str, view: LiveView
) -> dict[str, Any]:
    """Train by every rule and seed of a config and keep results, figures and a page in a folder.

    Args:
        config: The settings.
        out: The folder.
        resume: Go on with what the folder holds, if it holds anything.
        command: The command line, for the results file.
        view: Where progress is shown.

    Returns:
        The content of ``results.json``.

    Raises:
        ConfigError: The folder holds another comparison, or a setting names what does not exist.
        DataError: The data is missing or damaged.
        Interrupted: SIGINT or SIGTERM came; finished epochs are kept.
    """
    for rule, settings in config.rule_settings.items():
        make_rule(rule, settings)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    first_data = _load_data(config, config.seed)
    for rule in config.rules:  # refuses what cannot be built before anything is written
        make_path(config, rule, config.seed, make_network(config, config.seed, first_data))
    book = ResultsBook(out, config, first_data.facts, command, resume=resume)
    with _signals_raise_interrupted(), view:
        for seed in range(config.seed, config.seed + config.seeds):
            dataset = first_data if seed == config.seed else _load_data(config, seed)
            for rule in config.rules:
                if book.run_of(rule, seed)["status"] not in ENDED:
                    _train_and_record(book, rule, seed, dataset, view)
    book.save()
    write_report(book.results, out)
    return book.results


class ResultsBook:
    """The results of a comparison, in memory and on disk."""

    def __init__(
        self, out: Path, config: CompareConfig, facts: dict[str, Any], command: str, *, resume: bool
    ) -> None:
        self.out, self.config = out, config
        old = read_results(out) if (out / "results.json").exists() else None
        if old is not None:
            if not resume:
                raise ConfigError(
                    f"{out} holds results already: go on with them by --resume, or choose another --out"
                )
            _refuse_other_settings(out, config, old, facts)
        wanted = [(rule, s) for s in range(config.seed, config.seed + config.seeds) for rule in config.rules]
        runs = {(run["rule"], run["seed"]): run for run in (old or {}).get("runs", [])}
        for rule, seed in wanted:
            runs.setdefault((rule, seed), _new_run(rule, seed))
        self.results: dict[str, Any] = {
            "schema": SCHEMA,
            "command": command,
            "versions": _versions(),
            "device": _describe_device(config),
            "data": {"name": config.data, **facts},
            "model": config.model,
            "config": config.model_dump(mode="json"),
            "runs": list(runs.values()),
            "summary": {},
        }
        write_text(out / "config.yaml", config.to_yaml())
        self.save()

    def run_of(self, rule: str, seed: int) -> dict[str, Any]:
        """Return the entry of a run."""
        return next(run for run in self.results["runs"] if (run["rule"], run["seed"]) == (rule, seed))

    def checkpoint_path(self, run: dict[str, Any]) -> Path:
        """Return where a run keeps what it needs to go on."""
        return self.out / "checkpoints" / f"{run['rule']}-seed{run['seed']}.pt"

    def take_up(self, run: dict[str, Any]) -> dict[str, Any] | None:
        """Return the state that a run left, or None, and set its history to that moment."""
        state = load_checkpoint(self.checkpoint_path(run))
        run |= _new_run(run["rule"], run["seed"]) if state is None else state["run"]
        run["status"] = "running"
        return None if state is None else state["resume_state"]

    def record(self, run: dict[str, Any], measured: Measured) -> None:
        """Enter a measurement and keep the state, so that the run can go on from here."""
        run["seconds"] += measured.record["seconds"]
        if measured.epoch == 0:
            run["start"] = measured.record
        else:
            run["history"].append(measured.record)
            run["test_error"] = measured.record["test_error"]
        save_checkpoint(self.checkpoint_path(run), {"run": run, "resume_state": measured.resume_state})
        self.save()

    def end(self, run: dict[str, Any], status: str) -> None:
        """Enter how a run ended; an ended run needs no checkpoint any more."""
        run["status"] = status
        if status in ENDED:
            self.checkpoint_path(run).unlink(missing_ok=True)
        self.save()

    def save(self) -> None:
        """Write ``results.json`` and ``history.jsonl``."""
        self.results["summary"] = summarise(self.results["runs"])
        write_json(self.out / "results.json", self.results)
        lines = [
            {"rule": run["rule"], "seed": run["seed"], **entry}
            for run in self.results["runs"]
            for entry in run["history"]
        ]
        write_json_lines(self.out / "history.jsonl", lines)


def _train_and_record(book: ResultsBook, rule: str, seed: int, dataset: Dataset, view: LiveView) -> None:
    run = book.run_of(rule, seed)
    state = book.take_up(run)
    view.start_run(book.results, run)
    status = "finished"
    try:
        for event in train(book.config, rule, seed, dataset, state):
            if isinstance(event, Step):
                view.show_step(event)
            elif isinstance(event, Measured):
                book.record(run, event)
                view.show_measured(event)
            elif isinstance(event, Diverged):
                run["diverged_epoch"], status = event.epoch, "diverged"
    except Interrupted:
        book.end(run, "interrupted")
        write_report(book.results, book.out)
        raise
    book.end(run, status)
    write_report(book.results, book.out, figures=False)
    view.end_run()


def _load_data(config: CompareConfig, seed: int) -> Dataset:
    return load_dataset(
        config.data,
        data_dir=config.data_dir,
        seed=seed,
        num_classes=config.classes,
        samples_per_epoch=config.samples_per_epoch,
    )


def _new_run(rule: str, seed: int) -> dict[str, Any]:
    return {
        "rule": rule,
        "seed": seed,
        "status": "waiting",
        "test_error": None,
        "seconds": 0.0,
        "history": [],
    }


def _refuse_other_settings(
    out: Path, config: CompareConfig, old: dict[str, Any], facts: dict[str, Any]
) -> None:
    """Refuse to mix results of different settings or data in one folder."""
    new = config.model_dump(mode="json")
    differing = [
        f"{name} ({old['config'].get(name)!r} there, {new[name]!r} now)"
        for name in new
        if name not in FREE_TO_CHANGE and new[name] != old["config"].get(name)
    ]
    if old["data"] != json.loads(json.dumps({"name": config.data, **facts})):
        differing.append("data (the files or rendered classes are not the same)")
    if differing:
        raise ConfigError(f"{out} was run with other settings: {', '.join(differing)}; choose another --out")


def _versions() -> dict[str, str]:
    packages = ("feedbackpath", "torch", "numpy", "matplotlib", "pillow")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}


def _describe_device(config: CompareConfig) -> str:
    if torch.device(config.device).type == "cuda":
        return torch.cuda.get_device_name(config.device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


@contextmanager
def _signals_raise_interrupted() -> Iterator[None]:
    """Let SIGINT and SIGTERM end the job between two Python instructions, with what was done kept."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
