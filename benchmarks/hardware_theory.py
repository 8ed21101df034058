"""Theory of imperfect arrays beside measurement: `docs/figures/hardware-theory.png`.

    python benchmarks/hardware_theory.py            # measure
    python benchmarks/hardware_theory.py floor      # measure one of noise, contraction, floor, mirror anew
    python benchmarks/doc_figures.py hardware-theory.png

A network 20-40-20-5 learns a random teacher's classes; single arrays and layers stand beside it. Four minutes
on one core.
"""

import dataclasses
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import feedbackpath as fp
from feedbackpath.hardware import theory
from feedbackpath.mirror.noise import RELU_SPREAD
from feedbackpath.report.parts import PAGE_WIDTH, scale_linear, scale_log, write_letters

RESULTS = Path(__file__).parent / "hardware-theory" / "theory.json"
WIDTHS = (20, 40, 20, 5)
LR, BATCH = 0.1, 64
Found = dict[str, Any]


class Network:
    """A network on a chip that learns by Kolen-Pollack.

    Args:
        chip: The chip.
        weight_decay: Of the optimizer.
        momentum: Of the optimizer.
        is_alike: Whether B begins as W, in place of random.

    Attributes:
        asked: By array, the sum of the sizes of all changes of each cell.
        missed: Sum of the squares of what writes missed, and the number of cells that were written.
    """

    def __init__(
        self, chip: fp.Chip, weight_decay: float, momentum: float = 0.0, *, is_alike: bool = False
    ) -> None:
        torch.manual_seed(0)
        layers = [
            part for n, m in zip(WIDTHS, WIDTHS[1:], strict=False) for part in (nn.Linear(n, m), nn.ReLU())
        ]
        self.model = nn.Sequential(*layers[:-1])
        self.path = fp.untie(self.model, "kp", chip=chip)
        if is_alike:
            for _, w, b in self.path.pairs():
                b.data.copy_(w.data)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), LR, momentum=momentum, weight_decay=weight_decay
        )
        chip.attach(self.optimizer)
        self.arrays = [array for weight in self.path.weights for array in chip.arrays_of(weight)]
        self.asked = {(one.weight.name, one.side): torch.zeros_like(one.values) for one in self.arrays}
        self.missed = [0.0, 0]
        self.teacher = torch.randn(WIDTHS[-1], WIDTHS[0])

    def train(self, steps: int) -> None:
        """Learn, and note what writes were asked and what they missed."""
        for _ in range(steps):
            x = torch.randn(BATCH, WIDTHS[0])
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(x), (x @ self.teacher.T).argmax(1)).backward()
            self.optimizer.step()
            self.path.step()

    def gaps(self) -> list[Tensor]:
        """Return W - B of every layer."""
        return [(w - b).detach() for _, w, b in self.path.pairs()]


def watched(network: Network) -> Network:
    """Let a network note each write: the chip's devices are asked through this."""
    for array in network.arrays:
        plain, key = array.device, (array.weight.name, array.side)

        def write(
            w: Tensor, asked: Tensor, cells: Any, generator: Any, plain: Any = plain, key: Any = key
        ) -> Tensor:
            new = type(plain).write(plain, w, asked, cells, generator)
            network.asked[key] += asked.abs()
            network.missed[0] += float((new - w - asked).square().sum())
            network.missed[1] += w.numel()
            return new

        array.device = dataclasses.replace(plain)
        object.__setattr__(array.device, "write", write)
    return network


