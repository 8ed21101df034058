"""The summary of a comparison, as numbers and as tables for terminal, Markdown and HTML."""

from collections.abc import Sequence
from math import floor, isfinite, log10
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from feedbackpath.report.curves import (
    Run,
    finished,
    group_by_rule,
    history,
    mean_and_error,
    measured,
    unfinished,
)
from feedbackpath.report.panels import Panel, join_runs

COLUMNS = (
    "rule",
    "n",
    "test error",
    "minus bp",
    "angle, output",
    "angle, max",
    "δ angle, max",
    "gain",
    "s per epoch",
    "status",
)
"""Columns of the table, over finished seeds. "minus bp" is in points; angles and gains are the last epoch's:
of B and W in the output layer (mean over seeds) and in the worst layer; of δ in the worst layer."""

MISSING = "–"


def format_with_error(
    mean: float | None, error: float | None = None, *, sign: str = "", unit: str = "%"
) -> str:
    """Print a mean and its standard error as the paper does: in parentheses, in units of the last digit.

    The error keeps one significant digit, but neither less than whole units nor more than two decimals.

    Args:
        mean: The mean; a missing or non-finite one prints as a dash.
        error: Its standard error; None (one seed) leaves the parentheses out.
        sign: ``"+"`` to print the sign of a positive mean too.
        unit: What follows the number.

    Example:
        >>> format_with_error(3.6, 0.2), format_with_error(30.2, 1.3), format_with_error(3.6, 0.04)
        ('3.6(2)%', '30(1)%', '3.60(4)%')
        >>> format_with_error(3.6), format_with_error(None)
        ('3.6%', '–')
    """
    if mean is None or not isfinite(mean):
        return MISSING
    if error is None or not isfinite(error):
        return f"{mean:{sign}.1f}{unit}"
    decimals = _decimals_of_leading_digit(error)
    return f"{mean:{sign}.{decimals}f}({error * 10**decimals:.0f}){unit}"


def summarise(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Average the final test error of each rule's finished runs.

    Args:
        runs: ``results["runs"]``.

    Returns:
        By rule: ``n`` finished runs with an error, ``test_error_mean`` and ``test_error_se`` in percent (None
        where there is none), and ``diverged``, the number of diverged runs, where there are any.

    Example:
        >>> run = {"rule": "kp", "status": "finished"}
        >>> summarise([run | {"history": [{"epoch": 1, "test_error": error}]} for error in (3.0, 5.0)])
        {'kp': {'n': 2, 'test_error_mean': 4.0, 'test_error_se': 1.0}}
    """
    return {rule: _summarise_rule(group) for rule, group in group_by_rule(runs).items()}


def summary_rows(results: dict[str, Any]) -> list[dict[str, str]]:
    """Return the text of each rule's row, by the names in `COLUMNS`."""
    groups = group_by_rule(results.get("runs") or [])
    summary = summarise(results.get("runs") or [])
    baseline = _final_errors(groups.get("bp", []))
    return [_row(rule, group, summary[rule], baseline) for rule, group in groups.items()]


def seeds_by_stop(runs: Sequence[Run]) -> dict[str, str]:
    """Map how the unfinished runs of a rule stand to their seeds: ``{"diverged (epoch 4)": "seed 0, 2"}``."""
    seeds: dict[str, list[str]] = {}
    for run in unfinished(runs):
        seeds.setdefault(describe_stop(run), []).append(str(run.get("seed", "?")))
    return {stop: f"seed {', '.join(group)}" for stop, group in seeds.items()}


def error_rows(panels: Sequence[Panel]) -> list[list[str]]:
    """Return the text of the paper's table: a heading, then a row per panel with each rule's test error.

    Example:
        >>> runs = [{"rule": "kp", "status": "finished", "test_error": 3.6, "history": []}]
        >>> file = {"model": "resnet18", "data": "imagenet", "config": {"norm": "after"}, "runs": runs}
        >>> error_rows([Panel("imagenet", "resnet18", "after", (("runs/kp", file),))])
        [['network', 'norm', 'data', 'n', 'kp'], ['resnet18', 'after', 'imagenet', '1', '3.6%']]
    """
    rules = list(group_by_rule(join_runs(panels)))
    return [["network", "norm", "data", "n", *rules], *(_error_row(panel, rules) for panel in panels)]


def rich_error_table(panels: Sequence[Panel]) -> Table:
    """Build the paper's table for a terminal."""
    heading, *rows = error_rows(panels)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=0)
    for name in heading:  # names give way before numbers do
        table.add_column(Text(name), overflow="fold", no_wrap=name not in ("network", "data"))
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def rich_table(results: dict[str, Any]) -> Table:
    """Build the table for a terminal; cheap enough to build anew whenever a run ends."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=0)
    rows = summary_rows(results)
    for column in COLUMNS[:-1]:
        width = max(len(text) for text in [*column.split(), *(row[column] for row in rows)])
        table.add_column(column, justify="left" if column == "rule" else "right", width=width)
    table.add_column(COLUMNS[-1])  # the only one to give way: the rest fits 80 columns, its headings folded
    for row in rows:
        table.add_row(*(Text(row[column]) for column in COLUMNS))
    return table


def markdown_table(results: dict[str, Any], columns: Sequence[str] = COLUMNS) -> str:
    """Return the table, or some columns of it, in Markdown."""
    return to_markdown(columns, [[row[column] for column in columns] for row in summary_rows(results)])


def markdown_error_table(panels: Sequence[Panel]) -> str:
    """Return the paper's table in Markdown."""
    heading, *rows = error_rows(panels)
    return to_markdown(heading, rows)


