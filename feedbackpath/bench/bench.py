"""The whole benchmark: every rule on every network beside plain PyTorch, as numbers ready for JSON."""

import gc
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from feedbackpath.bench.counts import count_collective_bytes, count_graph_breaks
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
from feedbackpath.path import FeedbackPath
from feedbackpath.rules import RULES, resolve_rule
from feedbackpath.train.devices import usable_device

WARM_UP = 3
ANGLE_STEPS = 10  # at most, after each of which a mirror's angles are looked at
MEMORY_STEPS = 2
COUNTING_BATCH = 2  # samples where only calls and bytes are counted: BatchNorm needs two
MOST_STARTS = 7  # of fresh interpreters


@dataclass(frozen=True)
class BenchSettings:
    """What to measure.

    Args:
        models: Names of networks.
        rules: Names of rules.
        rounds: Steps of each network that are timed, at least.
        batch_size: Samples a step; each workload's own where not given.
        arithmetic: How the networks compute.
        least_seconds: What a network's timed steps take at least, all rules together: short steps are timed
            more often, for the ratio of two of them is less certain.
    """

    models: tuple[str, ...] = ("mlp", "lenet", "transformer", "resnet8", "resnet18", "resnet50")
    rules: tuple[str, ...] = ("bp", "fa", "ss", "kp", "mirror-kp", "wm")
    rounds: int = 10
    batch_size: int | None = None
    arithmetic: Arithmetic = Arithmetic()
    least_seconds: float = 20.0

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        for model in self.models:
            find_workload(model)
        for rule in self.rules:
            resolve_rule(rule)
        check_rounds(self.rounds)
        if self.batch_size is not None and not 0 < self.batch_size < 2**31:
            raise ConfigError(f"batch_size is {self.batch_size}; it must be at least 1, and below 2**31")
        if not 0 <= self.least_seconds < math.inf:
            raise ConfigError(f"seconds is {self.least_seconds}; it must be at least 0, and finite")
        usable_device(self.arithmetic.device)


def check_rounds(rounds: int) -> None:
    """Refuse too few rounds.

    Raises:
        ConfigError: There would be no quartiles.
    """
    if rounds < 2:
        raise ConfigError(f"rounds is {rounds}; quartiles need at least 2")


def run_bench(settings: BenchSettings, tell: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Measure every rule on every network.

    Args:
        settings: What to measure.
        tell: Called with a line of text when a network has been measured.

    Returns:
        ``machine``, ``settings``, ``start_up`` and ``networks``: by name, ``step`` times, memory, angles,
        graph breaks and bytes between devices by rule, each figure of time as a ratio to plain PyTorch in
        the same rounds, and ``traffic`` as a ratio to its bytes.
    """
    keep_freed_memory()
    networks = {}
    for name in settings.models:
        networks[name] = measure_network(find_workload(name), settings)
        tell(describe(name, networks[name]))
    return {
        "machine": describe_machine(settings.arithmetic),
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
    time_in_turns(steps, WARM_UP, arithmetic.device)
    seconds = time_in_turns(steps, settings.rounds, arithmetic.device, settings.least_seconds)
    paths = {name: step.path for name, step in steps.items() if step.path is not None}
    found: dict[str, Any] = {
        "batch_size": batch_size,
        "rounds": len(seconds[PLAIN]),
        "plain_seconds": round(statistics.median(seconds[PLAIN]), 5),
        "step": {name: ratio_to(seconds[PLAIN], seconds[name]) for name in rules},
        "largest_angle_deg": {
            name: _largest_angle(steps[name], path, settings.least_seconds) for name, path in paths.items()
        },
        "feedback_bytes": {name: bytes_of_feedback(path) for name, path in paths.items()},
        "delta_angles": _time_delta_angles(steps, settings) if "fa" in steps else None,
    }
    del steps, paths
    gc.collect()
    found["memory_bytes"] = dict(_measure_memory(workload, settings, batch_size))
    found |= count_without_clock(workload, settings)
    return found | untie_milliseconds(workload.build().to(arithmetic.device), "fa")


def count_without_clock(workload: Workload, settings: BenchSettings) -> dict[str, Any]:
    """Count graph breaks and bytes between devices of the plain network and under every rule.

    Returns:
        ``graph_breaks`` under ``torch.compile``, ``collective_bytes`` of a step by operation, and
        ``traffic``, all of these bytes over the plain network's.
    """
    arithmetic = replace(settings.arithmetic, is_compiled=False)
    breaks, collective = {}, {}
    for name, rule in {PLAIN: None, **{rule: rule for rule in settings.rules}}.items():
        step = TrainingStep(workload, rule, COUNTING_BATCH, arithmetic)
        breaks[name], collective[name] = count_graph_breaks(step), count_collective_bytes(step)
    sent = {name: sum(by_operation.values()) for name, by_operation in collective.items()}
    traffic = {rule: round(sent[rule] / sent[PLAIN], 4) for rule in settings.rules}
    return {"graph_breaks": breaks, "collective_bytes": collective, "traffic": traffic}


def describe(name: str, found: dict[str, Any]) -> str:
    """Return the times of a network as a line, and what was counted as another."""
    ratios = ", ".join(f"{rule} {ratio['median']:.3f}" for rule, ratio in found["step"].items())
    breaks = ", ".join(f"{rule} {found['graph_breaks'][rule]}" for rule in found["step"])
    traffic = ", ".join(f"{rule} {ratio:.2f}" for rule, ratio in found["traffic"].items())
    return (
        f"{name}, batch {found['batch_size']}: {ratios}\n"
        f"  graph breaks: {breaks}; bytes between devices over plain PyTorch's: {traffic}"
    )


def _largest_angle(step: TrainingStep, path: FeedbackPath, seconds: float) -> float | None:
    """Return the worst layer's angle between B and W; where rules mirror, over some steps. None: no angle.

    Args:
        step: The network's step.
        path: Its feedback path.
        seconds: After which no other step begins.
    """
    angles = list(path.matrix_angles().values())
    started = time.process_time()
    for _ in range(ANGLE_STEPS if path.mirrors else 0):
        if time.process_time() - started >= seconds:
            break
        step()
        angles += path.matrix_angles().values()
    return max(angles, default=None)


def _time_delta_angles(steps: dict[str, TrainingStep], settings: BenchSettings) -> dict[str, float]:
    """Time a measurement of delta angles as a multiple of the plain network's step."""
    step = steps["fa"]
    assert step.path is not None
    calls: dict[str, Call] = {PLAIN: steps[PLAIN], "angles": partial(step.path.delta_angles, step.loss)}
    seconds = time_in_turns(calls, settings.rounds, settings.arithmetic.device)
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


def describe_machine(arithmetic: Arithmetic) -> dict[str, Any]:
    """Return what times depend on: the device, its instructions, threads and PyTorch's version."""
    is_cuda = torch.device(arithmetic.device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(arithmetic.device) if is_cuda else platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rules": list(RULES),
    }