def measure_noise() -> list[Found]:
    """Let W and B, alike at first, drift apart by the noise of writes; return variances of W - B."""
    settings = {
        "one side": (0.1, 0.0, fp.devices.LinearStep, 1),
        "both sides": (0.1, 0.0, fp.devices.LinearStep, 2),
        "both, momentum 0.9": (0.01, 0.9, fp.devices.LinearStep, 2),
        "both, λ a third": (0.03, 0.0, fp.devices.LinearStep, 2),
        "both, soft bounds": (0.03, 0.0, fp.devices.SoftBounds, 2),
    }
    found = []
    for name, (decay, momentum, kind, sides) in settings.items():
        shrink = LR * decay / (1.0 - momentum)
        for step in (0.003, 0.01, 0.03, 0.1, 0.3):
            other = fp.devices.Ideal() if sides == 1 else None
            chip = fp.Chip(kind(step=step), feedback_device=other)
            network = watched(Network(chip, decay, momentum, is_alike=True))
            network.train(round(max(1000, 3 / shrink)))  # until learning, and with it the noise, has settled
            network.missed, variances = [0.0, 0], []
            for asked in network.asked.values():
                asked.zero_()
            for _ in range(10):  # the mean over a time in which the gap forgets
                network.train(round(0.2 / shrink))
                variances.append(float(torch.cat([gap.flatten() for gap in network.gaps()]).square().mean()))
            noise = math.sqrt(network.missed[0] / network.missed[1])
            written = float(sum(asked.sum() for asked in network.asked.values())) / network.missed[1]
            found.append({"series": name, "step": step, "noise": noise, "variance": sum(variances) / 10,
                          "shrink": shrink, "sides": sides, "written": written})  # fmt: skip
    return found


def measure_contraction() -> list[Found]:
    """Follow W - B from a random B, without weight decay; return its size by what cells have written."""
    found = []
    for bound in (0.5, 1.0, 2.0):
        network = watched(Network(fp.Chip(fp.devices.SoftBounds(step=5e-4, bound=bound)), 0.0))
        start = network.gaps()
        for _ in range(8):
            network.train(300)
            for number, (weight, first, gap) in enumerate(
                zip(network.path.weights, start, network.gaps(), strict=True)
            ):
                written = 0.5 * sum(network.asked[weight.name, side] for side in ("forward", "feedback"))
                found += _by_cell(bound, number, written / bound, first, gap)
    return found


def _by_cell(bound: float, layer: int, written: Tensor, first: Tensor, gap: Tensor) -> Iterator[Found]:
    """Yield a whole layer (part 0), and its cells in fifths by what they have written, from the least."""
    order = written.flatten().argsort()
    for part, chosen in enumerate([order, *order.tensor_split(5)]):
        left = gap.flatten()[chosen].norm() / first.flatten()[chosen].norm()
        wrote = float(written.flatten()[chosen].mean())
        yield {"bound": bound, "layer": layer, "part": part, "written": wrote, "left": float(left)}


def measure_floor() -> list[Found]:
    """Let cells with asymmetries of their own be written up and down; return what is left of W - B."""
    found = []
    for spread in (0.03, 0.06, 0.1, 0.2, 0.4, 0.8):
        device = fp.devices.SoftBounds(step=1e-3, asymmetry_spread=spread)
        random = torch.Generator().manual_seed(0)
        w = [torch.zeros(100, 100), torch.zeros(100, 100)]
        cells = [device.draw(one, random) for one in w]
        for _ in range(300):  # ups and downs of 0.02 in turn: 6 bounds written
            sign = torch.empty(100, 100).bernoulli_(0.5, generator=random).mul_(2).sub_(1)
            for asked in (0.02 * sign, -0.02 * sign):
                w = [device.write(one, asked, own, random) for one, own in zip(w, cells, strict=True)]
        found.append({"series": "arrays", "spread": spread, "left": float((w[0] - w[1]).std())})
        network = Network(fp.Chip(device), 0.0, is_alike=True)
        network.train(3000)
        left = torch.cat([gap.flatten() for gap in network.gaps()]).std()
        found.append({"series": "network", "spread": spread, "left": float(left)})
    return found


