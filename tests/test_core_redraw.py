"""The comparison of two source trees: a tree equals itself, and differences are seen."""

import json
import math
from pathlib import Path

import core_redraw
import numpy as np
import pytest

import feedbackpath

TREE = Path(feedbackpath.__file__).resolve().parent.parent


def run(folder, command):
    """Compare the tree under test with itself; return what the result file says."""
    out = folder / "found.json"
    core_redraw.main([*command.split(), "--old", str(TREE), "--new", str(TREE), "--out", str(out)])
    results = json.loads(out.read_text())
    assert str(TREE) not in out.read_text()
    assert results["trees"]["old"] == results["trees"]["new"]
    return results


@pytest.mark.slow
def test_a_tree_trains_as_itself_in_two_processes(tmp_path):
    results = run(tmp_path, "losses --networks mlp --rules kp --steps 2 --processes 2 --fill-feedback")
    assert "--old OLD --new NEW" in results["command"]
    assert "--fill-feedback" in results["command"]
    assert [(cell["optimizer"], cell["dtype"]) for cell in results["cells"]] == [
        ("sgd", "float64"),
        ("adamw", "float64"),
        ("sgd", "float32"),
        ("adamw", "float32"),
    ]
    for cell in results["cells"]:
        assert cell["identical"]
        assert cell["same_initial_weights"]
        assert cell["losses"] == cell["feedback"] == cell["initial_feedback"] == 0.0
        assert cell.get("in_goal", True)


def test_a_tree_takes_turns_with_itself(tmp_path, capsys):
    options = "--networks mlp --rules fa --batch-size 4 --rounds 3 --seconds 0 --placements 1"
    cells = run(tmp_path, f"times {options}")["cells"]
    assert [cell["rule"] for cell in cells] == ["plain", "fa"]
    for cell in cells:
        assert cell["rounds"] == 3
        for ratio in ("new_over_old", "new_over_old_by_clock", "old_over_plain", "new_over_plain"):
            assert 0 < cell[ratio]["q1"] <= cell[ratio]["median"] <= cell[ratio]["q3"]
    assert cells[0]["old_over_plain"]["median"] == 1.0
    assert len(capsys.readouterr().out.splitlines()) == 3


def found(losses, feedback):
    weights = {"fc": np.array(feedback)}
    return {"digest": "", "losses": np.array(losses), "before": weights, "after": weights}


def test_differences_are_relative_and_the_largest_counts():
    seen = core_redraw.compare(found([2.0, 4.0], [3.0, 4.0]), found([2.0, 5.0], [3.0, 4.5]))
    assert seen["losses"] == 0.25
    assert seen["feedback"] == seen["initial_feedback"] == pytest.approx(0.1)
    assert not seen["identical"]


def test_what_cannot_be_compared_is_infinitely_far():
    old, new = found([2.0], [1.0]), found([math.nan], [1.0])
    assert core_redraw.compare(old, new)["losses"] == math.inf
    new["after"] = {"other": new["after"]["fc"]}
    assert core_redraw.compare(old, new)["feedback"] == math.inf
    assert not core_redraw.compare(old, new)["identical"]
