"""Every rule on three tasks, tuned with equal effort: the tables of docs/rules.md.

    python benchmarks/rules_bench.py run TASK [--data-dir DIR] [--rules kp,wm]
    python benchmarks/rules_bench.py one-rate
    python benchmarks/rules_bench.py cost
    python benchmarks/rules_bench.py page

``run`` tunes each rule (8 trials of a quarter of the epochs, judged by validation data), then trains it with
its best settings on three other seeds. If one of them diverges, which training data alone tell, the next best
settings are taken, and the table says so. A rule of which no trial gives a result is tuned again, with lower
learning rates, and the table says so, too. Each rule has a folder of its own: stopped at any time, in any
order, the same command goes on. ``one-rate`` trains some rules with one learning rate. ``cost`` times a step
beside plain PyTorch's. ``page`` writes the tables.

All rules search the same learning rates and decays (one Sobol sequence) and start from the same weights. A
rule with settings of its own searches these in the same 8 trials. Test data are measured, and decide nothing.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from marked import as_table, not_run, write_between
from studies import call

from feedbackpath.jobs.tune import shared_and_own
from feedbackpath.report.curves import finished, layers_of, mean_and_error, measured
from feedbackpath.report.table import format_metric, markdown_table, summary_rows
from feedbackpath.rules import RULES
from feedbackpath.rules.base import group_of
from feedbackpath.train.results import Metric, Run, read_results

ROOT = Path(
    os.path.relpath(Path(__file__).parent.parent)
)  # result files keep their command: no machine's path
RESULTS = ROOT / "benchmarks" / "rules"
PAGE = ROOT / "docs" / "rules.md"
TRIALS, SEEDS, SHARE = 8, 3, 4  # of tuning, of the runs that count, and how many times longer these are
FIRST_SEED = 100  # of the runs that count; the search has seed 0
LOWER = (0.0003, 0.01)  # learning rates of a second search, where all trials of the first have diverged
CHOICES = 3  # settings that a rule may try at full length, as long as a run diverges
DIVERGED = 3  # what compare exits with if a run has
TASKS = {  # flags, and epochs of a run that counts
    "digits-mlp": (["--data", "digits", "--model", "mlp", "--batch-size", "32"], 20),
    "fashion-mnist-lenet": (
        ["--data", "fashion-mnist", "--model", "lenet", "--batch-size", "32", "--samples-per-epoch", "15000"],
        8,  # two passes over the data
    ),
    "glyphs-resnet8": (
        ["--data", "glyphs", "--model", "resnet8", "--batch-size", "32", "--samples-per-epoch", "10000"],
        6,
    ),
}
TUNED_ON = {"glyphs-resnet8": "fashion-mnist-lenet"}
COLUMNS = [
    "rule",
    "group",
    "learning rate",
    "n",
    "test error",
    "minus bp",
    "angle, worst epoch",
    "δ angle, worst epoch",
    "step time",
    "verdict",
]
ONE_RATE = ("bp", "ss", "kp", "wm")  # at the learning rate and decay that sc has in the bench, on glyphs
# Errors in percent that papers report for the same data and a network of the same kind; none is ours.
PUBLISHED = {
    "fashion-mnist-lenet": "BioTorch's README has, for LeNet on Fashion-MNIST: bp 8.88, fa 12.77, dfa 12.76, "
    "and 9.22 to 9.31 for three forms of sign-symmetry (one run each, chosen on the data reported)."
}
# What the field expects of test errors: the first is not above the second; with "<" it is below.
ORDERS = {
    "glyphs-resnet8": [
        ("bp", "≤", "kp"), ("bp", "≤", "wm"), ("kp", "≤", "ss"), ("wm", "≤", "ss"), ("ss", "<", "dfa"),
        ("ss", "<", "fa"),
    ]
}  # fmt: skip


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return what a command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run_ = commands.add_parser("run", help="tune and train on one task")
    run_.add_argument("task", choices=TASKS)
    run_.add_argument("--data-dir", type=Path, help="kept in the result files: give a relative path")
    run_.add_argument("--rules", default=",".join(RULES), help="names, by commas")
    commands.add_parser("one-rate", help="train some rules on glyphs with one learning rate")
    commands.add_parser("cost", help="time a step of each network under every rule")
    commands.add_parser("page", help="write the tables of docs/rules.md")
    return parser.parse_args(arguments)


def run(task: str, data_dir: Path | None, rules: Sequence[str]) -> None:
    """Tune each rule, and train it with what was chosen.

    Raises:
        SystemExit: Names the rules that could not be run; all others were.
    """
    failed = [rule for rule in rules if not _run_rule(task, data_dir, rule)]
    if failed:
        raise SystemExit(f"{task}: {', '.join(failed)} could not be run; what stands above says why")


def _run_rule(task: str, data_dir: Path | None, rule: str) -> bool:
    flags, epochs = TASKS[task]
    own = [*flags, "--num-threads", 1, *(("--data-dir", data_dir) if data_dir else ()), "--rules", rule]
    if task not in TUNED_ON:
        short = ["--epochs", max(1, epochs // SHARE), "--trials", TRIALS, "--resume"]
        first, lower = searches_of(task, rule)
        if call("tune", *own, *short, "--out", first) != 0:
            return False
        if _all_diverged(first) and call("tune", *own, *short, "--lr-range", *LOWER, "--out", lower) != 0:
            return False
    seeds = ["--seed", FIRST_SEED, "--seeds", SEEDS]
    code = 1
    for settings, folder in zip(choices(task, rule), folders_of(task, rule), strict=False):
        whole = ["--config", settings, "--epochs", epochs, *seeds, "--out", folder, "--resume"]
        if (code := call("compare", *own, *whole)) != DIVERGED:
            break
    return code in (0, DIVERGED)  # that all of them diverge is a result


def folders_of(task: str, rule: str) -> list[Path]:
    """Return where a rule's runs go with its best settings, with its second best, and so on."""
    folder = RESULTS / task / rule
    return [folder, *(folder / f"choice-{number}" for number in range(2, CHOICES + 1))]


