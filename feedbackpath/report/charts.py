"""The interactive charts of the page: what `figures` prints, with values under the pointer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, log10
from typing import Any

import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup

from feedbackpath.report.curves import (
    QUANTITIES,
    Curve,
    LayerCurves,
    LearningCurves,
    all_means,
    ends_of_bands,
    layer_curves_by_rule,
    learning_curves_by_rule,
)
from feedbackpath.report.figures import LAYER_COLOURS
from feedbackpath.report.panels import Panel
from feedbackpath.report.scales import (
    LayerScale,
    axis_title,
    describe_flat,
    error_axis,
    minor_ticks,
    scale_of,
    write_numbers,
)
from feedbackpath.report.style import DASHES, MARKERS, RuleStyle, Styles
from feedbackpath.report.table import describe_stop
from feedbackpath.train.results import Metric, Run

LEGEND_ROW = 23  # pixels


def draw_learning_curves(panels: Sequence[Panel], styles: Styles) -> list[Markup | None]:
    """Draw the metric by epoch as `figures.learning_curves` does; None for a panel with nothing measured."""
    curves = [learning_curves_by_rule(panel.runs) for panel in panels]
    values = ends_of_bands(lines for found in curves for lines in found.values())
    if not values:
        return [None] * len(panels)
    metric = panels[0].metric
    scale, ends, ticks = error_axis(values, metric)
    title = escape(axis_title(metric))
    axis: dict[str, Any] = {"title": title, "type": scale, "range": ends, "tickvals": ticks}
    if scale == "log":
        axis |= {
            "title": f"{title}, log scale",
            "range": [log10(end) for end in ends],
            "minor": {"tickvals": minor_ticks(ends), "ticks": "outside", "ticklen": 3},
            "ticks": "outside",
        }
    return [_learning_chart(found, styles, metric, axis) if found else None for found in curves]


@dataclass(frozen=True)
class LayerCharts:
    """The charts of a panel's layers.

    Attributes:
        colours: Each layer's colour, from the input layer to the output layer.
        charts: Each rule's charts, by what they show; None where nothing was measured.
    """

    colours: dict[str, str]
    charts: dict[str, dict[str, Markup | None]]


def draw_layers(panel: Panel) -> LayerCharts:
    """Draw matrix angle, δ angle and gain of each layer by epoch; charts of a quantity have equal axes."""
    rules = layer_curves_by_rule(panel.runs, QUANTITIES)
    found = [layers for quantities in rules.values() for layers in quantities.values()]
    names = list(dict.fromkeys(name for layers in sorted(found, key=len, reverse=True) for name in layers))
    colours = {name: _layer_colour(index / max(1, len(names) - 1)) for index, name in enumerate(names)}
    scales = {name: scale_of(name, all_means(of[name] for of in rules.values())) for name in QUANTITIES}
    return LayerCharts(
        colours,
        {
            rule: {
                QUANTITIES[name].removesuffix(" (°)"): (
                    _layer_chart(rule, name, layers, scales[name], colours) if layers else None
                )
                for name, layers in quantities.items()
            }
            for rule, quantities in rules.items()
        },
    )


def _learning_chart(
    curves: dict[str, LearningCurves], styles: Styles, metric: Metric, axis: dict[str, Any]
) -> Markup:
    figure = go.Figure()
    for rule, lines in curves.items():
        for index, (run, curve) in enumerate(lines):
            if run is None:
                _add_band(figure, styles[rule], curve)
            figure.add_scatter(**_line(styles[rule], run, curve, metric), showlegend=index == 0)
    figure.update_xaxes(title="epoch")
    figure.update_yaxes(axis)
    figure.update_layout(
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}, margin={"b": 45, "t": 20}
    )
    return _to_html(figure, height=480, narrow=330 + LEGEND_ROW * len(curves))


def _line(style: RuleStyle, run: Run | None, curve: Curve, metric: Metric) -> dict[str, Any]:
    """Return the looks of a mean, or of a run that did not finish, and what the pointer finds on it."""
    digits, decimals = (".2f", ".2f") if metric.unit == "%" else (".4g", ".2g")
    name, unit, last = escape(style.legend), escape(metric.suffix), len(curve.epochs) - 1
    if run is None:
        found, width = name, None
        notes = [
            f"{unit}, n = {n}" if error is None else f" ± {error:{decimals}}{unit}, n = {n}"
            for error, n in zip(curve.errors, curve.n, strict=True)
        ]
        symbol = MARKERS[style.marker]
        marker: dict[str, Any] = {"symbol": symbol, "size": 10 if "triangle" in symbol else 7}
    else:
        found, width = escape(f"{style.legend}, seed {run.seed}: {describe_stop(run)}"), 1
        notes = [unit] * len(curve.epochs)
        marker = {"symbol": "x", "size": [0] * last + [9]}
    return {
        "x": curve.epochs,
        "y": curve.means,
        "customdata": notes,
        "hovertemplate": f"{found}<br>epoch %{{x}}: %{{y:{digits}}}%{{customdata}}<extra></extra>",
        "name": name,
        "legendgroup": style.rule,
        "mode": "lines+markers" if run or last < 30 else "lines",
        "line": {"color": style.colour, "dash": DASHES[style.dash], "width": width},
        "marker": marker,
    }


def _add_band(figure: go.Figure, style: RuleStyle, curve: Curve) -> None:
    low, high = curve.band
    figure.add_scatter(
        x=curve.epochs + curve.epochs[::-1],
        y=high + low[::-1],
        fill="toself",
        fillcolor=style.colour,
        opacity=0.18,
        line_width=0,
        mode="lines",
        legendgroup=style.rule,
        showlegend=False,
        hoverinfo="skip",
    )


def _layer_chart(
    rule: str, quantity: str, layers: LayerCurves, scale: LayerScale, colours: Mapping[str, str]
) -> Markup:
    """Draw a quantity of a rule's layers on an axis that plotly does not have: values are mapped here."""
    figure = go.Figure()
    for layer, curve in layers.items():
        figure.add_scatter(**_layer_line(rule, layer, quantity, curve, colours[layer], scale))
    figure.update_xaxes(title={"text": "epoch", "standoff": 6})
    figure.update_yaxes(
        title="<br>".join(filter(None, (QUANTITIES[quantity], scale.name))),
        tickvals=_places(scale, scale.ticks),
        ticktext=write_numbers(scale.ticks),
        tickfont_size=11,
        range=_places(scale, scale.ends),
    )
    if quantity == "gain":
        figure.add_hline(y=1, line={"dash": "dash", "width": 1, "color": "#555555"})
    elif note := describe_flat(all_means([layers])):
        figure.add_annotation(text=note, showarrow=False, xref="paper", yref="paper", x=0.5, y=0.5)
    figure.update_layout(showlegend=False, margin_b=38, margin_t=8)
    return _to_html(figure, height=230, narrow=230)


