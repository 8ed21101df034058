"""The study of mirror mode: what noise leaves, and what training makes of the paper's settings.

Example:
    python benchmarks/mirror_study.py --out benchmarks/mirror-study --resume

A part of the study is a function that yields cells; a cell says what it is and measures it. Cells are
independent of each other, so that a study which was killed goes on with those that are missing.
"""

import argparse
import json
import math
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from study_figures import write_study_figures
from study_table import STUDY_SCHEMA, describe_cell, read_study, rich_study_table
from torch import nn

from feedbackpath.errors import ConfigError, MirrorWarning, UserError
from feedbackpath.jobs.book import describe_device, describe_versions
from feedbackpath.jobs.run import make_task
from feedbackpath.jobs.signals import Interrupted, StopRequest
from feedbackpath.mirror import Mirror
from feedbackpath.mirror.noise import NOISES, relative_variance, spread_of
from feedbackpath.mirror.settings import CODES, Reading
from feedbackpath.path import untie
from feedbackpath.rules import WeightMirror
from feedbackpath.train.build import make_network
from feedbackpath.train.config import TrainConfig
from feedbackpath.train.engine import Engine
from feedbackpath.train.loop import Diverged, Event, Measured, Paused, train
from feedbackpath.train.results import Entry
from feedbackpath.train.store import write_json

CLASSES = 10  # of glyphs: few, so that a short training gets somewhere
REFERENCE_BATCH = 128  # the learning rate is for this size, and follows the others in proportion
RATES = (0.03, 0.1, 0.3, 1.0)
DECAYS = (0.2, 0.5, 1.0)
READINGS: tuple[Reading, ...] = ("inside", "printed")
DEPTHS = (8, 20, 56)
WIDTHS = (1, 2, 3)
BATCH_SIZES = (32, 128, 512)
SAMPLES = tuple(2**power for power in range(8, 16))
NOISE_SEEDS = 5
PAPER = Mirror.paper()

Result = dict[str, Any]


@dataclass(frozen=True)
class StudySettings:
    """What a study measures.

    Args:
        parts: Names of its parts, of ``PARTS``.
        model: The network of grid, width and batch.
        data: What is trained on.
        seeds: Trainings of each cell, with seeds counted up from 0.
        epochs: Of each training.
        samples_per_epoch: Training samples per epoch.
        num_threads: CPU threads of torch.
    """

    parts: tuple[str, ...]
    model: str = "resnet8"
    data: str = "glyphs"
    seeds: int = 1
    epochs: int = 2
    samples_per_epoch: int = 6144
    num_threads: int = 1

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            raise ConfigError(f"--parts: {', '.join(unknown) or 'nothing'} is not of {', '.join(PARTS)}")
        for name, least in (("seeds", 1), ("epochs", 1), ("samples_per_epoch", 2), ("num_threads", 1)):
            if getattr(self, name) < least:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} is {getattr(self, name)}; it must be at least {least}")

    def config(self, model: str, batch_size: int, seed: int, mirror: Mirror | None) -> TrainConfig:
        """Return the settings of one training; the mirror's are those of the rule ``wm``."""
        return TrainConfig(
            data=self.data,
            classes=CLASSES if self.data == "glyphs" else None,
            model=model,
            seed=seed,
            epochs=self.epochs,
            samples_per_epoch=self.samples_per_epoch,
            batch_size=batch_size,
            lr_batch_size=REFERENCE_BATCH,
            rule_settings={"wm": {"mirror": asdict(mirror)}} if mirror else {},
            num_threads=self.num_threads,
        )


@dataclass(frozen=True)
class Cell:
    """One thing to measure.

    Attributes:
        part: The part of the study.
        settings: What tells it from other cells, ready for JSON.
        measure: Measures it; asks, as it goes, whether to stop.
    """

    part: str
    settings: dict[str, Any]
    measure: Callable[[Callable[[], bool]], Result]

    def is_in(self, entry: Result) -> bool:
        """Whether an entry of ``study.json`` is of this cell, in whatever part."""
        return self.settings.items() <= entry.items()


