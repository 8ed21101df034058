"""The book of a job: what its folder holds, in memory and on disk."""

import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from feedbackpath.errors import ConfigError
from feedbackpath.report import SCHEMA, read_results, summarise, write_report
from feedbackpath.report.table import describe_divergence
from feedbackpath.report.tensorboard import TensorBoardLog
from feedbackpath.train.checkpoint import Checkpoints, write_json, write_json_lines, write_model, write_text
from feedbackpath.train.config import CompareConfig, RunConfig, TrainConfig
from feedbackpath.train.loop import Diverged, Measured, State

FREE_TO_CHANGE = {  # on --resume; all else decides the numbers
    "rules", "seeds", "num_threads", "num_workers", "device", "devices", "num_nodes",
    "checkpoint_steps", "keep_checkpoints", "data_dir",
}  # fmt: skip
FREE_TO_MOVE = {"source"}  # among the data's facts: a checksum says whether it is the same data
ENDED = ("finished", "diverged")


class ResultsBook:
    """The results of a job.

    Args:
        out: The job's folder.
        config: The settings.
        facts: What the data says of itself.
        command: The command line.
        resume: Whether to go on with what the folder holds.

    Raises:
        ConfigError: The folder holds results already, of another job or without ``resume``.
    """

    def __init__(
        self,
        out: Path,
        config: CompareConfig | RunConfig,
        facts: dict[str, Any],
        command: str,
        *,
        resume: bool,
    ) -> None:
        self.out, self.is_writer = out, False
        self.tensorboard: TensorBoardLog | None = None
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
        if isinstance(config, CompareConfig):  # rules that an earlier call has run stay part of the job
            config = config.model_copy(update={"rules": tuple(dict.fromkeys(rule for rule, _ in runs))})
        self.config = config
        self.results: dict[str, Any] = {
            "schema": SCHEMA,
            "command": command,
            "versions": describe_versions(),
            "device": describe_device(config),
            "data": {"name": config.data, **facts},
            "model": config.model,
            "config": config.model_dump(mode="json"),
            "runs": list(runs.values()),
            "summary": {},
        }

    @property
    def keeps_models(self) -> bool:
        """Whether the folder is to hold trained networks, not results alone."""
        return isinstance(self.config, RunConfig)

    def open(self, *, is_writer: bool) -> None:
        """Begin to write, in the one process that does."""
        self.is_writer = is_writer
        if is_writer:
            write_text(self.out / "config.yaml", self.config.to_yaml())
            if self.keeps_models:
                self.tensorboard = TensorBoardLog(self.out / "tensorboard")
        self.save()

    def run_of(self, rule: str, seed: int) -> dict[str, Any]:
        """Return the entry of a run."""
        return next(run for run in self.results["runs"] if (run["rule"], run["seed"]) == (rule, seed))

    def checkpoints_of(self, run: dict[str, Any]) -> Checkpoints:
        """Return where a run keeps what it needs to go on."""
        folder = self.out / "checkpoints" / f"{run['rule']}-seed{run['seed']}"
        return Checkpoints(folder, keep=self.config.keep_checkpoints)

    def take_up(self, run: dict[str, Any]) -> tuple[State | None, list[str]]:
        """Return the state that a run left, or None, with notes on damaged ones; set its history to it."""
        kept, damaged = self.checkpoints_of(run).load_newest()
        run |= _new_run(run["rule"], run["seed"]) if kept is None else kept["run"]
        run["status"] = "running"
        onward = "going on from the one before" if kept else "beginning this run anew"
        notes = [f"checkpoint {path} is damaged: {onward}" for path in damaged]
        return None if kept is None else kept["state"], notes

    def record(self, run: dict[str, Any], measured: Measured) -> None:
        """Enter a measurement and keep the state, so that the run can go on from here."""
        run["seconds"] += measured.record["seconds"]
        if measured.epoch == 0:
            run["start"] = measured.record
        else:
            run["history"].append(measured.record)
            run["test_error"] = measured.record["test_error"]
        is_best = _enter_if_best(run, measured.record)
        self.save_state(run, measured.state)
        if self.is_writer and is_best:
            self.checkpoints_of(run).save_best({"run": run, "state": measured.state})
        if self.is_writer and self.keeps_models:
            write_model(self.out / "model.safetensors", measured.state["model"])
            write_report(self.results, self.out, figures=False)
        if self.tensorboard is not None:
            self.tensorboard.add(run, measured.record)

    def save_state(self, run: dict[str, Any], state: State) -> None:
        """Keep a state to go on from."""
        if self.is_writer:
            position = (state["epoch"], state["consumed"])
            self.checkpoints_of(run).save({"run": run, "state": state}, position)
        self.save()

    def record_divergence(self, run: dict[str, Any], event: Diverged) -> str:
        """Enter where a run diverged, and return that as a line for people."""
        run["diverged_epoch"] = event.epoch
        run["divergence"] = {
            "step": event.step,
            "learning_rate": event.learning_rate,
            "origin": event.origin,
        }
        return f"{run['rule']} seed {run['seed']} {describe_divergence(run)}"

    def end(self, run: dict[str, Any], status: str) -> None:
        """Enter how a run ended; one that finished needs no checkpoint any more, if only results count."""
        run["status"] = status
        if self.is_writer and status == "finished" and not self.keeps_models:
            self.checkpoints_of(run).remove()
        self.save()
        if self.is_writer:
            write_report(self.results, self.out, figures=False)

    def close(self) -> None:
        """Write everything, figures too."""
        self.save()
        if self.is_writer:
            write_report(self.results, self.out)
        if self.tensorboard is not None:
            self.tensorboard.close()

    def save(self) -> None:
        """Write ``results.json`` and ``history.jsonl``."""
        self.results["summary"] = summarise(self.results["runs"])
        if not self.is_writer:
            return
        write_json(self.out / "results.json", self.results)
        lines = [
            {"rule": run["rule"], "seed": run["seed"], **entry}
            for run in self.results["runs"]
            for entry in run["history"]
        ]
        write_json_lines(self.out / "history.jsonl", lines)


def _enter_if_best(run: dict[str, Any], record: dict[str, Any]) -> bool:
    """Note the epoch of the lowest validation error; whether this one is it."""
    error, best = record.get("validation_error"), run.get("best")
    if error is None or record["epoch"] == 0 or (best and best["validation_error"] <= error):
        return False
    run["best"] = {name: record[name] for name in ("epoch", "validation_error", "test_error")}
    return True


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
    out: Path, config: CompareConfig | RunConfig, old: dict[str, Any], facts: dict[str, Any]
) -> None:
    """Refuse to mix results of different settings or data in one folder."""
    new = config.model_dump(mode="json")
    there = type(config)().model_dump(mode="json") | old["config"]  # an older version had fewer settings
    differing = [
        f"{name} ({there[name]!r} there, {new[name]!r} now)"
        for name in new
        if name not in FREE_TO_CHANGE and new[name] != there[name]
    ]
    data = json.loads(json.dumps({"name": config.data, **facts}))
    differing += [
        f"the data's {name} ({old['data'].get(name)!r} there, {data.get(name)!r} now)"
        for name in dict.fromkeys([*old["data"], *data])
        if name not in FREE_TO_MOVE and old["data"].get(name) != data.get(name)
    ]
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
