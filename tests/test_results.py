"""What the kept result files show is what the project claims of its rules."""

import json
from pathlib import Path

import one_input_figures
import pytest

from feedbackpath.report import summarise
from feedbackpath.train.results import read_results

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(name):
    return read_results(BENCHMARKS / name)


def mean_error(results, rule):
    return results.summary[rule].test_mean


@pytest.mark.parametrize("file", sorted(BENCHMARKS.glob("*/results.json")), ids=lambda file: file.parent.name)
def test_kept_files_are_read_and_written_as_they_were(file):
    results, content = read_results(file.parent), json.loads(file.read_text())
    assert summarise(results.runs) == results.summary
    written = results.to_json()
    assert {name: written[name] for name in content} == content


def test_glyphs_mirror_and_kolen_pollack_learn_as_backprop_does():
    results = load("glyphs-resnet8")
    assert {rule: found.n for rule, found in results.summary.items()} == dict.fromkeys(
        ("bp", "fa", "ss", "kp", "wm"), 5
    )
    bp = mean_error(results, "bp")
    assert mean_error(results, "fa") > 80
    assert mean_error(results, "kp") == pytest.approx(bp, abs=1.5)
    assert mean_error(results, "wm") == pytest.approx(bp, abs=1.5)
    assert max(mean_error(results, rule) for rule in ("bp", "kp", "wm")) < mean_error(results, "ss") < 80


def test_glyphs_mirror_stays_aligned_from_its_first_mirroring_on():
    for run in load("glyphs-resnet8").runs:
        if run.rule == "wm":
            for entry in run.entries:
                assert max(entry.matrix_angle_deg.values()) < 12
                assert 0.9 < min(entry.gain.values()) <= max(entry.gain.values()) < 1.1


def test_fashion_mnist_is_at_or_below_the_published_figures():
    results = load("fashion-mnist-lenet")
    assert {found.n for found in results.summary.values()} == {5}
    for rule, published in (("bp", 9.2), ("fa", 13.06), ("ss", 9.61)):
        assert mean_error(results, rule) <= published
    for rule in ("kp", "wm"):
        assert mean_error(results, rule) == pytest.approx(mean_error(results, "bp"), abs=0.3)


def test_the_notes_have_the_ratios_that_were_measured():
    notes = (BENCHMARKS / "NOTES.md").read_text(encoding="utf-8")
    found = json.loads((BENCHMARKS / "step-cost" / "cpu.json").read_text())
    for name, network in found["networks"].items():
        ratios = [network["step"][rule] for rule in ("fa", "ss", "kp", "mirror-kp", "wm")]
        cells = " | ".join(f"{r['median']:.3f} ({r['q1']:.2f}–{r['q3']:.2f})" for r in ratios)
        assert f"| {name}, {network['batch_size']} | {cells} |" in notes


def load_one_input():
    return json.loads((BENCHMARKS / "one-input" / "angles.json").read_text())


def test_the_page_on_one_noisy_input_has_the_angles_that_were_measured():
    page = (BENCHMARKS.parent / "docs" / "one-input.md").read_text(encoding="utf-8")
    assert one_input_figures.make_table(load_one_input()["measured"]) in page


def test_one_noisy_input_leaves_the_angle_of_weights_times_covariance():
    """B = W C / v predicts each layer's angle from its inputs alone."""
    found = [f for f in load_one_input()["measured"] if f["method"] == "one-input" and f["network"] != "mlp"]
    for run in found:
        for name, angle in run["matrix_angle_deg"].items():
            assert angle == pytest.approx(run["inputs"][name]["predicted_angle_deg"], abs=5)
        assert max(run["matrix_angle_deg"].values()) > 60


def test_one_noisy_input_trains_only_decorrelated():
    summary = load("one-input").summary
    errors = {rule: found.test_mean for rule, found in summary.items()}
    assert max(errors["bp"], errors["wm"], errors["gaussian-mirror"]) < errors["one-input-decorrelate"]
    assert errors["one-input-decorrelate"] < errors["one-input-scaled"]
    assert summary["one-input"].n == 0
