"""What an audit of two training steps costs, in steps of the same network.

Run it alone on a machine: `python benchmarks/audit_cost.py`. CPU time of one thread, audits and steps in
turns; ResNet-18 at 224 pixels.
"""

import json
import os
import resource
import statistics
from pathlib import Path

import torch

from feedbackpath.auditing import audit
from feedbackpath.bench.workloads import Arithmetic, TrainingStep, find_workload

MODEL, BATCH_SIZE, REPETITIONS = "resnet18", 8, 3
OUT = Path(__file__).parent / "audit-cost" / "cost.json"


def measure(rule: str) -> dict[str, float | str]:
    """Return the time of an audit of two steps, over a step's; its memory, over a step's; and its verdict."""
    step = TrainingStep(find_workload(MODEL), rule, BATCH_SIZE, Arithmetic())
    assert step.path is not None
    step()
    ratios = []
    for _ in range(REPETITIONS):
        started = cpu_time()
        report = audit(step, step.path)
        audited = cpu_time()
        step()
        ratios.append((audited - started) / (cpu_time() - audited))
    own, passes = (
        resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return {
        "audit_over_step": round(statistics.median(ratios), 2),
        "memory_over_step": round(passes / own, 2),
        "verdict": report.verdict,
    }


def cpu_time() -> float:
    """Return the CPU time of this process and of those that it has forked, in seconds."""
    return sum(os.times()[:4])


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
        print(f"{rule}: {row['audit_over_step']:.1f} steps; {row['verdict']}")


if __name__ == "__main__":
    main()