def run_study(
    settings: StudySettings, out: Path, *, resume: bool, command: str, tell: Callable[[str, Result], None]
) -> dict[str, Any]:
    """Measure the cells of a study that its folder does not hold yet, and write each as it ends.

    Args:
        settings: What to measure.
        out: The folder of ``study.json``.
        resume: Go on with what the folder holds, if it holds anything.
        command: The command line, for the file.
        tell: Told of each cell as it ends: where the study is, and the entry.

    Returns:
        The content of ``study.json``.

    Raises:
        ConfigError: The folder holds another study, or a setting names what does not exist.
        Interrupted: SIGINT or SIGTERM came; finished cells are kept.
    """
    torch.set_num_threads(settings.num_threads)
    cells = [cell for part in settings.parts for cell in PARTS[part](settings)]
    models = {cell.settings["model"]: None for cell in cells if "model" in cell.settings}
    study = _open(settings, out, command, list(models) or [settings.model], resume=resume)
    write_json(out / "study.json", study)
    with StopRequest() as stop:
        for number, cell in enumerate(cells, 1):
            own = [entry for entry in study["cells"] if entry["part"] == cell.part]
            if any(cell.is_in(entry) for entry in own):
                continue
            entry = _measure(cell, study["cells"], lambda: bool(stop))
            if stop:  # a training that was broken off is no cell
                raise Interrupted(128 + stop.number)
            study["cells"].append(entry)
            write_json(out / "study.json", study)
            tell(f"{number}/{len(cells)}", entry)
    return study


def _measure(cell: Cell, known: Iterable[Result], must_stop: Callable[[], bool]) -> Result:
    """Measure a cell, or take over what another part measured at the same settings."""
    alike = next((entry for entry in known if cell.is_in(entry)), None)
    if alike is not None:
        return alike | {"part": cell.part}
    started = time.process_time()
    found = cell.measure(must_stop)
    seconds = round(time.process_time() - started, 2)
    return {"part": cell.part, **cell.settings, **found, "cpu_seconds": seconds}


def _open(
    settings: StudySettings, out: Path, command: str, models: Sequence[str], *, resume: bool
) -> dict[str, Any]:
    """Return the study that a folder holds, or a new one."""
    told = json.loads(json.dumps(asdict(settings)))
    old = read_study(out) if (out / "study.json").exists() else None
    if old is not None:
        if not resume:
            raise ConfigError(f"{out} holds a study already: go on by --resume, or choose another --out")
        fixed = ("model", "data", "epochs", "samples_per_epoch")  # parts and seeds may be added
        differing = [name for name in fixed if old["settings"][name] != told[name]]
        if differing:
            raise ConfigError(
                f"{out} holds a study of other settings ({', '.join(differing)}); choose another --out"
            )
        told["parts"] = list(dict.fromkeys(old["settings"]["parts"] + told["parts"]))
        told["seeds"] = max(old["settings"]["seeds"], told["seeds"])
    config = settings.config(settings.model, REFERENCE_BATCH, 0, None)
    data = make_task(config, 0)
    for model in models:  # refuses what cannot be built before anything is written
        make_network(settings.config(model, REFERENCE_BATCH, 0, None), 0, data)
    return {
        "schema": STUDY_SCHEMA,
        "command": command,
        "versions": describe_versions(),
        "device": describe_device(config),
        "data": {"name": settings.data, **data.facts},
        "settings": told,
        "config": config.model_dump(mode="json"),
        "cells": old["cells"] if old else [],
    }


def measure_designs(settings: StudySettings) -> Iterator[Cell]:
    """Yield a cell a curve: angle against samples, of each design, into each kind of layer."""
    for layer in LAYERS:
        for name in (*NOISES, *CODES):
            for activation in ACTIVATIONS:
                told = {"design": name, "layer": layer, "activation": activation}
                yield Cell("designs", told, partial(_measure_design, name, layer, activation))


