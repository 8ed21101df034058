"""What tables and figures show: quantities of the runs of a rule, averaged over seeds.

A *run* is an entry of ``results["runs"]``. Missing, null and non-finite values count as not measured.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite, sqrt
from statistics import fmean
from typing import Any

Run = dict[str, Any]


@dataclass(frozen=True)
class Curve:
    """A quantity by epoch: its mean over ``n`` seeds, and that mean's standard error (None for one seed)."""

    epochs: list[int]
    means: list[float]
    errors: list[float | None]
    n: list[int]


def group_by_rule(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Collect the runs of each rule, in the order in which rules first come up.

    Example:
        >>> list(group_by_rule([{"rule": "kp", "seed": 0}, {"rule": "bp"}, {"rule": "kp", "seed": 1}]))
        ['kp', 'bp']
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run["rule"], []).append(run)
    return groups


def finished(runs: Sequence[Run]) -> list[Run]:
    """Keep the runs that reached their last epoch; only these enter an averaged error."""
    return [run for run in runs if run.get("status") == "finished"]


def unfinished(runs: Sequence[Run]) -> list[Run]:
    """Keep the runs that diverged, were interrupted or are still going on."""
    return [run for run in runs if run.get("status") != "finished"]


def finished_or_all(runs: Sequence[Run]) -> list[Run]:
    """Keep the finished runs, or where there are none, all: angles of an interrupted run are worth seeing."""
    return finished(runs) or list(runs)


def history(run: Run) -> list[dict[str, Any]]:
    """Return the entries of a run, one an epoch, after what was measured before training, if that was."""
    start = run.get("start")
    return ([start] if start else []) + (run.get("history") or [])


def measured(values: Sequence[float | None]) -> list[float]:
    """Keep the finite numbers."""
    return [value for value in values if value is not None and isfinite(value)]


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error, std(ddof=1)/√n, which one value alone does not have.

    Example:
        >>> mean_and_error([3.0, 5.0])
        (4.0, 1.0)
        >>> mean_and_error([3.0])
        (3.0, None)
    """
    n, mean = len(values), fmean(values)
    if n < 2:
        return mean, None
    return mean, sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)


def error_curve(runs: Sequence[Run]) -> Curve:
    """Average the test error, in percent, of ``runs`` by epoch."""
    return _average(runs, lambda entry: entry.get("test_error"))


def layer_curves(runs: Sequence[Run], quantity: str) -> dict[str, Curve]:
    """Average a quantity of every layer of ``runs`` by epoch, from the input layer to the output layer.

    Args:
        runs: Runs of one rule.
        quantity: ``"matrix_angle_deg"``, ``"delta_angle_deg"`` or ``"gain"``.

    Returns:
        A curve per layer, in the order of the results; no entry for a layer never measured.
    """
    layers = dict.fromkeys(
        layer for run in runs for entry in history(run) for layer in entry.get(quantity) or {}
    )
    curves = {layer: _average(runs, partial(_of_layer, quantity=quantity, layer=layer)) for layer in layers}
    return {layer: curve for layer, curve in curves.items() if curve.epochs}


def layer_curves_by_rule(
    runs: Sequence[Run], quantities: Iterable[str]
) -> dict[str, dict[str, dict[str, Curve]]]:
    """Collect what alignment figures show: rule to quantity to layer to curve.

    Left out are backprop, whose angles are 0 and gains 1 by definition, and rules with nothing measured.
    """
    groups = {
        rule: {quantity: layer_curves(finished_or_all(group), quantity) for quantity in quantities}
        for rule, group in group_by_rule(runs).items()
        if rule != "bp"
    }
    return {rule: curves for rule, curves in groups.items() if any(curves.values())}


def largest_mean(groups: Iterable[dict[str, Curve]]) -> float:
    """Return the largest mean of any layer in any of the groups; 0 where there are none."""
    return max((mean for curves in groups for curve in curves.values() for mean in curve.means), default=0.0)


def _of_layer(entry: dict[str, Any], *, quantity: str, layer: str) -> float | None:
    value: float | None = (entry.get(quantity) or {}).get(layer)
    return value


def _average(runs: Sequence[Run], value: Callable[[dict[str, Any]], float | None]) -> Curve:
    by_epoch: dict[int, list[float | None]] = {}
    for run in runs:
        for entry in history(run):
            by_epoch.setdefault(entry["epoch"], []).append(value(entry))
    samples = {epoch: found for epoch in sorted(by_epoch) if (found := measured(by_epoch[epoch]))}
    statistics = [mean_and_error(found) for found in samples.values()]
    return Curve(
        epochs=list(samples),
        means=[mean for mean, _ in statistics],
        errors=[error for _, error in statistics],
        n=[len(found) for found in samples.values()],
    )