def searches_of(task: str, rule: str) -> list[Path]:
    """Return the folders of a rule's search, and of the one with lower learning rates."""
    folder = RESULTS / TUNED_ON.get(task, task) / rule
    return [folder / "tuned", folder / "tuned-lower"]


def last_search(task: str, rule: str) -> Path:
    """Return the folder of the search that counts: of the second, if there is one."""
    first, lower = searches_of(task, rule)
    return lower if (lower / "tune.json").exists() else first


def trials_of(search: Path) -> list[dict[str, Any]]:
    """Return the trials of a search, as far as it has got."""
    file = search / "tune.json"
    trials: list[dict[str, Any]] = (
        json.loads(file.read_text(encoding="utf-8"))["trials"] if file.exists() else []
    )
    return trials


def choices(task: str, rule: str) -> list[Path]:
    """Write the settings of a rule's trials that finished, each into a file, the best first."""
    folder = last_search(task, rule)
    trials = trials_of(folder)
    if len(trials) < TRIALS:
        sys.stderr.write(
            f"{rule} has not been tuned: {folder} lacks trials; run {folder.parent.parent.name} first\n"
        )
        return []
    ended = sorted((t for t in trials if t["validation"] is not None), key=lambda trial: trial["validation"])
    if not ended:
        sys.stderr.write(f"{rule}: none of {TRIALS} trials has finished\n")
    written = []
    for number, trial in enumerate(ended[:CHOICES], start=1):
        shared, own = shared_and_own(trial["settings"])
        settings = {"by_rule": {rule: shared}} | ({"rule_settings": {rule: own}} if own else {})
        written.append(folder / f"choice-{number}.yaml")
        written[-1].write_text(yaml.safe_dump(settings), encoding="utf-8")
    return written


