"""How ratios grow: what is measured at which sizes, and the figure of it."""

import json

import growth
import pytest
from cost_page import predict_cell, table_of_calibration, table_of_growth, table_of_model
from growth import AXES, Axis, Cell, GrowthSettings, run_growth
from growth_figure import GOALS, draw_growth

from feedbackpath.bench.workloads import find_workload
from feedbackpath.errors import ConfigError

RULES = ("fa", "kp", "wm")
SMALL = {"batch": Axis("batch", tuple(Cell(size, find_workload("mlp"), size) for size in (2, 4)))}


@pytest.fixture(scope="module")
def found():
    settings = GrowthSettings(("batch",), RULES, rounds=3, least_seconds=0.0, calibration_rounds=2)
    lines = []
    found = run_growth(settings, lines.append, SMALL)
    assert [line.partition(":")[0] for line in lines] == ["batch 2 (mlp, batch 2)", "batch 4 (mlp, batch 4)"]
    return json.loads(json.dumps(found))


def test_every_size_has_ratios_of_every_rule(found):
    cells = found["growth"]["batch"]["cells"]
    assert [cell["size"] for cell in cells] == [2, 4]
    for cell in cells:
        assert cell["rounds"] == 3
        assert cell["plain_seconds"] > 0
        assert all(0 < ratio["q1"] <= ratio["median"] <= ratio["q3"] for ratio in cell["step"].values())
    assert set(found["calibration"]["ns_per_value"]) == set(RULES)


def test_short_steps_are_timed_for_as_long_as_asked():
    settings = GrowthSettings(("batch",), ("fa",), rounds=2, least_seconds=0.2)
    assert growth.measure_cell(SMALL["batch"].cells[0], settings)["rounds"] > 2


def test_axes_grow():
    for axis in AXES.values():
        sizes = [cell.size for cell in axis.cells]
        assert sizes == sorted(set(sizes))
        assert len(sizes) >= 3


def test_calibration_layers_differ_in_number_or_size_alone():
    dense, convolution, values = (growth._STACKS[name].build() for name in ("dense", "convolution", "values"))
    kinds = [
        [type(m).__name__ for m in stack if any(True for _ in m.parameters())]
        for stack in (dense, convolution)
    ]
    assert kinds == [["Linear"] * 16, ["Conv2d"] * 16]
    assert max(p.numel() for p in values.parameters()) == growth.LARGE**2


def test_the_figure_shows_every_rule_and_the_goals(found):
    figure = draw_growth(found)
    panel, key = figure.axes
    assert len(panel.containers) == len(RULES)
    assert panel.get_xlabel() == "batch"
    assert len(key.get_legend().get_texts()) == len(RULES) + len(GOALS)


def test_tables_have_a_row_a_size(found):
    assert table_of_growth(found).count("(mlp, batch ") == 2
    assert table_of_calibration(found).count("µs") == 2
    predicted = predict_cell(found, found["growth"]["batch"]["cells"][0])
    assert f"{predicted['kp']:.3f} (" in table_of_model(found)


def test_unknown_axes_and_too_few_rounds_are_refused():
    with pytest.raises(ConfigError, match="rounds is 1"):
        GrowthSettings(("depth",), RULES, rounds=1)
    with pytest.raises(SystemExit, match="no axis 'height'"):
        growth.main(["--axes", "height"])


def test_the_script_writes_ratios_and_figure(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(AXES, "batch", SMALL["batch"])
    tiny = growth._Stack("stack", (4, 1, 1), 4, batch_size=1, num_layers=2)
    monkeypatch.setattr(growth, "_STACKS", dict.fromkeys(growth._STACKS, tiny))
    out = tmp_path / "growth.json"
    growth.main(["--axes", "batch", "--rules", "fa", "--rounds", "2", "--seconds", "0", "--out", str(out)])
    assert "batch 2 (mlp, batch 2): fa" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["command"].startswith("python benchmarks/growth.py --axes batch")
    assert found["growth"]["batch"]["label"] == "batch"
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
