"""What each rule tolerates on imperfect arrays: the study of docs/hardware.md.

    python benchmarks/hardware_tolerance.py tune
    python benchmarks/hardware_tolerance.py digits [--rules bp,kp]
    python benchmarks/hardware_tolerance.py join

``tune`` gives every rule the same 12 trials on an ideal chip; a trial counts by its mean over three seeds of
validation data. ``digits`` searches, with five other seeds, the worst value of each imperfection at which a
rule's mean test error stays within 1 point of its own on an ideal chip. Both go on where they were broken
off, and processes with other ``--rules`` can work at the same time. ``join`` puts together what has been
found; `doc_figures.py` draws it for docs/hardware.md.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from studies import call, search

from feedbackpath.jobs.tolerance import IMPERFECTIONS, Tolerance

HERE = Path(__file__).parent
OUT, WORK = HERE / "hardware-tolerance", Path("runs/hardware-tolerance")
RULES = ("bp", "fa", "ss", "kp", "wm", "mirror-kp", "dfa")
DIGITS = ("--data", "digits", "--model", "mlp-256-128", "--import", "benchmarks/digits_mlp.py")
BUDGET = ("--batch-size", 32, "--epochs", 15, "--num-threads", 1)
TRIALS, TUNING_SEEDS, FIRST_SEED, SEEDS, MARGIN, BISECTIONS = 12, 3, 100, 5, 1.0, 4


def tune() -> None:
    """Search settings for each rule, and keep what came out.

    Raises:
        SystemExit: The search was interrupted, or could not be run.
    """
    effort = ("--rules", ",".join(RULES), "--trials", TRIALS, "--seeds", TUNING_SEEDS)
    search(WORK / "tuned", OUT / "tuned", *DIGITS, *BUDGET, *effort)


def bisect(rules: Sequence[str]) -> None:
    """Search what each rule tolerates, in a folder of its own.

    Raises:
        SystemExit: The search was interrupted, or could not be run.
    """
    seeds = ("--seed", FIRST_SEED, "--seeds", SEEDS)
    effort = ("--imperfections", ",".join(IMPERFECTIONS), "--margin", MARGIN, "--bisections", BISECTIONS)
    for rule in rules:
        config = (
            "--config",
            OUT / "tuned" / "chosen.yaml",
            "--rules",
            rule,
            "--out",
            WORK / rule,
            "--resume",
        )
        if code := call("hardware", "tolerance", *config, *seeds, *effort):
            raise SystemExit(code)


def join() -> None:
    """Put together what has been searched, rule by rule."""
    whole, *others = [read(WORK / rule) for rule in RULES if (WORK / rule / "tolerance.json").exists()]
    for part in others:
        whole.trials += part.trials
        whole.found |= part.found
        whole.ended |= part.ended
    (OUT / "tolerance.json").write_text(whole.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> Tolerance:
    """Return what a folder's search has found."""
    return Tolerance.model_validate_json((folder / "tolerance.json").read_text(encoding="utf-8"))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return what a command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("part", choices=("tune", "digits", "join"))
    parser.add_argument("--rules", default=",".join(RULES), help="those of digits, by commas")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Do what a command line asks for."""
    asked = parse(arguments)
    if asked.part == "tune":
        tune()
    elif asked.part == "digits":
        bisect(asked.rules.split(","))
    else:
        join()


if __name__ == "__main__":
    main(sys.argv[1:])
