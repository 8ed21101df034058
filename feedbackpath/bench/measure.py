"""How time and memory are measured: in turns, so that a busy machine is busy for all alike.

Time on a CPU is that which it spent on this process, all threads added up: with one thread, and the machine
to itself, that is the clock's; where other work takes the cores away, the clock would time that too.
"""

import ctypes
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from feedbackpath.path import untie

Call = Callable[[], object]
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def time_in_turns(
    calls: Mapping[str, Call], rounds: int, device: str = "cpu", least_seconds: float = 0.0
) -> dict[str, list[float]]:
    """Return the seconds of each call in each round; the order of the calls rotates from round to round.

    Args:
        calls: What to time, by name.
        rounds: How often, at least.
        device: Where they compute: a GPU's queue is waited for.
        least_seconds: Go on until all calls together have taken so long.

    Example:
        >>> [len(seconds) for seconds in time_in_turns({"a": list, "b": dict}, rounds=3).values()]
        [3, 3]
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    number, spent = 0, 0.0
    while number < rounds or spent < least_seconds:
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(_time(calls[name], device))
            spent += seconds[name][-1]
        number += 1
    return seconds


def ratio_to(baseline: list[float], seconds: list[float]) -> dict[str, float]:
    """Return median and quartiles of the ratios of times, round by round.

    Example:
        >>> ratio_to([1.0, 2.0, 1.0], [1.0, 3.0, 2.0])
        {'median': 1.5, 'q1': 1.25, 'q3': 1.75}
    """
    ratios = [mine / other for mine, other in zip(seconds, baseline, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": round(middle, 4), "q1": round(low, 4), "q3": round(high, 4)}


def keep_freed_memory() -> None:
    """Let the C library keep what is freed (Linux): else steps fetch pages anew, or do not, by chance."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def peak_bytes(run: Call, device: str) -> int:
    """Return the most memory that was in use at once while ``run`` ran, beyond what was before.

    On a CPU the profiler's record of every allocation is added up; on a GPU PyTorch counts them itself.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        run()
    results: Any = profile.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def bytes_of_feedback(path: Any) -> int:
    """Return the bytes of all feedback weights that are not W itself, each once."""
    own = {id(b): b for _, w, b in path.pairs() if b is not w}
    return sum(b.numel() * b.element_size() for b in own.values())


def untie_milliseconds(model: nn.Module, rule: str, repetitions: int = 5) -> dict[str, float]:
    """Return the median time of untying a model, and of allocating as many weights alone."""
    untied, allocated = [], []
    for _ in range(repetitions):
        started = time.perf_counter()
        path = untie(model, rule)
        untied.append(time.perf_counter() - started)
        own = [b for _, w, b in path.pairs() if b is not w]
        started = time.perf_counter()
        _copies = [torch.empty_like(b).normal_() for b in own]
        allocated.append(time.perf_counter() - started)
        path.retie()
    return {
        "untie_ms": round(1e3 * statistics.median(untied), 2),
        "allocate_ms": round(1e3 * statistics.median(allocated), 2),
    }


def start_up_seconds(repetitions: int) -> dict[str, float]:
    """Return the median CPU seconds of fresh processes: importing the library beyond torch, and its help."""
    commands = {
        "torch": [sys.executable, "-c", "import torch"],
        "import": [sys.executable, "-c", "import torch, feedbackpath; feedbackpath.untie"],
        "help": [sys.executable, "-m", "feedbackpath", "--help"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repetitions):
        for name, command in commands.items():
            seconds[name].append(_time_process(command))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "import_beyond_torch_s": round(medians["import"] - medians["torch"], 3),
        "help_s": round(medians["help"], 3),
    }


def _time_process(command: list[str]) -> float:
    """Return the CPU time of a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def _time(call: Call, device: str) -> float:
    is_cuda = torch.device(device).type == "cuda"
    if is_cuda:
        torch.cuda.synchronize()
    clock = time.perf_counter if is_cuda else time.process_time
    started = clock()
    call()
    if is_cuda:
        torch.cuda.synchronize()
    return clock() - started