def run_at_one_rate() -> None:
    """Train rules on glyphs with the learning rate and decay of ``one-rate.yaml``.

    Raises:
        SystemExit: They could not be run.
    """
    flags, epochs = TASKS["glyphs-resnet8"]
    rules = ["--config", RESULTS / "one-rate.yaml", "--rules", ",".join(ONE_RATE), "--num-threads", 1]
    seeds = ["--epochs", epochs, "--seed", FIRST_SEED, "--seeds", SEEDS]
    if call("compare", *rules, *flags, *seeds, "--out", RESULTS / "glyphs-one-rate", "--resume"):
        raise SystemExit("the runs with one learning rate ended with an error; what stands above says why")


def one_rate() -> str:
    """Return the table of the runs with one learning rate."""
    folder = RESULTS / "glyphs-one-rate"
    told = "The same with one learning rate and decay for all, those of `sc` above"
    told += " (`python benchmarks/rules_bench.py one-rate`):"
    if not (folder / "results.json").exists():
        return not_run("python benchmarks/rules_bench.py one-rate", "the same with one learning rate for all")
    shown = ("rule", "n", "test error", "minus bp", "angle, worst epoch")
    return f"{told}\n\n{markdown_table(read_results(folder), shown)}"


def time_steps() -> None:
    """Time a step of each network under every rule, where that has not been done."""
    for flags, _ in TASKS.values():
        model = flags[flags.index("--model") + 1]
        out = RESULTS / f"cost-{model}.json"
        if not out.exists() and call(
            "bench", "--models", model, "--rules", ",".join(RULES), "--batch-size", 32, "--out", out
        ):
            raise SystemExit(f"the steps of {model} could not be timed; what stands above says why")


def last_choices(task: str) -> dict[str, tuple[int, Path]]:
    """Return which choice of settings each rule that was run has ended with, and its folder."""
    tried = {
        rule: [at for at in enumerate(folders_of(task, rule), start=1) if (at[1] / "results.json").exists()]
        for rule in RULES
    }
    return {rule: found[-1] for rule, found in tried.items() if found}


def read_runs(task: str) -> tuple[list[Run], Metric]:
    """Return a task's runs under all rules that have been run, and what they are judged by."""
    found = [read_results(folder) for _, folder in last_choices(task).values()]
    return [run for results in found for run in results.runs], found[0].metric if found else Metric()


def table(task: str) -> str:
    """Return a task's table: what was measured; below it, what was not run."""
    runs, metric = read_runs(task)
    rows = {row["rule"]: row for row in summary_rows(runs, metric)}
    failed = [name for name in RULES if name not in rows and _all_diverged(last_search(task, name))]
    absent = [name for name in RULES if name not in rows and name not in failed]
    below = [not_run(f"python benchmarks/rules_bench.py run {task}", _names(absent) if rows else "")]
    if not rows:
        where = f"on {TUNED_ON.get(task, task)}"
        return " ".join([*below, *(f"`{name}`: {_all_failed(task, name)} {where}." for name in failed)])
    times, chosen = _times_of(task), last_choices(task)
    columns = [column for column in COLUMNS if times or column != "step time"]
    lines = []
    for name in (name for name in RULES if name not in absent):
        row = rows.get(name) or dict.fromkeys(COLUMNS, "–") | {"n": _all_failed(task, name)}
        if name in rows:
            row["δ angle, worst epoch"] = _worst_delta([run for run in runs if run.rule == name])
            row["n"] += _how_chosen(task, name, chosen[name][0])
        row |= {
            "rule": f"`{name}`",
            "group": group_of(RULES[name]),
            "learning rate": _rate_of(chosen[name][1], name) if name in chosen else "–",
            "verdict": RULES[name].facts.verdict,
            "step time": times.get(name, "–"),
        }
        lines.append([row[column] for column in columns])
    below = below if absent else []
    if not times:
        below.append(not_run("python benchmarks/rules_bench.py cost", "the time of a step under each rule"))
    return as_table(columns, lines) + "".join(f"\n\n{sentence}" for sentence in below)


def _names(rules: Sequence[str]) -> str:
    return ", ".join(f"`{rule}`" for rule in rules)


