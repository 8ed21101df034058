"""The summary of a comparison, as numbers and as tables for terminal, Markdown and HTML."""

from collections.abc import Iterable, Sequence
from math import floor, isfinite, log10
from statistics import fmean

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from feedbackpath.report.curves import (
    finished,
    group_by_rule,
    layers_of,
    mean_and_error,
    measured,
    unfinished,
)
from feedbackpath.report.panels import Panel, join_runs
from feedbackpath.report.style import in_order
from feedbackpath.train.results import Metric, Results, Run, Summary

MISSING = "–"
WIDE = "δ norm"  # left out where 80 columns are all there is


def format_with_error(
    mean: float | None,
    error: float | None = None,
    *,
    sign: str = "",
    unit: str = "%",
    most_decimals: int | None = 2,
) -> str:
    """Print a mean and its standard error as the paper does: in parentheses, in units of the last digit.

    The error keeps one significant digit, but neither less than whole units nor more than ``most_decimals``.

    Args:
        mean: The mean; a missing or non-finite one prints as a dash.
        error: Its standard error; None (one seed) leaves the parentheses out.
        sign: ``"+"`` to print the sign of a positive mean too.
        unit: What follows the number.
        most_decimals: None where numbers may be of any size, unlike percentages. Without an error, or with
            one that is smaller still, such a mean has four significant digits.

    Example:
        >>> format_with_error(3.6, 0.2), format_with_error(30.2, 1.3), format_with_error(3.6, 0.04)
        ('3.6(2)%', '30(1)%', '3.60(4)%')
        >>> format_with_error(3.6), format_with_error(None)
        ('3.6%', '–')
        >>> format_with_error(0.01234, 0.0003, unit="", most_decimals=None)
        '0.0123(3)'
    """
    if mean is None or not isfinite(mean):
        return MISSING
    if error is None or not isfinite(error) or (most_decimals is None and error < 1e-4 * abs(mean)):
        return f"{mean:{sign}{'.4g' if most_decimals is None else '.1f'}}{unit}"
    rounded = float(f"{error:.0e}")  # its first significant digit may be one further to the left
    decimals = max(0, -floor(log10(rounded))) if rounded > 0 else 2
    decimals = decimals if most_decimals is None else min(decimals, most_decimals)
    return f"{mean:{sign}.{decimals}f}({error * 10**decimals:.0f}){unit}"


def format_metric(metric: Metric, mean: float | None, error: float | None = None, *, sign: str = "") -> str:
    """Print a mean of the metric with its unit, or a difference with its sign."""
    unit, most_decimals = "" if sign else metric.suffix, 2 if metric.unit == "%" else None
    return format_with_error(mean, error, sign=sign, unit=unit, most_decimals=most_decimals)


def format_angle(degrees: float | None) -> str:
    """Print an angle: tenths of a degree, or the power of ten of one that is smaller."""
    if degrees is None:
        return MISSING
    return f"{degrees:.0e}°" if 0 < degrees < 0.05 else f"{degrees:.1f}°"


def summarise(runs: Iterable[Run]) -> dict[str, Summary]:
    """Average the final metric of each rule's finished runs.

    Example:
        >>> summarise([Run(rule="kp", seed=n, status="finished", test=3.0 + 2 * n) for n in (0, 1)])
        {'kp': Summary(n=2, test_mean=4.0, test_se=1.0, diverged=None)}
    """
    return {rule: _summarise_rule(group) for rule, group in group_by_rule(runs).items()}


def summary_rows(runs: Iterable[Run], metric: Metric) -> list[dict[str, str]]:
    """Return the text of each rule's row, by column; rules are averaged over finished seeds.

    "minus bp" is in the metric's unit. Angles and gains are the last epoch's: of B and W in the output layer
    (mean over seeds) and in the worst layer; of δ in the worst layer.
    """
    groups = group_by_rule(runs)
    baseline = _final_metrics(groups.get("bp", []))
    return [_row(rule, group, metric, baseline) for rule, group in groups.items()]


