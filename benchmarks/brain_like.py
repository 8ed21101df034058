"""The brain-like network of Section 6 (Akrout et al. 2019): each replacement alone, and all together.

    python benchmarks/brain_like.py tune glyphs-resnet8 [--parts usual,all]
    python benchmarks/brain_like.py run glyphs-resnet8 [--parts usual,all]
    python benchmarks/brain_like.py tune fashion-mnist-lenet --data-dir data
    python benchmarks/brain_like.py cost
    python benchmarks/brain_like.py page

``tune`` gives backprop, feedback alignment, Kolen-Pollack and the mirror 8 trials each, on validation data,
at a third of the epochs: with the usual parts, with each of the three replacements, and with all. ``run``
trains each with its best settings on three other seeds. Both go on where they were broken off, and can work
on other parts at the same time. ``cost`` takes training steps of ResNet-8 in turns (CPU time, one thread,
batches of 128). ``page`` writes the tables of docs/brain-like.md.

Glyphs have 20 of their 200 classes here. In a pilot before any search, backprop with all three parts was
left at 62 to 86% after three epochs of 10,000 samples of 200 classes, and at 9% with 20: without sharing, a
synapse learns from one sample for each image.

The mirror has fixed settings, so that its trials search learning rate and decay alone. Passes through local
connections are long.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from marked import as_far_as_run, as_table, measure_into, not_run, with_quartiles, write_between
from matplotlib.figure import Figure
from studies import chosen_settings, rows_with_settings, search_with, train
from torch import nn

from feedbackpath.bench.measure import keep_freed_memory, ratio_to, time_in_turns
from feedbackpath.bench.workloads import Arithmetic, TrainingStep, Workload, find_workload
from feedbackpath.models import build_model
from feedbackpath.report.parts import PAGE_WIDTH, draw_legend, key, line_looks, scale_metric, write_letters
from feedbackpath.report.style import legend_label
from feedbackpath.train.results import read_results

HERE = Path(__file__).parent
OUT, WORK, PAGE = HERE / "brain-like", Path("runs") / "brain-like", HERE.parent / "docs" / "brain-like.md"
RULES = ("bp", "fa", "kp", "wm")
SCALING, TANH, LOCAL = {"norm": "scaling"}, {"activation": "rectified-tanh"}, {"connections": "local"}
PARTS: dict[str, dict[str, str]] = {
    "usual": {},
    "scaling": SCALING,
    "rectified-tanh": TANH,
    "local": LOCAL,
    "all": SCALING | TANH | LOCAL,
}
STUDIES: dict[str, dict[str, Any]] = {
    "glyphs-resnet8": {"data": "glyphs", "classes": 20, "model": "resnet8"},
    "fashion-mnist-lenet": {"data": "fashion-mnist", "model": "lenet"},
}
TITLES = {"glyphs-resnet8": "ResNet-8, glyphs", "fashion-mnist-lenet": "LeNet, Fashion-MNIST"}
SIZES = {"samples_per_epoch": 5_000, "batch_size": 32, "num_threads": 1}
MIRROR = {"wm": {"mirror": {"target_angle_deg": 20.0, "forgetting": 0.6, "when": {"every": 2}}}}
TRIALS, SHORT, EPOCHS, SEEDS, FIRST_SEED = 8, 2, 6, 3, 100
COST, COST_RULES, BATCH, ROUNDS = OUT / "cost.json", ("bp", "kp", "wm"), 128, 7
COLUMNS = ("rule", "n", "test error", "minus bp", "angle, max", "angle, worst epoch")


def tune(study: str, part: str, data_dir: Path | None) -> None:
    """Search settings for each rule with the parts, and keep what came out.

    Raises:
        SystemExit: The search was interrupted, or could not be run.
    """
    place = Path(study) / part / "tuned"
    asked = STUDIES[study] | SIZES | PARTS[part] | {"rules": RULES, "epochs": SHORT}
    asked |= {"rule_settings": MIRROR}
    asked |= {"data_dir": str(data_dir)} if data_dir else {}
    search_with(asked, WORK / place, OUT / place, "--trials", TRIALS)


def run(study: str, part: str, data_dir: Path | None) -> None:
    """Train each rule with its best settings, and keep the result file."""
    place = Path(study) / part
    chosen = chosen_settings(OUT / place / "tuned")
    chosen |= {"rules": RULES, "epochs": EPOCHS, "seed": FIRST_SEED, "seeds": SEEDS}
    chosen |= {"data_dir": data_dir} if data_dir else {}
    command = f"python benchmarks/brain_like.py run {study} --parts {part}"
    train(chosen, WORK / place / "run", OUT / place, command)


def table(study: str) -> str:
    """Return a study's table, and a sentence on what has not been run."""
    command = f"python benchmarks/brain_like.py tune {study}`, then `run {study}"
    rows = {part: rows_of(study, part) for part in PARTS}
    return as_far_as_run(["parts", *COLUMNS, "settings"], rows, command)


