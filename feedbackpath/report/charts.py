"""The interactive charts of the page: what `figures` prints, with values under the pointer."""

from collections.abc import Sequence
from html import escape
from math import ceil, log10, sqrt

import plotly.graph_objects as go
from markupsafe import Markup
from plotly.subplots import make_subplots

from feedbackpath.report.curves import (
    Curve,
    Run,
    error_curve,
    finished,
    group_by_rule,
    largest_mean,
    layer_curves_by_rule,
    unfinished,
)
from feedbackpath.report.figures import LAYER_COLOURS, angle_axis, error_axis
from feedbackpath.report.panels import Panel
from feedbackpath.report.style import DASHES, MARKERS, legend_label, style_of
from feedbackpath.report.table import describe_stop

AXIS_HEIGHT = 50  # pixels of a layer chart's lowest axis and its title; the legend is below
LEGEND_ROW_HEIGHT = 29
MAX_LEGEND_ROWS = 11  # two layers fit a row of a narrow page; a longer legend scrolls
QUANTITIES = {"matrix_angle_deg": "matrix angle (°)", "delta_angle_deg": "δ angle (°)", "gain": "gain"}


def draw_learning_curves(panels: Sequence[Panel]) -> list[Markup | None]:
    """Draw test error by epoch as `figures.learning_curves` does; None for a panel with nothing measured."""
    figures = [_error_chart(panel) for panel in panels]
    means = [
        value
        for figure in figures
        for trace in figure.data
        if trace.hoverinfo != "skip"  # bands
        for value in trace.y
    ]
    for figure in figures:
        if figure.data:
            _scale_errors(figure, means)
    return [_to_html(figure, height=480) if figure.data else None for figure in figures]


def _error_chart(panel: Panel) -> go.Figure:
    figure = go.Figure()
    for rule, runs in group_by_rule(panel.runs).items():
        _add_mean(figure, rule, error_curve(finished(runs)))
        for index, run in enumerate(unfinished(runs)):
            _add_unfinished(figure, rule, run, showlegend=index == 0 and not finished(runs))
    figure.update_xaxes(title="epoch")
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}, margin_b=45)
    return figure


def _scale_errors(figure: go.Figure, errors: Sequence[float]) -> None:
    """Give the error axis the scale for the errors of all panels."""
    scale, ends, ticks = error_axis(errors)
    limits = [log10(end) for end in ends] if scale == "log" else ends
    figure.update_yaxes(title="test error (%)", type=scale, tickvals=ticks or None, range=limits)


def _add_mean(figure: go.Figure, rule: str, curve: Curve) -> None:
    if not curve.epochs:
        return
    style, name = style_of(rule), escape(legend_label(rule))
    errors = [error or 0.0 for error in curve.errors]
    low = [max(mean - error, mean / 100) for mean, error in zip(curve.means, errors, strict=True)]
    high = [mean + error for mean, error in zip(curve.means, errors, strict=True)]
    figure.add_scatter(
        x=curve.epochs + curve.epochs[::-1],
        y=high + low[::-1],
        fill="toself",
        fillcolor=style.colour,
        opacity=0.18,
        line_width=0,
        mode="lines",
        legendgroup=rule,
        showlegend=False,
        hoverinfo="skip",
    )
    figure.add_scatter(
        x=curve.epochs,
        y=curve.means,
        customdata=[
            f"%, n = {n}" if error is None else f" ± {error:.2f}%, n = {n}"
            for error, n in zip(curve.errors, curve.n, strict=True)
        ],
        hovertemplate=f"{name}<br>epoch %{{x}}: %{{y:.2f}}%{{customdata}}<extra></extra>",
        name=name,
        legendgroup=rule,
        mode="lines+markers" if len(curve.epochs) <= 30 else "lines",
        line={"color": style.colour, "dash": DASHES[style.dash]},
        marker={"symbol": MARKERS[style.marker], "size": 7},
    )


def _add_unfinished(figure: go.Figure, rule: str, run: Run, *, showlegend: bool) -> None:
    curve = error_curve([run])
    if not curve.epochs:
        return
    style = style_of(rule)
    stop = escape(f"{legend_label(rule)}, seed {run.get('seed', '?')}: {describe_stop(run)}")
    figure.add_scatter(
        x=curve.epochs,
        y=curve.means,
        hovertemplate=f"{stop}<br>epoch %{{x}}: %{{y:.2f}}%<extra></extra>",
        name=escape(legend_label(rule)),
        legendgroup=rule,
        showlegend=showlegend,
        mode="lines+markers",
        line={"color": style.colour, "dash": DASHES[style.dash], "width": 1},
        marker={"symbol": "x", "size": [0] * (len(curve.epochs) - 1) + [9]},
    )


def draw_layers(panel: Panel) -> dict[str, Markup]:
    """Draw a chart per rule: matrix angle, δ angle and gain of each layer by epoch, angles on equal axes."""
    rules = layer_curves_by_rule(panel.runs, QUANTITIES)
    tops = {name: largest_mean(quantities[name] for quantities in rules.values()) for name in QUANTITIES}
    return {
        rule: _layer_chart(rule, {name: curves for name, curves in quantities.items() if curves}, tops)
        for rule, quantities in rules.items()
    }


def _layer_chart(rule: str, rows: dict[str, dict[str, Curve]], largest: dict[str, float]) -> Markup:
    figure = make_subplots(rows=len(rows), cols=1, shared_xaxes=True, vertical_spacing=0.05)
    layers = list(dict.fromkeys(layer for curves in rows.values() for layer in curves))
    colours = dict(zip(layers, _layer_colours(len(layers)), strict=True))
    for row, (quantity, curves) in enumerate(rows.items(), start=1):
        for layer, curve in curves.items():
            figure.add_trace(_layer_line(rule, layer, quantity, curve, colours[layer]), row=row, col=1)
        figure.update_yaxes(title=QUANTITIES[quantity], row=row, col=1)
        if quantity == "gain":
            _mark_gain_of_one(figure, row, [mean for curve in curves.values() for mean in curve.means])
        else:
            _scale_angles(figure, row, largest[quantity])
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
    quantity_name = QUANTITIES[quantity].removesuffix(" (°)")
    value = f"{quantity_name} %{{customdata:.3g}}{'°' if is_angle else ''}"
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


def _scale_angles(figure: go.Figure, row: int, largest: float) -> None:
    """Make the axis a square-root one, which plotly does not have: `_layer_line` drew the roots."""
    top, ticks = angle_axis(largest)
    figure.update_yaxes(
        tickvals=[sqrt(tick) for tick in ticks],
        ticktext=[f"{tick:g}" for tick in ticks],
        range=[0, sqrt(top)],
        row=row,
        col=1,
    )


def _mark_gain_of_one(figure: go.Figure, row: int, gains: Sequence[float]) -> None:
    figure.add_hline(y=1, line={"dash": "dash", "width": 1, "color": "#555555"}, row=row, col=1)
    figure.update_yaxes(range=[min(-0.05, *gains), max(1.25, *gains)], row=row, col=1)


def _layer_colours(count: int) -> list[str]:
    positions = [index / max(1, count - 1) for index in range(count)]
    return [
        f"rgb{tuple(round(255 * part) for part in LAYER_COLOURS(position)[:3])}" for position in positions
    ]


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