def seeds_by_stop(runs: Iterable[Run]) -> dict[str, str]:
    """Map how the unfinished runs of a rule stand to their seeds: ``{"diverged (epoch 4)": "seed 0, 2"}``."""
    seeds: dict[str, list[str]] = {}
    for run in unfinished(runs):
        seeds.setdefault(describe_stop(run), []).append(str(run.seed))
    return {stop: f"seed {', '.join(group)}" for stop, group in seeds.items()}


def error_rows(panels: Sequence[Panel]) -> list[list[str]]:
    """Return the text of the paper's table: a heading, then a row per panel with each rule's final metric.

    Example:
        >>> runs = [Run(rule="kp", seed=0, status="finished", test=3.6)]
        >>> error_rows([Panel("imagenet", "resnet18", "after", (("runs/kp", Results(runs=runs)),))])
        [['network', 'norm', 'data', 'n', 'kp'], ['resnet18', 'after', 'imagenet', '1', '3.6%']]
    """
    rules = in_order(run.rule for run in join_runs(panels))
    return [["network", "norm", "data", "n", *rules], *(_error_row(panel, rules) for panel in panels)]


def rich_error_table(panels: Sequence[Panel]) -> Table:
    """Build the paper's table for a terminal."""
    heading, *rows = error_rows(panels)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=0)
    for name, *cells in zip(heading, *rows, strict=True):  # names are folded before numbers are
        width = 1 if name in ("network", "data") else max(map(len, cells), default=1)
        table.add_column(Text(name), overflow="fold", min_width=width)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def rich_table(results: Results) -> Table:
    """Build the table for a terminal; cheap enough to build anew whenever a run ends."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=0)
    rows = summary_rows(results.runs, results.metric)
    columns = [column for column in (rows[0] if rows else ()) if column != WIDE]
    for column in columns:
        width = max(len(text) for text in [*column.split(), *(row[column] for row in rows)])
        if column in ("rule", "status"):  # these give way, and are folded: the rest fits 80 columns
            table.add_column(column, overflow="fold", min_width=min(width, 8))
        else:
            table.add_column(column, justify="right", width=width)
    for row in rows:
        table.add_row(*(Text(row[column]) for column in columns))
    return table


def markdown_table(results: Results, columns: Sequence[str] = ()) -> str:
    """Return the table, or some columns of it, in Markdown."""
    rows = summary_rows(results.runs, results.metric)
    columns = columns or list(rows[0] if rows else ())
    return to_markdown(columns, [[row[column] for column in columns] for row in rows])


def markdown_error_table(panels: Sequence[Panel]) -> str:
    """Return the paper's table in Markdown."""
    heading, *rows = error_rows(panels)
    return to_markdown(heading, rows)


def describe_stop(run: Run) -> str:
    """Say how a run stands and, unless it goes on, in which epoch it stopped: ``diverged (epoch 4)``."""
    last = run.entries[-1].epoch if run.entries else None
    epoch = last if run.diverged_epoch is None else run.diverged_epoch
    return run.status + (f" (epoch {epoch})" if run.status != "running" and epoch is not None else "")


def describe_divergence(run: Run) -> str:
    """Say where a run diverged.

    Example:
        >>> where = {"step": 7, "learning_rate": 0.1, "origin": "the output of layer 'fc'"}
        >>> describe_divergence(Run(rule="kp", seed=0, divergence=where))
        "diverged at step 7 (learning rate 0.1); not finite first: the output of layer 'fc'"
    """
    where = run.divergence
    if where is None:
        return "diverged"
    return (
        f"diverged at step {where.step} (learning rate {where.learning_rate:.3g}); "
        f"not finite first: {where.origin}"
    )


def to_markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in (heading, ["---"] * len(heading), *rows)]
    return "".join(f"| {' | '.join(row)} |\n" for row in escaped)


