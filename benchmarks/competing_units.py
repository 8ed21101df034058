"""Competing hidden units on MNIST, trained as Krotov & Hopfield (2019) do it, for docs/estimating-w.md.

    python benchmarks/competing_units.py run --data-dir DIR --seeds 2     # goes on where it was broken off
    python benchmarks/competing_units.py page                             # the table of the page

A network 784-2000-10 on pixels from 0 to 1. Under `kh` hidden units compete for 55,000 images first, without
labels; then their weights stay as they are, and the read-out learns. `random` leaves hidden weights as they
are drawn. `bp` and `fa` train both layers. Seed 0 chooses among the settings of each by error on 5,000
validation images; test images are looked at with the chosen settings alone.

Under `kh` a read-out gets backprop's gradient, and what is below it does not change any more: so what the
read-out takes in is computed once.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from cost_page import put_tables
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import feedbackpath as fp
from feedbackpath.data import load_dataset
from feedbackpath.report.parts import PAGE_WIDTH

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "competing-units" / "mnist.json"
PAGE = ROOT / "docs" / "estimating-w.md"
WORK = Path("runs") / "competing-units"
PIXELS, HIDDEN, CLASSES, BATCH, SHOWN = 784, 2000, 10, 100, 40
COMPETITION = {"rate": 0.2, "p": 3.0, "k": 7, "delta": 0.4}
EPOCHS = {"competition": 20, "read-out": 8, "both layers": 4}
READ_OUTS = [{"n": n, "lr": lr} for n in (1.0, 3.0, 4.5) for lr in (0.003, 0.01)]
CHOICES: dict[str, list[dict[str, float]]] = {
    "kh": READ_OUTS,
    "random": READ_OUTS,
    "bp": [{"lr": 0.0003}, {"lr": 0.001}],
    "fa": [{"lr": 0.0003}, {"lr": 0.001}],
}
NAMES = {
    "bp": "backprop, both layers",
    "fa": "feedback alignment, both layers",
    "kh": "competition, then the read-out",
    "random": "random hidden weights, only the read-out learns",
}
PUBLISHED = {"bp": "1.5", "kh": "1.46"}
Samples = tuple[Tensor, Tensor]
Splits = dict[str, Samples]


def load(data_dir: Path) -> tuple[Splits, str]:
    """Return images `[N, 784]` from 0 to 1 with labels, by split, and the checksum of all."""
    data = load_dataset("mnist", data_dir=data_dir)
    splits: dict[str, Any] = {"train": data.train, "validation": data.validation, "test": data.test}
    found = {name: (split.images.flatten(1) / 255, split.labels) for name, split in splits.items()}
    return found, data.facts["checksum"]


def make(seed: int) -> nn.Sequential:
    """Return the network."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(PIXELS, HIDDEN, bias=False), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


def order(size: int, seed: int, epoch: int) -> Sequence[Tensor]:
    """Return the minibatches of an epoch."""
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    return torch.randperm(size, generator=generator).split(BATCH)


def compete(images: Tensor, seed: int) -> Tensor:
    """Return hidden weights `[2000, 784]` after competition; each epoch of it is kept as it ends."""
    steps = EPOCHS["competition"] * len(order(len(images), seed, 0))
    model = make(seed)
    path = fp.untie(model, fp.CompetingUnits(steps=steps, **COMPETITION), seed=seed)
    file, begun = WORK / f"kh-{seed}.pt", 0
    if file.exists():
        saved = torch.load(file)
        model.load_state_dict(saved["model"])
        path.load_state_dict(saved["path"])
        begun = saved["epochs"]
    for epoch in range(begun, EPOCHS["competition"]):
        for batch in order(len(images), seed, epoch):
            model(images[batch]).sum().backward()
            path.step()
        saved = {"model": model.state_dict(), "path": path.state_dict(), "epochs": epoch + 1}
        torch.save(saved, file.with_suffix(".new"))
        file.with_suffix(".new").replace(file)
        print(
            f"kh, seed {seed}: {epoch + 1} epochs, {count_untrained(model[0].weight)} untrained", flush=True
        )
    return model[0].weight.detach()


def count_untrained(w: Tensor) -> int:
    """Return how many units have more than twice the sum of ``|W_mi|^p`` that winners come to, which is 1."""
    return int((w.abs().pow(COMPETITION["p"]).sum(1) > 2.0).sum())


