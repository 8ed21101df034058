"""Tables and figures of docs/language.md and docs/language-results.md, from ``benchmarks/language``.

`python benchmarks/language_page.py` writes the tables, `python benchmarks/doc_figures.py` the figures.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cells import Cell, read_cells
from cost_page import put_tables
from language import MARGINS, OUT, RULES, place_of, ways_of
from marked import as_far_as_run, as_table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from saturation import NETWORKS
from studies import rows_with_settings

from feedbackpath.report.curves import finished, mean_and_error
from feedbackpath.report.equivalence import describe
from feedbackpath.report.parts import (
    PAGE_WIDTH,
    REFERENCE,
    draw_legend,
    key,
    line_looks,
    scale_linear,
    scale_log,
    write_letters,
)
from feedbackpath.report.style import in_order, legend_label, style_of
from feedbackpath.report.table import summary_rows
from feedbackpath.train.config import CompareConfig
from feedbackpath.train.results import Results, read_results
from feedbackpath.train.schedule import Schedule

DOCS = Path(__file__).parent.parent / "docs"
PAGE, STUDY = DOCS / "language.md", DOCS / "language-results.md"
SHOWN = ("rule", "n", "test bits per byte", "minus bp", "angle, max", "δ angle, max", "gain")
# network, study, way, rule, and how the rule was used
SUMMARY = [
    ("gpt", "equivalence", "", "mirror-kp", ""),
    ("gpt", "mirrors", "pairs", "wm", "noise that leaves 2°, no memory; declared after the search"),
    ("gpt", "equivalence", "", "wm", "noise that leaves 20°, as the search chose"),
    ("gpt", "long", "small", "kp", "5.2 e-folds, `scale=0.1`"),
    ("gpt", "run", "", "ss", ""),
    ("gpt", "run", "", "dfa", "attention by backprop"),
    ("gpt", "run", "", "kp", "0.06 e-folds"),
    ("gpt", "run", "", "fa", ""),
    ("lstm", "equivalence", "", "mirror-kp", ""),
    ("lstm", "equivalence", "", "wm", "the default mirror"),
    ("lstm", "long", "early", "kp", "5.5 e-folds, `--early-efolds 5`"),
    ("lstm", "run", "", "ss", ""),
    ("lstm", "equivalence", "", "kp", "0.06 e-folds"),
    ("lstm", "run", "", "fa", ""),
]
NAMES = {"self_attn": "qkv", "out_proj": "out", "linear1": "ff 1", "linear2": "ff 2", "head": "output"}


def tables() -> dict[Path, dict[str, str]]:
    """Return the tables of each page, by name."""
    short = {"summary": summary_table(), "samples": samples_table(read_cells(OUT / "samples.json"))}
    found = {"saturation": saturation_table(read_cells(OUT / "saturation.json"))}
    for network in RULES:
        found[f"{network}-run"] = table_of("run", network)
        found[f"{network}-equivalence"] = table_of("equivalence", network)
        found[f"{network}-long"] = table_of("long", network)
    found |= {f"gpt-{study}": table_of(study, "gpt") for study in ("mirrors", "doses", "strong-decay")}
    return {PAGE: short, STUDY: found}


def summary_table() -> str:
    """Return how far behind backprop each rule is, used as is best and otherwise."""
    heads = ["network", "rule", "how", "steps", "n", "minus bp", "verdict"]
    return as_table(heads, [summary_row(*line) for line in SUMMARY]) + "\n"


def summary_row(network: str, study: str, way: str, rule: str, how: str) -> list[str]:
    """Return the row of a rule in a job."""
    found = jobs_of(study, network)
    results = beside_backprop(found[way], found)
    config = CompareConfig.model_validate(results.config)
    steps = Schedule.over(config, config.samples_per_epoch or 0).num_steps
    (row,) = (row for row in summary_rows(results.runs, results.metric) if row["rule"] == rule)
    verdicts = [
        f"{one.verdict} within {test.margin:g}"
        for test in results.equivalence[-1:]
        for one in test.verdicts
        if one.rule == rule
    ]
    return [network, f"`{rule}`", how, f"{steps:,}", row["n"], row["minus bp"], *(verdicts or ["–"])]


def table_of(study: str, network: str) -> str:
    """Return the table of a study's jobs with the settings of each rule, and the verdict if it has one."""
    ways, found = ways_of(study, network) or [""], jobs_of(study, network)
    first = ["way"] if len(ways) > 1 else []
    rows: dict[str, list[list[str]]] = {way: [] for way in ways}
    for way, results in found.items():
        rules = {run.rule for run in results.runs}
        made = rows_with_settings(beside_backprop(results, found), SHOWN, *[way][: len(first)])
        rows[way] = [row for row in made if row[len(first)] in rules]
    command = f"python benchmarks/language.py {study} {network}"
    table = as_far_as_run([*first, *SHOWN, "settings"], rows, command)
    verdicts = "\n".join(
        f"- {': '.join([*[way][: len(first)], line])}"
        for way, results in found.items()
        for line in describe(results)
    )
    return f"{table}\n\n{verdicts}".strip() + "\n"


