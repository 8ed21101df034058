"""Every rule on three tasks, tuned with equal effort: the tables of docs/rules.md.

    python benchmarks/rules_bench.py run TASK [--data-dir DIR] [--rules kp,wm]
    python benchmarks/rules_bench.py page

``run`` tunes each rule (8 trials of a quarter of the epochs, on validation data), then trains it with its
best settings on three other seeds. Both go on where they were stopped. ``page`` writes the tables anew.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from feedbackpath import cli
from feedbackpath.report.table import summary_rows
from feedbackpath.rules import RULES
from feedbackpath.rules.base import group_of
from feedbackpath.train.results import read_results

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "rules"
PAGE = ROOT / "docs" / "rules.md"
TRIALS, SEEDS, SHARE = 8, 3, 4  # of tuning, of the runs that count, and how many times longer these are
TASKS = {  # flags, and epochs of a run that counts
    "digits-mlp": (["--data", "digits", "--model", "mlp", "--batch-size", "32"], 20),
    "fashion-mnist-lenet": (["--data", "fashion-mnist", "--model", "lenet", "--batch-size", "32"], 8),
    "glyphs-resnet8": (["--data", "glyphs", "--model", "resnet8"], 6),
}
TUNED_ON = {"glyphs-resnet8": "fashion-mnist-lenet"}
COLUMNS = [
    "rule",
    "group",
    "n",
    "test error",
    "minus bp",
    "angle, worst epoch",
    "δ angle, worst epoch",
    "FLOPs",
]
# Errors in percent that papers report for the same data and a network of the same kind; none is ours.
PUBLISHED = {
    "fashion-mnist-lenet": "BioTorch's README has, for LeNet on Fashion-MNIST: bp 8.88, fa 12.77, dfa 12.76, "
    "and 9.22 to 9.31 for three forms of sign-symmetry (one run each, chosen on the data reported)."
}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return what a command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run_ = commands.add_parser("run", help="tune and train on one task")
    run_.add_argument("task", choices=TASKS)
    run_.add_argument("--data-dir", type=Path)
    run_.add_argument("--rules", default="all", help="names, by commas")
    commands.add_parser("page", help="write the tables of docs/rules.md")
    return parser.parse_args(arguments)


def call(*arguments: object) -> None:
    """Run a command of the program, and stop where it fails."""
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        if stop.code not in (0, 3):  # 3: a run diverged, which is a result
            raise


def run(task: str, data_dir: Path | None, rules: str) -> None:
    """Tune, and train with what was chosen."""
    flags, epochs = TASKS[task]
    flags = [*flags, "--num-threads", "1", *(("--data-dir", str(data_dir)) if data_dir else ())]
    tuned = RESULTS / TUNED_ON.get(task, task) / "tuned"
    if task not in TUNED_ON:
        short = ["--epochs", max(1, epochs // SHARE), "--trials", TRIALS]
        call("tune", *flags, *short, "--rules", rules, "--out", tuned, "--resume")
    whole = [
        "--config",
        tuned / "chosen.yaml",
        "--epochs",
        epochs,
        "--seed",
        100,
        "--seeds",
        SEEDS,
        "--rules",
        rules,
    ]
    call("compare", *flags, *whole, "--out", RESULTS / task, "--resume")


def table(task: str) -> str:
    """Return a task's table: what was measured, and which rules were not run."""
    folder = RESULTS / task
    rows = {}
    if (folder / "results.json").exists():
        results = read_results(folder)
        for row in summary_rows(results.runs, results.metric):
            runs = [run for run in results.runs if run.rule == row["rule"]]
            deltas = [
                value
                for run in runs
                for entry in run.history
                for value in entry.delta_angle_deg.values()
                if value is not None
            ]
            rows[row["rule"]] = row | {"δ angle, worst epoch": f"{max(deltas):.0f}°" if deltas else "–"}
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for name in RULES:
        flops = RULES[name].facts.flops
        known = {"group": group_of(RULES[name]), "FLOPs": f"{flops:.2f}" if flops else "–"}
        row = rows.get(name, dict.fromkeys(COLUMNS, "not run")) | known | {"rule": f"`{name}`"}
        lines.append(f"| {' | '.join(row[column] for column in COLUMNS)} |")
    return "\n".join(lines)


def tables() -> str:
    """Return all tables, each under its heading."""
    parts = []
    for task, (flags, epochs) in TASKS.items():
        note = f"{PUBLISHED[task]}\n\n" if task in PUBLISHED else ""
        heading = f"### {task}\n\n`{' '.join(flags)} --epochs {epochs}`, {SEEDS} seeds.\n\n"
        parts.append(f"{heading}{note}{table(task)}\n")
    return "\n".join(parts)


def write_page() -> None:
    """Put the tables into the page."""
    text = PAGE.read_text(encoding="utf-8")
    marked = re.compile(r"(<!-- bench:begin -->\n).*(<!-- bench:end -->)", re.DOTALL)
    PAGE.write_text(marked.sub(lambda found: found[1] + tables() + found[2], text), encoding="utf-8")


def main(arguments: Sequence[str]) -> None:
    """Do what a command line asks for."""
    asked = parse(arguments)
    if asked.command == "run":
        run(asked.task, asked.data_dir, asked.rules)
    else:
        write_page()


if __name__ == "__main__":
    main(sys.argv[1:])
