import re
from io import StringIO

import numpy as np
import pytest
from markupsafe import escape
from rich.console import Console

from feedbackpath.report import (
    format_with_error,
    markdown_table,
    rich_table,
    summarise,
    summary_rows,
    write_report,
)
from feedbackpath.report.curves import layer_curves
from feedbackpath.report.page import describe_rules, describe_task
from feedbackpath.report.page import render_page as render_panels
from feedbackpath.report.panels import make_panel, styles_of
from feedbackpath.report.parts import KINDS, legend_columns
from feedbackpath.report.scales import error_axis
from feedbackpath.report.style import choose_styles, style_of
from feedbackpath.rules import RULES
from feedbackpath.train.results import DataFacts, Entry, Look, Metric, Results, Run, Summary


def render_page(results):
    return render_panels([make_panel([("runs/a", results)])])


LAYERS = ("conv1", "layer1.0.conv1", "fc")
FIGURES = {f"{name}.{kind}" for name in ("learning_curves", "alignment", "gains") for kind in KINDS}


def make_run(rule, seed, tests, *, status="finished", angle=5.0):
    """Make a run with an entry per value of the metric; epoch 0 has no training in it."""
    history = [
        Entry(
            epoch=epoch,
            train_loss=test / 20,
            test=test,
            seconds=2.0,
            matrix_angle_deg={layer: angle + index for index, layer in enumerate(LAYERS)},
            delta_angle_deg={layer: 2 * angle + index for index, layer in enumerate(LAYERS)},
            gain={layer: 1.0 + 0.1 * index for index, layer in enumerate(LAYERS)},
        )
        for epoch, test in enumerate(tests)
    ]
    return Run(rule=rule, seed=seed, status=status, test=tests[-1], history=history)


def make_results(*runs, **fields):
    facts = {
        "command": "feedbackpath compare",
        "versions": {"torch": "2.13.0"},
        "device": "cpu",
        "data": DataFacts(name="glyphs", num_classes=200),
        "model": "resnet8",
        "config": {"rules": ["bp", "kp", "fa"], "seeds": 2, "lr": 0.1, "epochs": 6},
    }
    runs = runs or (
        make_run("bp", 0, [99.0, 20.0, 3.0], angle=0.0),
        make_run("bp", 1, [99.0, 22.0, 3.4], angle=0.0),
        make_run("kp", 0, [99.0, 25.0, 3.5]),
        make_run("kp", 1, [99.0, 23.0, 4.1], angle=7.0),
        make_run("fa", 0, [99.0, 95.0, 93.0], angle=85.0),
        make_run("fa", 1, [99.0, 98.0], status="diverged", angle=85.0),
    )
    return Results(**{**facts, "runs": list(runs), **fields})


@pytest.fixture
def results():
    return make_results()


def row_of(results, rule):
    rows = summary_rows(results.runs, results.metric)
    return next(row for row in rows if row["rule"] == rule)


@pytest.mark.parametrize(
    ("mean", "error", "expected"),
    [
        (3.6, 0.2, "3.6(2)%"),
        (30.2, 0.7, "30.2(7)%"),
        (30.2, 1.3, "30(1)%"),
        (3.6, 0.04, "3.60(4)%"),
        (34.2, 12.4, "34(12)%"),
        (3.64, 0.096, "3.6(1)%"),  # the error rounds up to the next digit
        (30.2, 0.97, "30(1)%"),
        (3.64, 0.003, "3.64(0)%"),
        (3.6, 0.0, "3.60(0)%"),
        (3.64, None, "3.6%"),
        (3.64, float("nan"), "3.6%"),
        (None, None, "–"),
        (float("nan"), 0.2, "–"),
        (float("inf"), 0.2, "–"),
    ],
)
def test_error_digits_are_in_units_of_the_last_digit(mean, error, expected):
    assert format_with_error(mean, error) == expected