def describe_stop(run: Run) -> str:
    """Say how a run stands and in which epoch that was, or the last one measured: ``diverged (epoch 4)``."""
    entries = history(run)
    epoch = run.get("diverged_epoch", entries[-1]["epoch"] if entries else None)
    return str(run.get("status", "unknown")) + (f" (epoch {epoch})" if epoch is not None else "")


def describe_divergence(run: Run) -> str:
    """Say where a run diverged.

    Example:
        >>> where = {"step": 7, "learning_rate": 0.1, "origin": "the output of layer 'fc'"}
        >>> describe_divergence({"divergence": where})
        "diverged at step 7 (learning rate 0.1); not finite first: the output of layer 'fc'"
    """
    where = run["divergence"]
    return (
        f"diverged at step {where['step']} (learning rate {where['learning_rate']:.3g}); "
        f"not finite first: {where['origin']}"
    )


def to_markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in (heading, ["---"] * len(heading), *rows)]
    return "".join(f"| {' | '.join(row)} |\n" for row in escaped)


def _decimals_of_leading_digit(error: float) -> int:
    """Return 0, 1 or 2: the decimals that show the first significant digit of the rounded ``error``."""
    rounded = float(f"{error:.0e}")
    return min(2, max(0, -floor(log10(rounded)))) if rounded > 0 else 2


def _final_error(run: Run) -> float | None:
    entries = history(run)
    error: float | None = (entries[-1] if entries else run).get("test_error")
    return error


def _final_errors(runs: Sequence[Run]) -> dict[Any, float]:
    """Map the seed of each finished run to its final test error."""
    errors = {run.get("seed", index): _final_error(run) for index, run in enumerate(finished(runs))}
    return {seed: error for seed, error in errors.items() if error is not None and isfinite(error)}


def _summarise_rule(runs: Sequence[Run]) -> dict[str, Any]:
    errors = measured([_final_error(run) for run in finished(runs)])
    mean, error = mean_and_error(errors) if errors else (None, None)
    summary = {"n": len(errors), "test_error_mean": mean, "test_error_se": error}
    diverged = sum(run.get("status") == "diverged" for run in runs)
    return summary | ({"diverged": diverged} if diverged else {})


def _row(
    rule: str, runs: Sequence[Run], summary: dict[str, Any], baseline: dict[Any, float]
) -> dict[str, str]:
    done = finished(runs)
    last_layers = [angles[-1] for run in done if (angles := _last_values(run, "matrix_angle_deg"))]
    seconds = measured([entry.get("seconds") for run in done for entry in history(run) if entry["epoch"]])
    cells = (
        rule,
        f"{summary['n']}/{len(runs)}",
        format_with_error(summary["test_error_mean"], summary["test_error_se"]),
        MISSING if rule == "bp" else _difference(_final_errors(runs), baseline),
        format_angle(sum(last_layers) / len(last_layers) if last_layers else None),
        format_angle(max(_all_last_values(done, "matrix_angle_deg"), default=None)),
        format_angle(max(_all_last_values(done, "delta_angle_deg"), default=None)),
        _format_range(_all_last_values(done, "gain")),
        f"{sum(seconds) / len(seconds):.1f}" if seconds else MISSING,
        _status(runs),
    )
    return dict(zip(COLUMNS, cells, strict=True))


def _error_row(panel: Panel, rules: Sequence[str]) -> list[str]:
    groups = group_by_rule(panel.runs)
    counts = sorted({len(finished(runs)) for runs in groups.values()})
    seeds = "…".join(str(count) for count in dict.fromkeys([*counts[:1], *counts[-1:]]))
    errors = [_error_or_status(groups[rule]) if rule in groups else MISSING for rule in rules]
    return [panel.model, panel.norm, panel.data, seeds, *errors]


def _error_or_status(runs: Sequence[Run]) -> str:
    summary = _summarise_rule(runs)
    if summary["n"] == 0:
        return ", ".join(dict.fromkeys(str(run.get("status")) for run in runs))
    return format_with_error(summary["test_error_mean"], summary["test_error_se"])


def _difference(errors: dict[Any, float], baseline: dict[Any, float]) -> str:
    """Print the mean difference to backprop, paired by seed: equal seeds start from equal weights."""
    differences = [errors[seed] - baseline[seed] for seed in errors if seed in baseline]
    return format_with_error(*mean_and_error(differences), sign="+", unit="") if differences else MISSING


def _last_values(run: Run, quantity: str) -> list[float]:
    """Return a quantity of every layer, input to output, at the last epoch that measured it."""
    entries = [entry[quantity] for entry in history(run) if entry.get(quantity)]
    return measured(list(entries[-1].values())) if entries else []


def _all_last_values(runs: Sequence[Run], quantity: str) -> list[float]:
    return [value for run in runs for value in _last_values(run, quantity)]


def format_angle(degrees: float | None) -> str:
    """Print an angle: tenths of a degree, or the power of ten of one that is smaller."""
    if degrees is None:
        return MISSING
    return f"{degrees:.0e}°" if 0 < degrees < 0.05 else f"{degrees:.1f}°"


def _format_range(values: Sequence[float]) -> str:
    return f"{min(values):.2f}…{max(values):.2f}" if values else MISSING


def _status(runs: Sequence[Run]) -> str:
    stops = seeds_by_stop(runs)
    if len(stops) == 1 and len(unfinished(runs)) == len(runs):
        return next(iter(stops))
    return "; ".join(f"{seeds} {stop}" for stop, seeds in stops.items()) or "finished"
