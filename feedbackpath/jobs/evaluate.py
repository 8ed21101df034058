"""Evaluate a trained network that a run has kept."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from feedbackpath.errors import ConfigError
from feedbackpath.jobs.book import checkpoints_of, facts_of, metric_of
from feedbackpath.jobs.imports import import_files
from feedbackpath.jobs.run import make_task
from feedbackpath.train.engine import Engine
from feedbackpath.train.loop import Training
from feedbackpath.train.results import Metric, Run
from feedbackpath.train.settings import read_run

Which = Literal["last", "best"]


@dataclass(frozen=True)
class Evaluation:
    """What was measured anew.

    Attributes:
        run: The run's entry as of the checkpoint.
        metric: What it was judged by.
        validation: The metric on the validation split.
        test: The metric on the test split.
        matrix_angle_deg: Each layer's angle between B and W, in degrees.
        gain: Each layer's gain.
    """

    run: Run
    metric: Metric
    validation: float
    test: float
    matrix_angle_deg: dict[str, float]
    gain: dict[str, float]


def evaluate(folder: Path, which: Which = "last", **changes: Any) -> Evaluation:
    """Measure a run's network anew.

    Args:
        folder: The run's folder, made by ``feedbackpath train``.
        which: The newest checkpoint, or the one with the best validation metric.
        changes: Settings that differ from the run's: ``data_dir``, ``device``, ``num_threads``.

    Raises:
        ConfigError: The folder holds no run, or no checkpoint of that kind.
        CheckpointError: The checkpoint is damaged.
    """
    config = read_run(folder, **changes)
    import_files(config.imports)
    task = make_task(config, config.seed)
    checkpoints = checkpoints_of(folder, config, config.rule, config.seed, facts_of(config, task))
    kept = checkpoints.load_best() if which == "best" else checkpoints.load_newest()[0]
    if kept is None and which == "best":
        raise ConfigError(
            f"{folder} has no best checkpoint: only a run with --select-best keeps it, and it cannot be "
            "made later; evaluate --which last"
        )
    if kept is None:
        raise ConfigError(f"{folder} holds no last checkpoint; run feedbackpath train --resume {folder}")
    training = Training(config, config.rule, config.seed, task, Engine(config))
    training.load_state(kept["state"])
    return Evaluation(
        Run.model_validate(kept["run"]),
        metric_of(task),
        training.measure_metric(task.validation),
        training.measure_metric(task.test),
        training.path.matrix_angles(),
        training.path.gains(),
    )
