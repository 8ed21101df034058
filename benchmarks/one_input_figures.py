"""Figures and table of the page on one noisy input, from the result files of `benchmarks/one_input.py`."""

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from feedbackpath.report.parts import (
    PAGE_WIDTH,
    REFERENCE,
    draw_legend,
    key,
    looks_of,
    scale_linear,
    write_letters,
)
from feedbackpath.report.style import choose_styles, in_order
from feedbackpath.train.results import Look

RESULTS = Path(__file__).parent / "one-input"
METHODS = {
    "one-input": "one input",
    "one-input-decorrelate": "one input, decorrelated",
    "wm": "layer by layer (wm)",
}
LOOKS = {
    "one-input": Look(colour="#999933"),
    "one-input-decorrelate": Look(colour="#882255"),
    "one-input-scaled": Look(colour="#44AA99"),
    "gaussian-mirror": Look(colour="#332288"),
}
NETWORKS = {
    ("resnet8", "after"): "ResNet-8, BatchNorm after ReLU",
    ("resnet8", "before"): "ResNet-8, before",
    ("resnet20", "after"): "ResNet-20, after",
    ("resnet20", "before"): "ResNet-20, before",
    ("mlp", "after"): "MLP, no BatchNorm",
}
IMAGES_A_PASS = 96
STYLES = choose_styles(in_order(METHODS), LOOKS)
STATES = {"start": "at the start", "trained": "trained"}
NETWORK_LOOKS = {"resnet8": ("ResNet-8", "o"), "resnet20": ("ResNet-20", "s"), "mlp": ("MLP", "^")}
Found = dict[str, Any]


def select(measured: Iterable[Found], **wanted: Any) -> list[Found]:
    """Return what was measured under some conditions, with the most noise that was fired there."""
    chosen = [found for found in measured if wanted.items() <= found.items()]
    most = max(found["passes"] for found in chosen)
    return [found for found in chosen if found["passes"] == most]


def mean_by_layer(found: Iterable[Found], quantity: str) -> dict[str, float]:
    """Return the mean of a quantity over seeds, by layer."""
    runs = [run[quantity] for run in found]
    return {name: mean(run[name] for run in runs) for name in runs[0]}


def draw_angles(measured: list[Found]) -> Figure:
    """Draw angles by layer of the deeper network, and what the inputs' covariance says of them."""
    figure = Figure(figsize=(PAGE_WIDTH, 3.1), layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharey=True)
    here = [found for found in measured if (found["network"], found["norm"]) == ("resnet20", "after")]
    draw_by_layer(left, here, "matrix_angle_deg")
    draw_by_layer(middle, here, "delta_angle_deg")
    left.set_ylabel("matrix angle (°)")
    middle.set_ylabel("δ angle (°)")
    draw_against_inputs(right, measured)
    scale_linear(left, "y", (0, 90), 15)
    write_letters((left, middle, right))
    keys = [
        key(f"{METHODS[method]}, {name}", **looks(method, state))
        for method in in_order(METHODS)
        for state, name in STATES.items()
    ]
    draw_legend(figure, keys, 3)
    return figure


def looks(method: str, state: str) -> Found:
    """Return how a way of mirroring is drawn: filled marks at the start, hollow ones after training."""
    style = STYLES[method]
    return looks_of(style) | {
        "linestyle": "-" if state == "start" else "--",
        "markerfacecolor": style.colour if state == "start" else "white",
    }


def draw_by_layer(axes: Axes, measured: list[Found], quantity: str) -> None:
    """Draw one line for each way of mirroring, in each state."""
    for method in in_order(METHODS):
        for state in STATES:
            values = list(mean_by_layer(select(measured, method=method, state=state), quantity).values())
            axes.plot(range(1, len(values) + 1), values, **looks(method, state))
    axes.set(xlabel="layer of ResNet-20", xticks=(1, 5, 10, 15, 20))


def draw_against_inputs(axes: Axes, measured: list[Found]) -> None:
    """Draw each layer's matrix angle against how far its inputs are from white."""
    axes.plot((0, 90), (0, 90), **REFERENCE)
    for network, norm in NETWORKS:
        for state in STATES:
            found = select(measured, network=network, norm=norm, state=state, method="one-input", seed=0)[0]
            inputs = found["inputs"]
            own = looks("one-input", state) | {"marker": NETWORK_LOOKS[network][1], "linestyle": "none"}
            axes.plot(
                [inputs[name]["angle_to_white_deg"] for name in inputs],
                [found["matrix_angle_deg"][name] for name in inputs],
                **own | {"markeredgewidth": 0.7},
            )
    scale_linear(axes, "x", (0, 90), 15)
    axes.set(xlabel="angle of the inputs' C to white (°)", ylabel="matrix angle, one input (°)")
    keys = [
        key(name, color="#555555", marker=marker, linestyle="") for name, marker in NETWORK_LOOKS.values()
    ]
    draw_legend(axes, keys, 1, loc="upper left", handlelength=1)


def make_table(measured: list[Found]) -> str:
    """Return angles of the median and the worst layer, and the range of gains, by network."""
    lines = [
        "| network | noise | one input: angle | δ angle | gain | decorrelated: angle | δ angle | "
        "layer by layer: angle | δ angle |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (network, norm), name in NETWORKS.items():
        for state, state_name in STATES.items():
            cells: list[str] = []
            for method in METHODS:
                found = select(measured, network=network, norm=norm, state=state, method=method)
                cells += [describe_layers(found, q) for q in ("matrix_angle_deg", "delta_angle_deg")]
                if method == "one-input":
                    sizes = mean_by_layer(found, "gain").values()
                    cells.append(f"{min(sizes):.1f}…{max(sizes):.1f}")
            images = found[0]["passes"] * IMAGES_A_PASS
            lines.append(f"| {name}, {state_name} | {images:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def describe_layers(found: list[Found], quantity: str) -> str:
    """Return a quantity of the median and of the worst layer, in degrees."""
    values = mean_by_layer(found, quantity).values()
    return f"{median(values):.0f}°, {max(values):.0f}°"


def main() -> None:
    """Print the table."""
    print(make_table(json.loads((RESULTS / "angles.json").read_text())["measured"]))


if __name__ == "__main__":
    main()
