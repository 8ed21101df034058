"""The printed figures: axes that can be read, one order, one scale a row, text that can be read in print."""

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.text import Text
from test_report import LAYERS, make_results, make_run

from feedbackpath.report.figures import LAYER_FIGURES, draw_layer_figure, learning_curves
from feedbackpath.report.panels import make_panel, styles_of
from feedbackpath.report.parts import COLUMN_WIDTH, FIGURE_STYLE, PAGE_WIDTH, draw_cells, render
from feedbackpath.report.scales import describe_flat, error_axis, minor_ticks, scale_of
from feedbackpath.report.style import ORDER, in_order
from feedbackpath.rules.registry import OWN

SMALLEST = 6.5  # points, at the size at which a figure is printed


@pytest.fixture
def panel():
    runs = [
        make_run("wm", 0, [99.0, 21.0, 3.2], angle=0.0),
        make_run("mine", 0, [99.0, 50.0, 31.0], angle=40.0),
        make_run("kp", 0, [99.0, 25.0, 3.5]),
        make_run("kp", 1, [99.0, 25.0, 9.5]),
        make_run("bp", 0, [99.0, 20.0, 3.0], angle=0.0),
    ]
    for entry in runs[0].history:
        entry.matrix_angle_deg = dict.fromkeys(LAYERS, 2e-6)
    for entry in runs[1].history:
        entry.gain = dict.fromkeys(LAYERS, 2.5)
    return make_panel([("a", make_results(*runs))])


@pytest.fixture(params=["learning_curves", *LAYER_FIGURES])
def figure(request, panel):
    with matplotlib.rc_context(FIGURE_STYLE):
        if request.param == "learning_curves":
            return learning_curves([panel], styles_of([panel]))
        return draw_layer_figure(panel, styles_of([panel]), LAYER_FIGURES[request.param])


def test_text_can_be_read_at_the_size_at_which_a_figure_is_printed(figure):
    assert figure.get_figwidth() in (COLUMN_WIDTH, PAGE_WIDTH, pytest.approx(1.0 + 1.6 * 3))
    with matplotlib.rc_context(FIGURE_STYLE):
        render(figure, "png")
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    assert min(text.get_fontsize() for text in texts) >= SMALLEST


def test_no_line_lies_on_the_frame_and_all_are_within_it(figure):
    for axes in figure.axes:
        low, high = axes.get_ylim()
        for line in axes.lines:
            values = np.asarray(line.get_ydata(), float)
            assert low < values.min()
            assert values.max() < high
            ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
            assert ticks[0] <= values.min()
            assert values.max() <= ticks[-1]


@pytest.mark.parametrize(
    ("rules", "columns"), [(("bp", "kp"), 2), (("bp", "kp", "mirror-kp", "mirror-fa"), 1)]
)
def test_a_legend_has_as_many_columns_as_fit(rules, columns):
    panel = make_panel([("a", make_results(*(make_run(rule, 0, [99.0, 3.0]) for rule in rules)))])
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = learning_curves([panel], styles_of([panel]))
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        box = figure.legends[0].get_window_extent(canvas.get_renderer())
    assert figure.legends[0]._ncols == columns
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width


def test_text_on_a_map_can_be_read():
    axes = Figure().subplots()
    texts = [["pale", "dark", ""]]
    draw_cells(
        axes, [[0.0, 1.0, np.nan]], texts, "viridis_r", Normalize(0, 1), across=["1", "2", "3"], up=["a"]
    )
    assert [text.get_color() for text in axes.texts] == ["black", "white", "black"]


def test_rules_come_in_one_order_in_legends_and_columns(panel):
    assert tuple(OWN) == ORDER
    assert in_order(["mine", "wm", "bp", "kp"]) == ["bp", "kp", "wm", "mine"]
    styles = styles_of([panel])
    legend = learning_curves([panel], styles).legends[0]
    assert [text.get_text() for text in legend.get_texts()] == [style.legend for style in styles.values()]
    columns = draw_layer_figure(panel, styles, ("gain",)).axes[:3]
    assert [axes.get_title() for axes in columns] == ["Kolen–Pollack", "weight mirror", "mine"]


@pytest.mark.parametrize("name", LAYER_FIGURES)
def test_a_row_has_one_scale_and_its_axis_names_it(panel, name):
    figure = draw_layer_figure(panel, styles_of([panel]), LAYER_FIGURES[name])
    for row, quantity in zip(np.reshape(figure.axes[:-1], (-1, 3)), LAYER_FIGURES[name], strict=True):
        assert len({axes.get_ylim() for axes in row}) == 1
        assert ("square-root scale" in row[0].get_ylabel()) == (quantity != "gain")


def test_angles_too_small_for_the_axis_are_told(panel):
    figure = draw_layer_figure(panel, styles_of([panel]), ("matrix_angle_deg",))
    notes = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert [note for note in notes if note] == ["all below 0.00001°"]
    assert describe_flat([0.0]) == "all 0°"
    assert describe_flat([]) == ""


def test_a_last_value_is_between_marks_that_are_close(panel):
    """No value is further than half from the nearest mark, and the band of a mean is within the axis."""
    axes = learning_curves([panel], styles_of([panel])).axes[0]
    assert axes.get_ylim()[0] < 6.5 - 3.0  # kp: 6.5 ± 3
    for value in (3.0, 3.2, 6.5, 31.0):
        assert min(abs(mark - value) for mark in minor_ticks(axes.get_ylim())) <= 0.5 * 10 ** (value > 10)
    assert error_axis([3.0])[2][0] <= 3.0


@pytest.mark.parametrize(
    ("gains", "name", "ticks"),
    [
        ([0.2, 1.1], "", [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]),
        ([-0.3, 2.5], "", [-0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5]),
        ([-0.3, 40.0], "log scale above 1", [-1.0, 0.0, 1.0, 10.0, 100.0]),
        ([-40.0, 0.0], "log scale above 1", [-100.0, -10.0, -1.0, 0.0, 1.0]),
    ],
)
def test_gains_of_any_size_have_an_axis(gains, name, ticks):
    scale = scale_of("gain", gains)
    assert (scale.name, scale.ticks) == (name, ticks)
    assert scale.ends[0] < min(gains)
    assert max(gains) < scale.ends[1]
    values = np.array([*gains, *scale.ticks, *scale.ends])
    np.testing.assert_allclose(scale.inverse(scale.forward(values)), values)


def test_angles_go_to_the_axis_and_back():
    scale = scale_of("delta_angle_deg", [2e-6, 100.0])
    assert scale.ticks[-1] == 120
    values = np.array([*scale.ticks, *scale.ends, 2e-6])
    np.testing.assert_allclose(scale.inverse(scale.forward(values)), values)