def test_difference_prints_its_sign():
    assert format_with_error(0.48, 0.06, sign="+", unit="") == "+0.48(6)"


def test_summary_is_mean_and_standard_error_of_finished_runs(results):
    summary = summarise(results.runs)
    final = [3.5, 4.1]
    assert (summary["kp"].n, summary["kp"].diverged) == (2, None)
    assert summary["kp"].test_mean == pytest.approx(np.mean(final))
    assert summary["kp"].test_se == pytest.approx(np.std(final, ddof=1) / np.sqrt(2))
    assert summary["fa"] == Summary(n=1, test_mean=93.0, diverged=1)


def test_summary_of_a_rule_that_never_finished_has_no_error():
    runs = [make_run("fa", 0, [99.0], status="diverged"), Run(rule="fa", seed=1, status="interrupted")]
    assert summarise(runs) == {"fa": Summary(n=0, diverged=1)}


def test_summary_leaves_unmeasured_errors_out(results):
    results.runs[2].test = None
    assert summarise(results.runs)["kp"].n == 1


def test_layer_curves_average_over_seeds_and_skip_what_was_not_measured(results):
    kp = results.runs[2:4]
    kp[0].history[2].gain = {}
    kp[1].history[2].gain["fc"] = float("nan")
    curves = layer_curves(kp, "gain")
    assert list(curves) == list(LAYERS)
    assert (curves["fc"].epochs, curves["conv1"].n) == ([0, 1], [2, 2, 1])
    np.testing.assert_allclose(layer_curves(kp, "matrix_angle_deg")["fc"].means, [8.0, 8.0, 8.0])


def test_row_shows_the_last_epoch_of_finished_runs(results):
    row = row_of(results, "kp")
    differences = np.array([3.5 - 3.0, 4.1 - 3.4])
    assert row["minus bp"] == format_with_error(
        differences.mean(), differences.std(ddof=1) / np.sqrt(2), sign="+", unit=""
    )
    assert row["angle, max"] == "9.0°"
    assert row["angle, worst epoch"] == "9.0°"
    assert row["δ angle, max"] == "16.0°"
    assert row["gain"] == "1.00…1.20"
    assert (row["n"], row["s per epoch"], row["status"]) == ("2/2", "2.0", "finished")


def test_no_error_below_the_output_layer_is_no_agreement(results):
    for run in results.runs:  # in the last epoch alone: no earlier one stands for it
        run.history[-1].delta_angle_deg = dict.fromkeys(LAYERS) | {"fc": 0.0}
    assert row_of(results, "kp")["δ angle, max"] == "–"


def test_a_legend_without_entries_has_a_column():
    assert legend_columns([], 3.0, 2) == 2


def test_tiny_angles_do_not_print_as_zero(results):
    for run in results.runs:
        run.history[-1].matrix_angle_deg = dict.fromkeys(LAYERS, 1e-5)
    assert row_of(results, "kp")["angle, max"] == "1e-05°"


def test_diverged_run_is_named_and_not_averaged(results):
    row = row_of(results, "fa")
    assert row["n"] == "1/2"
    assert row["status"] == "seed 1 diverged (epoch 1)"
    assert row["test error"] == "93.0%"
    assert "fa, seed 1: diverged (epoch 1); left out" in render_page(results)


def test_terminal_table_fits_eighty_columns(results):
    results.runs.append(make_run("mirror-kp", 0, [99.0, 3.0]))
    output = StringIO()
    Console(file=output, width=80).print(rich_table(results))
    assert "3.2(2)%" in output.getvalue()
    assert "…" not in re.sub(r"\d…\d", "", output.getvalue())  # nothing cut short


def test_tables_show_markup_in_a_rule_name_as_it_is(results):
    results.runs[-1].rule = "[red]a|b"
    output = StringIO()
    Console(file=output, width=200).print(rich_table(results))
    assert "[red]a|b" in output.getvalue()
    assert r"| [red]a\|b |" in markdown_table(results)


