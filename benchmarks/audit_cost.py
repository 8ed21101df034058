"""What an audit of one training step costs, in steps of the same network.

Run it alone on a machine: `python benchmarks/audit_cost.py`. CPU time of one thread, audits and steps in
turns; ResNet-18 at 224 pixels.
"""

import json
import statistics
import time
from pathlib import Path

import torch

from feedbackpath.auditing import audit
from feedbackpath.bench.workloads import Arithmetic, TrainingStep, find_workload

MODEL, BATCH_SIZE, REPETITIONS = "resnet18", 8, 3
OUT = Path(__file__).parent / "audit-cost" / "cost.json"


def measure(rule: str) -> dict[str, float]:
    """Return the time of an audit of one step, over a step's, and its verdict."""
    step = TrainingStep(find_workload(MODEL), rule, BATCH_SIZE, Arithmetic())
    assert step.path is not None
    step()
    ratios = []
    for _ in range(REPETITIONS):
        started = time.process_time()
        report = audit(step, step.path, steps=1)
        audited = time.process_time()
        step()
        ratios.append((audited - started) / (time.process_time() - audited))
    return {"audit_over_step": round(statistics.median(ratios), 2), "verdict": report.verdict}


def main() -> None:
    """Measure, print and write the result file."""
    torch.set_num_threads(1)
    rules = {rule: measure(rule) for rule in ("fa", "kp", "wm")}
    results = {
        "task": f"audit of one step, {MODEL}, 224 pixels, batch {BATCH_SIZE}; CPU time of one thread",
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
