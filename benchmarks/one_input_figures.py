"""Figures and table of the page on one noisy input, from the result files of `benchmarks/one_input.py`."""

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, median
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from feedbackpath.report.figures import render_figures
from feedbackpath.report.panels import make_panel
from feedbackpath.report.parts import FIGURE_STYLE, PAGE_WIDTH
from feedbackpath.report.style import in_order, style_of
from feedbackpath.train.results import read_results

RESULTS = Path(__file__).parent / "one-input"
FIGURES = Path(__file__).parent.parent / "docs" / "figures"
METHODS = {
    "one-input": "one input",
    "one-input-decorrelate": "one input, decorrelated",
    "wm": "layer by layer",
}
NETWORKS = {
    ("resnet8", "after"): "ResNet-8, BatchNorm after ReLU",
    ("resnet8", "before"): "ResNet-8, before",
    ("resnet20", "after"): "ResNet-20, after",
    ("resnet20", "before"): "ResNet-20, before",
    ("mlp", "after"): "MLP, no BatchNorm",
}
IMAGES_A_PASS = 96
STATES = {"start": "at the start", "trained": "trained"}
NETWORK_MARKERS = {"resnet8": "o", "resnet20": "s", "mlp": "^"}
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
    figure = Figure(figsize=(PAGE_WIDTH, 2.9), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    here = [found for found in measured if (found["network"], found["norm"]) == ("resnet20", "after")]
    for axes, quantity, label in (
        (left, "matrix_angle_deg", "matrix angle (°)"),
        (middle, "delta_angle_deg", "δ angle (°)"),
    ):
        draw_by_layer(axes, here, quantity)
        axes.set_xlabel("layer of ResNet-20")
        axes.set_ylabel(label)
    right.sharey(left)
    draw_against_inputs(right, measured)
    for axes, letter in zip((left, middle, right), "abc", strict=True):
        axes.set_title(letter, loc="left", fontweight="bold")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    return figure


def draw_by_layer(axes: Axes, measured: list[Found], quantity: str) -> None:
    """Draw one line for each way of mirroring, filled marks at the start and hollow ones after training."""
    for method in in_order(METHODS):
        name, style = METHODS[method], style_of(method)
        for state, state_name in STATES.items():
            values = list(mean_by_layer(select(measured, method=method, state=state), quantity).values())
            axes.plot(
                range(1, len(values) + 1), values, color=style.colour, marker=style.marker,
                linestyle="-" if state == "start" else "--",
                markerfacecolor=style.colour if state == "start" else "white",
                label=f"{name}, {state_name}",
            )  # fmt: skip
    axes.set_ylim(-4, 95)
    axes.set_yticks((0, 15, 30, 45, 60, 75, 90))


def draw_against_inputs(axes: Axes, measured: list[Found]) -> None:
    """Draw each layer's matrix angle against how far its inputs are from white."""
    axes.plot((0, 90), (0, 90), color="#888888", linewidth=0.8, linestyle=":")
    style = style_of("one-input")
    for network, norm in NETWORKS:
        for state in STATES:
            found = select(measured, network=network, norm=norm, state=state, method="one-input", seed=0)[0]
            inputs = found["inputs"]
            axes.plot(
                [inputs[name]["angle_to_white_deg"] for name in inputs],
                [found["matrix_angle_deg"][name] for name in inputs],
                linestyle="none", marker=NETWORK_MARKERS[network], color=style.colour,
                markerfacecolor=style.colour if state == "start" else "white",
                label=network if norm == "after" and state == "start" else None,
            )  # fmt: skip
    axes.set_xlim(-4, 95)
    axes.set_xticks((0, 15, 30, 45, 60, 75, 90))
    axes.set_xlabel("angle of the inputs' C to white (°)")
    axes.set_ylabel("matrix angle, one input (°)")
    axes.legend(frameon=False, loc="upper left")


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
    """Write the figures and print the table."""
    measured = json.loads((RESULTS / "angles.json").read_text())["measured"]
    with rc_context(FIGURE_STYLE):
        draw_angles(measured).savefig(FIGURES / "one-input-angles.png", dpi=300)
    panel = make_panel([("one-input", read_results(RESULTS))])
    (FIGURES / "one-input-learning_curves.png").write_bytes(render_figures([panel])["learning_curves.png"])
    print(make_table(measured))


if __name__ == "__main__":
    main()
