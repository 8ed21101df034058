"""The tables of ``feedbackpath hardware``: what arrays do in a training step, and what that takes."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from feedbackpath.hardware.counts import PHASES, ArrayCounts, Costs, Work
from feedbackpath.report.curves import group_by_rule
from feedbackpath.report.table import MISSING
from feedbackpath.train import results as files
from feedbackpath.train.results import Results

WORK = ("reads", "products", "dac", "adc", "writes", "pulses", "moved")


def mean_counts(results: Results) -> dict[str, dict[str, ArrayCounts]]:
    """Return, by rule and array, what a step takes on average over all epochs and seeds that were counted."""
    found: dict[str, dict[str, ArrayCounts]] = {}
    for rule, runs in group_by_rule(results.runs).items():
        counted = [entry.counts for run in runs for entry in run.history if entry.counts]
        for array in counted[0] if counted else ():
            kept = [counts[array] for counts in counted]
            work = {p: _mean([one.work[p] for one in kept if p in one.work], len(kept)) for p in PHASES}
            told = {p: mean for p, mean in work.items() if mean != Work()}
            one = kept[0]
            found.setdefault(rule, {})[array] = ArrayCounts(one.cells, one.dacs, one.adcs, told)
    return found


def _mean(works: Sequence[files.Work], count: int) -> Work:
    return sum((Work(**work.model_dump()) for work in works), Work()) * (1.0 / count)


def counts_table(counted: dict[str, dict[str, ArrayCounts]]) -> Table:
    """Build the table of counts: a row for each rule, array and phase."""
    table = _table("in a training step", "rule", "array", "phase", *WORK)
    for rule, arrays in counted.items():
        for array, counts in arrays.items():
            for phase, work in counts.work.items() if array != "one" else ():
                table.add_row(rule, array, phase, *(_short(getattr(work, name)) for name in WORK))
    return table


def energy_table(counted: dict[str, dict[str, ArrayCounts]], costs: Costs) -> Table:
    """Build the table of energy and area: a row for each rule."""
    heading, *rows = energy_rows(counted, costs)
    table = _table("energy of a training step, and area", *heading)
    for row in rows:
        table.add_row(*row)
    table.caption = (
        "×: ratio to one array that backprop reads in both directions, without mirroring before training"
    )
    return table


def energy_rows(counted: dict[str, dict[str, ArrayCounts]], costs: Costs) -> list[list[str]]:
    """Return a heading, and a row for each rule: energy by phase and area, over one array's."""
    rows = [["rule", *(f"{phase}, µJ" for phase in PHASES), "sum, µJ", "×", "mm²", "×"]]
    for rule, arrays in counted.items():
        one = arrays["one"]
        own = [counts for array, counts in arrays.items() if array != "one"]
        phases = [costs.energy_pj(sum((a.work.get(p, Work()) for a in own), Work())) for p in PHASES]
        energy, area = sum(phases), sum(map(costs.area_um2, own))
        told = [_short(value / 1e6) if value else MISSING for value in phases]
        times = [_over(energy, costs.energy_pj(one.total)), _over(area, costs.area_um2(one))]
        rows.append([rule, *told, _short(energy / 1e6), times[0], _short(area / 1e6), times[1]])
    return rows


def _over(value: float, other: float) -> str:
    return f"{value / other:.2f}" if other else MISSING


def _table(title: str, *columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=0, title=title)
    for number, column in enumerate(columns):
        is_number = number > 0 and column not in ("array", "phase")
        table.add_column(column, justify="right" if is_number else "left", overflow="fold")
    return table


def _short(value: float) -> str:
    """Print three digits, with thousands and millions as k and M."""
    size, unit = next(
        ((s, u) for s, u in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= 0.9995 * s), (1.0, "")
    )
    return f"{value / size:.3g}{unit}"
