"""Kolen-Pollack's balance of decay and rate, and how sensitive it and the mirror are to their settings.

Akrout et al. 2019, Section 7: "A big lambda speeds up alignment, but may hamper learning", and "more tests
are needed to assess the two mechanisms' [...] sensitivity to hyperparameters".

`python benchmarks/balance.py balance` trains a fully connected network on digits over decay, learning rate,
depth, norm, start of B and optimizer; `... falling` compares a constant decay with one that falls with time;
`... kp` and `... wm` map the two mechanisms' settings. Each cell is kept as it ends, in
`benchmarks/balance/`; broken off, the same command goes on. `balance_page.py` has the figures and the table
of docs/balance.md.
"""

import argparse
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cells import Cell, run_cells
from torch import nn

import feedbackpath as fp
from feedbackpath.data import load_dataset, minibatches

OUT = Path(__file__).parent / "balance"
DEFAULTS: Cell = {
    "rule": "kp", "depth": 2, "norm": "none", "optimizer": "sgd", "lr": 0.1, "weight_decay": 1e-3,
    "momentum": 0.9, "start": 1.0, "epochs": 20, "seed": 0,
}  # fmt: skip
FALLING: Cell = {"power": 3}  # of the share of the run that is left, in a decay that falls with time
MIRROR: Cell = {"rule": "wm", "rate": 0.1, "decay": 0.5, "sigma": 1.0, "samples": 64, "every": 1}
WIDTH, BATCH, DEPTHS = 128, 64, (2, 6)


def cells_of(part: str, seeds: int) -> Iterator[Cell]:
    """Yield the settings of a part's cells, seed by seed."""
    for seed in range(seeds):
        for changes in GRIDS[part]():
            yield {**DEFAULTS, **changes, "seed": seed}


def _grid(**axes: Sequence[Any]) -> list[Cell]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _balance() -> list[Cell]:
    sgd = {"lr": (0.03, 0.2), "weight_decay": (0.0, 1e-4, 1e-3, 5e-3, 1e-2, 3e-2, 1e-1)}
    adamw = {"optimizer": ("adamw",), "lr": (3e-3,), "weight_decay": (0.01, 0.1, 1.0, 5.0, 10.0)}
    cells = []
    for depth, norm in itertools.product(DEPTHS, ("none", "batchnorm")):
        for settings in (sgd, adamw):
            shape = {"depth": (depth,), "norm": (norm,), **settings}
            cells += _grid(rule=("bp", "mirror-kp"), **shape) + _grid(rule=("kp",), start=(1.0, 0.0), **shape)
    return cells


def _falling() -> list[Cell]:
    rates = {0.03: (0.03, 0.1, 0.3), 0.2: (0.01, 0.03, 0.1)}
    return [
        {"lr": lr, "rule": rule, "norm": norm, "weight_decay": decay, **falling}
        for lr, decays in rates.items()
        for falling in ({}, FALLING)
        for rule, norm, decay in itertools.product(("bp", "kp"), ("none", "batchnorm"), decays)
    ]


def _kp() -> list[Cell]:
    rates = {"lr": (0.01, 0.03, 0.1, 0.3, 1.0), "weight_decay": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)}
    momenta = {"momentum": (0.0, 0.5, 0.9, 0.97)}
    control = _grid(rule=("bp",), **rates) + _grid(rule=("bp",), **momenta)
    return _grid(**rates) + _grid(**momenta, start=(0.0, 0.3, 1.0, 3.0, 10.0)) + control


def _wm() -> list[Cell]:
    cells = _grid(rate=(0.01, 0.03, 0.1, 0.3, 1.0), decay=(0.1, 0.25, 0.5, 1.0, 2.0))
    cells += _grid(sigma=(0.03, 0.1, 0.3, 1.0, 3.0), samples=(8, 16, 64, 256))
    cells += _grid(every=(1, 3, 10, 30, 100), lr=(0.01, 0.03, 0.1, 0.3))
    whole = [{**MIRROR, **cell} for cell in cells]
    return [cell for cell in whole if cell["rate"] * cell["decay"] <= 1.0]  # more than all of B cannot go