def descend(
    model: nn.Module, path: fp.FeedbackPath | None, data: Samples, lr: float, epochs: int, seed: int
) -> None:
    """Train by Adam on the cross entropy, at a rate that falls linearly to 0."""
    x, y = data
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    fall = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs * len(order(len(x), seed, 0)))
    for epoch in range(epochs):
        for batch in order(len(x), seed, epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            fall.step()
            if path is not None:
                path.step()


def error(model: nn.Module, data: Samples) -> float:
    """Return the share of wrong answers, in percent."""
    x, y = data
    with torch.no_grad():
        parts = zip(x.split(1000), y.split(1000), strict=True)
        wrong = sum(int((model(some).argmax(1) != label).sum()) for some, label in parts)
    return round(100 * wrong / len(y), 2)


def respond(images: Splits, w: Tensor, n: float) -> Splits:
    """Return ReLU(W v)^n, each unit over its root mean square in training, by split."""
    found = {name: (F.relu(x @ w.t()).pow_(n), y) for name, (x, y) in images.items()}
    size = found["train"][0].square().mean(0).sqrt().clamp(min=1e-12)
    return {name: (x.div_(size), y) for name, (x, y) in found.items()}


def train(
    kind: str, images: Splits, w: Tensor | None, setting: dict[str, float], seed: int
) -> tuple[nn.Module, Splits]:
    """Train a network or, above hidden weights W, a read-out; return it and what it takes in."""
    lr = setting["lr"]
    if w is None:
        model = make(seed)
        path = fp.untie(model, kind, seed=seed)
        descend(model, path, images["train"], lr, EPOCHS["both layers"], seed)
        return model, images
    torch.manual_seed(seed)
    read_out, inputs = nn.Linear(HIDDEN, CLASSES), respond(images, w, setting["n"])
    descend(read_out, None, inputs["train"], lr, EPOCHS["read-out"], seed)
    return read_out, inputs


def measure(kind: str, images: Splits, seed: int, found: dict[str, Any]) -> None:
    """Add a run to what was found; seed 0 chooses the setting."""
    w = compete(images["train"][0], seed) if kind == "kh" else None
    if kind == "random":
        w = make(seed)[0].weight.detach()
    runs: list[dict[str, Any]] = []
    for setting in CHOICES[kind] if seed == 0 else [found["chosen"][kind]]:
        model, inputs = train(kind, images, w, setting, seed)
        errors = {split: error(model, inputs[split]) for split in ("train", "validation")}
        runs.append(setting | errors)
        print(kind, f"seed {seed}", runs[-1], flush=True)
        if errors["validation"] == min(run["validation"] for run in runs):
            best, chosen, test = runs[-1], model, inputs["test"]
    if seed == 0:
        found["tried"][kind] = runs
        found["chosen"][kind] = {name: best[name] for name in CHOICES[kind][0]}
    run = {"seed": seed, "train": best["train"], "test": error(chosen, test)}
    if kind == "kh" and w is not None:
        run["untrained"] = count_untrained(w)
        shares = 100 * w[:SHOWN] / w[:SHOWN].abs().amax(1, keepdim=True)
        found["features"] = found["features"] or [
            " ".join(str(round(share)) for share in unit) for unit in shares.tolist()
        ]
    found["runs"].setdefault(kind, []).append(run)


def run(data_dir: Path, seeds: int) -> None:
    """Train what is not in the result file yet, and write it as each run ends."""
    torch.set_num_threads(1)
    WORK.mkdir(parents=True, exist_ok=True)
    images, checksum = load(data_dir)
    found: dict[str, Any] = {
        "network": [PIXELS, HIDDEN, CLASSES], "batch": BATCH, "epochs": EPOCHS, "competition": COMPETITION,
        "torch": torch.__version__, "data": checksum, "tried": {}, "chosen": {}, "runs": {}, "features": [],
    }  # fmt: skip
    if RESULTS.exists():
        found = json.loads(RESULTS.read_text(encoding="utf-8"))
    for seed in range(seeds):
        for kind in CHOICES:
            if seed >= len(found["runs"].get(kind, [])):
                measure(kind, images, seed, found)
                RESULTS.parent.mkdir(exist_ok=True)
                RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def make_table(found: dict[str, Any]) -> str:
    """Return errors by kind: mean over seeds, and the standard error that the 10,000 test images leave.

    All seeds see the same test images, so that more seeds do not make this smaller.
    """
    rows = [
        "| | n | training error (%) | test error (%) | published (%) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for kind, name in NAMES.items():
        runs = found["runs"][kind]
        training, test = (mean(run[split] for run in runs) for split in ("train", "test"))
        spread = 100 * math.sqrt(test / 100 * (1 - test / 100) / 10_000)
        label = name if kind == "random" else f"`{kind}`: {name}"
        published = PUBLISHED.get(kind, "–")
        rows.append(f"| {label} | {len(runs)} | {training:.2f} | {test:.2f} ± {spread:.2f} | {published} |")
    return "\n".join(rows) + "\n"


def draw(found: dict[str, Any]) -> Figure:
    """Draw weights from each pixel, red above 0 and blue below, each unit in units of its largest."""
    figure = Figure(figsize=(PAGE_WIDTH, 2.55), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
    grid = figure.subplots(4, SHOWN // 4)
    for axes, unit in zip(grid.flat, found["features"], strict=True):
        weights = torch.tensor([int(share) / 100 for share in unit.split()]).view(28, 28)
        drawn = axes.imshow(weights, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_axis_off()
    key = figure.colorbar(drawn, ax=grid, ticks=[-1, 0, 1], aspect=30, label="weight over the unit's largest")
    key.ax.grid(visible=False)
    return figure


def page() -> None:
    """Write the table of the page anew. The picture: `python benchmarks/doc_figures.py kh-features.png`."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    text = put_tables(PAGE.read_text(encoding="utf-8"), {"competing-units": make_table(found)})
    PAGE.write_text(text, encoding="utf-8")


def main() -> None:
    """Run, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("--data-dir", type=Path, required=True, help="folder of MNIST's files")
    runner.add_argument("--seeds", type=int, default=1)
    commands.add_parser("page")
    asked = parser.parse_args()
    if asked.command == "run":
        run(asked.data_dir, asked.seeds)
    else:
        page()


if __name__ == "__main__":
    main()
