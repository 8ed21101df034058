"""The interactive charts of the page: what `figures` prints, with values under the pointer."""

from collections.abc import Sequence
from html import escape
from math import ceil, log10, sqrt
from typing import Any

import plotly.graph_objects as go
from markupsafe import Markup
from plotly.subplots import make_subplots

from feedbackpath.report.curves import (
    QUANTITIES,
    Curve,
    LayerCurves,
    LearningCurves,
    largest_mean,
    layer_curves_by_rule,
    learning_curves_by_rule,
)
from feedbackpath.report.figures import LAYER_COLOURS, angle_axis, axis_title, error_axis
from feedbackpath.report.panels import Panel
from feedbackpath.report.style import DASHES, MARKERS, RuleStyle, Styles
from feedbackpath.report.table import describe_stop
from feedbackpath.train.results import Metric, Run

AXIS_HEIGHT = 50  # pixels of a layer chart's lowest axis and its title; the legend is below
LEGEND_ROW_HEIGHT = 29
MAX_LEGEND_ROWS = 11  # two layers fit a row of a narrow page; a longer legend scrolls


def draw_learning_curves(panels: Sequence[Panel], styles: Styles) -> list[Markup | None]:
    """Draw the metric by epoch as `figures.learning_curves` does; None for a panel with nothing measured."""
    curves = [learning_curves_by_rule(panel.runs) for panel in panels]
    lines = [curve for found in curves for of_rule in found.values() for _, curve in of_rule]
    if not lines:
        return [None] * len(panels)
    metric = panels[0].metric
    scale, ends, ticks = error_axis((mean for curve in lines for mean in curve.means), metric)
    limits = [log10(end) for end in ends] if scale == "log" else ends
    title = escape(axis_title(metric)) + (", log scale" if scale == "log" else "")
    axis = {"title": title, "type": scale, "tickvals": ticks or None, "range": limits}
    return [_learning_chart(found, styles, metric, axis) if found else None for found in curves]


def draw_layers(panel: Panel, styles: Styles) -> dict[str, Markup]:
    """Draw a chart per rule: matrix angle, δ angle and gain of each layer by epoch, angles on equal axes."""
    rules = layer_curves_by_rule(panel.runs, QUANTITIES)
    tops = {name: largest_mean(quantities[name] for quantities in rules.values()) for name in QUANTITIES}
    return {
        rule: _layer_chart(rule, {name: curves for name, curves in quantities.items() if curves}, tops)
        for rule, quantities in rules.items()
    }


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
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}, margin_b=45)
    return _to_html(figure, height=480)


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
        marker: dict[str, Any] = {"symbol": MARKERS[style.marker], "size": 7}
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
    spans = [(mean, error or 0.0) for mean, error in zip(curve.means, curve.errors, strict=True)]
    low = [max(mean - error, mean / 100) if mean > 0 else mean - error for mean, error in spans]
    figure.add_scatter(
        x=curve.epochs + curve.epochs[::-1],
        y=[mean + error for mean, error in spans] + low[::-1],
        fill="toself",
        fillcolor=style.colour,
        opacity=0.18,
        line_width=0,
        mode="lines",
        legendgroup=style.rule,
        showlegend=False,
        hoverinfo="skip",
    )


def _layer_chart(rule: str, rows: dict[str, LayerCurves], largest: dict[str, float]) -> Markup:
    figure = make_subplots(rows=len(rows), cols=1, shared_xaxes=True, vertical_spacing=0.05)
    layers = list(dict.fromkeys(layer for curves in rows.values() for layer in curves))
    for row, (quantity, curves) in enumerate(rows.items(), start=1):
        for layer, curve in curves.items():
            colour = _layer_colour(layers.index(layer) / max(1, len(layers) - 1))
            figure.add_trace(_layer_line(rule, layer, quantity, curve, colour), row=row, col=1)
        axis = _gain_axis(curves) if quantity == "gain" else _angle_axis(largest[quantity])
        figure.update_yaxes(axis | {"title": QUANTITIES[quantity]}, row=row, col=1)
        if quantity == "gain":
            figure.add_hline(y=1, line={"dash": "dash", "width": 1, "color": "#555555"}, row=row, col=1)
    figure.update_xaxes(title="epoch", row=len(rows), col=1)
    legend_height = LEGEND_ROW_HEIGHT * min(ceil(len(layers) / 2), MAX_LEGEND_ROWS) + 8
    height = 220 * len(rows) + AXIS_HEIGHT + legend_height
    figure.update_layout(
        margin_b=AXIS_HEIGHT + legend_height,
        legend={
            "orientation": "h",
            "yref": "container",
            "y": legend_height / height,
            "yanchor": "top",
            "x": 0,
            "font_size": 12,
            "maxheight": legend_height,
        },
    )
    return _to_html(figure, height=height)


def _layer_line(rule: str, layer: str, quantity: str, curve: Curve, colour: str) -> go.Scatter:
    is_angle = quantity != "gain"
    value = f"{QUANTITIES[quantity].removesuffix(' (°)')} %{{customdata:.3g}}{'°' if is_angle else ''}"
    return go.Scatter(
        x=curve.epochs,
        y=[sqrt(max(mean, 0.0)) for mean in curve.means] if is_angle else curve.means,
        customdata=curve.means,
        hovertemplate=f"{escape(layer)}<br>{escape(rule)}, epoch %{{x}}<br>{value}<extra></extra>",
        name=escape(layer),
        legendgroup=layer,
        showlegend=quantity == "matrix_angle_deg",
        mode="lines+markers" if len(curve.epochs) == 1 else "lines",
        line={"color": colour, "width": 1.6},
    )


def _angle_axis(largest: float) -> dict[str, Any]:
    """Return a square-root axis, which plotly does not have: `_layer_line` drew the roots."""
    top, ticks = angle_axis(largest)
    labels = [f"{tick:g}" for tick in ticks]
    return {"tickvals": [sqrt(tick) for tick in ticks], "ticktext": labels, "range": [0, sqrt(top)]}


def _gain_axis(curves: LayerCurves) -> dict[str, Any]:
    gains = [mean for curve in curves.values() for mean in curve.means]
    return {"range": [min(-0.05, *gains), max(1.25, *gains)]}


def _layer_colour(position: float) -> str:
    return f"rgb{tuple(round(255 * part) for part in LAYER_COLOURS(position)[:3])}"


def _to_html(figure: go.Figure, *, height: int) -> Markup:
    """Return the place of a chart and its content, which the page's script draws there."""
    figure.update_layout(
        template="none",
        height=height,
        margin_l=55,
        margin_r=12,
        margin_t=20,
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#1b1f24"},
        hoverlabel={"align": "left"},
        hovermode="closest",
    )
    last_epoch = max(max(trace.x) for trace in figure.data)
    figure.update_xaxes(gridcolor="#e4e4e4", zeroline=False, tick0=0, dtick=max(1, ceil(last_epoch / 6)))
    figure.update_yaxes(gridcolor="#e4e4e4", zeroline=False, showline=True, linecolor="#5b6470")
    content = figure.to_json().replace("<", "\\u003c")  # no name in it can end the script element
    place = f'<div class="chart" style="height: {height}px"></div>'
    return Markup(f'{place}<script type="application/json">{content}</script>')