def measure_grid(settings: StudySettings) -> Iterator[Cell]:
    """Yield trainings by the paper's noise over its two numbers, in both readings of the decay."""
    beside = {"bp": None, "default": Mirror()}
    yield from _trainings("grid", settings, settings.model, REFERENCE_BATCH, beside)
    for reading in READINGS:
        for decay in DECAYS:
            for rate in RATES:
                mirror = replace(PAPER, reading=reading, rate=rate, decay=decay)
                yield from _trainings("grid", settings, settings.model, REFERENCE_BATCH, {"paper": mirror})


def measure_depth(settings: StudySettings) -> Iterator[Cell]:
    """Yield trainings of ResNets that differ in depth."""
    for depth in DEPTHS:
        yield from _compare("depth", settings, f"resnet{depth}", REFERENCE_BATCH)


def measure_width(settings: StudySettings) -> Iterator[Cell]:
    """Yield trainings of networks that differ in width."""
    for width in WIDTHS:
        model = settings.model if width == 1 else f"{settings.model}x{width}"
        yield from _compare("width", settings, model, REFERENCE_BATCH)


def measure_batch(settings: StudySettings) -> Iterator[Cell]:
    """Yield trainings that differ in the batch; all see as many samples, and the learning rate follows it."""
    for batch_size in BATCH_SIZES:
        yield from _compare("batch", settings, settings.model, batch_size)


PARTS: dict[str, Callable[[StudySettings], Iterator[Cell]]] = {
    "designs": measure_designs,
    "grid": measure_grid,
    "depth": measure_depth,
    "width": measure_width,
    "batch": measure_batch,
}


def _compare(part: str, settings: StudySettings, model: str, batch_size: int) -> Iterator[Cell]:
    """Yield trainings by backprop, by the default mirror and by the paper's."""
    rules = {"bp": None, "default": Mirror(), "paper": PAPER}
    return _trainings(part, settings, model, batch_size, rules)


def _trainings(
    part: str, settings: StudySettings, model: str, batch_size: int, rules: Mapping[str, Mirror | None]
) -> Iterator[Cell]:
    for seed in range(settings.seeds):
        for name, mirror in rules.items():
            told = {"model": model, "batch_size": batch_size, "seed": seed, "rule": name}
            how = _tell(mirror) if mirror else None
            config = settings.config(model, batch_size, seed, mirror)
            yield Cell(part, told | {"mirror": how}, partial(_train, config, "wm" if mirror else "bp"))


def _tell(mirror: Mirror) -> dict[str, Any]:
    """Return the settings of a mirror, but for those that only layers taken in turns ask for.

    A cell is known by its settings: a new default of one that it does not use should not make it another.
    """
    settings = asdict(mirror)
    settings["when"] = {"layers": mirror.when.layers, "every": mirror.when.every}
    return settings


def _train(config: TrainConfig, rule: str, must_stop: Callable[[], bool]) -> Result:
    """Train through the one loop; keep, of each measurement, the extremes over layers."""
    dataset = make_task(config, config.seed)
    history: list[Result] = []
    found: Result = {"status": "finished", "history": history}
    event: Event
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MirrorWarning)  # of gains, which are what the study records
        for event in train(config, rule, config.seed, dataset, Engine(config), must_stop=must_stop):
            if isinstance(event, Measured):
                history.append(_extremes(event.entry))
            elif isinstance(event, Diverged):
                found |= {"status": "diverged", "diverged_step": event.step}
            elif isinstance(event, Paused):
                break
    return found


def _extremes(entry: Entry) -> Result:
    """Reduce what the loop measured to what is drawn; the deepest error is that of the first layer."""
    layers = (entry.matrix_angle_deg, entry.delta_angle_deg, entry.gain)
    matrix, deltas, gains = ([value for value in of.values() if value is not None] for of in layers)
    return {
        "epoch": entry.epoch,
        "train_loss": entry.train_loss,
        "test_error": entry.test,
        "matrix_angle_deg_max": max(matrix),
        "delta_angle_deg_max": max(deltas),
        "delta_angle_deg_deepest": deltas[0],
        "gain_min": min(gains),
        "gain_median": statistics.median(gains),
        "gain_max": max(gains),
    }