def jobs_of(study: str, network: str) -> dict[str, Results]:
    """Return the results of a study's jobs by way, as far as they were run."""
    places = {way: OUT / place_of(study, network, way) for way in ways_of(study, network) or [""]}
    return {way: read_results(at) for way, at in places.items() if (at / "results.json").exists()}


def beside_backprop(results: Results, found: Mapping[str, Results]) -> Results:
    """Return results of a job with backprop's runs of ``same`` or ``bp``, if it has none of its own."""
    lender = found.get("same") or found.get("bp")
    if lender is None or any(run.rule == "bp" for run in results.runs):
        return results
    borrowed = [run for run in lender.runs if run.rule == "bp"]
    return results.model_copy(update={"runs": [*borrowed, *results.runs]})


def samples_table(cells: Sequence[Cell]) -> str:
    """Return what each network wrote, on one line each."""
    rows = [
        f"| {network}, {rule} | {found['bits_per_byte']:.2f} | `{shown(found['sample'])}` |"
        for (network, rule), found in by_network_and_rule(cells).items()
    ]
    head = "| network, rule | bits per byte | what it writes after the prompt |\n| --- | --- | --- |"
    return "\n".join([head, *rows, ""])


def by_network_and_rule(cells: Sequence[Cell]) -> dict[tuple[str, str], Cell]:
    """Return what was found of each network and rule."""
    return {(cell["settings"]["network"], cell["settings"]["rule"]): cell["found"] for cell in cells}


def saturation_table(cells: Sequence[Cell]) -> str:
    """Return how the units of each LSTM are after the first epoch and after the last."""
    seen = {
        name: cell["found"]["epochs"]
        for name, settings in NETWORKS.items()
        for cell in cells
        if cell["settings"] == settings
    }
    told = {
        name: [state_in_words(epochs[at], seen["bp"][at]) for at in (0, -1)] for name, epochs in seen.items()
    }
    rows = [
        [name, *(f"{first[column]} → {last[column]}" for column in first)]
        for name, (first, last) in told.items()
    ]
    return as_table(["network", *told["bp"][0]], rows) + "\n"


def state_in_words(found: Mapping[str, Any], bp: Mapping[str, Any]) -> dict[str, str]:
    """Return what was kept of a network after an epoch, beside that of backprop."""
    return {
        "angle, max": f"{found['angle_deg']:.0f}°",
        "minus bp": f"{found['bits_per_byte'] - bp['bits_per_byte']:+.2f}",
        "candidate, lower quartile": f"{found['candidate'][0]:.2f}",
        "forget gate, median": f"{found['forget'][1]:.2f}",
        "dimensions": f"{found['dimensions']:.0f}",
    }


def shown(text: str) -> str:
    """Return the first characters of a text in the way that fits a table's cell."""
    first = text[:90].replace("\n", "⏎").replace("`", "'").replace("|", "¦")
    return "".join(letter if letter.isprintable() else "�" for letter in first)


