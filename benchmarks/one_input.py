"""Mirror mode driven by one noisy input: how near B comes to W, and whether a network trains with it.

`python benchmarks/one_input.py training` trains ResNet-8 on glyphs, every B learning after each step from one
forward pass of noise, beside other rules; `... angles` measures angles, gains and how far inputs are from
white, at the start and after some training; `... drives`, run last, does so for drives in place of answers.
One thread each; a run that was broken off is taken up. `doc_figures.py` draws the figures.
"""

import argparse
import dataclasses
import json
import math
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from one_input_mirror import Seen, look, mirror_from_input
from rich.console import Console
from torch import Tensor, nn

from feedbackpath import FeedbackPath, Mirror, RuleContext, UntiedWeight, register_rule, untie
from feedbackpath.data import Dataset, load_dataset, minibatches
from feedbackpath.jobs import run_job
from feedbackpath.measure.angles import angle_deg
from feedbackpath.measure.deltas import left_as_it_was
from feedbackpath.mirror import MirrorMode
from feedbackpath.mirror.readings import learn
from feedbackpath.mirror.settings import Reading
from feedbackpath.models import build_model
from feedbackpath.report.live import LiveView
from feedbackpath.rules import Rule, WeightMirror
from feedbackpath.train.config import CompareConfig

DATA, CLASSES = "glyphs", 10
OUT = Path(__file__).parent / "one-input"
WORK = Path("runs") / "one-input"

NOISE_BATCH = 96
SEEDS = (0, 1, 2)
TRAINING = {"epochs": 4, "samples_per_epoch": 2048, "batch_size": 64, "seeds": 3, "num_threads": 1}
BACKPROP_STEPS, BACKPROP_BATCH, BACKPROP_LR = 100, 32, 0.1
NETWORKS = {  # network, norm: forward passes of noise
    ("resnet8", "after"): (1, 4),
    ("resnet8", "before"): (1, 4),
    ("resnet20", "after"): (1,),
    ("resnet20", "before"): (1,),
    ("mlp", "after"): (8, 32),
}


@dataclass(frozen=True)
class OneInput(Rule):
    """After each update, one forward pass of noise through the whole network, from which every B learns."""

    name: ClassVar[str] = "one-input"
    decorrelate: ClassVar[bool] = False
    reading: ClassVar[Reading] = "calibrated"

    def step(self, weights: Sequence[UntiedWeight], context: RuleContext) -> None:
        """Mirror all layers at once."""
        run, settings = partial(run_on_noise, context.model), Mirror(reading=self.reading)
        mirror_from_input(context, weights, run, settings, decorrelate=self.decorrelate)


@dataclass(frozen=True)
class OneInputDecorrelate(OneInput):
    """The same, with the inputs of each layer decorrelated."""

    name: ClassVar[str] = "one-input-decorrelate"
    decorrelate: ClassVar[bool] = True


@dataclass(frozen=True)
class OneInputScaled(OneInput):
    """The same, with each B kept at the norm that it began with (synaptic scaling)."""

    name: ClassVar[str] = "one-input-scaled"
    reading: ClassVar[Reading] = "scaled"


@dataclass(frozen=True)
class GaussianMirror(WeightMirror):
    """The weight mirror, layer by layer, with Gaussian noise as well, and as long a memory."""

    name: ClassVar[str] = "gaussian-mirror"
    mirror: Mirror = Mirror()


@cache
def sample_shape() -> tuple[int, ...]:
    """Return the shape of a sample of the data."""
    return load_dataset(DATA).sample_shape


def run_on_noise(model: nn.Module) -> Tensor:
    """Run a model forward on a minibatch of Gaussian noise of unit variance."""
    return model(torch.randn(NOISE_BATCH, *sample_shape()))


OWN_RULES: tuple[type[Rule], ...] = (GaussianMirror, OneInput, OneInputScaled, OneInputDecorrelate)


def measure_training() -> None:
    """Train by each rule and keep the result file."""
    for rule in OWN_RULES:
        register_rule(rule)
    rules = ("bp", "fa", "wm", *(rule.name for rule in OWN_RULES))
    config = CompareConfig(data=DATA, classes=CLASSES, rules=rules, **TRAINING)
    command = "python benchmarks/one_input.py training"
    run_job(config, WORK, resume=True, command=command, view=LiveView(Console()))
    OUT.mkdir(exist_ok=True)
    shutil.copy(WORK / "results.json", OUT)


def measure_angles() -> None:
    """Measure every network and write the result file."""
    torch.set_num_threads(1)
    file = OUT / "angles.json"
    results = json.loads(file.read_text()) if file.exists() else describe()
    done = [{name: found[name] for name in ("network", "norm", "seed")} for found in results["measured"]]
    for seed in SEEDS:
        dataset = load_dataset(DATA, seed=seed, num_classes=CLASSES)
        for (network, norm), passes in NETWORKS.items():
            key = {"network": network, "norm": norm, "seed": seed}
            if key in done:
                continue
            for state in ("start", "trained"):
                path, loss = prepare(network, norm, state, seed, dataset)
                for steps in passes:
                    print(key, state, steps, flush=True)
                    results["measured"] += [{**key, "state": state, **f} for f in measure(path, loss, steps)]
            OUT.mkdir(exist_ok=True)
            file.write_text(json.dumps(results) + "\n")