def _final_metrics(runs: Iterable[Run]) -> dict[int, float]:
    """Map the seed of each finished run to its final metric."""
    tests = {run.seed: run.test for run in finished(runs)}
    return {seed: test for seed, test in tests.items() if test is not None and isfinite(test)}


def _summarise_rule(runs: Sequence[Run]) -> Summary:
    tests = list(_final_metrics(runs).values())
    mean, error = mean_and_error(tests) if tests else (None, None)
    diverged = sum(run.status == "diverged" for run in runs)
    return Summary(n=len(tests), test_mean=mean, test_se=error, diverged=diverged or None)


def _row(rule: str, runs: Sequence[Run], metric: Metric, baseline: dict[int, float]) -> dict[str, str]:
    done, summary = finished(runs), _summarise_rule(runs)
    angles = [_last_values(run, "matrix_angle_deg") for run in done]
    worst = [
        value
        for run in done
        for entry in run.history
        if entry.epoch
        for value in measured(entry.matrix_angle_deg.values())
    ]
    deltas, norms, gains = (
        [value for run in done for value in _last_values(run, quantity)]
        for quantity in ("delta_angle_deg", "delta_norm_ratio", "gain")
    )
    seconds = [entry.seconds for run in done for entry in run.history if entry.epoch]
    return {
        "rule": rule,
        "n": f"{summary.n}/{len(runs)}",
        metric.label: format_metric(metric, summary.test_mean, summary.test_se),
        "minus bp": MISSING if rule == "bp" else _difference(_final_metrics(runs), baseline, metric),
        "angle, max": format_angle(max((value for of_run in angles for value in of_run), default=None)),
        "angle, worst epoch": format_angle(max(worst, default=None)),
        "δ angle, max": format_angle(max(deltas, default=None)),
        "δ norm": _range(norms),
        "gain": _range(gains),
        "s per epoch": f"{fmean(seconds):.1f}" if seconds else MISSING,
        "status": _status(runs),
    }


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2f}…{max(values):.2f}" if values else MISSING


def _error_row(panel: Panel, rules: Sequence[str]) -> list[str]:
    groups = group_by_rule(panel.runs)
    counts = sorted({len(finished(runs)) for runs in groups.values()})
    seeds = "…".join(str(count) for count in dict.fromkeys([*counts[:1], *counts[-1:]]))
    cells = [_metric_or_status(groups[rule], panel.metric) if rule in groups else MISSING for rule in rules]
    return [panel.model, panel.norm, panel.data, seeds, *cells]


def _metric_or_status(runs: Sequence[Run], metric: Metric) -> str:
    summary = _summarise_rule(runs)
    if summary.n == 0:
        return ", ".join(dict.fromkeys(run.status for run in runs))
    return format_metric(metric, summary.test_mean, summary.test_se)


def _difference(tests: dict[int, float], baseline: dict[int, float], metric: Metric) -> str:
    """Print the mean difference to backprop, paired by seed: equal seeds start from equal weights."""
    differences = [tests[seed] - baseline[seed] for seed in tests if seed in baseline]
    return format_metric(metric, *mean_and_error(differences), sign="+") if differences else MISSING


def _last_values(run: Run, quantity: str) -> list[float]:
    """Return a quantity of every layer, input to output, at the last epoch that measured it."""
    found = [layers for entry in run.entries if (layers := layers_of(entry, quantity))]
    return measured(found[-1].values()) if found else []


def _status(runs: Sequence[Run]) -> str:
    stops = seeds_by_stop(runs)
    if len(stops) == 1 and len(unfinished(runs)) == len(runs):
        return next(iter(stops))
    return "; ".join(f"{seeds} {stop}" for stop, seeds in stops.items()) or "finished"


def in_two_digits(value: float) -> str:
    """Return a value with two significant digits, without an exponent where it is not tiny.

    Example:
        >>> in_two_digits(112.0), in_two_digits(0.0748)
        ('110', '0.075')
    """
    return f"{float(f'{value:.2g}'):g}"
