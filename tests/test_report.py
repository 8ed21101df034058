import copy
import json
import re
from io import StringIO

import numpy as np
import pytest
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
from feedbackpath.report.page import render_page as render_panels
from feedbackpath.report.panels import make_panel
from feedbackpath.report.style import style_of


def render_page(results):
    return render_panels([make_panel([("runs/a", results)])])


LAYERS = ("conv1", "layer1.0.conv1", "fc")
FIGURES = {f"{name}.{kind}" for name in ("learning_curves", "alignment", "gains") for kind in ("png", "pdf")}


def make_run(rule, seed, errors, *, status="finished", angle=5.0):
    """Make a run with an entry per error; epoch 0 has no training in it."""
    history = [
        {
            "epoch": epoch,
            "train_loss": error / 20,
            "test_error": error,
            "seconds": 2.0,
            "matrix_angle_deg": {layer: angle + index for index, layer in enumerate(LAYERS)},
            "delta_angle_deg": {layer: 2 * angle + index for index, layer in enumerate(LAYERS)},
            "gain": {layer: 1.0 + 0.1 * index for index, layer in enumerate(LAYERS)},
        }
        for epoch, error in enumerate(errors)
    ]
    return {"rule": rule, "seed": seed, "status": status, "test_error": errors[-1], "history": history}


def make_results():
    runs = [
        make_run("bp", 0, [99.0, 20.0, 3.0], angle=0.0),
        make_run("bp", 1, [99.0, 22.0, 3.4], angle=0.0),
        make_run("kp", 0, [99.0, 25.0, 3.5]),
        make_run("kp", 1, [99.0, 23.0, 4.1], angle=7.0),
        make_run("fa", 0, [99.0, 95.0, 93.0], angle=85.0),
        make_run("fa", 1, [99.0, 98.0], status="diverged", angle=85.0),
    ]
    return {
        "schema": 1,
        "command": "feedbackpath compare",
        "versions": {"torch": "2.13.0"},
        "device": "cpu",
        "data": {"name": "glyphs", "num_classes": 200},
        "model": "resnet8",
        "config": {"rules": ["bp", "kp", "fa"], "seeds": 2, "lr": 0.1},
        "runs": runs,
    }


@pytest.fixture
def results():
    return make_results()


def row_of(results, rule):
    return next(row for row in summary_rows(results) if row["rule"] == rule)


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
    summary = summarise(results["runs"])
    final = [3.5, 4.1]
    assert summary["kp"] == {
        "n": 2,
        "test_error_mean": pytest.approx(np.mean(final)),
        "test_error_se": pytest.approx(np.std(final, ddof=1) / np.sqrt(2)),
    }
    assert summary["fa"] == {"n": 1, "test_error_mean": 93.0, "test_error_se": None, "diverged": 1}


def test_summary_of_a_rule_that_never_finished_has_no_error():
    runs = [make_run("fa", 0, [99.0], status="diverged"), {"rule": "fa", "seed": 1, "status": "interrupted"}]
    expected = {"n": 0, "test_error_mean": None, "test_error_se": None, "diverged": 1}
    assert summarise(runs) == {"fa": expected}


def test_summary_leaves_unmeasured_errors_out(results):
    results["runs"][2]["history"][-1]["test_error"] = None
    assert summarise(results["runs"])["kp"]["n"] == 1


def test_layer_curves_average_over_seeds_and_skip_what_was_not_measured(results):
    kp = results["runs"][2:4]
    kp[0]["history"][2]["gain"] = {}
    kp[1]["history"][2]["gain"]["fc"] = float("nan")
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
    assert row["angle, output"] == "8.0°"
    assert row["angle, max"] == "9.0°"
    assert row["δ angle, max"] == "16.0°"
    assert row["gain"] == "1.00…1.20"
    assert (row["n"], row["s per epoch"], row["status"]) == ("2/2", "2.0", "finished")


def test_tiny_angles_do_not_print_as_zero(results):
    for run in results["runs"]:
        run["history"][-1]["matrix_angle_deg"] = dict.fromkeys(LAYERS, 1e-5)
    assert row_of(results, "kp")["angle, max"] == "1e-05°"


def test_diverged_run_is_named_and_not_averaged(results):
    row = row_of(results, "fa")
    assert row["n"] == "1/2"
    assert row["status"] == "seed 1 diverged (epoch 1)"
    assert row["test error"] == "93.0%"
    assert "fa, seed 1: diverged (epoch 1); left out" in render_page(results)


def test_terminal_table_fits_eighty_columns(results):
    results["runs"].append(make_run("mirror-kp", 0, [99.0, 3.0]))
    output = StringIO()
    Console(file=output, width=80).print(rich_table(results))
    assert "3.2(2)%" in output.getvalue()
    assert "…" not in re.sub(r"\d…\d", "", output.getvalue())  # nothing cut short


