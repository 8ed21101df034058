"""Ways of estimating W at equal cost: angle of B to W against what it takes; and `kh` on digits.

    python benchmarks/estimating_w.py            # measure, and print the table of docs/estimating-w.md
    python benchmarks/estimating_w.py --print    # print from the result file alone
    python benchmarks/doc_figures.py estimating-w.png

One layer of 100 inputs and 50 neurons, three seeds; about a minute and a half on one core.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

import feedbackpath as fp
from feedbackpath.mirror import MirrorMode
from feedbackpath.mirror.mode import fire_alike
from feedbackpath.mirror.readings import learn
from feedbackpath.report.parts import (
    PAGE_WIDTH,
    REFERENCE,
    draw_legend,
    key,
    line_looks,
    scale_log,
    write_letters,
)
from feedbackpath.report.scales import describe_flat
from feedbackpath.report.style import in_order, legend_label

RESULTS = Path(__file__).parent / "estimating-w" / "angles.json"
FIGURES = Path(__file__).parent.parent / "docs" / "figures"
INPUTS, NEURONS, SEEDS, BATCH = 100, 50, 3, 64
SIGMA, COMMON, DECAY = 0.5, 0.3, 1e-3
Point = dict[str, float]
COSTS = {"events": "values or spikes of each input", "products": "extra multiplications\nof each synapse"}
WIDE = {
    "wm": "samples",
    "wm-exact": "samples",
    "rdd": "spikes",
    "stdwi": "spikes",
    "pal": "samples",
    "kp": "samples",
}


def untie(rule: str | fp.Rule, seed: int) -> tuple[nn.Sequential, fp.FeedbackPath]:
    """Return a layer with a ReLU behind it, and its path."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(INPUTS, NEURONS, bias=False), nn.ReLU())
    return model, fp.untie(model, rule, seed=seed)


def now(path: fp.FeedbackPath, events: float, products: float) -> Point:
    """Return the angle, and what it has taken."""
    return {"angle_deg": path.matrix_angles()["0"], "events": events, "products": products}


def mirror(seed: int, settings: fp.Mirror, passes: int) -> Iterator[Point]:
    """Average passes of the weight mirror: each sample goes through W once, and once into the products."""
    _, path = untie("fa", seed)
    mode, (weight,) = path.context.part(MirrorMode), path.weights
    mode.find_activations(path.weights)
    for number, found in enumerate(fire_alike(mode, weight, settings, passes), 1):
        samples = number * found.num_samples
        learn(mode, found, settings, 1.0 / number)
        yield now(path, samples, 2 * samples)


def from_spikes(seed: int, rule: Any, passes: int) -> Iterator[Point]:
    """Average steps of a rule that learns from spikes: W and the products take each window, or time step."""
    _, path = untie(dataclasses.replace(rule, rate=1e-9), seed)
    (weight,), cells, spikes = path.weights, rule.cells, 0.0
    rows = cells.runs * (cells.steps if rule.name == "stdwi" else 1)
    for number in range(1, passes + 1):
        path.step()
        fired, _ = cells.fire((INPUTS,), weight.weight, path.context.generator(weight, rule.name))
        spikes += fired.sum().item() / INPUTS
        yield now(path, spikes, 2 * number * rows)


def riding(seed: int, passes: int) -> Iterator[Point]:
    """Average steps of PAL on minibatches of white data: the forward pass is training's own."""
    rule = fp.PhaselessAlignment(sigma=SIGMA)
    model, path = untie(rule, seed)
    for number in range(1, passes + 1):
        model(torch.randn(BATCH, INPUTS)).sum().backward()
        path.context.steps = number
        dataclasses.replace(rule, rate=1.0 / number).step(path.weights, path.context)
        yield now(path, number * BATCH, number * BATCH)


def following(seed: int, passes: int) -> Iterator[Point]:
    """Follow W by Kolen-Pollack, in a W that updates hold at its length; B adds each update, no more."""
    model, path = untie("kp", seed)
    weight = model[0].weight
    size = weight.std().item()
    with torch.no_grad():
        model[0].feedback.normal_(0.0, size)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=DECAY)
    for number in range(1, passes + 1):
        optimizer.zero_grad()
        answers = model[0](torch.randn(BATCH, INPUTS))
        (answers * torch.randn(BATCH, NEURONS)).sum().mul(size * math.sqrt(2 * DECAY / BATCH)).backward()
        optimizer.step()
        path.step()
        yield now(path, number * BATCH, number)