GRIDS = {"balance": _balance, "falling": _falling, "kp": _kp, "wm": _wm}


@functools.cache
def digits() -> Any:
    """Return the digits."""
    return load_dataset("digits")


def make_network(settings: Cell) -> nn.Sequential:
    """Make ``depth`` hidden layers of ReLUs, each with or without a BatchNorm in front of them."""
    torch.manual_seed(settings["seed"])
    sizes = [64, *[WIDTH] * settings["depth"]]
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [
            nn.Linear(inputs, outputs),
            *([nn.BatchNorm1d(outputs)] * (settings["norm"] == "batchnorm")),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


def make_rule(settings: Cell) -> str | fp.Rule:
    """Return the rule; the mirror reads with the decay inside the rate, as in the paper."""
    if settings["rule"] != "wm":
        return str(settings["rule"])
    told = {name: settings[name] for name in ("rate", "decay", "sigma", "samples")}
    return fp.WeightMirror(fp.Mirror(reading="inside", when=fp.When(every=settings["every"]), **told))


def make_optimizer(model: nn.Module, settings: Cell) -> torch.optim.Optimizer:
    """Make SGD with momentum, or AdamW."""
    told = {"lr": settings["lr"], "weight_decay": settings["weight_decay"]}
    learning = [p for p in model.parameters() if p.requires_grad]
    if settings["optimizer"] == "adamw":
        return torch.optim.AdamW(learning, **told)
    return torch.optim.SGD(learning, momentum=settings["momentum"], **told)


def steps_of(settings: Cell) -> int:
    """Return the steps of a run; a last minibatch of one sample is left out."""
    return int(settings["epochs"] * math.ceil((len(digits().train) - 1) / BATCH))


def schedule(settings: Cell, steps: int) -> list[tuple[float, float]]:
    """Return each step's learning rate and decay: a half cosine, and a constant or a falling one.

    A decay that falls has the sum of lr wd of the constant one::

        lr_t = lr (1 + cos(pi t / T)) / 2
        wd_t = wd s_t (sum of lr_t) / (sum of lr_t s_t)        s_t = (1 - t / T)^power

    Example:
        >>> falls = schedule({"lr": 1.0, "weight_decay": 0.5, "power": 3}, 100)
        >>> round(sum(lr * decay for lr, decay in falls) / sum(lr for lr, _ in falls), 6)
        0.5
    """
    rates = [settings["lr"] * 0.5 * (1.0 + math.cos(math.pi * done / steps)) for done in range(steps)]
    shares = [(1.0 - done / steps) ** settings.get("power", 0) for done in range(steps)]
    scale = sum(rates) / sum(rate * share for rate, share in zip(rates, shares, strict=True))
    return [
        (rate, settings["weight_decay"] * share * scale) for rate, share in zip(rates, shares, strict=True)
    ]


def exact_efolds(plan: Sequence[tuple[float, float]], momentum: float) -> float:
    """Return by how many e-folds SGD with momentum divides W - B, without the approximation of the sum.

    ``v <- momentum v + wd d`` and ``d <- d - lr v`` for each step's learning rate and decay, from d = 1. The
    sum of lr wd / (1 - momentum) is its first order; it holds while lr wd is well below
    (1 - sqrt(momentum))^2. Beyond, d oscillates, and a step divides it by 1 / sqrt(momentum) at most.

    Example:
        >>> round(exact_efolds([(0.01, 0.01)] * 1000, 0.9), 2)  # the sum has 1
        1.0
        >>> round(exact_efolds([(0.1, 0.1)] * 100, 0.9), 2)  # the sum has 10
        5.94
    """
    difference, velocity, most = 1.0, 0.0, 0.0
    for rate, decay in plan:
        velocity = momentum * velocity + decay * difference
        difference -= rate * velocity
        most = max(abs(difference), 0.9 * most)  # of an oscillation, not where it crosses 0
    return -math.log(most)


def measure(settings: Cell) -> Cell:
    """Train once; return the error in percent, angles in degrees, and what theory says of them."""
    data, model = digits(), make_network(settings)
    path = fp.untie(model, make_rule(settings), seed=settings["seed"])
    if settings["rule"] == "kp":
        with torch.no_grad():
            for _, _, b in path.pairs():
                b.mul_(settings["start"])
    first = {name: (float(w.detach().norm()), float(b.detach().norm())) for name, w, b in path.pairs()}
    optimizer, worst = make_optimizer(model, settings), 0.0
    if path.mirrors:
        path.mirror()
    plan = schedule(settings, steps_of(settings))
    momentum = settings["momentum"] if settings["optimizer"] == "sgd" else 0.0
    planned = iter(plan)
    for epoch in range(1, settings["epochs"] + 1):
        model.train()
        for x, y in minibatches(
            data.train, batch_size=BATCH, seed=settings["seed"], epoch=epoch, shuffle=True
        ):
            rate, decay = next(planned)
            for group in optimizer.param_groups:
                group["lr"], group["weight_decay"] = rate, decay
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data.train.prepare(x)), y)
            if not math.isfinite(float(loss.detach())):
                return {"diverged": True}
            loss.backward()
            optimizer.step()
            path.step()
        worst = max(worst, largest_angle(path))
    gains, efolds = path.gains(), sum(rate * decay for rate, decay in plan) / (1.0 - momentum)
    found = {"error": error_of(model, data), "worst": worst, "last": largest_angle(path), "efolds": efolds}
    found |= {"least_gain": min(gains.values()), "most_gain": max(gains.values())}
    if settings["rule"] == "kp":
        found["predicted"] = max(
            predict_angle(exact_efolds(plan, momentum), float(w.detach().norm()), *first[name])
            for name, w, _ in path.pairs()
        )
    return {name: round(value, 4) for name, value in found.items()}