def measure_mirror() -> list[Found]:
    """Mirror one layer of 64 inputs once, its answers read with noise; return the angle of B and W."""
    found = []
    for samples in (512, 2048, 8192):
        for noise in (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0):
            for activation in ("linear", "ReLU"):
                torch.manual_seed(0)
                layers = [nn.Linear(64, 64, bias=False), nn.ReLU()]
                model = nn.Sequential(*layers[: 1 + (activation == "ReLU")])
                rule = fp.WeightMirror(fp.Mirror(samples=samples))
                path = fp.untie(model, rule, chip=fp.Chip(read={"mirror": fp.Read(noise=noise)}))
                path.mirror(steps=1)
                found.append({"series": activation, "samples": samples, "noise": noise,
                              "angle_deg": path.matrix_angles()["0"]})  # fmt: skip
    return found


PARTS: dict[str, Callable[[], list[Found]]] = {
    "noise": measure_noise,
    "contraction": measure_contraction,
    "floor": measure_floor,
    "mirror": measure_mirror,
}


# The figure

INDIGO, WINE, TEAL = "#332288", "#882255", "#44AA99"  # none is a rule's
GREY = "0.35"


def draw(found: dict[str, list[Found]]) -> Figure:
    """Draw each theory as a line over what was measured, as points."""
    figure = Figure(figsize=(PAGE_WIDTH, 5.6), layout="constrained")
    panels = figure.subplots(2, 2)
    write_letters(panels.flat)
    for axes, part in zip(panels.flat, DRAWN, strict=True):
        DRAWN[part](axes, found[part])
        axes.set_title(TITLES[part])
        axes.legend(loc=PLACES[part], frameon=False, handletextpad=0.4, borderaxespad=0.2, labelspacing=0.3)
    return figure


def _points(
    axes: Axes, x: list[float], y: list[float], colour: str, marker: str, label: str, **more: Any
) -> None:
    axes.plot(x, y, marker, color=colour, label=label, markersize=4, markeredgewidth=0.9, **more)


def draw_noise(axes: Axes, cells: list[Found]) -> None:
    """Draw the variance of W - B against the noise of a write."""
    looks = {
        "both, λ a third": (TEAL, "^", "both arrays, λ = 0.003", {}),
        "both, soft bounds": (TEAL, "v", "the same, soft bounds", {"fillstyle": "none"}),
        "both sides": (INDIGO, "o", "both arrays, λ = 0.01", {}),
        "both, momentum 0.9": (INDIGO, "D", "the same, momentum 0.9", {"fillstyle": "none"}),
        "one side": (WINE, "s", "one array, λ = 0.01", {}),
    }
    for series, (colour, marker, label, more) in looks.items():
        own = [cell for cell in cells if cell["series"] == series]
        _points(axes, [c["noise"] for c in own], [c["variance"] for c in own], colour, marker, label, **more)
    noises = [10 ** (-3.7 + 0.1 * k) for k in range(28)]
    for shrink, sides, colour in ((0.003, 2, TEAL), (0.01, 2, INDIGO), (0.01, 1, WINE)):
        lines = [theory.gap_variance(s, 1.0, shrink, sides=sides) for s in noises]
        axes.plot(noises, lines, color=colour, linewidth=0.8, zorder=1)
    scale_log(axes, "x", (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1))
    scale_log(axes, "y", [10.0**power for power in range(-5, 1)])
    axes.set(xlabel="noise of a write, s (units of weight), log scale", ylabel="variance of W − B, log scale")


def draw_contraction(axes: Axes, cells: list[Found]) -> None:
    """Draw what is left of W - B against what was written, in bounds."""
    for bound, colour, marker in ((0.5, INDIGO, "o"), (1.0, WINE, "s"), (2.0, TEAL, "^")):
        for is_least in (False, True):
            own = [c for c in cells if c["bound"] == bound and c["part"] and (c["part"] == 1) == is_least]
            _points(axes, [c["written"] for c in own], [c["left"] for c in own], colour, marker,
                    "_" if is_least else f"bound {bound:g}", fillstyle="none" if is_least else "full",
                    alpha=0.7)  # fmt: skip
    _points(axes, [], [], GREY, "o", "cells that write least", fillstyle="none")
    whole = [cell for cell in cells if cell["part"] == 0]
    _points(axes, [c["written"] for c in whole], [c["left"] for c in whole], GREY, "x", "whole layers")
    written = [0.05 * k for k in range(131)]
    axes.plot(written, [theory.soft_contraction(w, 1.0) for w in written], color="black", linewidth=0.9,
              label="theory")  # fmt: skip
    scale_linear(axes, "x", (0, 6), 1)
    scale_log(axes, "y", (0.003, 0.01, 0.03, 0.1, 0.3, 1))
    axes.set(
        xlabel="written changes of a weight (in bounds)", ylabel="size of W − B over its start, log scale"
    )


