"""The whole benchmark: every rule on every network beside plain PyTorch, as numbers ready for JSON."""

import gc
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from feedbackpath.bench.measure import (
    Call,
    bytes_of_feedback,
    keep_freed_memory,
    peak_bytes,
    ratio_to,
    start_up_seconds,
    time_in_turns,
    untie_milliseconds,
)
from feedbackpath.bench.workloads import PLAIN, Arithmetic, TrainingStep, Workload, find_workload, make_steps
from feedbackpath.errors import ConfigError
from feedbackpath.models import build_model
from feedbackpath.rules import RULES, resolve_rule

WARM_UP = 3
MEMORY_STEPS = 2
MOST_STARTS = 7  # of fresh interpreters


@dataclass(frozen=True)
class BenchSettings:
    """What to measure.

    Args:
        models: Names of networks.
        rules: Names of rules.
        rounds: Steps of each network that are timed.
        batch_size: Samples a step; each workload's own where not given.
        arithmetic: How the networks compute.
    """

    models: tuple[str, ...] = ("mlp", "lenet", "transformer", "resnet8", "resnet18", "resnet50")
    rules: tuple[str, ...] = ("bp", "fa", "ss", "kp", "mirror-kp", "wm")
    rounds: int = 30
    batch_size: int | None = None
    arithmetic: Arithmetic = Arithmetic()

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        for model in self.models:
            find_workload(model)
        for rule in self.rules:
            resolve_rule(rule)
        if self.rounds < 2:
            raise ConfigError(f"rounds is {self.rounds}; quartiles need at least 2")
        device = torch.device(self.arithmetic.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device is cuda, but PyTorch finds no GPU here; choose cpu")


def run_bench(settings: BenchSettings, tell: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Measure every rule on every network.

    Args:
        settings: What to measure.
        tell: Called with a line of text when a network has been measured.

    Returns:
        ``machine``, ``settings``, ``start_up`` and ``networks``: by name, ``step`` times, ``memory`` and
        ``angles`` by rule, each figure of time as a ratio to plain PyTorch in the same rounds.
    """
    keep_freed_memory()
    networks = {}
    for name in settings.models:
        networks[name] = measure_network(find_workload(name), settings)
        tell(describe(name, networks[name]))
    return {
        "machine": _machine(settings.arithmetic),
        "settings": asdict(settings),
        "start_up": start_up_seconds(min(settings.rounds, MOST_STARTS)),
        "networks": networks,
    }


def measure_network(workload: Workload, settings: BenchSettings) -> dict[str, Any]:
    """Measure one network under every rule."""
    arithmetic = settings.arithmetic
    is_cuda = torch.device(arithmetic.device).type == "cuda"
    batch_size = settings.batch_size or (workload.cuda_batch_size if is_cuda else workload.batch_size)
    rules = {name: name for name in settings.rules}
    steps = make_steps(workload, rules, batch_size, arithmetic)
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    seconds = time_in_turns(steps, settings.rounds, arithmetic.device)
    paths = {name: step.path for name, step in steps.items() if step.path is not None}
    found: dict[str, Any] = {
        "batch_size": batch_size,
        "plain_seconds": round(sorted(seconds[PLAIN])[settings.rounds // 2], 5),
        "step": {name: ratio_to(seconds[PLAIN], seconds[name]) for name in rules},
        "largest_angle_deg": {name: max(path.matrix_angles().values()) for name, path in paths.items()},
        "feedback_bytes": {name: bytes_of_feedback(path) for name, path in paths.items()},
        "delta_angles": _time_delta_angles(steps, settings) if "fa" in steps else None,
    }
    del steps, paths
    gc.collect()
    found["memory_bytes"] = dict(_measure_memory(workload, settings, batch_size))
    model = build_model(workload.model, sample_shape=workload.sample_shape, num_classes=workload.num_classes)
    return found | untie_milliseconds(model.to(arithmetic.device), "fa")


def describe(name: str, found: dict[str, Any]) -> str:
    """Return the times of a network as a line."""
    ratios = ", ".join(f"{rule} {ratio['median']:.3f}" for rule, ratio in found["step"].items())
    return f"{name}, batch {found['batch_size']}: {ratios}"


def _time_delta_angles(steps: dict[str, TrainingStep], settings: BenchSettings) -> dict[str, float]:
    """Time a measurement of delta angles as a multiple of the plain network's step."""
    step = steps["fa"]
    assert step.path is not None
    calls: dict[str, Call] = {PLAIN: steps[PLAIN], "angles": partial(step.path.delta_angles, step.loss)}
    seconds = time_in_turns(calls, max(5, settings.rounds // 3), settings.arithmetic.device)
    return ratio_to(seconds[PLAIN], seconds["angles"])


def _measure_memory(
    workload: Workload, settings: BenchSettings, batch_size: int
) -> Iterator[tuple[str, int]]:
    """Yield for each network the most memory that it takes: its weights, its optimizer and its steps."""

    def build_and_train(rule: str | None) -> None:
        step = TrainingStep(workload, rule, batch_size, settings.arithmetic)
        for _ in range(MEMORY_STEPS):
            step()

    for name, rule in {PLAIN: None, **{rule: rule for rule in settings.rules}}.items():
        gc.collect()
        yield name, peak_bytes(partial(build_and_train, rule), settings.arithmetic.device)


def _machine(arithmetic: Arithmetic) -> dict[str, Any]:
    is_cuda = torch.device(arithmetic.device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(arithmetic.device) if is_cuda else platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rules": list(RULES),
    }