def looks_of(style):
    return style.colour, style.marker


def test_no_two_rules_of_a_page_look_alike():
    theirs = [f"mine-{n}" for n in range(12)]
    styles = choose_styles([*RULES, *theirs], {"mine-5": Look(colour="#123abc")})
    assert {rule: styles[rule] for rule in RULES} == {rule: style_of(rule) for rule in RULES}
    assert len({style.colour for style in map(style_of, RULES)}) == len(RULES)
    assert len(set(map(looks_of, styles.values()))) == len(styles)
    assert styles["mine-5"].colour == "#123ABC"
    assert len({styles[rule].colour for rule in theirs}) == 6  # colours first, then markers
    assert choose_styles(styles, {"mine-5": Look(colour="#123abc")}) == styles
    assert style_of("mine-0").colour not in {style_of(rule).colour for rule in RULES}


def test_a_colour_that_another_rule_has_gives_way_and_the_page_says_so(results):
    results.runs += [make_run(rule, 0, [99.0, 9.0]) for rule in ("a", "b")]
    results.looks = {"a": Look(label="Rule A", colour="#0072b2"), "b": Look(label="Kolen–Pollack")}
    styles = styles_of([make_panel([("runs/a", results)])])
    assert (styles["a"].legend, styles["b"].legend) == ("Rule A (a)", "b")
    assert len({style.colour for style in styles.values()}) == len(styles)
    page = render_page(results)
    assert f"a is drawn in {styles['a'].colour}: another rule has #0072B2" in page
    assert "Rule A (a)" in page


def test_report_writes_every_figure_and_the_page(results, tmp_path):
    written = write_report(results, tmp_path / "run")
    assert {path.name for path in written} == FIGURES | {"report.html"}
    assert written[-1] == tmp_path / "run" / "report.html"
    assert all(path.stat().st_size > 5_000 for path in written)
    assert {
        path.name for path in (tmp_path / "run" / "figures").iterdir()
    } == FIGURES  # no temporary file left


def test_report_of_equal_results_is_equal_and_replaces_the_old_one(results, tmp_path):
    before = {path: path.read_bytes() for path in write_report(results, tmp_path)}
    after = {path: path.read_bytes() for path in write_report(results.model_copy(deep=True), tmp_path)}
    assert before == after


def test_page_fetches_nothing(results):
    page = render_page(results)
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)\s*=\s*[\"']?(?:https?:)?//", page)
    assert "default-src 'none'" in page


def test_page_names_layers_under_the_pointer(results):
    page = render_page(results)
    templates = re.findall(r'"hovertemplate":"(.*?)"', page)
    for layer in LAYERS:
        assert any(layer in text and "kp" in text for text in templates)
    assert any("backprop (bp)" in text for text in templates)


def test_page_says_what_each_rule_does_and_a_user_s_rule_in_its_own_words(results):
    results.runs += [make_run("mine", 0, [99.0, 9.0]), make_run("forgotten", 0, [99.0, 9.0])]
    results.looks = {"mine": Look(what="Do as I do.")}
    facts = describe_rules([make_panel([("runs/a", results)])])
    assert facts["mine"] == ("Do as I do.", "")
    assert "forgotten" not in facts  # nothing is known of it
    page = render_page(results)
    for rule in ("bp", "fa", "kp"):
        assert facts[rule][0].endswith(".")
        assert escape(facts[rule][0]) in page
        assert escape(facts[rule][1]) in page


@pytest.mark.parametrize(
    ("facts", "said", "unsaid"),
    [
        (
            {"classes": 200, "chance": 99.5},
            "apart the 200 classes of glyphs. Guesses at random have a",
            "samples",
        ),
        ({"chance": 8.0}, "learns glyphs. Guesses at random have a test error of 8.0%", "classes"),
        (
            {"sizes": {"test": 4000}},
            "The error is measured on 4,000 samples after each of 6 epochs",
            "random",
        ),
        ({"classes": "<b>", "chance": [1], "sizes": [2]}, "The network resnet8 learns glyphs.", "random"),
    ],
)
def test_page_says_what_the_task_is_as_far_as_it_is_known(results, facts, said, unsaid):
    results.data = DataFacts(name="glyphs", **facts)
    task = describe_task(make_panel([("runs/a", results)]))
    assert said in task
    assert unsaid not in task
    assert said in render_page(results)


