"""The brain-like network of Section 6 (Akrout et al. 2019): each replacement alone, and all together.

`python benchmarks/brain_like.py digits-resnet8` trains by backprop, feedback alignment, Kolen-Pollack and the
mirror, with the usual parts, each of the three replacements, and all. A job of `feedbackpath compare`
for each; what was broken off goes on. Result files are kept in `benchmarks/brain-like/`. `... table` prints
error, worst angle over all epochs and time of what there is.
"""

import argparse
import math
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from feedbackpath.jobs import run_job
from feedbackpath.report.live import LiveView
from feedbackpath.train.config import CompareConfig
from feedbackpath.train.results import Results, read_results

OUT, WORK = Path(__file__).parent / "brain-like", Path("runs") / "brain-like"
RULES = ("bp", "fa", "kp", "wm")
SCALING, TANH, LOCAL = {"norm": "scaling"}, {"activation": "rectified-tanh"}, {"connections": "local"}
PARTS: dict[str, dict[str, Any]] = {
    "usual": {},
    "scaling": SCALING,
    "rectified-tanh": TANH,
    "local": LOCAL,
    "all": SCALING | TANH | LOCAL,
}
STUDIES: dict[str, dict[str, Any]] = {
    "digits-resnet8": {"data": "digits", "epochs": 10, "batch_size": 64, "lr": 0.05, "weight_decay": 5e-3},
    "glyphs-resnet8": {"data": "glyphs", "epochs": 8},
    "fashion-mnist-lenet": {
        "data": "fashion-mnist", "model": "lenet", "epochs": 8, "batch_size": 32, "optimizer": "adamw",
        "lr": 0.003, "weight_decay": 0.3,
    },
}  # fmt: skip


def run_study(name: str, parts: Sequence[str], seeds: int, **changes: Any) -> None:
    """Train all rules with each of the parts, and keep the result files."""
    for part in parts:
        settings = {**STUDIES[name], **PARTS[part], **changes}
        config = CompareConfig(rules=RULES, seeds=seeds, num_threads=1, **settings)
        command = shlex.join(
            ["python", "benchmarks/brain_like.py", name, "--seeds", str(seeds), "--parts", part]
        )
        folder = WORK / f"{name}-{part}"
        try:
            run_job(config, folder, resume=True, command=command, view=LiveView(Console()))
        finally:  # what is finished of a job that is broken off is kept as well
            (OUT / name / part).mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / "results.json", OUT / name / part)


def table(name: str) -> list[list[str]]:
    """Return rows of a study: parts, rule, error, worst angle over all epochs, seconds of a run.

    The worst angle leaves out what was measured before training.
    """
    rows = [["parts", "rule", "n", "error (%)", "worst angle (°)", "seconds"]]
    for part in PARTS:
        folder = OUT / name / part
        if folder.exists():
            rows += [[part, *row] for row in _rows_of(read_results(folder))]
    return rows


def _rows_of(results: Results) -> list[list[str]]:
    rows = []
    for rule in RULES:
        runs = [run for run in results.runs if run.rule == rule and run.status == "finished"]
        if not runs:
            continue
        errors = [run.test for run in runs if run.test is not None]
        mean = sum(errors) / len(errors)
        error = f"{mean:.1f}"
        if len(errors) > 1:
            variance = sum((e - mean) ** 2 for e in errors) / (len(errors) - 1)
            error += f" ± {math.sqrt(variance / len(errors)):.1f}"
        angles = [
            a
            for run in runs
            for entry in run.history
            for a in entry.matrix_angle_deg.values()
            if a is not None
        ]
        seconds = sum(run.seconds for run in runs) / len(runs)
        rows.append([rule, str(len(runs)), error, f"{max(angles):.0f}", f"{seconds:.0f}"])
    return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return what was asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("study", choices=[*STUDIES, "table"])
    parser.add_argument(
        "--parts", type=lambda text: text.split(","), default=list(PARTS), help="by commas (all)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each rule (3)")
    parser.add_argument("--data-dir", type=Path, default=None, help="folder of data files (fashion-mnist)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a study, or print the tables."""
    asked = parse(argv)
    if asked.study != "table":
        changes = {} if asked.data_dir is None else {"data_dir": asked.data_dir}
        run_study(asked.study, asked.parts, asked.seeds, **changes)
    for name in STUDIES if asked.study == "table" else [asked.study]:
        rows = table(name)
        print(f"{name}\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows if len(rows) > 1))


if __name__ == "__main__":
    main()