def measure_drives() -> None:
    """Regress drives, not answers, on the inputs: angles that are left are no fault of the activation."""
    torch.set_num_threads(1)
    results = json.loads((OUT / "angles.json").read_text())
    results["drives"] = []
    for (network, norm), passes in NETWORKS.items():
        for state in ("start", "trained"):
            path, _ = prepare(network, norm, state, SEEDS[0], load_dataset(DATA, num_classes=CLASSES))
            mode, steps = path.context.part(MirrorMode), passes[-1]
            mode.path.activations = {"*": nn.Identity()}
            with left_as_it_was(path.weights, path.model), torch.no_grad():
                for one in look(mode, path.weights, partial(run_on_noise, path.model), steps=steps,
                                with_inputs=True):  # fmt: skip
                    learn(mode, one.regress(), Mirror(noise="gaussian", forgetting=1.0))
            results["drives"].append({
                "network": network, "norm": norm, "state": state, "passes": steps,
                "matrix_angle_deg": path.matrix_angles(),
            })  # fmt: skip
    (OUT / "angles.json").write_text(json.dumps(results) + "\n")


def describe() -> dict[str, Any]:
    """Return what the result file says of its making."""
    return {
        "command": "python benchmarks/one_input.py angles",
        "task": f"{DATA} of {CLASSES} classes; 'trained': after {BACKPROP_STEPS} steps of backprop, "
        f"{BACKPROP_BATCH} samples each, by SGD (learning rate {BACKPROP_LR}, momentum 0.9); Gaussian noise, "
        f"{NOISE_BATCH} images per pass",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "seeds": SEEDS,
        "measured": [],
    }


def prepare(
    network: str, norm: str, state: str, seed: int, dataset: Dataset
) -> tuple[FeedbackPath, partial[Tensor]]:
    """Return an untied network, trained by backprop if asked for, and its loss on a minibatch of data."""
    torch.manual_seed(seed)
    model = build_model(
        network, sample_shape=dataset.sample_shape, num_classes=dataset.num_classes, norm=norm
    )
    batches = minibatches(dataset.train, batch_size=BACKPROP_BATCH, seed=seed, epoch=0, shuffle=True)
    loss_on = partial(compute_loss, model, dataset)
    optimizer = torch.optim.SGD(model.parameters(), lr=BACKPROP_LR, momentum=0.9, nesterov=True)
    for _ in range(BACKPROP_STEPS if state == "trained" else 0):
        loss = loss_on(next(batches))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return untie(model, "fa", seed=seed), partial(loss_on, next(batches))


def compute_loss(model: nn.Module, dataset: Dataset, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean loss of a minibatch."""
    x, y = batch
    return F.cross_entropy(model(dataset.train.prepare(x)), y)


def measure(path: FeedbackPath, loss: partial[Tensor], steps: int) -> list[dict[str, Any]]:
    """Let B learn from one noisy input in both ways, and layer by layer from as many samples."""
    mode, settings = path.context.part(MirrorMode), Mirror(noise="gaussian", forgetting=1.0, block_bias=False)
    run = partial(run_on_noise, path.model)
    with left_as_it_was(path.weights, path.model):
        seen = look(mode, path.weights, run, steps=steps, with_inputs=True)
    inputs = {one.weight.name: describe_inputs(one) for one in seen}
    found = []
    for method in ("one-input", "one-input-decorrelate", "wm"):
        with torch.no_grad():
            for one in seen:
                if method == "wm":
                    samples = inputs[one.weight.name]["samples"]
                    layerwise = dataclasses.replace(settings, samples=samples, block_bias=True)
                    mode.run([one.weight], layerwise)
                else:
                    learn(mode, one.correlate() if method == "one-input" else one.regress(), settings)
        found.append({
            "method": method, "passes": steps, "matrix_angle_deg": path.matrix_angles(),
            "gain": path.gains(), "delta_angle_deg": path.delta_angles(loss), "inputs": inputs,
        })  # fmt: skip
    return found


def describe_inputs(seen: Seen) -> dict[str, float]:
    """Say how far a layer's inputs are from white, and what angle that alone would leave."""
    (covariance,) = seen.input_covariances()
    (moments,) = seen.moments.values()
    matrix, weight = covariance[0], seen.weight.weight.detach().flatten(1)
    to_white = angle_deg(matrix, torch.eye(len(matrix)))
    return {
        "inputs": len(matrix),
        "samples": int(moments.samples),
        "angle_to_white_deg": to_white,
        "participation_ratio": len(matrix) * math.cos(math.radians(to_white)) ** 2,
        "predicted_angle_deg": angle_deg(weight @ matrix, weight),
    }


PARTS = {"training": measure_training, "angles": measure_angles, "drives": measure_drives}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return what was asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    PARTS[parse(None).part]()