def test_page_says_how_to_read_angle_and_gain(results):
    page = " ".join(render_page(results).split())
    for said in ("0° is the same direction", "a random B has about 90°", "how large B is along W"):
        assert said in page


def test_page_escapes_what_the_results_say(results):
    attack = "<img src=x onerror=alert(1)>"
    results.runs.append(make_run(attack, 0, [50.0, 40.0]))
    results.runs[-1].history[-1].gain[attack] = 1.0
    results.model = results.command = attack
    results.data, results.config = DataFacts(name=attack), {attack: attack}
    results.metric, results.looks = Metric(name=attack, unit=attack), {attack: Look(label=attack + "!")}
    page = render_page(results)
    assert "alert(1)" in page
    assert attack not in page


def test_page_says_what_is_incomplete(results):
    results.runs[2].status = "interrupted"
    for run in results.runs[3:5]:
        run.status, run.history = "waiting", []
    page = render_page(results)
    assert "Incomplete: 2 of 6 runs have not started." in page
    assert "kp, seed 0: interrupted (epoch 2)" in page
    assert "kp, seed 1" not in page
    assert row_of(results, "kp")["status"] == "seed 0 interrupted (epoch 2); seed 1 waiting"


def test_page_says_which_run_is_going_on(results):
    run = results.runs[2]
    run.status = "running"
    assert "kp, seed 0: running, epoch 3 of 6." in render_page(results)
    assert row_of(results, "kp")["status"] == "seed 0 running"
    run.history[-1].epoch = 6  # measured, but not ended yet
    assert "kp, seed 0: running, epoch 6 of 6." in render_page(results)
    run.history.clear()
    assert "kp, seed 0: running, epoch 1 of 6." in render_page(results)


def test_rule_whose_runs_all_wait_says_so_once(results):
    for run in results.runs[2:4]:
        run.status, run.history = "waiting", []
    row = row_of(results, "kp")
    assert (row["n"], row["test error"], row["status"]) == ("0/2", "–", "waiting")


def test_measurement_before_training_is_epoch_zero(results):
    for run in results.runs:
        run.start = run.history.pop(0)
        run.start.seconds = 100.0
    curve = layer_curves(results.runs[2:4], "gain")["fc"]
    assert (curve.epochs, curve.n) == ([0, 1, 2], [2, 2, 2])
    assert row_of(results, "kp")["s per epoch"] == "2.0"  # training only


def test_diverged_run_names_the_epoch_in_which_it_diverged(results):
    results.runs[-1].diverged_epoch = 2
    assert row_of(results, "fa")["status"] == "seed 1 diverged (epoch 2)"


def test_names_with_dollar_signs_are_not_mathematics(results, tmp_path):
    results.runs[2].rule = r"$\nonsense$"
    assert {path.name for path in write_report(results, tmp_path)} >= FIGURES


def in_mse():
    runs = [make_run(rule, seed, [1.0, 0.02 + 0.001 * seed]) for rule in ("bp", "kp") for seed in (0, 1)]
    return make_results(*runs, metric=Metric(name="mse", unit=""))


def test_numbers_of_any_metric_have_its_name_unit_and_digits():
    results = in_mse()
    row = row_of(results, "kp")
    assert (row["test mse"], row["minus bp"]) == ("0.0205(5)", "+0.00(0)")
    page = render_page(results)
    assert "Test mse after the last epoch" in page
    assert "test error" not in page
    assert "%{y:.4g}%{customdata}" in page
    results.metric = Metric(name="top_1", unit="dB", lower_is_better=False)
    assert row_of(results, "kp")["test top 1"] == "0.0205(5) dB"
    page = " ".join(render_page(results).split())
    assert "Higher is better" in page
    assert "the difference to backprop in dB, paired" in page


