"""The study of decay and rate: cells are kept, and theory is right where it is known."""

import json
import math

import balance
import brain_like
import pytest
from cells import run_cells


def test_a_study_goes_on_where_it_was_broken_off(tmp_path):
    file, measured = tmp_path / "study.json", []

    def measure(cell):
        measured.append(cell["x"])
        return {"y": 2 * cell["x"]}

    cells = [{"x": x} for x in range(5)]
    run_cells(file, "command", cells, measure, at_most=2)
    assert json.loads(file.read_text())["cells"] == [
        {"settings": {"x": x}, "found": {"y": 2 * x}} for x in (0, 1)
    ]
    assert len(run_cells(file, "command", cells, measure)) == 5
    assert measured == [0, 1, 2, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["study.json"]


def test_theory_at_its_ends():
    assert balance.predict_angle(0.0, 1.0, 1.0, 1.0) == pytest.approx(90)  # nothing learned, nothing decayed
    assert balance.predict_angle(20.0, 1.0, 1.0, 1.0) == pytest.approx(0, abs=1e-5)
    # W has grown at right angles to W0 and B0, both of length 1, to length 2: B = W - W0 + B0.
    assert balance.predict_angle(0.0, 2.0, 1.0, 1.0) == pytest.approx(math.degrees(math.acos(3 / 4)))


@pytest.mark.parametrize("start", [1.0, 0.0])
def test_theory_is_what_a_run_does(start):
    settings = {**balance.DEFAULTS, "lr": 0.2, "weight_decay": 1e-2, "start": start, "epochs": 4}
    found = balance.measure(settings)
    assert found["last"] == pytest.approx(found["predicted"], abs=5)
    assert found["efolds"] == pytest.approx(0.2 * 1e-2 / 0.1 * 4 * 19 / 2, rel=0.05)


def test_the_mirror_has_cells_of_its_own():
    found = balance.measure({**balance.DEFAULTS, **balance.MIRROR, "epochs": 1})
    assert found["worst"] < 45
    assert "predicted" not in found


def test_every_study_of_the_brain_like_network_can_be_made():
    for settings in brain_like.STUDIES.values():
        for parts in brain_like.PARTS.values():
            assert (
                brain_like.CompareConfig(rules=brain_like.RULES, **settings, **parts).rules
                == brain_like.RULES
            )
