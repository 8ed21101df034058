"""Two source trees of the package side by side: whether they train alike, and what a step costs in each.

Example:
    python benchmarks/core_redraw.py losses --old OLD --new NEW --out losses.json
    python benchmarks/core_redraw.py times --old OLD --new NEW --out times.json

``losses`` trains the same networks on the same minibatches in both trees and compares every loss and every B.
``times`` lets both trees take turns, step by step, on one core. Only names that users call are used, so that
what lies behind them may change. Each tree runs in processes of its own (``core_redraw_worker.py``).
"""

import argparse
import hashlib
import itertools
import json
import os
import pickle
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from core_redraw_worker import LOSSES, OPTIMIZERS, PLAIN, TIMES

WORKER = Path(__file__).with_name("core_redraw_worker.py")
GOAL = 1e-10  # largest relative difference in float64
RULES = ("bp", "fa", "ss", "kp", "mirror-kp")
Results = dict[str, Any]


class Worker:
    """A process that has the package from ``tree``."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree.resolve()
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(self.tree), "OMP_NUM_THREADS": "1"},
        )

    def send(self, job: str, **arguments: Any) -> None:
        """Give a job, a method of `Jobs`, and do not wait for it."""
        assert self.process.stdin is not None
        pickle.dump((job, arguments), self.process.stdin)
        self.process.stdin.flush()

    def receive(self) -> tuple[bool, Any]:
        """Wait for the last job; return whether it succeeded, with its answer or else its traceback."""
        assert self.process.stdout is not None
        succeeded, answer = pickle.load(self.process.stdout)
        return succeeded, answer

    def ask(self, job: str, **arguments: Any) -> Any:
        """Give a job and return its answer.

        Raises:
            RuntimeError: It failed.
        """
        self.send(job, **arguments)
        succeeded, answer = self.receive()
        if not succeeded:
            raise RuntimeError(f"{job} failed in {self.tree}:\n{answer}")
        return answer


@contextmanager
def start_workers(trees: Sequence[Path]) -> Iterator[list[Worker]]:
    """Start a worker for each tree; see that each has found its own; end them afterwards."""
    workers = [Worker(tree) for tree in trees]
    try:
        for worker in workers:
            found = worker.ask("find_tree")
            if found != str(worker.tree):
                raise SystemExit(f"{worker.tree} has no package feedbackpath: {found} was imported instead")
        yield workers
    finally:
        for worker in workers:
            worker.process.kill()  # it has nothing to save, and a group of processes can hang when it ends
            worker.process.communicate()


def relative_difference(old: np.ndarray, new: np.ndarray) -> float:
    """Return the norm of the difference over the old norm; infinite where either is not finite."""
    difference = float(np.linalg.norm(new - old))
    if not np.isfinite(difference):
        return float("inf")
    return difference / float(np.linalg.norm(old)) if difference else 0.0


def largest_difference(old: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray]) -> float:
    """Return the largest relative difference of arrays of the same name; infinite where names differ."""
    if old.keys() != new.keys():
        return float("inf")
    return max(relative_difference(values, new[name]) for name, values in old.items())


def compare(old: Results, new: Results) -> Results:
    """Return how far the training of one process differs in both trees."""
    pairs = [(old["losses"], new["losses"])]
    pairs += [(values, new["after"].get(name)) for name, values in old["after"].items()]
    return {
        "same_initial_weights": old["digest"] == new["digest"],
        "initial_feedback": largest_difference(old["before"], new["before"]),
        "losses": max(map(relative_difference, old["losses"], new["losses"])),
        "feedback": largest_difference(old["after"], new["after"]),
        "identical": all(b is not None and a.tobytes() == b.tobytes() for a, b in pairs),
    }


def compare_cell(
    old: Sequence[Worker], new: Sequence[Worker], cell: Results, folder: str, **arguments: Any
) -> Results:
    """Train one cell in both trees at the same time; return it with the worst of what its processes found.

    The processes of a tree meet in a file in ``folder``.
    """
    for tree, workers in (("old", old), ("new", new)):
        for rank, worker in enumerate(workers):
            worker.send("train", cell=cell, rank=rank, store=f"{folder}/{tree}", **arguments)
    outcomes = [worker.receive() for worker in (*old, *new)]
    errors = [answer.strip().splitlines()[-1] for succeeded, answer in outcomes if not succeeded]
    if errors:
        return cell | {"error": errors[0]}
    answers = [answer for _, answer in outcomes]
    found = [compare(*pair) for pair in zip(answers[: len(old)], answers[len(old) :], strict=True)]
    worst = {name: max(one[name] for one in found) for name in ("initial_feedback", "losses", "feedback")}
    same = {name: all(one[name] for one in found) for name in ("same_initial_weights", "identical")}
    is_double = cell["dtype"] == "float64"
    goal = {"in_goal": max(worst["losses"], worst["feedback"]) <= GOAL} if is_double else {}
    ends = {"first_loss": float(answers[0]["losses"][0]), "last_loss": float(answers[0]["losses"][-1])}
    return cell | worst | same | goal | ends


def run_losses(arguments: argparse.Namespace, keep: Callable[[Results], None]) -> None:
    """Train in both trees every combination of what is asked for; give each cell to ``keep``."""
    for name, processes in itertools.product(arguments.networks, arguments.processes):
        size = arguments.batch_size or LOSSES[name].batch_size
        trees = [arguments.old] * processes + [arguments.new] * processes
        with tempfile.TemporaryDirectory() as folder, start_workers(trees) as workers:
            old, new = workers[:processes], workers[processes:]
            data, batches = old[0].ask("draw", name=name, steps=arguments.steps, batch_size=size)
            for dtype, optimizer, rule in itertools.product(arguments.dtypes, OPTIMIZERS, arguments.rules):
                cell = {"network": name, "data": data, "batch_size": size, "steps": arguments.steps}
                cell |= {"rule": rule, "optimizer": optimizer, "processes": processes, "dtype": dtype}
                keep(compare_cell(old, new, cell, folder, batches=batches, fill=arguments.fill_feedback))


def quartiles(ratios: np.ndarray) -> dict[str, float]:
    """Return the median of ratios and their quartiles."""
    low, middle, high = (round(float(value), 4) for value in np.quantile(ratios, (0.25, 0.5, 0.75)))
    return {"median": middle, "q1": low, "q3": high}


def take_turns(workers: Sequence[Worker], rules: Sequence[str], rounds: int, seconds: float) -> np.ndarray:
    """Return the seconds of every step, ``[rounds, rules, trees, 2]``: CPU time and the clock's.

    Rules begin each round with another one, and of the two trees each is the first every second time.
    """
    found: list[np.ndarray] = []
    started = time.perf_counter()
    while len(found) < rounds or time.perf_counter() - started < seconds:
        times = np.empty((len(rules), 2, 2))
        for turn in range(len(rules)):
            rule = (turn + len(found)) % len(rules)
            for tree in (1, 0) if (rule + len(found)) % 2 else (0, 1):
                times[rule, tree] = workers[tree].ask("time_step", rule=rules[rule], number=len(found))
        found.append(times)
    return np.array(found)


def run_times(arguments: argparse.Namespace, keep: Callable[[Results], None]) -> None:
    """Time the steps of each network in new processes, several times over; give each cell to ``keep``."""
    core = max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    rules, parts = (PLAIN, *arguments.rules), arguments.placements
    for name in arguments.networks:
        size, found = arguments.batch_size or TIMES[name].batch_size, []
        for _ in range(parts):
            with start_workers([arguments.old, arguments.new]) as workers:
                for worker in workers:
                    worker.ask("prepare", name=name, rules=rules, batch_size=size, core=core)
                found.append(
                    take_turns(workers, rules, -(-arguments.rounds // parts), arguments.seconds / parts)
                )
        times = np.concatenate(found)
        cpu, clock = times[..., 0], times[..., 1]
        for number, rule in enumerate(rules):
            medians = [np.median(part[:, number, 1, 0] / part[:, number, 0, 0]) for part in found]
            keep(
                {
                    "network": name,
                    "rule": rule,
                    "batch_size": size,
                    "rounds": len(times),
                    "is_pinned": core is not None,
                    "new_over_old": quartiles(cpu[:, number, 1] / cpu[:, number, 0]),
                    "new_over_old_by_clock": quartiles(clock[:, number, 1] / clock[:, number, 0]),
                    "new_over_old_by_placement": [round(float(median), 4) for median in medians],
                    "old_over_plain": quartiles(cpu[:, number, 0] / cpu[:, 0, 0]),
                    "new_over_plain": quartiles(cpu[:, number, 1] / cpu[:, 0, 1]),
                    "old_ms": round(1e3 * float(np.median(cpu[:, number, 0])), 3),
                    "new_ms": round(1e3 * float(np.median(cpu[:, number, 1])), 3),
                }
            )


COLUMNS = {
    "losses": (
        "network rule optimizer processes dtype same_initial_weights initial_feedback losses feedback "
        "identical in_goal error"
    ),
    "times": (
        "network rule rounds old_ms new_ms new_over_old new_over_old_by_clock old_over_plain new_over_plain"
    ),
}


def show(value: Any) -> str:
    """Return what stands in the table for a value of a cell."""
    if isinstance(value, dict):
        return f"{value['median']:.3f} ({value['q1']:.3f}-{value['q3']:.3f})"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def is_infinite(value: Any) -> bool:
    """Return whether a value of a cell is a number that JSON does not know."""
    return isinstance(value, float) and not np.isfinite(value)


def describe_tree(tree: Path) -> dict[str, str]:
    """Return a digest of the package's sources, and the commit that is checked out there, if one is."""
    sources = hashlib.sha256()
    for path in sorted(tree.glob("feedbackpath/**/*.py")):
        sources.update(path.relative_to(tree).as_posix().encode() + b"\0" + path.read_bytes())
    git = subprocess.run(["git", "-C", tree, "rev-parse", "HEAD"], capture_output=True, text=True)
    return {"commit": git.stdout.strip(), "sources": sources.hexdigest()[:16]}