def draw(cells: Sequence[Cell]) -> Figure:
    """Draw delta angles by depth of the GPT, and by steps back in time of the LSTM."""
    figure = Figure(figsize=(PAGE_WIDTH, 2.8), layout="constrained")
    by_depth, by_time = figure.subplots(1, 2, sharey=True)
    rules = [rule for rule in in_order(RULES["gpt"]) if rule != "bp"]
    found = by_network_and_rule(cells)
    layers = list(found["gpt", "bp"]["delta_angle_deg"])
    for rule in rules:
        angles = [found["gpt", rule]["delta_angle_deg"].get(layer, math.nan) for layer in layers]
        by_depth.plot(range(len(layers)), angles, **line_looks(rule))
        if rule in RULES["lstm"]:
            angles = found["lstm", rule]["delta_angle_deg_by_steps_back"]
            by_time.plot(angles, markevery=9, **line_looks(rule))
    names = [NAMES[layer.rsplit(".", 1)[-1]] for layer in layers]
    by_depth.set_xticks(range(len(names)), names)
    by_depth.set(title="GPT", xlabel="layer", ylabel="δ angle (°)")
    for block in range(2):
        by_depth.axvline(4 * block + 3.5, linestyle=":", **REFERENCE)
        by_depth.text(4 * block + 1.5, 104, f"block {block + 1}", ha="center", va="center", fontsize=7)
    by_time.set(title="LSTM", xlabel="time steps back from the loss", xticks=range(0, 71, 10))
    scale_linear(by_depth, "y", (0, 105), 15)
    write_letters((by_depth, by_time))
    draw_legend(figure, [key(legend_label(rule), **line_looks(rule)) for rule in rules], 3)
    return figure


def draw_doses(found: Mapping[str, Results]) -> Figure:
    """Draw how far ``wm`` is behind backprop, by the noise of its mirror and by the memory of its B."""
    figure = Figure(figsize=(PAGE_WIDTH, 2.6), layout="constrained")
    by_angle, by_memory = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    _draw_behind(by_angle, found, "angle-", linestyle="-", marker=style_of("wm").marker)
    _draw_behind(by_angle, found, "each-", linestyle="", marker="x", markersize=7)
    _draw_behind(by_memory, found, "memory-", linestyle="-", marker=style_of("wm").marker)
    by_angle.set(
        xlabel="sampling noise of B (°), and patterns per input and step", ylabel="bits per byte minus bp"
    )
    angles = [1, 2, 4, 7, 10, 14, 20]
    scale_log(by_angle, "x", angles, is_marked=False)
    by_angle.set_xticklabels([f"{angle}\n{patterns_per_input(angle)}" for angle in angles])
    by_memory.set(xlabel="share of B that a step replaces, at 2°")
    scale_log(by_memory, "x", [0.1, 0.2, 0.5, 1.0], is_marked=False)
    by_memory.invert_xaxis()
    scale_linear(by_angle, "y", (0.0, 0.12), 0.02)
    for axes in (by_angle, by_memory):
        axes.axhline(MARGINS["gpt"], linestyle=":", **REFERENCE)
    by_angle.text(1, MARGINS["gpt"], "margin", va="bottom", fontsize=7)
    write_letters((by_angle, by_memory))
    keys = [
        key("wm, pairs drawn as a whole", color=style_of("wm").colour, marker=style_of("wm").marker),
        key("each pattern fired", color=style_of("wm").colour, linestyle="", marker="x", markersize=7),
    ]
    draw_legend(figure, keys, 2)
    return figure


def _draw_behind(axes: Axes, found: Mapping[str, Results], kind: str, **looks: Any) -> None:
    """Draw means and standard errors over seeds of all jobs of a kind; one of 2 degrees has no memory."""
    behind = behind_backprop(found)
    points = {float(way.removeprefix(kind)): behind[way] for way in behind if way.startswith(kind)}
    if kind == "memory-":
        points[1.0] = behind["angle-2"]
    places = sorted(points)
    means, errors = zip(*(mean_and_error(points[place]) for place in places), strict=True)
    axes.errorbar(places, means, yerr=errors, color=style_of("wm").colour, elinewidth=0.8, capsize=2, **looks)


def behind_backprop(found: Mapping[str, Results]) -> dict[str, list[float]]:
    """Return how far ``wm`` is behind backprop at each seed, by job."""
    bp = {run.seed: run.test for run in found["bp"].runs}
    return {
        way: [run.test - bp[run.seed] for run in finished(results.runs)]  # type: ignore[operator]
        for way, results in found.items()
        if way != "bp"
    }


def patterns_per_input(angle_deg: float) -> str:
    """Return how many patterns of noise, in pairs, an angle takes per input: ``tan^2(angle) = 2 n / N``."""
    number = f"{2.0 / math.tan(math.radians(angle_deg)) ** 2:.1e}"  # two digits tell enough
    return f"{float(number):,.0f}"


def main() -> None:
    """Write the tables anew."""
    for page, found in tables().items():
        page.write_text(put_tables(page.read_text(), found))


if __name__ == "__main__":
    main()