@dataclass(frozen=True)
class _Layer:
    """A layer that noise is sent through, and how much of it at once."""

    make: Callable[[], nn.Module]
    inputs: int


LAYERS = {
    "dense, 256 inputs": _Layer(partial(nn.Linear, 256, 64), 256),
    "convolution, 288 inputs": _Layer(partial(nn.Conv2d, 32, 64, 3), 288),
    "convolution, 9 inputs": _Layer(partial(nn.Conv2d, 1, 64, 3), 9),
}
ACTIVATIONS: dict[str, nn.Module] = {"ReLU": nn.ReLU(), "linear": nn.Identity()}


def _measure_design(name: str, layer: str, activation: str, must_stop: Callable[[], bool]) -> Result:
    """Mirror a fresh layer once, for several numbers of samples and several seeds."""
    inputs, spread = LAYERS[layer].inputs, spread_of(ACTIVATIONS[activation])
    # Codes take as many samples as there are inputs, and no other number may be asked for.
    sizes = list(SAMPLES) if name in NOISES else [None]
    samples = [size or Mirror(noise=name).examples_for(inputs) for size in sizes]
    predicted = [relative_variance(name, inputs, size, spread) if name in NOISES else 0.0 for size in samples]
    return {
        "inputs": inputs,
        "samples": samples,
        "angle_deg": [
            [_mirror_once(name, LAYERS[layer], activation, size, seed) for seed in range(NOISE_SEEDS)]
            for size in sizes
        ],
        "predicted_deg": [math.degrees(math.atan(math.sqrt(variance))) for variance in predicted],
    }


def _mirror_once(name: str, layer: _Layer, activation: str, samples: int | None, seed: int) -> float:
    torch.manual_seed(seed)
    model = nn.Sequential(layer.make(), ACTIVATIONS[activation])
    path = untie(model, WeightMirror(Mirror(noise=name, samples=samples)), seed=seed)
    path.mirror(steps=1)
    return path.matrix_angles()["0"]


HELP = {
    "model": "network of grid, width and batch",
    "data": "what is trained on",
    "seeds": "trainings of each cell",
    "epochs": "epochs of a training",
    "samples_per_epoch": "training samples per epoch",
    "num_threads": "CPU threads of torch",
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return what was asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parts", type=lambda text: tuple(text.split(",")), default=tuple(PARTS))
    defaults = {field.name: field.default for field in fields(StudySettings)}
    for name, meaning in HELP.items():
        flag, default = f"--{name.replace('_', '-')}", defaults[name]
        parser.add_argument(flag, type=type(default), default=default, help=f"{meaning} ({default})")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/mirror-study"), help="for study.json and figures"
    )
    parser.add_argument("--resume", action="store_true", help="go on with what --out holds, if anything")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, show each cell as it ends, and draw; return 130 or 143 if a signal broke it off."""
    arguments = vars(parse(argv))
    out, resume = arguments.pop("out"), arguments.pop("resume")
    command = shlex.join(["python", "benchmarks/mirror_study.py", *(sys.argv[1:] if argv is None else argv)])
    console = Console()

    def tell(where: str, entry: Result) -> None:
        console.print(f"{where} {describe_cell(entry)}", highlight=False, soft_wrap=True)

    try:
        study = run_study(StudySettings(**arguments), out, resume=resume, command=command, tell=tell)
    except UserError as error:
        raise SystemExit(f"mirror_study: {error}") from None
    except Interrupted as stop:
        console.print(
            f"interrupted: finished cells are kept in {out}; the same command with --resume goes on"
        )
        return stop.exit_code
    write_study_figures(study, out)
    console.print(rich_study_table(study))
    console.print(f"study.json and figures are in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
