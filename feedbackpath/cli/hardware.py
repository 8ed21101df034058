"""The commands ``hardware`` and ``hardware tolerance``."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from cyclopts.validators import Number

from feedbackpath.cli.exit_codes import DIVERGED, DONE
from feedbackpath.cli.output import make_console, make_table
from feedbackpath.cli.running import run
from feedbackpath.train.config import CompareConfig
from feedbackpath.train.settings import merge_config

# Small enough for two minutes on two cores; as a recipe is, beneath the file and the flags.
FIRST = CompareConfig(
    data="digits", model="mlp", lr=0.05, epochs=10, chip="reram", rules=("bp", "fa", "ss", "kp", "wm")
)
STUDIED = FIRST.model_copy(update={"chip": None, "seeds": 3})


def hardware(
    *,
    flags: Annotated[CompareConfig, Parameter(name="*")] = CompareConfig(),  # noqa: B008 (frozen)
    config: Annotated[Path | None, Parameter(help="YAML file of settings; flags override it")] = None,
    out: Annotated[Path, Parameter(help="folder for results, figures and report.html")] = Path(
        "runs/hardware"
    ),
    resume: Annotated[
        bool, Parameter(help="continue the job in --out, if there is one", negative="")
    ] = False,
    costs: Annotated[
        Path | None,
        Parameter(help="YAML file of the energy of operations, in pJ, and the area of parts, in um2"),
    ] = None,
) -> int:
    """Train by several rules with W and B in arrays of imperfect devices; as `compare --chip` does.

    Prints what the arrays do in a step on average, and its energy and area, compared with one array that
    backprop reads in both directions.

    Defaults differ from those below: --data digits --model mlp --lr 0.05 --epochs 10 --chip reram.

    Exit codes: 0 done, 2 bad input, 3 a run diverged, 130 or 143 interrupted (what was done is kept).
    """
    from feedbackpath.errors import ConfigError
    from feedbackpath.hardware import Costs
    from feedbackpath.hardware.counter import can_count
    from feedbackpath.report.counts import counts_table, energy_table, mean_counts
    from feedbackpath.rules import RULES
    from feedbackpath.train.chips import read_costs
    from feedbackpath.train.results import read_results

    taken = Costs() if costs is None else read_costs(costs)
    settings = merge_config(flags, config, FIRST)
    if costs is not None and not any(can_count(RULES[rule]) for rule in settings.rules if rule in RULES):
        raise ConfigError(
            f"--costs has no effect here: the work of arrays under {', '.join(settings.rules)} is not "
            "modelled; leave it out"
        )
    code = run(settings, out, resume=resume)
    if code not in (DONE, DIVERGED):
        return code
    console, counted = make_console(), mean_counts(read_results(out))
    left = [rule for rule in settings.rules if rule not in counted]
    if counted:
        console.print(counts_table(counted))
        console.print(energy_table(counted, taken))
    if left:
        console.print(
            f"not counted: {', '.join(left)}: what their arrays do is not modelled, or they diverged"
        )
    return code


def tolerance(
    *,
    flags: Annotated[CompareConfig, Parameter(name="*")] = CompareConfig(),  # noqa: B008 (frozen)
    imperfections: Annotated[str, Parameter(help="imperfections to search, separated by commas")] = (
        "step,noise,asymmetry_spread,read_noise"
    ),
    margin: Annotated[
        float,
        Parameter(
            help="largest tolerated error, in points above the rule's error on an ideal chip",
            validator=Number(gt=0),
        ),
    ] = 1.0,
    bisections: Annotated[
        int,
        Parameter(help="number of values to try between the mildest and the worst", validator=Number(gte=1)),
    ] = 5,
    config: Annotated[Path | None, Parameter(help="YAML file of settings; flags override it")] = None,
    out: Annotated[Path, Parameter(help="folder for tolerance.json and the figure")] = Path("runs/tolerance"),
    resume: Annotated[
        bool, Parameter(help="continue the job in --out, if there is one", negative="")
    ] = False,
) -> int:
    """Find the worst value of each imperfection at which a rule's error stays near that on an ideal chip.

    Defaults differ from those below: --data digits --model mlp --lr 0.05 --epochs 10 --seeds 3.

    Exit codes: 0 done, 2 bad input, 130 or 143 interrupted (runs that ended are kept).
    """
    from feedbackpath.jobs import Interrupted
    from feedbackpath.jobs.tolerance import find_tolerance, table_of
    from feedbackpath.report.tolerance import draw_tolerance

    console = make_console()
    settings = merge_config(flags, config, STUDIED)
    try:
        kept = find_tolerance(
            settings, out, imperfections=[name.strip() for name in imperfections.split(",") if name.strip()],
            margin=margin, bisections=bisections, resume=resume, tell=console.print,
        )  # fmt: skip
    except Interrupted as stop:
        console.print(f"interrupted: what has ended is kept in {out}; --resume continues")
        return stop.exit_code
    heading, rows = table_of(kept)
    table = make_table(*heading)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    draw_tolerance(kept.model_dump(), out)
    console.print(f"every run is in {out / 'tolerance.json'}, the figures beside it")
    return DONE


app = App(
    name="hardware",
    help="Train with W and B in arrays of imperfect devices; `tolerance` finds what each rule tolerates.\n\n"
    "Defaults differ from those below: --data digits --model mlp --lr 0.05 --epochs 10 --chip reram.\n\n"
    "Example: feedbackpath hardware --chip reram --read-bits 8 --rules bp,fa,ss,kp,wm",
)
app.default(hardware)
app.command(tolerance)