def describe_machine() -> dict[str, Any]:
    """Return what numbers may depend on besides the trees."""
    return {
        "processor": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": 1,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def describe_command(arguments: argparse.Namespace) -> str:
    """Return the command with all its settings, paths replaced by names."""
    words = ["python benchmarks/core_redraw.py", arguments.part]
    for name, value in vars(arguments).items():
        if name == "part" or value in (None, False):
            continue
        listed = value if isinstance(value, list) else [name.upper() if isinstance(value, Path) else value]
        words += [f"--{name.replace('_', '-')}", *([] if value is True else map(str, listed))]
    return " ".join(words)


def write_json(path: Path, value: Any) -> None:
    """Write a result file beside its place, then rename it: a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    part.replace(path)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return what was asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    for part, networks, rules in (("losses", LOSSES, RULES), ("times", TIMES, (*RULES, "wm"))):
        command = parts.add_parser(part)
        for name in ("--old", "--new", "--out"):
            command.add_argument(name, type=Path, required=True)
        command.add_argument("--networks", nargs="+", choices=networks, default=list(networks))
        command.add_argument("--rules", nargs="+", default=list(rules))
        command.add_argument("--batch-size", type=int, help="samples per step; by default each network's own")
        if part == "losses":
            command.add_argument("--steps", type=int, default=200)
            command.add_argument("--processes", type=int, nargs="+", default=[1, 2])
            command.add_argument("--dtypes", nargs="+", default=["float64", "float32"])
            command.add_argument("--fill-feedback", action="store_true", help="same random B in both trees")
        else:
            command.add_argument("--rounds", type=int, default=60, help="at least")
            command.add_argument("--seconds", type=float, default=60.0, help="a network, at least")
            command.add_argument("--placements", type=int, default=3, help="new processes so many times")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Compare, print the table row by row, and keep the result file up to date."""
    arguments = parse(argv)
    results: Results = {
        "command": describe_command(arguments),
        "trees": {name: describe_tree(vars(arguments)[name]) for name in ("old", "new")},
        "machine": describe_machine(),
        "cells": [],
    }
    columns = COLUMNS[arguments.part].split()
    print(*columns, sep=" | ")

    def keep(cell: Results) -> None:
        results["cells"].append({name: None if is_infinite(value) else value for name, value in cell.items()})
        write_json(arguments.out, results)
        print(*(show(cell.get(column, "")) for column in columns), sep=" | ", flush=True)

    (run_losses if arguments.part == "losses" else run_times)(arguments, keep)


if __name__ == "__main__":
    main()
