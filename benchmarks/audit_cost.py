"""What an audit of two training steps costs, in steps of the same network.

Run it alone on a Linux machine: `python benchmarks/audit_cost.py`. CPU time of one thread, audits and steps
in turns; ResNet-18 at 224 pixels. Memory is the largest sum over the process and those that it has forked,
each page that they share counted once, with PyTorch itself; another process looks at it all the time. Beside
it: the largest size of the files in which passes hand over what they recorded.
"""

import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from feedbackpath.auditing import audit
from feedbackpath.bench.workloads import Arithmetic, TrainingStep, find_workload

MODEL, BATCH_SIZE, REPETITIONS = "resnet18", 8, 3
OUT = Path(__file__).parent / "audit-cost" / "cost.json"


def measure(rule: str) -> dict[str, float | str]:
    """Return the time and memory of an audit of two steps, over a step's, and its verdict."""
    step = TrainingStep(find_workload(MODEL), rule, BATCH_SIZE, Arithmetic())
    assert step.path is not None
    step()
    path, ratios, verdicts = step.path, [], []
    step_bytes, _ = largest(step)

    def compare() -> None:
        started = cpu_time()
        verdicts.append(audit(step, path).verdict)
        audited = cpu_time()
        step()
        ratios.append((audited - started) / (cpu_time() - audited))

    def compare_all() -> None:
        for _ in range(REPETITIONS):
            compare()

    audit_bytes, file_bytes = largest(compare_all)
    return {
        "audit_over_step": round(statistics.median(ratios), 2),
        "memory_over_step": round(audit_bytes / step_bytes, 2),
        "step_megabytes": round(step_bytes / 1e6),
        "audit_megabytes": round(audit_bytes / 1e6),
        "file_megabytes": round(file_bytes / 1e6),
        "verdict": verdicts[-1],
    }


def cpu_time() -> float:
    """Return the CPU time of this process and of those that it has forked, in seconds."""
    return sum(os.times()[:4])


def largest(run: Callable[[], object]) -> tuple[int, int]:
    """Return the most memory, and the most bytes in temporary files, while something runs."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory() as folder:
        watcher = context.Process(target=watch, args=(os.getpid(), folder, theirs))
        watcher.start()
        ours.recv()
        tempfile.tempdir = folder
        try:
            run()
        finally:
            tempfile.tempdir = before
            ours.send("enough")
            found: tuple[int, int] = ours.recv()
            watcher.join()
    return found


def watch(process: int, folder: str, line: Connection) -> None:
    """Look at a process, at those that it has forked, and at the files in a folder, until told to stop."""
    memory = files = 0
    line.send("begun")
    while not line.poll(0.05):
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        family = [str(process), *(child for child in children if int(child) != os.getpid())]
        memory = max(memory, sum(resident(member) for member in family))
        found = [
            Path(where, name) for where, _, names in os.walk(folder) for name in names
        ]  # some go meanwhile
        files = max(files, sum(map(size, found)))
    line.send((memory, files))


def resident(process: str) -> int:
    """Return the bytes of a process that are in memory: of those that it shares, its part."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def size(file: Path) -> int:
    """Return the bytes of a file."""
    try:
        return file.stat().st_size
    except OSError:  # it is gone
        return 0


def main() -> None:
    """Measure, print and write the result file."""
    torch.set_num_threads(1)
    rules = {rule: measure(rule) for rule in ("fa", "kp", "wm")}
    results = {
        "task": f"audit of two steps, {MODEL}, 224 pixels, batch {BATCH_SIZE}; CPU time of one thread",
        "repetitions": REPETITIONS,
        "torch": torch.__version__,
        "rules": rules,
    }
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(results, indent=2) + "\n")
    for rule, row in rules.items():
        times, memory = row["audit_over_step"], row["memory_over_step"]
        print(f"{rule}: {times} steps, {memory} times the memory; {row['verdict']}")


if __name__ == "__main__":
    main()
