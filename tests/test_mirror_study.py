"""The study of mirror mode: cells, resume, refusals, figures; and theory against measurement."""

import json
import os
import signal
import time
from dataclasses import asdict, replace
from statistics import fmean

import mirror_study
import numpy as np
import pytest
from mirror_study import PARTS, StudySettings, run_study
from study_figures import write_study_figures
from study_table import describe_cell, group_trainings, markdown_study_table, read_study, study_rows

import feedbackpath as fp
from feedbackpath import cli
from feedbackpath.errors import ConfigError, UserError
from feedbackpath.jobs import Interrupted
from feedbackpath.mirror.noise import NOISES, code_length
from feedbackpath.mirror.settings import CODES

TINY = {"model": "mlp", "data": "digits", "epochs": 1, "samples_per_epoch": 64}
FLAGS = ["--model", "mlp", "--data", "digits", "--epochs", "1", "--samples-per-epoch", "64"]


@pytest.fixture(autouse=True)
def _few_cells(monkeypatch):
    monkeypatch.setattr(mirror_study, "RATES", (0.1, 1.0))
    monkeypatch.setattr(mirror_study, "DECAYS", (0.5,))
    monkeypatch.setattr(mirror_study, "DEPTHS", (8,))
    monkeypatch.setattr(mirror_study, "WIDTHS", (1,))
    monkeypatch.setattr(mirror_study, "BATCH_SIZES", (16, 128))
    monkeypatch.setattr(mirror_study, "SAMPLES", (256, 1024))
    monkeypatch.setattr(mirror_study, "PAPER", fp.Mirror.paper(samples=128))


def run_script(*arguments):
    return mirror_study.main([str(argument) for argument in arguments])


def run(out, *parts, resume=False, told=None, **changes):
    tell = (told if told is not None else []).append
    settings = StudySettings(parts, **(TINY | changes))
    return run_study(
        settings, out, resume=resume, command="a command", tell=lambda where, entry: tell((where, entry))
    )


def without_times(cells):
    return [{name: value for name, value in cell.items() if name != "cpu_seconds"} for cell in cells]


@pytest.mark.slow
def test_a_study_by_its_script(tmp_path, capsys):
    assert run_script(*FLAGS, "--parts", "designs,width,batch", "--out", tmp_path) == 0
    study = json.loads((tmp_path / "study.json").read_text())
    assert study["schema"] == 1
    assert study["command"].startswith("python benchmarks/mirror_study.py")
    assert {"feedbackpath", "torch", "python"} <= study["versions"].keys()
    assert study["settings"] == asdict(StudySettings(("designs", "width", "batch"), **TINY)) | {
        "parts": ["designs", "width", "batch"]
    }
    counts = {part: sum(cell["part"] == part for cell in study["cells"]) for part in PARTS}
    assert counts == {
        "designs": 3 * len((*NOISES, *CODES)) * 2,
        "grid": 0,
        "depth": 0,
        "width": 3,
        "batch": 6,
    }
    output = capsys.readouterr().out
    assert f"1/{sum(counts.values())} gaussian, dense, 256 inputs, ReLU" in output
    assert "wm, paper inside" in output
    for name in ("designs", "width", "batch"):
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert_theory_agrees(cell for cell in study["cells"] if cell["part"] == "designs")


def assert_theory_agrees(cells):
    for cell in cells:
        for angles, predicted in zip(cell["angle_deg"], cell["predicted_deg"], strict=True):
            if cell["design"] in CODES:
                assert max(angles) < 1e-4
                assert (predicted, cell["samples"]) == (0.0, [2 * code_length(cell["inputs"])])
            else:
                noise = 4 * np.std(angles, ddof=1) / len(angles) ** 0.5
                assert abs(fmean(angles) - predicted) < noise + 0.1 * predicted, describe_cell(cell)


@pytest.mark.slow
def test_the_grid_has_both_readings_and_what_stands_beside(tmp_path):
    study = run(tmp_path, "grid")
    groups = group_trainings(study, "grid")
    told = [(g.name, g.mirror.get("reading"), g.mirror.get("rate")) for g in groups]
    assert told == [
        ("bp", None, None), ("default", "calibrated", 0.1),
        ("paper", "inside", 0.1), ("paper", "inside", 1.0),
        ("paper", "printed", 0.1), ("paper", "printed", 1.0),
    ]  # fmt: skip
    gains = {(g.mirror["reading"], g.mirror["rate"]): g.last("gain_median")[0] for g in groups[2:]}
    # What a ReLU's neurons settle at: half of what the reading says, as paper.md derives.
    for setting, gain in {("inside", 0.1): 1, ("inside", 1.0): 1, ("printed", 0.1): 0.1}.items():
        assert gains[setting] == pytest.approx(gain, rel=0.25), setting
    assert gains["printed", 1.0] / gains["printed", 0.1] == pytest.approx(10, rel=0.25)
    assert [row[3] for row in study_rows(study)] == [
        "bp", "wm-exact", "wm, paper inside", "wm, paper printed",
    ]  # fmt: skip
    assert markdown_study_table(study).count("\n") == 2 + 4
    assert {path.name for path in write_study_figures(study, tmp_path)} == {"grid.png", "grid.pdf"}