def rows_of(study: str, part: str) -> list[list[str]]:
    """Return the rows of a network, one for each rule; none if it has not been run."""
    folder = OUT / study / part
    if not (folder / "results.json").exists():
        return []
    return rows_with_settings(read_results(folder), COLUMNS, part)


@dataclass(frozen=True)
class Network(Workload):
    """ResNet-8 with some parts replaced.

    Attributes:
        parts: As ``build_model`` takes them.
    """

    parts: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """Return the network with fresh weights."""
        return build_model(
            self.model, sample_shape=self.sample_shape, num_classes=self.num_classes, **self.parts
        )


def measure_cost() -> list[dict[str, Any]]:
    """Return weights of each network, and its step by each rule over the usual one's by backprop."""
    keep_freed_memory()
    rows = []
    for part, settings in PARTS.items():
        steps = {"usual": make_step("bp", {})} | {rule: make_step(rule, settings) for rule in COST_RULES}
        seconds = time_in_turns(steps, ROUNDS)
        ratios = {rule: ratio_to(seconds["usual"], seconds[rule]) for rule in COST_RULES}
        weights = sum(parameter.numel() for parameter in steps["bp"].model.parameters())
        rows.append({"part": part, "weights": weights, **ratios})
        sys.stderr.write(f"{rows[-1]}\n")
    return rows


def make_step(rule: str, parts: Mapping[str, Any]) -> TrainingStep:
    """Return a training step of ResNet-8 that has been taken once."""
    usual = find_workload("resnet8")
    network = Network(usual.model, usual.sample_shape, usual.num_classes, usual.batch_size, parts=parts)
    step = TrainingStep(network, rule, BATCH, Arithmetic(), 8)
    step()
    return step


def cost_table() -> str:
    """Return the table of weights and of the time of a step."""
    if not COST.exists():
        return not_run("python benchmarks/brain_like.py cost")
    heads = ["parts", "weights", *(f"step of `{rule}`" for rule in COST_RULES)]
    rows = [
        [row["part"], f"{row['weights']:,}", *(with_quartiles(row[rule], 2) for rule in COST_RULES)]
        for row in json.loads(COST.read_text(encoding="utf-8"))["rows"]
    ]
    return as_table(heads, rows)


def draw() -> Figure:
    """Draw the test errors of each network: a marker for each seed, and a line at the rule's mean."""
    figure = Figure(figsize=(PAGE_WIDTH, 2.9), layout="constrained")
    panels = figure.subplots(1, len(STUDIES))
    for axes, (study, title) in zip(panels, TITLES.items(), strict=True):
        found = {part: read_results(OUT / study / part).runs for part in PARTS}
        for place, runs in enumerate(found.values()):
            for shift, rule in enumerate(RULES):
                errors = [run.test for run in runs if run.rule == rule and run.test is not None]
                looks = line_looks(rule) | {"linestyle": ""}
                x = place + (shift - (len(RULES) - 1) / 2) * 0.19
                axes.plot([x] * len(errors), errors, **looks, markerfacecolor="none", markeredgewidth=0.8)
                axes.hlines(statistics.fmean(errors), x - 0.08, x + 0.08, color=looks["color"], linewidth=1.6)
        scale_metric(axes, [run.test for runs in found.values() for run in runs if run.test])
        axes.set_xticks(range(len(PARTS)), [part.replace("-", "\n") for part in PARTS])
        axes.set(title=title, ylabel="test error (%)")
        axes.grid(visible=False, axis="x")
    write_letters(panels)
    keys = [key(legend_label(rule), **line_looks(rule) | {"linestyle": ""}) for rule in RULES]
    draw_legend(figure, keys, 4, handlelength=1)
    return figure


def write_page() -> None:
    """Put the tables into the page."""
    write_between(PAGE, "brain-like-cost", cost_table() + "\n")
    for study in STUDIES:
        write_between(PAGE, study, table(study) + "\n")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return what a command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("tune", "search settings for each rule"), ("run", "train with the best settings")):
        one = commands.add_parser(name, help=what)
        one.add_argument("study", choices=STUDIES)
        one.add_argument("--parts", default=",".join(PARTS), help="names, by commas")
        one.add_argument(
            "--data-dir", type=Path, help="of Fashion-MNIST, a relative path: result files keep it"
        )
    commands.add_parser("cost", help="time a step of ResNet-8 with each of the parts")
    commands.add_parser("page", help="write the tables of docs/brain-like.md")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Do what a command line asks for."""
    asked = parse(arguments)
    if asked.command == "page":
        write_page()
    elif asked.command == "cost":
        measure_into(COST, "rows", measure_cost)
    else:
        for part in asked.parts.split(","):
            {"tune": tune, "run": run}[asked.command](asked.study, part, asked.data_dir)


if __name__ == "__main__":
    main(sys.argv[1:])