def largest_angle(path: fp.FeedbackPath) -> float:
    """Return the largest angle between a B and its W, in degrees; a B that is still 0 counts as 90."""
    return max(90.0 if math.isnan(angle) else angle for angle in path.matrix_angles().values())


@torch.no_grad()
def error_of(model: nn.Module, data: Any) -> float:
    """Return the test error in percent."""
    model.eval()
    wrong = 0.0
    for x, y in minibatches(data.test, batch_size=500, seed=0, epoch=0, shuffle=False):
        wrong += float((model(data.test.prepare(x)).argmax(1) != y).sum())
    return 100.0 * wrong / len(data.test)


def predict_angle(efolds: float, w: float, w_first: float, b_first: float) -> float:
    """Return the angle that theory leaves between B and W, in degrees.

    With k e-folds W - B is e^-k (W0 - B0). W holds e^-k W0 and what it has learned, which B holds as well;
    taken for independent of W0 and B0, that gives both products from the norms alone::

        <B, W> = |W|^2 - e^-2k |W0|^2        |B|^2 = |W|^2 - e^-2k (|W0|^2 - |B0|^2)

    Example:
        >>> round(predict_angle(0.0, 1.0, 1.0, 1.0)), round(predict_angle(9.0, 1.0, 1.0, 1.0))
        (90, 0)
    """
    left = math.exp(-2.0 * efolds)
    product, square = w**2 - left * w_first**2, w**2 - left * (w_first**2 - b_first**2)
    if square <= 0.0 or w == 0.0:
        return 90.0
    return math.degrees(math.acos(min(1.0, max(-1.0, product / (w * math.sqrt(square))))))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return what was asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", choices=GRIDS)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each cell (3)")
    parser.add_argument("--at-most", type=int, default=None, help="stop after so many new cells (all)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of result files")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing of a part."""
    asked = parse(argv)
    torch.set_num_threads(1)
    command = f"python benchmarks/balance.py {asked.part} --seeds {asked.seeds}"
    cells = cells_of(asked.part, asked.seeds)
    run_cells(asked.out / f"{asked.part}.json", command, cells, measure, asked.at_most)


if __name__ == "__main__":
    main()
