"""What a step costs on arrays, for docs/hardware.md: counts on digits, and the table of energy and area.

    python benchmarks/hardware_counts.py            # train, count, and print the table
    python benchmarks/hardware_counts.py --draw     # print from the result file alone

The first run of docs/hardware.md with two more rules; about two minutes on one core.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from feedbackpath.cli.hardware import FIRST
from feedbackpath.hardware import ArrayCounts, Costs, Work
from feedbackpath.jobs import run_job
from feedbackpath.report.counts import energy_rows, mean_counts
from feedbackpath.report.live import LiveView

RESULTS = Path(__file__).parent / "hardware-theory" / "counts.json"
RULES = ("bp", "fa", "ss", "kp", "mirror-kp", "wm", "dfa")


def measure() -> dict[str, Any]:
    """Train by each rule; return the settings, and the counts of a step, on average."""
    config = FIRST.model_copy(update={"rules": RULES, "read_bits": 8, "num_threads": 1})
    with tempfile.TemporaryDirectory() as folder:
        view = LiveView(Console(quiet=True))
        results = run_job(config, Path(folder) / "out", resume=False, command="", view=view)
    counted = {
        rule: {array: dataclasses.asdict(counts) for array, counts in arrays.items()}
        for rule, arrays in mean_counts(results).items()
    }
    return {"versions": results.versions, "config": results.config, "counts": counted}


def read() -> dict[str, dict[str, ArrayCounts]]:
    """Return the counts of the result file, by rule and array."""
    kept = json.loads(RESULTS.read_text(encoding="utf-8"))["counts"]
    return {
        rule: {
            array: ArrayCounts(**of | {"work": {phase: Work(**work) for phase, work in of["work"].items()}})
            for array, of in arrays.items()
        }
        for rule, arrays in kept.items()
    }


def make_table() -> str:
    """Return the table of docs/hardware.md."""
    heading, *rows = energy_rows(read(), Costs())
    lines = [heading, ["---"] * len(heading), *([f"`{row[0]}`", *row[1:]] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def main() -> None:
    """Measure, and print the table."""
    if "--draw" not in sys.argv:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(make_table())


if __name__ == "__main__":
    main()
