"""The tables and the figure of docs/language.md, from the result files in ``benchmarks/language``.

python benchmarks/language_page.py
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from cost_page import put_tables
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from feedbackpath.report import markdown_table
from feedbackpath.report.figures import FIGURE_STYLE, PAGE_WIDTH, line_looks, render
from feedbackpath.report.style import in_order, legend_label
from feedbackpath.train.results import read_results

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks" / "language"
PAGE = ROOT / "docs" / "language.md"
SHOWN = ("rule", "n", "test bits per byte", "minus bp", "angle, max", "δ angle, max", "gain")
FIGURE = ROOT / "docs" / "figures" / "language-errors.png"


def tables() -> dict[str, str]:
    """Return the tables of the page, by name: of each part that has been run, and of samples."""
    cells = json.loads((FOLDER / "samples.json").read_text())
    parts = [file.parent for file in sorted(FOLDER.glob("*/results.json"))]
    return {part.name: markdown_table(read_results(part), SHOWN).strip() + "\n" for part in parts} | {
        "samples": samples_table(cells)
    }


def samples_table(cells: Mapping[str, Any]) -> str:
    """Return what each network wrote, on one line each."""
    rows = [
        f"| {cell.replace('/', ', ')} | {found['bits_per_byte']:.2f} | `{shown(found['sample'])}` |"
        for cell, found in cells.items()
    ]
    head = "| network, rule | bits per byte | what it writes after the prompt |\n| --- | --- | --- |"
    return "\n".join([head, *rows, ""])


def shown(text: str) -> str:
    """Return the first characters of a text in the way that fits a table's cell."""
    first = text[:90].replace("\n", "⏎").replace("`", "'").replace("|", "¦")
    return "".join(letter if letter.isprintable() else "�" for letter in first)


def draw(cells: Mapping[str, Any]) -> Figure:
    """Draw delta angles by depth of the GPT (seed 0), and by steps back in time of the LSTM."""
    figure = Figure(figsize=(PAGE_WIDTH, 2.8), layout="constrained")
    by_depth, by_time = figure.subplots(1, 2, sharey=True)
    found_runs = {run.rule: run for run in read_results(FOLDER / "gpt").runs if run.seed == 0}
    runs = [found_runs[rule] for rule in in_order(found_runs) if rule != "bp"]
    layers = list(runs[0].history[-1].delta_angle_deg)
    for run in runs:
        angles = [run.history[-1].delta_angle_deg.get(layer, float("nan")) for layer in layers]
        by_depth.plot(range(len(layers)), angles, label=legend_label(run.rule), **line_looks(run.rule))
    for cell, found in cells.items():
        part, rule = cell.split("/")
        if part == "lstm" and rule != "bp":
            by_time.plot(found["delta_angle_deg_by_steps_back"], markevery=9, **line_looks(rule))
    names = [
        name.removeprefix("layers.layers.").replace("self_attn.", "").replace("self_attn", "q, k, v")
        for name in layers
    ]
    by_depth.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=6.5)
    finish(by_depth, "GPT, by layer", "")
    finish(by_time, "LSTM, by time", "steps back from the loss")
    by_depth.set_ylabel("δ angle (°)")
    figure.legend(loc="outside upper left", ncols=3, frameon=False, handlelength=2.6)
    return figure


def finish(axes: Axes, title: str, label: str) -> None:
    """Give a panel its title, labels and limits."""
    axes.set_title(title)
    axes.set_xlabel(label)
    axes.set_ylim(-4, 95)
    axes.set_yticks([0, 30, 60, 90])


def main() -> None:
    """Write tables and figure anew."""
    PAGE.write_text(put_tables(PAGE.read_text(), tables()))
    with matplotlib.rc_context(FIGURE_STYLE):
        FIGURE.write_bytes(render(draw(json.loads((FOLDER / "samples.json").read_text())), "png"))


if __name__ == "__main__":
    main()
