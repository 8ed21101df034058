"""Angles by layer over time, as in Figure 4 of the paper, and what theory says: glyphs, ResNet-8.

    python benchmarks/figure_4.py train
    python benchmarks/figure_4.py theory
    python benchmarks/doc_figures.py figure-4.png

``train`` compares the rules on a schedule of steps: eight epochs at the full learning rate, three at a tenth,
one at a hundredth. It goes on where it was broken off. ``theory`` works out two predictions.

- ``kp``: W_t - B_t = exp(-c_t) (W_0 - B_0), with c_t the e-folds after t steps. The angle follows from W_t.
  So one seed is trained once more, W is read after each epoch, and B is not.
- ``wm``: the angle that sampling noise leaves if W stands still. It follows from sizes alone.
"""

import argparse
import json
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from studies import call, keep
from torch import Tensor

import feedbackpath as fp
from feedbackpath.jobs.run import make_task
from feedbackpath.measure.angles import angle_deg
from feedbackpath.report.figures import LAYER_COLOURS, LAYER_FIGURES, draw_layer_figure
from feedbackpath.report.panels import make_panel, styles_of
from feedbackpath.report.parts import PAGE_WIDTH, REFERENCE
from feedbackpath.tasks import Task
from feedbackpath.train.build import make_network, make_optimizer, make_path
from feedbackpath.train.config import CompareConfig
from feedbackpath.train.engine import Engine
from feedbackpath.train.loop import Measured, train
from feedbackpath.train.results import Results, read_results
from feedbackpath.train.schedule import Schedule

HERE = Path(__file__).parent
OUT, WORK = HERE / "figure-4", Path("runs/figure-4")
RULES, FIRST_SEED, SEEDS, EPOCHS, MILESTONES = ("bp", "ss", "kp", "wm"), 500, 2, 12, (8, 11)
Angles = dict[str, float]  # by layer, in degrees


def train_all() -> None:
    """Train by every rule, and keep the result file.

    Raises:
        SystemExit: The comparison was interrupted, or could not be run.
    """
    schedule = ["--schedule", "steps", "--milestones", ",".join(map(str, MILESTONES)), "--epochs", EPOCHS]
    seeds = ["--seed", FIRST_SEED, "--seeds", SEEDS, "--num-threads", 1]
    if code := call("compare", "--rules", ",".join(RULES), *schedule, *seeds, "--out", WORK, "--resume"):
        raise SystemExit(code)
    keep(WORK / "results.json", OUT)


def predict() -> None:
    """Write what theory says of ``kp`` after each epoch, and of ``wm``."""
    settings = read_results(OUT).config
    config = CompareConfig.model_validate(settings)
    task = make_task(config, FIRST_SEED)
    found = {
        "seed": FIRST_SEED,
        "kp": predict_kolen_pollack(config, task),
        "wm": predict_mirror(config, task),
    }
    (OUT / "theory.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def predict_kolen_pollack(config: CompareConfig, task: Task) -> list[Angles]:
    """Train by ``kp``; return the predicted angles after each epoch, from epoch 0."""
    path = make_path(config, "kp", FIRST_SEED, make_network(config, FIRST_SEED, task))
    first = {name: (w.detach().clone(), b.detach().clone()) for name, w, b in path.pairs()}
    efolds = efolds_by_epoch(config, path, Schedule.over(config, len(task.train)))
    predicted = []
    for event in train(config, "kp", FIRST_SEED, task, Engine(config)):
        if isinstance(event, Measured):
            now, count = event.state["model"], efolds[event.entry.epoch]
            predicted.append(
                {name: predicted_angle(now[f"{name}.weight"], *start, count) for name, start in first.items()}
            )
    return predicted


def efolds_by_epoch(config: CompareConfig, path: fp.FeedbackPath, schedule: Schedule) -> list[float]:
    """Return c after each epoch, from epoch 0."""
    optimizer = make_optimizer(path, config)
    steps, rate = schedule.steps_per_epoch, schedule.learning_rate
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fp.KolenPollackWarning)  # the first epochs have few
        counts = [
            path.check_optimizer(optimizer, steps=epoch * steps, schedule=rate)
            for epoch in range(1, config.epochs + 1)
        ]
    return [0.0, *(min(count.values()) for count in counts)]


def predicted_angle(weight: Tensor, first_weight: Tensor, first_feedback: Tensor, efolds: float) -> float:
    """Return the angle to W_t of B_t = W_t - exp(-c_t) (W_0 - B_0)."""
    return angle_deg(weight - math.exp(-efolds) * (first_weight - first_feedback), weight)


def predict_mirror(config: CompareConfig, task: Task) -> Angles:
    """Return the angle that sampling noise leaves in each layer under ``wm``, whatever W is."""
    network = make_network(config, FIRST_SEED, task)
    path = make_path(config, "wm", FIRST_SEED, network)
    x, y = task.train.batch(torch.arange(config.batch_size), 1)
    plan = path.plan(lambda: task.loss(network(task.train.prepare(x)), y))
    return {layer.name: layer.angle_deg for layer in plan}


def draw(results: Results, theory: dict[str, Any]) -> Figure:
    """Draw the angles by rule and layer, the milestones, and theory as circles."""
    panel = make_panel([("figure-4", results)])
    figure = draw_layer_figure(panel, styles_of([panel]), LAYER_FIGURES["alignment"])
    assert figure is not None
    figure.set_figwidth(PAGE_WIDTH)
    rules = [rule for rule in RULES if rule != "bp"]
    for axes in figure.axes[: 2 * len(rules)]:
        for milestone in MILESTONES:
            axes.axvline(milestone, linestyle=":", **REFERENCE)
    for rule, by_epoch in (("kp", theory["kp"][1:]), ("wm", [theory["wm"]] * EPOCHS)):
        axes = figure.axes[rules.index(rule)]
        for place, layer in enumerate(theory["wm"]):
            looks = {"color": LAYER_COLOURS(place / (len(theory["wm"]) - 1)), "mfc": "none", "markersize": 3}
            axes.plot(range(1, EPOCHS + 1), [angles[layer] for angles in by_epoch], "o", **looks)
    return figure


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return what a command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("part", choices=PARTS)
    return parser.parse_args(arguments)


PARTS = {"train": train_all, "theory": predict}


if __name__ == "__main__":
    PARTS[parse(sys.argv[1:]).part]()