@pytest.mark.slow
def test_trainings_are_those_of_compare(tmp_path):
    study = run(tmp_path, "batch")
    out = tmp_path / "compare"
    same = ["--data", "digits", "--model", "mlp", "--epochs", "1", "--samples-per-epoch", "64"]
    with pytest.raises(SystemExit):
        cli.main(
            ["compare", *same, "--rules", "bp", "--lr-batch-size", "128", "--batch-size", "16",
             "--num-threads", "1", "--out", str(out)]
        )  # fmt: skip
    (expected,) = json.loads((out / "results.json").read_text())["runs"]
    (found,) = (g for g in group_trainings(study, "batch") if (g.name, g.batch_size) == ("bp", 16))
    assert found.last("test_error") == [expected["test_error"]]


@pytest.mark.slow
def test_a_cell_that_two_parts_share_is_measured_once(tmp_path):
    told = []
    study = run(tmp_path, "width", "batch", told=told)
    shared = [c for c in study["cells"] if (c["model"], c["batch_size"], c["rule"]) == ("mlp", 128, "bp")]
    assert [cell["part"] for cell in shared] == ["width", "batch"]
    assert shared[0]["cpu_seconds"] == shared[1]["cpu_seconds"]
    assert [where for where, _ in told] == [f"{number}/9" for number in range(1, 10)]


@pytest.mark.slow
def test_resume_measures_what_is_missing_and_no_more(tmp_path):
    whole = run(tmp_path / "whole", "batch")
    folder = tmp_path / "part"
    folder.mkdir()
    (folder / "study.json").write_text(json.dumps(whole | {"cells": whole["cells"][:4]}))
    told = []
    resumed = run(folder, "batch", resume=True, told=told)
    assert [where for where, _ in told] == ["5/6", "6/6"]
    assert without_times(resumed["cells"]) == without_times(whole["cells"])
    assert read_study(folder)["cells"] == json.loads(json.dumps(resumed["cells"]))
    told.clear()
    run(folder, "batch", "width", resume=True, seeds=2, told=told)
    assert read_study(folder)["settings"]["parts"] == ["batch", "width"]
    assert {entry["seed"] for _, entry in told if entry["part"] == "batch"} == {1}


@pytest.mark.slow
def test_settings_that_a_cell_does_not_use_may_change(tmp_path, monkeypatch):
    run(tmp_path, "batch")
    paper, told = mirror_study.PAPER, []
    another = replace(paper, when=replace(paper.when, cost_share=0.5))
    monkeypatch.setattr(mirror_study, "PAPER", another)
    run(tmp_path, "batch", resume=True, told=told)
    assert not told
    monkeypatch.setattr(mirror_study, "PAPER", replace(paper, rate=0.3))
    run(tmp_path, "batch", resume=True, told=told)
    assert {entry["rule"] for _, entry in told} == {"paper"}


def test_a_cell_that_was_broken_off_is_not_kept(tmp_path):
    def stop_at_the_first(where, entry):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)

    settings = StudySettings(("batch",), **TINY)
    with pytest.raises(Interrupted) as stop:
        run_study(settings, tmp_path, resume=False, command="", tell=stop_at_the_first)
    assert stop.value.exit_code == 130
    assert len(read_study(tmp_path)["cells"]) == 1


@pytest.mark.slow
def test_trainings_that_diverge_are_cells_too(tmp_path, monkeypatch):
    monkeypatch.setattr(mirror_study, "BATCH_SIZES", (16,))
    monkeypatch.setattr(StudySettings, "config", with_learning_rate(StudySettings.config, 1e30), raising=True)
    study = run(tmp_path, "batch", epochs=2)
    for cell, row in zip(study["cells"], study_rows(study), strict=True):
        assert cell["status"] == "diverged"
        assert "error diverged" in describe_cell(cell)
        assert row[-1] == "diverged"
    assert write_study_figures(study, tmp_path)


def with_learning_rate(make_config, lr):
    return lambda self, *arguments: make_config(self, *arguments).model_copy(update={"lr": lr})


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--parts", "grid,depht"], "--parts: depht is not of designs, grid"),
        (["--samples-per-epoch", "1"], "--samples-per-epoch is 1; it must be at least 2"),
        (["--model", "resnet9"], "resnet9"),
    ],
)
def test_bad_settings_are_refused(flags, complaint, tmp_path):
    with pytest.raises(SystemExit, match=complaint):
        run_script(*flags, "--out", tmp_path)


@pytest.mark.slow
def test_other_settings_and_damaged_files_are_refused(tmp_path):
    run(tmp_path, "batch")
    with pytest.raises(ConfigError, match="go on by --resume"):
        run(tmp_path, "batch")
    with pytest.raises(ConfigError, match=r"other settings \(samples_per_epoch\)"):
        run(tmp_path, "batch", samples_per_epoch=32, resume=True)
    text = (tmp_path / "study.json").read_text()
    damages = (text[: len(text) // 2], "[]", '{"schema": 1}', text.replace('"schema": 1', '"schema": 0'))
    for damaged in damages:
        (tmp_path / "study.json").write_text(damaged)
        with pytest.raises(ConfigError, match=r"study\.json"):
            run(tmp_path, "batch", resume=True)


def test_a_model_that_does_not_come_in_other_widths_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(mirror_study, "WIDTHS", (1, 2))
    with pytest.raises(UserError, match="resnet18x2"):
        run(tmp_path, "width", model="resnet18")
    assert not (tmp_path / "study.json").exists()