FLOOR = 1.0  # degrees, the lowest of the figure
THEORY: dict[str, Any] = REFERENCE | {"color": "black", "linestyle": ":", "linewidth": 0.9, "zorder": 3}


def methods() -> dict[str, Callable[[int], Iterator[Point]]]:
    """Return the ways of estimating W, by name: each yields points for a seed."""
    rdd, stdwi = fp.RegressionDiscontinuity(), fp.SpikeTimingWeightInference()
    known: dict[str, Callable[[int], Iterator[Point]]] = {
        "wm": lambda seed: mirror(seed, fp.Mirror(samples=BATCH), 1600),
        "wm-exact": lambda seed: mirror(seed, fp.Mirror(noise="hadamard"), 1),
        "rdd": lambda seed: from_spikes(seed, rdd, 300),
        "stdwi": lambda seed: from_spikes(seed, stdwi, 160),
        "pal": lambda seed: riding(seed, 1600),
        "kp": lambda seed: following(seed, 6000),
    }
    for rule, passes in ((rdd, 300), (stdwi, 160)):
        shared = dataclasses.replace(rule, cells=dataclasses.replace(rule.cells, common=COMMON))
        known[f"{rule.name}, common"] = lambda seed, rule=shared, passes=passes: from_spikes(
            seed, rule, passes
        )
    return known


def thinned(points: Iterator[Point]) -> list[Point]:
    """Keep points 1, 2, 3, 4, 6, 8, 11, ...: evenly spread on a logarithmic axis."""
    wanted = {round(2 ** (k / 2)) for k in range(30)}
    return [point for number, point in enumerate(points, 1) if number in wanted]


def theory(method: str, events: float) -> float | None:
    """Return the angle that is expected, in degrees; None: there is no closed form in sizes alone."""
    if method == "kp":  # W and B each hold e^-t of their start, and the same updates
        return math.degrees(math.acos(1.0 - math.exp(-2.0 * DECAY * events / BATCH)))
    needed = {
        "wm": (2.0 - 2.0 / math.pi) * (INPUTS + 1),
        "pal": INPUTS * (1.0 / SIGMA**2 + 1.0),
        "rdd": 4.0 * INPUTS * RDD["variance"] * RDD["spikes"] * (1.0 / RDD["above"] + 1.0 / RDD["below"]),
    }.get(method)
    return None if needed is None else math.degrees(math.atan(math.sqrt(needed / events)))


def rdd_windows() -> dict[str, float]:
    """Return what RDD's theory needs of one window: spikes, their variance, and shares near the threshold."""
    rule = dataclasses.replace(fp.RegressionDiscontinuity().cells, runs=20_000)
    spikes, peak = rule.fire((10,), torch.zeros(()), torch.Generator().manual_seed(0))
    off, counts = peak - rule.threshold, spikes.sum(0)
    shares = {"above": (off >= 0) & (off < 0.5), "below": (off < 0) & (off >= -0.5)}
    return {
        "spikes": counts.mean().item(),
        "variance": counts.var().item(),
        **{name: near.double().mean().item() for name, near in shares.items()},
    }


RDD = rdd_windows()


def learn_digits(rule: str, rate: float, seed: int) -> tuple[float, float]:
    """Train 64-100-10 on scikit-learn's digits for 30 epochs; return training and test error, %."""
    from sklearn.datasets import load_digits

    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images = (images / 16).float()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    path = fp.untie(model, rule, seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    for epoch in range(30):
        shuffled = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(epoch))]
        for batch in shuffled.split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            path.step()
    wrong = [
        100 * (model(images[part]).argmax(1) != labels[part]).float().mean().item() for part in (train, test)
    ]
    return wrong[0], wrong[1]


def compare_digits() -> dict[str, Any]:
    """Return test errors of three rules, each at the learning rate of lower training error."""
    chosen = {}
    for rule in ("bp", "fa", "kh"):
        found = {rate: [learn_digits(rule, rate, seed) for seed in range(SEEDS)] for rate in (0.1, 0.003)}
        rate = min(found, key=lambda rate, found=found: mean(training for training, _ in found[rate]))
        chosen[rule] = {"rate": rate, "errors": [error for _, error in found[rate]]}
    return chosen


def measure() -> dict[str, Any]:
    """Measure all; return what goes into the result file."""
    points = {name: [thinned(run(seed)) for seed in range(SEEDS)] for name, run in methods().items()}
    return {
        "layer": [INPUTS, NEURONS],
        "torch": torch.__version__,
        "points": points,
        "digits": compare_digits(),
    }