def draw_floor(axes: Axes, cells: list[Found]) -> None:
    """Draw the spread of W - B against the spread of up and of down pulses."""
    for series, colour, marker, label in (
        ("arrays", INDIGO, "o", "arrays, ups and downs in turn"),
        ("network", WINE, "s", "network, 3,000 steps"),
    ):
        own = [cell for cell in cells if cell["series"] == series]
        _points(axes, [c["spread"] for c in own], [c["left"] for c in own], colour, marker, label)
    spreads = [0.01, 1.0]
    floor = [math.sqrt(2.0) * theory.symmetry_spread(1.0, spread) for spread in spreads]
    axes.plot(spreads, floor, color="black", linewidth=0.9, label="theory")
    scale_log(axes, "x", (0.01, 0.03, 0.1, 0.3, 1))
    scale_log(axes, "y", (0.01, 0.03, 0.1, 0.3, 1))
    axes.set(
        xlabel="spread of up and of down pulses, log scale", ylabel="spread of W − B (in bounds), log scale"
    )


def draw_mirror(axes: Axes, cells: list[Found]) -> None:
    """Draw the angle of B and W against the noise of reads."""
    least = 0.05  # where noise 0 is drawn
    noises = [least * 10 ** (0.05 * k) for k in range(47)]
    for samples, colour in ((512, INDIGO), (2048, WINE), (8192, TEAL)):
        for series, filled, spread in (("linear", "full", 1.0), ("ReLU", "none", RELU_SPREAD)):
            own = [c for c in cells if c["samples"] == samples and c["series"] == series]
            _points(axes, [max(least, c["noise"]) for c in own], [c["angle_deg"] for c in own], colour, "o",
                    f"N = {samples:,}" if series == "linear" else "_", fillstyle=filled)  # fmt: skip
            angles = [theory.mirror_angle_deg(64, samples, noise, spread) for noise in noises]
            axes.plot(noises, angles, color=colour, linewidth=0.8, zorder=1,
                      linestyle="-" if series == "linear" else "--")  # fmt: skip
    _points(axes, [], [], GREY, "o", "open, dashed: behind a ReLU", fillstyle="none", linestyle="--")
    scale_log(axes, "x", (least, 0.1, 1, 10), is_marked=False)
    axes.set_xticks(axes.get_xticks(), ["0", "0.1", "1", "10"])
    axes.text(
        0.07, 0, "//", transform=axes.get_xaxis_transform(), ha="center", va="center"
    )  # 0 is not to scale
    scale_linear(axes, "y", (0, 90), 15)
    axes.set(xlabel="noise of reads (over the answers' rms), log scale", ylabel="angle of B and W (°)")


TITLES = {
    "noise": "noise of writes",
    "contraction": "soft bounds, no weight decay",
    "floor": "spread of the asymmetry",
    "mirror": "mirror, 64 inputs, N samples",
}
PLACES = {"noise": "lower right", "contraction": "lower left", "floor": "upper left", "mirror": "upper left"}
DRAWN: dict[str, Callable[[Axes, list[Found]], None]] = {
    "noise": draw_noise, "contraction": draw_contraction, "floor": draw_floor, "mirror": draw_mirror,
}  # fmt: skip


def main() -> None:
    """Measure what was asked for."""
    torch.set_num_threads(1)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in sys.argv[1:] or PARTS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Kolen-Pollack without weight decay is what is measured
            found |= {"torch": torch.__version__, name: PARTS[name]()}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
