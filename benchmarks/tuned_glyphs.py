"""Rules at settings of their own: glyphs, ResNet-8, with equal tuning effort for each.

    python benchmarks/tuned_glyphs.py tune [--optimizers sgd]
    python benchmarks/tuned_glyphs.py run
    python benchmarks/tuned_glyphs.py page

``tune`` gives each rule 8 trials by SGD and 8 by AdamW, on validation data, at a third of the budget:
learning rate, decay, and the scale of the initial B where it is random (Xavier's or He's). ``run`` trains
each rule with the best of its 16 on five other seeds. Both go on where they were broken off; the two
optimizers can be searched at the same time. ``page`` writes the table of docs/results.md. ``no-feedback`` is
a control: B = 0, so that only the output layer learns.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from marked import as_table, not_run, write_between
from studies import search, settings_in_words, train

from feedbackpath.jobs.tune import shared_and_own
from feedbackpath.report.table import summary_rows
from feedbackpath.train.results import read_results

HERE = Path(__file__).parent
OUT, WORK, PAGE = HERE / "glyphs-resnet8-tuned", Path("runs/tuned-glyphs"), HERE.parent / "docs/results.md"
CONTROL = "benchmarks/no_feedback.py"
RULES = ("bp", "fa", "ss", "kp", "wm", "no-feedback")
OPTIMIZERS, TRIALS, SHORT, EPOCHS, SEEDS, FIRST_SEED = ("sgd", "adamw"), 8, 2, 6, 5, 300
COLUMNS = ("rule", "n", "test error", "minus bp", "angle, max", "angle, worst epoch", "gain")


def tune(optimizers: Sequence[str]) -> None:
    """Search settings for each rule, by each optimizer.

    Raises:
        SystemExit: A search was interrupted, or could not be run.
    """
    for optimizer in optimizers:
        rules = ["--import", CONTROL, "--rules", ",".join(RULES), "--optimizer", optimizer]
        effort = ["--trials", TRIALS, "--epochs", SHORT, "--num-threads", 1]
        search(WORK / optimizer, OUT / optimizer, *rules, *effort)


def best_settings() -> dict[str, dict[str, Any]]:
    """Return the settings of each rule's best trial of all optimizers, as a compare config has them."""
    by_rule, rule_settings = {}, {}
    for rule in RULES:
        trials = [(optimizer, trial) for optimizer in OPTIMIZERS for trial in trials_of(rule, optimizer)]
        optimizer, trial = min(trials, key=lambda found: found[1]["validation"])
        shared, own = shared_and_own(trial["settings"])
        by_rule[rule] = {"optimizer": optimizer, **shared}
        rule_settings |= {rule: own} if own else {}
    return {"by_rule": by_rule, "rule_settings": rule_settings}


def trials_of(rule: str, optimizer: str) -> list[dict[str, Any]]:
    """Return a rule's trials that finished."""
    search = json.loads((OUT / optimizer / "tune.json").read_text(encoding="utf-8"))
    return [trial for trial in search["trials"] if (trial["rule"], trial["status"]) == (rule, "finished")]


def run() -> None:
    """Train each rule with its best settings, and keep the result file."""
    study = {"rules": RULES, "seed": FIRST_SEED, "seeds": SEEDS, "epochs": EPOCHS, "num_threads": 1}
    settings = {"imports": [CONTROL], **study, **best_settings()}
    train(settings, WORK / "run", OUT / "run", "python benchmarks/tuned_glyphs.py run")


def table() -> str:
    """Return the table of what has been run, with the settings that were found."""
    if not (OUT / "run" / "results.json").exists():
        return not_run("python benchmarks/tuned_glyphs.py tune`, then `run")
    results, found = read_results(OUT / "run"), best_settings()
    rows = [
        [*(row[column] for column in COLUMNS), settings_in_words(found, row["rule"])]
        for row in summary_rows(results.runs, results.metric)
    ]
    return as_table([*COLUMNS, "settings"], rows)


def write_page() -> None:
    """Put the table into the page."""
    write_between(PAGE, "tuned", table() + "\n")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return what a command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    search = commands.add_parser("tune", help="search settings for each rule")
    search.add_argument("--optimizers", default=",".join(OPTIMIZERS), help="names, by commas")
    commands.add_parser("run", help="train each rule with its best settings")
    commands.add_parser("page", help="write the table of docs/results.md")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Do what a command line asks for."""
    asked = parse(arguments)
    if asked.command == "tune":
        tune(asked.optimizers.split(","))
    elif asked.command == "run":
        run()
    else:
        write_page()


if __name__ == "__main__":
    main(sys.argv[1:])