def draw_methods(points: dict[str, Any]) -> Figure:
    """Draw angles against events, against multiplications, and where cells have something in common."""
    figure = Figure(figsize=(PAGE_WIDTH, 3.3), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    methods = in_order(WIDE)
    for axes, cost in zip(panels[:2], COSTS, strict=True):
        for method in methods:
            draw_line(axes, method, points[method], cost)
    for method in methods:
        if theory(method, 1.0) is not None:
            costs = [point["events"] for point in points[method][0]]
            panels[0].plot(costs, [theory(method, cost) for cost in costs], **THEORY)
    for method in ("rdd", "stdwi"):
        draw_line(panels[2], method, points[f"{method}, common"], "events")
    labels = (*COSTS.values(), "spikes of each input, common drive")
    for axes, label, powers in zip(panels, labels, ((1, 6), (0, 6), (2, 5)), strict=True):
        scale_log(axes, "x", [10.0**power for power in range(powers[0], powers[1] + 1)], is_marked=False)
        axes.set_xlabel(f"{label}\nlog scale" if "\n" not in label else f"{label}, log scale")
    scale_log(panels[0], "y", (FLOOR, 3, 10, 30, 90))
    panels[0].set_ylabel("angle of B to W (°), log scale")
    write_letters(panels)
    draw_legend(
        figure, [*(key(legend_label(m), **line_looks(m)) for m in methods), key("theory (a)", **THEORY)], 3
    )
    return figure


def draw_line(axes: Axes, method: str, runs: list[list[Point]], cost: str) -> None:
    """Draw the mean over seeds of one method; what is below the axis is told."""
    costs = [mean(point[cost] for point in same) for same in zip(*runs, strict=True)]
    angles = [mean(point["angle_deg"] for point in same) for same in zip(*runs, strict=True)]
    if angles[0] < FLOOR:
        told = describe_flat(angles).removeprefix("all ").replace(" ", "\n")
        angles = [1.2 * FLOOR] * len(angles)
        axes.annotate(
            f"{told} ↓", (costs[0], angles[0]), (10, 4),
            textcoords="offset points", ha="right", fontsize=7,
        )  # fmt: skip
    elif angles[-1] < FLOOR:
        side, place = (1, "left") if cost == "products" else (-1, "right")
        last = max(index for index, angle in enumerate(angles) if angle >= FLOOR)
        axes.annotate(
            f"{angles[-1]:.1f}° ↓", (costs[last], angles[last]), (6 * side, 0),
            textcoords="offset points", ha=place, va="center", fontsize=7,
        )  # fmt: skip
    axes.plot(costs, angles, **line_looks(method))


def make_table(points: dict[str, Any]) -> str:
    """Return what each method takes to come within 30, 10 and 5 degrees."""
    lines = [
        "| rule | sends | within 30° | 10° | 5° | multiplications for 10° |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for method, sends in WIDE.items():
        cells = [reach(points[method], angle, "events") for angle in (30.0, 10.0, 5.0)]
        lines.append(
            f"| `{method}` | {sends} | {' | '.join(cells)} | {reach(points[method], 10.0, 'products')} |"
        )
    return "\n".join(lines) + "\n"


def reach(runs: list[list[Point]], angle_deg: float, cost: str) -> str:
    """Return the cost at which the mean angle first is below some degrees, between points by a power law."""
    before: tuple[float, float] | None = None
    for same in zip(*runs, strict=True):
        angle, paid = mean(point["angle_deg"] for point in same), mean(point[cost] for point in same)
        if angle <= angle_deg:
            if before is not None:
                share = math.log(before[0] / angle_deg) / math.log(before[0] / angle)
                paid = before[1] * (paid / before[1]) ** share
            digits = 10 ** max(0, math.floor(math.log10(paid)) - 1)
            return f"{round(paid / digits) * digits:,}"
        before = angle, paid
    return "–"


def main() -> None:
    """Measure, and print the table."""
    torch.set_num_threads(1)
    if "--print" not in sys.argv:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n")
    found = json.loads(RESULTS.read_text())
    print(make_table(found["points"]))
    for rule, run in found["digits"].items():
        print(f"digits, {rule}, lr {run['rate']}: {mean(run['errors']):.1f}% of {len(run['errors'])} seeds")


if __name__ == "__main__":
    main()
