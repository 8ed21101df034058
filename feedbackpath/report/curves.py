"""What tables and figures show: quantities of the runs of a rule, averaged over seeds.

None and numbers that are not finite count as not measured.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from statistics import fmean

from feedbackpath.train.results import Entry, Layers, Run

QUANTITIES = {"matrix_angle_deg": "matrix angle (°)", "delta_angle_deg": "δ angle (°)", "gain": "gain"}
"""What is measured of every layer, as axes name it."""


@dataclass(frozen=True)
class Curve:
    """A quantity by epoch: its mean over ``n`` seeds, and that mean's standard error (None for one seed)."""

    epochs: list[int]
    means: list[float]
    errors: list[float | None]
    n: list[int]

    @property
    def band(self) -> tuple[list[float], list[float]]:
        """The mean less and plus its standard error; of a positive mean a tenth is left on a log axis."""
        spans = [(mean, error or 0.0) for mean, error in zip(self.means, self.errors, strict=True)]
        low = [max(mean - error, mean / 10) if mean > 0 else mean - error for mean, error in spans]
        return low, [mean + error for mean, error in spans]


LearningCurves = list[tuple[Run | None, Curve]]
"""The metric of a rule: the mean of its finished runs (None), then each run that did not finish."""
LayerCurves = dict[str, Curve]
"""A quantity by layer, from the input layer to the output layer."""


def group_by_rule(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Collect the runs of each rule, in the order in which rules first come up."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.rule, []).append(run)
    return groups


def finished(runs: Iterable[Run]) -> list[Run]:
    """Keep the runs that reached their last epoch; only these enter an averaged metric."""
    return [run for run in runs if run.status == "finished"]


def unfinished(runs: Iterable[Run]) -> list[Run]:
    """Keep the runs that wait, diverged, were interrupted or are still going on."""
    return [run for run in runs if run.status != "finished"]


def measured(values: Iterable[float | None]) -> list[float]:
    """Keep the finite numbers."""
    return [value for value in values if value is not None and isfinite(value)]


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error, std(ddof=1)/√n, which one value alone does not have.

    Example:
        >>> mean_and_error([3.0, 5.0]), mean_and_error([3.0])
        ((4.0, 1.0), (3.0, None))
    """
    n, mean = len(values), fmean(values)
    if n < 2:
        return mean, None
    return mean, sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)


def learning_curves_by_rule(runs: Iterable[Run]) -> dict[str, LearningCurves]:
    """Collect what learning curves show; what was not measured is left out."""
    groups = group_by_rule(runs)
    curves = {
        rule: [
            (None, _metric_curve(finished(group))),
            *((run, _metric_curve([run])) for run in unfinished(group)),
        ]
        for rule, group in groups.items()
    }
    lines = {rule: [line for line in of_rule if line[1].epochs] for rule, of_rule in curves.items()}
    return {rule: of_rule for rule, of_rule in lines.items() if of_rule}


def layer_curves(runs: Sequence[Run], quantity: str) -> LayerCurves:
    """Average one of `QUANTITIES` by epoch, of every layer that was measured in a rule's runs."""
    layers = dict.fromkeys(
        layer for run in runs for entry in run.entries for layer in layers_of(entry, quantity)
    )
    curves = {layer: _layer_curve(runs, quantity, layer) for layer in layers}
    return {layer: curve for layer, curve in curves.items() if curve.epochs}


def layer_curves_by_rule(runs: Iterable[Run], quantities: Iterable[str]) -> dict[str, dict[str, LayerCurves]]:
    """Collect what figures of layers show: rule to quantity to layer to curve.

    Of a rule without a finished run all runs are shown: angles of an interrupted one are worth seeing.
    Backprop is left out: its angles are 0 and its gains 1 by definition.
    """
    groups = {
        rule: {quantity: layer_curves(finished(group) or group, quantity) for quantity in quantities}
        for rule, group in group_by_rule(runs).items()
        if rule != "bp"
    }
    return {rule: curves for rule, curves in groups.items() if any(curves.values())}


def all_means(groups: Iterable[LayerCurves]) -> list[float]:
    """Return the means of all layers in all of the groups."""
    return [mean for curves in groups for curve in curves.values() for mean in curve.means]


def ends_of_bands(curves: Iterable[LearningCurves]) -> list[float]:
    """Return all that an axis for these curves has to reach."""
    return [end for lines in curves for _, curve in lines for ends in curve.band for end in ends]


def layers_of(entry: Entry, quantity: str) -> Layers:
    """Return one of `QUANTITIES` by layer; no δ angle where no error goes below the output layer.

    The output layer's is always 0, and next to layers without an error it would look like agreement.
    """
    layers: Layers = getattr(entry, quantity)
    has_no_error = quantity == "delta_angle_deg" and set(layers.values()) == {None, 0.0}
    return dict.fromkeys(layers) if has_no_error else layers


def _metric_curve(runs: Iterable[Run]) -> Curve:
    return _average(runs, lambda entry: entry.test)


def _layer_curve(runs: Iterable[Run], quantity: str, layer: str) -> Curve:
    return _average(runs, lambda entry: layers_of(entry, quantity).get(layer))


def _average(runs: Iterable[Run], value: Callable[[Entry], float | None]) -> Curve:
    by_epoch: dict[int, list[float | None]] = {}
    for run in runs:
        for entry in run.entries:
            by_epoch.setdefault(entry.epoch, []).append(value(entry))
    samples = {epoch: found for epoch in sorted(by_epoch) if (found := measured(by_epoch[epoch]))}
    statistics = [mean_and_error(found) for found in samples.values()]
    return Curve(
        epochs=list(samples),
        means=[mean for mean, _ in statistics],
        errors=[error for _, error in statistics],
        n=[len(found) for found in samples.values()],
    )
