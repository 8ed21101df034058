"""Learned feedback in networks that read text: the studies behind docs/language.md.

    python benchmarks/language.py tune gpt
    python benchmarks/language.py run gpt
    python benchmarks/language.py equivalence gpt
    python benchmarks/language.py long gpt [--ways same]
    python benchmarks/language_page.py

``gpt`` or ``lstm``. ``tune`` gives each rule 8 trials on validation data, at half the epochs: learning rate,
decay, and what else the rule has. ``run`` trains every rule with its best settings on three other seeds.
``equivalence`` trains those that are said to be as good as backprop on ten further seeds; its margins, in
bits per byte, were written here before any of them ran. ``long`` gives Kolen-Pollack ten times as many steps,
and 5.2 e-folds: AdamW's decoupled decay shrinks W - B by exp(-sum of lr wd) = exp(-0.003 * 0.35 * 0.5 *
10,000). Beside it stand a B that starts at 0, and backprop with the same settings and with its own best.

All go on where they were broken off. The two networks, and the ways of ``long``, can be run at the same time.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from studies import chosen_settings, search_with, train

HERE = Path(__file__).parent
OUT, WORK = HERE / "language", Path("runs") / "language"
RULES = {
    "gpt": ("bp", "mirror-kp", "wm", "kp", "ss", "fa", "dfa"),
    "lstm": ("bp", "mirror-kp", "wm", "kp", "ss", "fa"),
}
AS_GOOD = {"gpt": ("bp", "mirror-kp", "wm"), "lstm": ("bp", "mirror-kp", "wm", "kp")}
MARGINS = {"gpt": 0.02, "lstm": 0.05}
TEXT: dict[str, Any] = {
    "data": "text", "optimizer": "adamw", "batch_size": 16, "samples_per_epoch": 4000, "num_threads": 1,
}  # fmt: skip
TRIALS, SHORT, EPOCHS = 8, 2, 4
LONG = {"lr": 0.003, "weight_decay": 0.35}
LONG_EPOCHS = 40
WAYS: dict[str, dict[str, Any]] = {
    "same": {"rules": ("bp", "kp"), **LONG},
    "zero": {"rules": ("kp",), "rule_settings": {"kp": {"scale": "zero"}}, **LONG},
    "best": {"rules": ("bp",)},
}


def tune(network: str) -> None:
    """Search settings for each rule, and keep what came out.

    Raises:
        SystemExit: The search was interrupted, or could not be run.
    """
    place = Path(network) / "tuned"
    asked = TEXT | {"model": network, "rules": RULES[network], "epochs": SHORT}
    search_with(asked, WORK / place, OUT / place, "--trials", TRIALS)


def best_settings(network: str, rules: Sequence[str]) -> dict[str, Any]:
    """Return what the search has chosen for some rules: a job refuses settings of rules it does not train."""
    chosen = chosen_settings(OUT / network / "tuned")
    parts = {
        part: {rule: found for rule, found in chosen.get(part, {}).items() if rule in rules}
        for part in ("by_rule", "rule_settings")
    }
    return {**chosen, **parts, "rules": rules}


def settings_of(study: str, network: str, way: str = "") -> dict[str, Any]:
    """Return the settings of a job.

    Args:
        study: ``run``, ``equivalence`` or ``long``.
        network: ``gpt`` or ``lstm``.
        way: Of ``long``: ``same``, ``zero`` or ``best``.
    """
    base = TEXT | {"model": network, "seeds": 3}
    if way:
        own = WAYS[way] if way != "best" else best_settings(network, ("bp",))
        return base | own | {"epochs": LONG_EPOCHS, "seed": 300}
    if study == "run":
        return base | best_settings(network, RULES[network]) | {"epochs": EPOCHS, "seed": 100}
    chosen = best_settings(network, AS_GOOD[network])
    return base | chosen | {"epochs": EPOCHS, "seed": 200, "seeds": 10, "equivalence": MARGINS[network]}


def place_of(study: str, network: str, way: str = "") -> Path:
    """Return the folder of a job's results, within that of the study."""
    return Path(network) / f"{study}-{way}" if way else Path(network) / study


def run(study: str, network: str, way: str = "") -> None:
    """Train what a job asks for, or go on with it, and keep its result file."""
    place = place_of(study, network, way)
    command = f"python benchmarks/language.py {study} {network}{' --ways ' * bool(way)}{way}"
    train(settings_of(study, network, way), WORK / place, OUT / place, command)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return what a command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (
        ("tune", "search settings for each rule"),
        ("run", "train each rule with its best settings"),
        ("equivalence", "compare some rules with backprop on ten seeds"),
        ("long", "train Kolen-Pollack for five e-folds"),
    ):
        one = commands.add_parser(name, help=what)
        one.add_argument("network", choices=RULES)
        if name == "long":
            one.add_argument("--ways", default=",".join(WAYS), help="names, by commas")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Do what a command line asks for."""
    asked = parse(arguments)
    if asked.command == "tune":
        tune(asked.network)
    elif asked.command == "long":
        for way in asked.ways.split(","):
            run("long", asked.network, way)
    else:
        run(asked.command, asked.network)


if __name__ == "__main__":
    main(sys.argv[1:])
