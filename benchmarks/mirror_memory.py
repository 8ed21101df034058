"""Is a mirror that is late worse than one that is noisy? Digits, an MLP 64-256-128-10, batches of 32.

    python benchmarks/mirror_memory.py

Trains at the learning rate and decay that are best for ``bp`` in ``robustness.py``: ``bp``; ``wm`` with
mirrors that leave one angle or another, and replace one share of B or another in each pass; and a control,
``late``, whose B follows W by the same shares without any noise. Error on validation data, 30 epochs, three
seeds. It goes on where it was broken off. It writes mirror-memory/memory.json and a table of docs/results.md.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from marked import as_table, write_between
from rich.console import Console

from feedbackpath.jobs import run_job
from feedbackpath.report.curves import finished
from feedbackpath.report.live import LiveView
from feedbackpath.train.config import CompareConfig

HERE = Path(__file__).parent
OUT, WORK = HERE / "mirror-memory" / "memory.json", Path("runs") / "mirror-memory"
PAGE = HERE.parent / "docs" / "results.md"
IMPORTS = ["benchmarks/digits_mlp.py", "benchmarks/late_feedback.py"]
NETWORK = {"data": "digits", "model": "mlp-256-128", "batch_size": 32, "num_threads": 1}
STUDY = {"lr": 0.0892, "weight_decay": 0.00153, "epochs": 30, "seed": 400, "seeds": 3}
ANGLES, SHARES = (20.0, 10.0), (0.1, 0.3, 0.6, 1.0)


def run_one(rule: str, settings: dict[str, Any], name: str) -> dict[str, Any]:
    """Train a rule with its settings; return the errors, None for what diverged, and the worst angle."""
    own = {
        "rules": (rule,),
        "rule_settings": {rule: settings} if settings else {},
        "evaluate_on": "validation",
    }
    config = CompareConfig.model_validate({"imports": IMPORTS, **NETWORK, **STUDY, **own})
    command, view = "python benchmarks/mirror_memory.py", LiveView(Console(quiet=True))
    runs = run_job(config, WORK / name, resume=True, command=command, view=view).runs
    angles = [
        angle
        for run in finished(runs)
        for entry in run.history
        for angle in entry.matrix_angle_deg.values()
        if entry.epoch and angle is not None
    ]
    errors = [run.test if run.status == "finished" else None for run in runs]
    return {
        "rule": rule,
        "settings": settings,
        "errors": errors,
        "worst_angle_deg": max(angles, default=None),
    }


def run() -> None:
    """Train all, and write down what came out."""
    rows = [run_one("bp", {}, "bp")]
    rows += [run_one("late", {"rate": share}, f"late-{share:g}") for share in SHARES]
    for angle in ANGLES:
        for share in SHARES:
            mirror = {"target_angle_deg": angle, "forgetting": share}
            rows.append(run_one("wm", {"mirror": mirror}, f"wm-{angle:g}-{share:g}"))
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps({**NETWORK, **STUDY, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    write_between(PAGE, "memory", table() + "\n")


def table() -> str:
    """Return the table of what came out."""
    rows = json.loads(OUT.read_text(encoding="utf-8"))["rows"]
    groups = {
        "late, without noise": rows[1:5],
        "`wm`, 20°": rows[5:9],
        "`wm`, 10°": rows[9:],
        "`bp`": rows[:1] * len(SHARES),
    }
    cells = [[what, *(_errors(row) for row in group)] for what, group in groups.items()]
    return as_table(["`B`", *(f"d = {share:g}" for share in SHARES)], cells)


def _errors(row: dict[str, Any]) -> str:
    return ", ".join("diverged" if error is None else f"{error:.1f}" for error in row["errors"])


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return what a command line asks for."""
    return argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args(arguments)


if __name__ == "__main__":
    parse(sys.argv[1:])
    run()