def _how_chosen(task: str, rule: str, choice: int) -> str:
    """Return what the table says of settings that are not the best of the first search."""
    is_lower = last_search(task, rule).name == "tuned-lower"
    return f", choice {choice}" * (choice > 1) + ", lower rates" * is_lower


def _rate_of(folder: Path, rule: str) -> str:
    """Return the learning rate of a rule's runs."""
    return f"{read_results(folder).config['by_rule'][rule]['lr']:g}"


def _all_failed(task: str, rule: str) -> str:
    return f"all {sum(len(trials_of(search)) for search in searches_of(task, rule))} trials diverged"


def _all_diverged(search: Path) -> bool:
    """Whether no settings of a search have worked."""
    trials = trials_of(search)
    return len(trials) >= TRIALS and all(trial["validation"] is None for trial in trials)


def _worst_delta(runs: Sequence[Run]) -> str:
    """Return the largest δ angle of all layers, epochs and runs that have finished, as the table's others."""
    entries = [entry for run in finished(runs) for entry in run.history if entry.epoch]
    deltas = [value for entry in entries for value in measured(layers_of(entry, "delta_angle_deg").values())]
    return f"{max(deltas):.1f}°" if deltas else "–"


def _times_of(task: str) -> dict[str, str]:
    flags = TASKS[task][0]
    model = flags[flags.index("--model") + 1]
    file = RESULTS / f"cost-{model}.json"
    if not file.exists():
        return {}
    steps = json.loads(file.read_text(encoding="utf-8"))["networks"][model]["step"]
    return {rule: f"{ratio['median']:.2f}" for rule, ratio in steps.items()}


def orders(task: str) -> str:
    """Say which of the known orders of test errors came out, and by how much, paired by seed."""
    runs, metric = read_runs(task)
    done = {rule: {run.seed: run.test for run in finished(runs) if run.rule == rule} for rule in RULES}
    told = "Orders of errors that the field expects, and whether they were found:"
    lines = [told, "", "| known order | found | second minus first |", "|---|---|---|"]
    for lower, sign, higher in ORDERS[task]:
        pairs = [(done[lower][seed], done[higher][seed]) for seed in done[lower] if seed in done[higher]]
        gaps = [second - first for first, second in pairs if first is not None and second is not None]
        without = [rule for rule in (lower, higher) if not any(run.rule == rule for run in runs)]
        if gaps:
            mean, error = mean_and_error(gaps)
            said = "yes" if mean > 0 or (sign == "≤" and mean == 0) else "no"
            found = f"{said} | {format_metric(metric, mean, error, sign='+')}"
        else:
            found = "not run | not run" if without else "not decided: no seed has finished under both | –"
        lines.append(f"| `{lower}` {sign} `{higher}` | {found} |")
    return "\n".join(lines)


def tables() -> str:
    """Return all tables, each under its heading."""
    parts = []
    for task, (flags, epochs) in TASKS.items():
        search = f"{TRIALS} trials of each rule on {TUNED_ON.get(task, task)}"
        told = f"`{' '.join(flags)} --epochs {epochs}`, {SEEDS} seeds; settings by {search}."
        notes = [told, *([PUBLISHED[task]] if task in PUBLISHED else [])]
        checked = [orders(task), one_rate()] if task in ORDERS and read_runs(task)[0] else []
        parts.append("\n\n".join([f"### {task}", *notes, table(task), *checked]) + "\n")
    return "\n".join(parts)


def write_page() -> None:
    """Put the tables into the page."""
    write_between(PAGE, "bench", tables())


def main(arguments: Sequence[str]) -> None:
    """Do what a command line asks for."""
    asked = parse(arguments)
    if asked.command == "run":
        run(asked.task, asked.data_dir, asked.rules.split(","))
    elif asked.command == "one-rate":
        run_at_one_rate()
    elif asked.command == "cost":
        time_steps()
    else:
        write_page()


if __name__ == "__main__":
    main(sys.argv[1:])
