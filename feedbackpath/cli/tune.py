"""The command ``tune``."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console

from feedbackpath.cli.compare import with_all_rules
from feedbackpath.cli.exit_codes import DONE
from feedbackpath.cli.output import make_console, make_table
from feedbackpath.errors import ConfigError
from feedbackpath.train.config import CompareConfig
from feedbackpath.train.settings import merge_config

if TYPE_CHECKING:
    from feedbackpath.jobs.tune import Search, Trial

IDLE = {"equivalence", "evaluate_on", "select_best", "checkpoint_steps", "keep_checkpoints"}


def tune(
    *,
    flags: Annotated[CompareConfig, Parameter(name="*")] = CompareConfig(),  # noqa: B008 (frozen)
    trials: Annotated[
        int, Parameter(help="settings that are tried for each rule", validator=Number(gte=1))
    ] = 16,
    lr_range: Annotated[
        tuple[float, float] | None,
        Parameter(
            help="lowest and highest learning rate; by default 0.01 and 1, and 0.0001 and 0.01 with adamw"
        ),
    ] = None,
    config: Annotated[Path | None, Parameter(help="YAML file of settings; flags override it")] = None,
    out: Annotated[Path, Parameter(help="folder for tune.json and chosen.yaml")] = Path("runs/tune"),
    resume: Annotated[
        bool, Parameter(help="continue the job in --out, if there is one", negative="")
    ] = False,
) -> int:
    """Search settings for each rule on validation data, with equally many trials for every rule.

    With --seeds N, a trial trains with N seeds, and the mean over them counts.

    Exit codes: 0 done, 2 bad input, 130 or 143 interrupted (finished trials are kept).
    """
    from feedbackpath.jobs import Interrupted
    from feedbackpath.jobs.tune import SHARED, given_in_vain, in_words
    from feedbackpath.jobs.tune import tune as job

    console = make_console()

    def tell(search: "Search", trial: "Trial") -> None:
        nothing = "not finite" if trial.status == "finished" else trial.status
        found = nothing if trial.validation is None else f"{trial.validation:.2f}{search.metric.unit}"
        seed = f" seed {search.seed + trial.repeat}" if settings.seeds > 1 else ""
        console.print(
            f"{trial.rule} trial {trial.number + 1} of {trials}{seed}: {in_words(trial.settings)}, "
            f"validation {search.metric.name} {found}"
        )

    settings = with_all_rules(merge_config(flags, config))
    for name in flags.model_fields_set & IDLE:
        raise ConfigError(f"--{name.replace('_', '-')} has no effect in a search; leave it out")
    for name in flags.model_fields_set & SHARED[settings.optimizer].keys():
        raise ConfigError(f"--{name.replace('_', '-')} is what tune searches; leave it out")
    for name, value in given_in_vain(settings).items():
        console.print(f"{name} {value:g} of the config file has no effect: tune searches it")
    command = shlex.join(["feedbackpath", *sys.argv[1:]])
    try:
        search = job(
            settings, out, trials=trials, resume=resume, command=command, tell=tell, lr_range=lr_range
        )
    except Interrupted as stop:
        console.print(f"interrupted: finished trials are kept in {out}; --resume continues")
        return stop.exit_code
    _print_outcome(search, out, console)
    return DONE


def _print_outcome(search: "Search", out: Path, console: Console) -> None:
    """Print the best trials, and how to go on with them."""
    from feedbackpath.jobs.tune import in_words, rows_of

    table = make_table("rule", "trials", f"validation {search.metric.name}", "settings", names=(0, 3))
    for rule, count, best in rows_of(search):
        shown = (
            (f"{best.validation:.2f}{search.metric.unit}", in_words(best.settings)) if best else ("–", "–")
        )
        table.add_row(rule, str(count), *shown)
    console.print(table)
    found = [rule for rule, _, best in rows_of(search) if best is not None]
    if failed := [rule for rule in search.spaces if rule not in found]:
        lowest = search.spaces[failed[0]]["lr"][1]
        console.print(
            f"no trial of {', '.join(failed)} gave a result: search again with lower learning rates, "
            f"--rules {','.join(failed)} --lr-range {lowest / 30:.1g} {lowest:g}, and another --out"
        )
    if found:
        console.print(f"every trial is in {out}; now compare the rules with these settings and new seeds:")
        console.print(
            shlex.join(["feedbackpath", "compare", "--config", str(out / "chosen.yaml")])
            + f" --rules {','.join(found)} --seed {search.seed + 100}",
            soft_wrap=True,
        )
