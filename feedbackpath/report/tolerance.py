"""The figures of ``hardware tolerance``: the map of rules and imperfections, and errors."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from feedbackpath.report.figures import render
from feedbackpath.report.style import choose_styles
from feedbackpath.train.store import write_bytes

PANEL = 2.6  # inches


def draw_tolerance(kept: Mapping[str, Any], out: Path) -> None:
    """Write ``figures/tolerance.*`` and ``figures/error.*`` of a search's results (``tolerance.json``)."""
    figures = {"tolerance": draw_map(kept), "error": draw_errors(kept)}
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        for kind in ("png", "pdf"):
            write_bytes(out / "figures" / f"{name}.{kind}", render(figure, kind))


def draw_map(kept: Mapping[str, Any]) -> Figure:
    """Draw the worst tolerated values: each imperfection has its own scale, darker is more tolerant."""
    found, ended = kept["found"], kept["ended"]
    rules, names = list(found), list(dict.fromkeys(name for row in found.values() for name in row))
    figure = Figure(figsize=(1.6 + 1.15 * len(names), 1.2 + 0.4 * len(rules)), layout="constrained")
    axes = figure.subplots()
    shades = [[math.nan] * len(names) for _ in rules]
    for column, name in enumerate(names):
        values = [math.log10(found[rule][name]) if found[rule].get(name) else None for rule in rules]
        told = [value for value in values if value is not None]
        span = (max(told) - min(told)) or 1.0 if told else 1.0
        for row, value in enumerate(values):
            if value is not None:
                shades[row][column] = 0.15 + 0.7 * (value - min(told)) / span
    axes.imshow(shades, cmap="Blues", vmin=0.0, vmax=1.4, aspect="auto")
    for row, rule in enumerate(rules):
        for column, name in enumerate(names):
            value = found[rule].get(name)
            is_end = name in ended.get(rule, [])
            text = "" if name not in found[rule] else "none" if value is None else f"{value:.2g}"
            axes.text(column, row, f"≥ {text}" if is_end else text, ha="center", va="center", fontsize=9)
    axes.set_xticks(range(len(names)), [name.replace("_", " ") for name in names], rotation=25, ha="right")
    axes.set_yticks(range(len(rules)), rules)
    axes.set_title(f"Worst value within {kept['margin']:g} points of the rule's ideal", fontsize=10)
    return figure


def draw_errors(kept: Mapping[str, Any]) -> Figure:
    """Draw the mean error of every value that was tried, one panel for each imperfection."""
    runs: dict[tuple[str, str | None, float | None], list[float]] = {}
    for trial in kept["trials"]:
        error = 100.0 if trial["error"] is None else trial["error"]
        runs.setdefault((trial["rule"], trial["imperfection"], trial["value"]), []).append(error)
    names = list(dict.fromkeys(name for _, name, _ in runs if name is not None))
    columns = min(4, max(1, len(names)))
    rows = max(1, math.ceil(len(names) / columns))
    figure = Figure(figsize=(PANEL * columns + 1.0, PANEL * rows + 0.5), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    styles = choose_styles([rule for rule, _, _ in runs], {})
    for axes, name in zip(grid, names, strict=False):
        for rule, style in styles.items():
            points = sorted(
                (value, sum(errors) / len(errors))
                for (of_rule, of_name, value), errors in runs.items()
                if (of_rule, of_name) == (rule, name) and value is not None
            )
            if points:
                axes.plot(
                    *zip(*points, strict=True), color=style.colour, marker=style.marker, ms=4, label=rule
                )
        axes.set_xscale("log")
        axes.set_xlabel(name.replace("_", " "))
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    grid[0].set_ylabel(f"error ({kept['unit'] or '1'})")
    handles = {
        label: line for axes in grid for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(list(handles.values()), list(handles), loc="outside right upper", fontsize=8)
    return figure