def test_an_error_that_is_rounding_does_not_print_its_digits():
    results = in_mse()
    for run in results.runs[2:]:
        run.test += 0.0123
    assert row_of(results, "kp")["minus bp"] == "+0.0123"


@pytest.mark.parametrize(
    ("values", "metric", "scale", "ends", "ticks"),
    [
        ([99.0, 3.0], Metric(), "log", (3 / 1.1, 110), [3, 5, 10, 20, 30, 50, 100]),
        ([1e-6, 50.0], Metric(unit=""), "log", (1e-6 / 1.1, 110), [10.0**n for n in range(-6, 3)]),
        ([6.8, 1.2], Metric(), "log", (1 / 1.1, 11), [1, 2, 3, 5, 10]),
        ([8.2, 8.4], Metric(), "log", (10 / 6, 11), [2, 3, 5, 10]),
        ([0.0, 0.1], Metric(), "linear", (-0.04, 1.04), [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ([0.0, 0.1], Metric(unit=""), "linear", (-0.004, 0.104), [0, 0.02, 0.04, 0.06, 0.08, 0.1]),
        ([-1.0, 1.0], Metric(unit=""), "linear", (-1.08, 1.08), [-1, -0.5, 0, 0.5, 1]),
        ([91.0, 99.0], Metric(lower_is_better=False), "linear", (89.6, 100.4), [90, 92, 94, 96, 98, 100]),
    ],
)
def test_axes_suit_the_metric(values, metric, scale, ends, ticks):
    assert error_axis(values, metric) == (scale, pytest.approx(ends), pytest.approx(ticks))


def without(*quantities):
    def strip(results):
        for run in results.runs:
            for entry in run.history:
                for quantity in quantities:
                    setattr(entry, quantity, None if quantity == "test" else {})

    return strip


def no_history(results):
    for run in results.runs:
        run.history, run.test = [], None


def only_epoch_one(results):
    for run in results.runs:
        run.history = run.history[1:2]


def nothing_but_nan(results):
    without("test", "gain", "delta_angle_deg")(results)
    for run in results.runs:
        for entry in run.history:
            entry.matrix_angle_deg = dict.fromkeys(LAYERS, float("nan"))


def zero_error(results):
    for run in results.runs[:2]:
        run.test = run.history[-1].test = 0.0


ALIGNMENT, GAINS, CURVES = (
    {f"{name}.{kind}" for kind in KINDS} for name in ("alignment", "gains", "learning_curves")
)


@pytest.mark.parametrize(
    ("change", "figures"),
    [
        pytest.param(lambda results: results.runs.clear(), set(), id="no-runs"),
        pytest.param(no_history, set(), id="no-history"),
        pytest.param(nothing_but_nan, set(), id="nan"),
        pytest.param(only_epoch_one, FIGURES, id="one-epoch"),
        pytest.param(zero_error, FIGURES, id="zero-error"),
        pytest.param(without("delta_angle_deg"), FIGURES, id="no-delta"),
        pytest.param(without("matrix_angle_deg", "delta_angle_deg"), CURVES | GAINS, id="no-angles"),
        pytest.param(without("test"), ALIGNMENT | GAINS, id="no-error"),
        pytest.param(lambda results: results.runs.__delitem__(slice(1, None)), CURVES, id="bp-alone"),
        pytest.param(lambda results: results.runs.__delitem__(slice(5)), FIGURES, id="diverged-alone"),
    ],
)
def test_report_shows_what_there_is(results, tmp_path, change, figures):
    change(results)
    assert {path.name for path in write_report(results, tmp_path)} == figures | {"report.html"}