def _layer_line(
    rule: str, layer: str, quantity: str, curve: Curve, colour: str, scale: LayerScale
) -> dict[str, Any]:
    unit = "" if quantity == "gain" else "°"
    value = f"{QUANTITIES[quantity].removesuffix(' (°)')} %{{customdata:.3g}}{unit}"
    return {
        "x": curve.epochs,
        "y": _places(scale, curve.means),
        "customdata": curve.means,
        "hovertemplate": f"{escape(layer)}<br>{escape(rule)}, epoch %{{x}}<br>{value}<extra></extra>",
        "legendgroup": layer,  # what the page's key of layers finds it by
        "mode": "lines+markers" if len(curve.epochs) == 1 else "lines",
        "line": {"color": colour, "width": 1.6},
    }


def _places(scale: LayerScale, values: Sequence[float]) -> list[float]:
    places: list[float] = scale.forward(np.array(values, float)).tolist()
    return places


def _layer_colour(position: float) -> str:
    return f"rgb{tuple(round(255 * part) for part in LAYER_COLOURS(position)[:3])}"


def _to_html(figure: go.Figure, *, height: int, narrow: int) -> Markup:
    """Return the place of a chart and its content, which the page's script draws there.

    Heights are in pixels; ``narrow`` is for screens that have room for one rule a row of the legend.
    """
    figure.update_layout(
        template="none",
        margin_l=72,
        margin_r=12,
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#1b1f24"},
        hoverlabel={"align": "left"},
        hovermode="closest",
    )
    last_epoch = max(max(trace.x) for trace in figure.data)
    figure.update_xaxes(gridcolor="#e4e4e4", zeroline=False, tick0=0, dtick=max(1, ceil(last_epoch / 6)))
    figure.update_yaxes(gridcolor="#e4e4e4", zeroline=False, showline=True, linecolor="#5b6470")
    content = figure.to_json().replace("<", "\\u003c")  # no name in it can end the script element
    place = f'<div class="chart" style="--height: {height}px; --narrow: {narrow}px"></div>'
    return Markup(f'{place}<script type="application/json">{content}</script>')
