"""Evaluate a trained network that a run has kept."""

from pathlib import Path
from typing import Any, Literal

from feedbackpath.errors import ConfigError
from feedbackpath.jobs.run import load_data
from feedbackpath.train.checkpoint import Checkpoints
from feedbackpath.train.config import read_run
from feedbackpath.train.engine import Engine
from feedbackpath.train.loop import Run

Which = Literal["last", "best"]


def evaluate(folder: Path, which: Which = "last", **changes: Any) -> dict[str, Any]:
    """Measure a run's network anew.

    Args:
        folder: The run's folder, made by ``feedbackpath train``.
        which: The newest checkpoint, or the one with the lowest validation error.
        changes: Settings that differ from the run's: ``data_dir``, ``device``, ``num_threads``.

    Returns:
        Rule, seed, epochs done, errors in percent on both splits, and each layer's angle and gain.

    Raises:
        ConfigError: The folder holds no run, or no checkpoint of that kind.
        CheckpointError: The checkpoint is damaged.
    """
    config = read_run(folder, **changes)
    kept = _load(Checkpoints(folder / "checkpoints" / f"{config.rule}-seed{config.seed}"), which)
    if kept is None:
        raise ConfigError(f"{folder} holds no {which} checkpoint; run feedbackpath train --resume {folder}")
    dataset = load_data(config, config.seed)
    run = Run(config, config.rule, config.seed, dataset, Engine(config))
    run.load_state(kept["state"])
    return {
        "rule": config.rule,
        "seed": config.seed,
        "epoch": len(kept["run"]["history"]),
        "validation_error": run.error_percent(dataset.validation),
        "test_error": run.error_percent(dataset.test),
        "matrix_angle_deg": run.path.matrix_angles(),
        "gain": run.path.gains(),
    }


def _load(checkpoints: Checkpoints, which: Which) -> dict[str, Any] | None:
    return checkpoints.load_best() if which == "best" else checkpoints.load_newest()[0]
