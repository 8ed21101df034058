"""Write the tables and the figure of benchmarks/step-cost/README.md anew: `python benchmarks/cost_page.py`.

They come from `step-cost/growth.json`, which `growth.py` writes, and from the cost model: ratios as measured,
what the model says of them, and extrapolations.
"""

import json
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from cost_model import Calibration, LayerSize, predict_ratio
from extrapolation import Training, add_every_rule, resnet50_on_32_devices, transformer_of_7_billion
from layer_sizes import measure_layers
from marked import with_quartiles
from old_names import name_now

from feedbackpath.bench.workloads import Workload

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "step-cost" / "growth.json"
PAGE = RESULTS.parent / "README.md"
TIME_SHARE = 0.05  # of a step's time, that a mirror takes at most if it keeps to its goal


def tables_of_cost(growth: Mapping[str, Any]) -> dict[str, str]:
    """Return every table of the page by its name, as Markdown.

    Args:
        growth: What ``growth.py`` found.
    """
    return {
        "calibration": table_of_calibration(growth),
        "growth": table_of_growth(growth),
        "model": table_of_model(growth),
        "resnet50": table_of_training(resnet50_on_32_devices()),
        "transformer": table_of_training(transformer_of_7_billion()),
    }


def table_of_growth(growth: Mapping[str, Any]) -> str:
    """Return measured ratios, medians and quartiles: a row a size, a column a rule."""
    rules = growth["settings"]["rules"]
    rows = [
        [*_name(axis, cell), str(cell["rounds"]), *(with_quartiles(cell["step"][rule], 3) for rule in rules)]
        for axis, cell in _cells(growth)
    ]
    return _table(["axis", "size", "rounds", *_codes(rules)], rows)


def table_of_calibration(growth: Mapping[str, Any]) -> str:
    """Return what a weight and a value were measured to add to a step."""
    rules, found = growth["settings"]["rules"], growth["calibration"]
    rows = [
        [f"a {kind} layer, µs", *(f"{by_rule[rule]:.0f}" for rule in rules)]
        for kind, by_rule in found["us_per_weight"].items()
    ]
    rows.append(["a value of W, ns", *(f"{found['ns_per_value'][rule]:.2f}" for rule in rules)])
    return _table(["added by", *_codes(rules)], rows)


def table_of_model(growth: Mapping[str, Any]) -> str:
    """Return predicted ratios, in parentheses by how many points the measured are above; and the errors."""
    rules = growth["settings"]["rules"]
    rows, errors = [], {rule: list[float]() for rule in rules}
    for axis, cell in _cells(growth):
        predicted = predict_cell(growth, cell)
        points = {rule: 100 * (cell["step"][rule]["median"] - predicted[rule]) for rule in rules}
        rows.append([*_name(axis, cell), *(f"{predicted[rule]:.3f} ({points[rule]:+.1f})" for rule in rules)])
        for rule in rules:
            errors[rule].append(abs(points[rule]))
    for label, summarise in (("median error, points", statistics.median), ("largest error, points", max)):
        rows.append([label, "", *(f"{summarise(errors[rule]):.1f}" for rule in rules)])
    return _table(["axis", "size", *_codes(rules)], rows)


def predict_cell(growth: Mapping[str, Any], cell: Mapping[str, Any]) -> dict[str, float]:
    """Return what the model says of one size, by rule."""
    layers = _layers(cell["model"], tuple(cell["sample_shape"]), cell["num_classes"])
    calibration = _read_calibration(growth["calibration"])
    return {
        rule: predict_ratio(rule, layers, cell["batch_size"], cell["plain_seconds"], calibration)
        for rule in growth["settings"]["rules"]
    }


@cache
def _layers(model: str, sample_shape: tuple[int, int, int], num_classes: int) -> Sequence[LayerSize]:
    return measure_layers(Workload(model, sample_shape, num_classes, batch_size=1))


def _read_calibration(found: Mapping[str, Any]) -> Calibration:
    rates = {
        kind: {rule: (1e-6 * us, 1e-9 * found["ns_per_value"][rule]) for rule, us in by_rule.items()}
        for kind, by_rule in found["us_per_weight"].items()
    }
    return Calibration(rates["dense"], rates["convolution"])


def table_of_training(training: Training) -> str:
    """Return what backprop takes there, and what each rule would add, in percent of it: a row a rule."""
    rows = []
    for rule, added in add_every_rule(training).items():
        is_mirror = rule.startswith("wm")
        rows.append([
            name_now(rule),
            _percent(added.flops),
            _percent(added.paper_flops) if added.paper_flops else "–",
            _percent(added.seconds),
            f"{math.ceil(added.seconds / TIME_SHARE)}" if is_mirror else "–",
            f"{_percent(added.memory)}, {added.num_bytes / 1e9:.2f} GB",
            f"{1 + added.traffic:.2f}",
            f"{1 + added.unshared_traffic:.2f}",
        ])  # fmt: skip
    header = [
        "rule", "FLOPs", "FLOPs by Appendix B", "time", "steps per pass, at 5%", "memory per device",
        "traffic / bp's", "if nothing were shared",
    ]  # fmt: skip
    return f"{_describe_training(training)}\n\n{_table(header, rows)}"


def _describe_training(training: Training) -> str:
    return (
        f"Backprop, a device and step: {training.flops / 1e12:,.1f} TFLOP, {training.seconds:.3g} s, "
        f"{training.memory / 1e9:.2f} GB of weights, gradients and optimizer state, "
        f"{training.traffic / 1e9:.2f} GB sent."
    )


def _percent(share: float) -> str:
    """Return a share in percent with two digits that mean something, or 0."""
    return f"+{100 * share:.2g}%" if share else "0"


def _cells(growth: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for axis, found in growth["growth"].items():
        for cell in found["cells"]:
            yield axis, cell


def _name(axis: str, cell: Mapping[str, Any]) -> list[str]:
    return [axis, f"{cell['size']} ({cell['model']}, batch {cell['batch_size']})"]


def _codes(rules: Iterable[str]) -> list[str]:
    return [f"`{name_now(rule)}`" for rule in rules]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def put_tables(page: str, tables: dict[str, str]) -> str:
    """Return the page with each table between its marks, `<!-- NAME:begin -->` and `<!-- NAME:end -->`."""
    for name, table in tables.items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        page, found = re.subn(f"(?s){begin}.*?{end}", lambda _, text=begin + table + end: text, page)
        if found != 1:
            raise ValueError(f"{PAGE} has {found} places for the table {name!r}, not one")
    return page


def main() -> None:
    """Read and write."""
    growth = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(put_tables(PAGE.read_text(encoding="utf-8"), tables_of_cost(growth)), encoding="utf-8")


if __name__ == "__main__":
    main()
