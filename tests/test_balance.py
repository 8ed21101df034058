"""The study of decay and rate: cells are kept, and theory is right where it is known."""

import json
import math

import balance
import balance_page
import brain_like
import pytest
import studies
import yaml
from cells import run_cells

from feedbackpath.train.config import CompareConfig


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


@pytest.mark.parametrize("power", [0, 3])
def test_a_decay_that_falls_has_the_e_folds_of_a_constant_one(power):
    plan = balance.schedule({"lr": 0.2, "weight_decay": 0.03, "power": power}, 380)
    assert sum(lr * decay for lr, decay in plan) == pytest.approx(0.03 * sum(lr for lr, _ in plan))
    assert plan[0][0] == 0.2
    first, last = plan[0][1], plan[-1][1]
    assert (first == pytest.approx(last)) if power == 0 else (first > 1.5 * 0.03 and last < 1e-5)


def test_a_cell_of_several_seeds_has_their_mean_and_one_that_diverged_counts_as_chance():
    cells = [
        {"settings": {"lr": 1.0, "seed": seed}, "found": found}
        for seed, found in enumerate([{"error": 10.0, "last": 4.0}, {"diverged": True}])
    ]
    (mean,) = balance_page.means_over_seeds(cells)
    assert mean["found"] == {"error": 50.0, "last": 4.0, "errors": [10.0, 90.0]}


def test_a_map_tells_where_some_and_where_most_seeds_fail():
    error = balance_page.QUANTITIES[0]
    good, bad, gone = {"error": 4.0}, {"error": 93.0}, {"diverged": True}
    assert balance_page.value_and_text(error, [good, good, {"error": 6.0}]) == (4.0, "4.0")
    assert balance_page.value_and_text(error, [good, {"error": 6.0}, gone]) == (5.0, "5.0*")
    assert balance_page.value_and_text(error, [good, bad, gone])[1] == "×"
    assert balance_page.value_and_text(error, [])[1] == ""


def test_the_sum_of_e_folds_is_exact_for_small_steps_alone():
    small = balance.schedule({"lr": 0.01, "weight_decay": 0.01}, 2000)
    large = balance.schedule({"lr": 0.2, "weight_decay": 0.1}, 380)
    assert balance.exact_efolds(small, 0.9) == pytest.approx(sum(lr * wd for lr, wd in small) / 0.1, rel=0.01)
    assert (
        balance.exact_efolds(large, 0.9)
        < 380 * -math.log(math.sqrt(0.9))
        < sum(lr * wd for lr, wd in large) / 0.1
    )


def test_the_tables_of_the_page_are_written_from_the_result_files():
    cells = json.loads((balance.OUT / "falling.json").read_text())["cells"]
    page = balance_page.PAGE.read_text(encoding="utf-8")
    assert balance_page.falling_table(cells) in page
    assert balance_page.recipe_table() in page


def test_the_mirror_has_cells_of_its_own():
    found = balance.measure({**balance.DEFAULTS, **balance.MIRROR, "epochs": 1})
    assert found["worst"] < 45
    assert "predicted" not in found


@pytest.mark.parametrize("study", brain_like.STUDIES)
def test_a_study_of_the_brain_like_network_tunes_and_trains_the_same_network(study, tmp_path, monkeypatch):
    monkeypatch.setattr(brain_like, "WORK", tmp_path / "work")
    monkeypatch.setattr(brain_like, "OUT", tmp_path / "kept")
    searched, trained = [], []

    def search(work, kept, config, file, *effort):
        searched.append(CompareConfig.model_validate(yaml.safe_load(file.read_text())))
        kept.mkdir(parents=True)
        (kept / "chosen.yaml").write_text(file.read_text())

    monkeypatch.setattr(studies, "search", search)
    monkeypatch.setattr(
        brain_like, "train", lambda settings, *_: trained.append(CompareConfig.model_validate(settings))
    )
    for command in ("tune", "run"):
        brain_like.main([command, study, "--data-dir", "data"])
    shared = ("data", "model", "norm", "activation", "connections", "rules", "data_dir")
    for one, other in zip(searched, trained, strict=True):
        assert [getattr(one, name) for name in shared] == [getattr(other, name) for name in shared]
        assert one.epochs * 3 == other.epochs
    networks = [(one.norm, one.activation, one.connections) for one in trained]
    assert len(set(networks)) == len(brain_like.PARTS)


def test_the_page_of_the_brain_like_network_has_the_tables_of_its_files():
    page = brain_like.PAGE.read_text()
    for study in brain_like.STUDIES:
        assert f"<!-- {study}:begin -->\n{brain_like.table(study)}\n<!-- {study}:end -->" in page
    marked = f"<!-- brain-like-cost:begin -->\n{brain_like.cost_table()}\n<!-- brain-like-cost:end -->"
    assert marked in page