def test_tables_show_markup_in_a_rule_name_as_it_is(results):
    results["runs"][-1]["rule"] = "[red]a|b"
    output = StringIO()
    Console(file=output, width=200).print(rich_table(results))
    assert "[red]a|b" in output.getvalue()
    assert r"| [red]a\|b |" in markdown_table(results)


def test_built_in_rules_look_different_and_others_keep_their_look():
    styles = [style_of(rule) for rule in ("bp", "fa", "ss", "wm", "kp", "mirror-kp")]
    assert len({style.colour for style in styles}) == len({style.marker for style in styles}) == 6
    assert style_of("mine") == style_of("mine")
    assert style_of("mine").colour not in {style.colour for style in styles}


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
    after = {path: path.read_bytes() for path in write_report(copy.deepcopy(results), tmp_path)}
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


def test_page_escapes_what_the_results_say(results):
    attack = "<script>alert(1)</script>"
    results["runs"].append(make_run(attack, 0, [50.0, 40.0]))
    results["runs"][0]["status"] = attack
    results |= {"model": attack, "command": attack, "data": {"name": attack}, "config": {attack: attack}}
    results["runs"][-1]["history"][-1]["gain"][attack] = 1.0
    page = render_page(results)
    assert "alert(1)" in page
    assert attack not in page


def test_page_says_what_is_incomplete(results):
    results["runs"][2]["status"] = "interrupted"
    for run in results["runs"][3:5]:
        run |= {"status": "waiting", "history": []}
    page = render_page(results)
    assert "Incomplete: 2 of 6 runs have not started." in page
    assert "kp, seed 0: interrupted (epoch 2)" in page
    assert "kp, seed 1" not in page
    assert row_of(results, "kp")["status"] == "seed 0 interrupted (epoch 2); seed 1 waiting"


def test_rule_whose_runs_all_wait_says_so_once(results):
    for run in results["runs"][2:4]:
        run |= {"status": "waiting", "history": []}
    row = row_of(results, "kp")
    assert (row["n"], row["test error"], row["status"]) == ("0/2", "–", "waiting")


def test_measurement_before_training_is_epoch_zero(results):
    for run in results["runs"]:
        run["start"] = run["history"].pop(0) | {"seconds": 100.0}
    curve = layer_curves(results["runs"][2:4], "gain")["fc"]
    assert (curve.epochs, curve.n) == ([0, 1, 2], [2, 2, 2])
    assert row_of(results, "kp")["s per epoch"] == "2.0"  # training only


def test_diverged_run_names_the_epoch_in_which_it_diverged(results):
    results["runs"][-1]["diverged_epoch"] = 2
    assert row_of(results, "fa")["status"] == "seed 1 diverged (epoch 2)"


def test_names_with_dollar_signs_are_not_mathematics(results, tmp_path):
    results["runs"][2]["rule"] = r"$\nonsense$"
    assert {path.name for path in write_report(results, tmp_path)} >= FIGURES


def without(*quantities):
    def strip(results):
        for run in results["runs"]:
            for entry in run["history"]:
                for quantity in quantities:
                    entry.pop(quantity, None)

    return strip


def no_history(results):
    for run in results["runs"]:
        run.pop("history")
        run.pop("test_error")


def only_epoch_one(results):
    for run in results["runs"]:
        run["history"] = run["history"][1:2]


def nothing_but_nan(results):
    for run in results["runs"]:
        for entry in run["history"]:
            entry["test_error"] = None
            entry["matrix_angle_deg"] = dict.fromkeys(LAYERS, float("nan"))
            entry["delta_angle_deg"] = None
            entry["gain"] = {}


def zero_error(results):
    results["runs"][0]["history"][-1]["test_error"] = results["runs"][1]["history"][-1]["test_error"] = 0.0


ALIGNMENT, GAINS, CURVES = (
    {f"{name}.{kind}" for kind in ("png", "pdf")} for name in ("alignment", "gains", "learning_curves")
)


@pytest.mark.parametrize(
    ("change", "figures"),
    [
        (lambda results: results["runs"].clear(), set()),
        (lambda results: results.clear(), set()),
        (no_history, set()),
        (nothing_but_nan, set()),
        (only_epoch_one, FIGURES),
        (zero_error, FIGURES),
        (without("delta_angle_deg"), FIGURES),
        (without("matrix_angle_deg", "delta_angle_deg"), CURVES | GAINS),
        (without("test_error"), ALIGNMENT | GAINS),
        (lambda results: results.update(runs=results["runs"][:1]), CURVES),  # backprop alone
        (lambda results: results.update(runs=results["runs"][-1:]), FIGURES),  # one run, diverged
    ],
    ids=[
        "no-runs",
        "empty",
        "no-history",
        "nan",
        "one-epoch",
        "zero-error",
        "no-delta",
        "no-angles",
        "no-error",
        "bp-alone",
        "diverged-alone",
    ],
)
def test_report_shows_what_there_is(results, tmp_path, change, figures):
    change(results)
    assert {path.name for path in write_report(results, tmp_path)} == figures | {"report.html"}
    json.dumps(summarise(results.get("runs", [])), allow_nan=False)
