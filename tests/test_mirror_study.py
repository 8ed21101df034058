"""mirror --study: cells, resume, refusals, figures; and theory against measurement."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from statistics import fmean

import numpy as np
import pytest

import feedbackpath as fp
from feedbackpath import cli, mirror_command
from feedbackpath.jobs import Interrupted, mirror_study
from feedbackpath.jobs.mirror_study import PARTS, StudySettings, run_study
from feedbackpath.mirror import DESIGNS
from feedbackpath.report.study import (
    describe_cell,
    group_trainings,
    markdown_study_table,
    read_study,
    study_rows,
)
from feedbackpath.report.study_figures import write_study_figures

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


def run_cli(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(["mirror", *(str(argument) for argument in arguments)])
    return stop.value.code


def run(out, *parts, resume=False, told=None, **changes):
    tell = (told if told is not None else []).append
    settings = StudySettings(parts, **(TINY | changes))
    return run_study(
        settings, out, resume=resume, command="a command", tell=lambda where, entry: tell((where, entry))
    )


def without_times(cells):
    return [{name: value for name, value in cell.items() if name != "cpu_seconds"} for cell in cells]


def test_a_study_from_the_command_line(tmp_path, capsys):
    assert run_cli("--study", *FLAGS, "--parts", "designs,depth,width,batch", "--out", tmp_path) == 0
    study = json.loads((tmp_path / "study.json").read_text())
    assert study["schema"] == 1
    assert study["command"].startswith("feedbackpath")
    assert {"feedbackpath", "torch", "python"} <= study["versions"].keys()
    assert study["settings"] == asdict(StudySettings(("designs", "depth", "width", "batch"), **TINY)) | {
        "parts": ["designs", "depth", "width", "batch"]
    }
    counts = {part: sum(cell["part"] == part for cell in study["cells"]) for part in PARTS}
    assert counts == {"designs": 4 * len(DESIGNS) * 2, "grid": 0, "depth": 3, "width": 3, "batch": 6}
    output = capsys.readouterr().out
    assert f"1/{sum(counts.values())} orthogonal, dense, 256 inputs, ReLU" in output
    assert "wm, paper inside" in output
    for name in ("designs", "depth", "width", "batch"):
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")


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
        "bp", "wm", "wm, paper inside", "wm, paper printed",
    ]  # fmt: skip
    assert markdown_study_table(study).count("\n") == 2 + 4
    assert {path.name for path in write_study_figures(study, tmp_path)} == {"grid.png", "grid.pdf"}


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


def test_a_cell_that_two_parts_share_is_measured_once(tmp_path):
    told = []
    study = run(tmp_path, "width", "batch", told=told)
    shared = [c for c in study["cells"] if (c["model"], c["batch_size"], c["rule"]) == ("mlp", 128, "bp")]
    assert [cell["part"] for cell in shared] == ["width", "batch"]
    assert shared[0]["cpu_seconds"] == shared[1]["cpu_seconds"]
    assert [where for where, _ in told] == [f"{number}/9" for number in range(1, 10)]


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


def test_settings_that_a_cell_does_not_use_may_change(tmp_path, monkeypatch):
    run(tmp_path, "batch")
    paper, told = mirror_study.PAPER, []
    another = replace(paper, when=replace(paper.when, cost_share=0.5, within_deg=3.0))
    monkeypatch.setattr(mirror_study, "PAPER", another)
    run(tmp_path, "batch", resume=True, told=told)
    assert not told
    monkeypatch.setattr(mirror_study, "PAPER", replace(paper, rate=0.3))
    run(tmp_path, "batch", resume=True, told=told)
    assert {entry["rule"] for _, entry in told} == {"paper"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_study_keeps_finished_cells(tmp_path, number):
    command = [sys.executable, "-m", "feedbackpath", "mirror", "--study", *FLAGS, "--parts", "batch"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path)], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    while "1/9" not in process.stdout.readline():
        assert process.poll() is None
    os.kill(process.pid, number)
    process.communicate(timeout=60)
    assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    kept = read_study(tmp_path)["cells"]
    assert 1 <= len(kept) < 9
    told = []
    resumed = run(tmp_path, "batch", resume=True, told=told)
    assert resumed["cells"][: len(kept)] == kept
    assert all(entry not in kept for _, entry in told)


def test_a_cell_that_was_broken_off_is_not_kept(tmp_path):
    def stop_at_the_first(where, entry):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)

    settings = StudySettings(("batch",), **TINY)
    with pytest.raises(Interrupted) as stop:
        run_study(settings, tmp_path, resume=False, command="", tell=stop_at_the_first)
    assert stop.value.exit_code == 130
    assert len(read_study(tmp_path)["cells"]) == 1


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
        ([], "say what to do"),
        (["--plan", "--study"], "say what to do"),
        (["--study", "--parts", "grid,depht"], "--parts: depht is not of designs, grid"),
        (["--study", "--seeds", "0"], "--seeds is 0; it must be at least 1"),
        (["--study", "--samples-per-epoch", "1"], "--samples-per-epoch is 1; it must be at least 2"),
        (["--study", "--noise", "gaussian"], "--noise is for --plan"),
        (["--plan", "--seeds", "2"], "--seeds is for --study"),
        (["--study", "--model", "resnet9"], "resnet9"),
        (["--study", "--data", "glyph"], "glyph"),
    ],
)
def test_bad_flags_are_one_line(flags, complaint, tmp_path, capsys):
    assert run_cli(*flags, "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_other_settings_and_damaged_files_are_refused(tmp_path, capsys):
    run(tmp_path, "batch")
    again = ["--study", "--parts", "batch", "--out", tmp_path]
    assert run_cli(*again, *FLAGS) == 2
    assert "go on by --resume" in capsys.readouterr().err
    assert run_cli(*again, *FLAGS[:-1], "32", "--resume") == 2
    assert "other settings (samples_per_epoch)" in capsys.readouterr().err
    text = (tmp_path / "study.json").read_text()
    for damaged in (
        text[: len(text) // 2],
        "[]",
        '{"schema": 1}',
        text.replace('"schema": 1', '"schema": 0'),
    ):
        (tmp_path / "study.json").write_text(damaged)
        assert run_cli(*again, *FLAGS, "--resume") == 2
        assert "study.json" in capsys.readouterr().err


def test_the_commands_defaults_are_the_studys():
    (parts, *rest) = (
        mirror_command.mirror.__kwdefaults__[name]
        for name in ("parts", "model", "data", "seeds", "epochs", "samples_per_epoch", "num_threads")
    )
    assert StudySettings(tuple(parts.split(","))) == StudySettings(tuple(PARTS), *rest)


def test_theory_agrees_with_what_is_measured(tmp_path):
    study = run(tmp_path, "designs")
    for cell in study["cells"]:
        for angles, predicted in zip(cell["angle_deg"], cell["predicted_deg"], strict=True):
            if cell["design"] == "orthogonal":
                assert max(angles) < 1e-4
                assert (predicted, cell["samples"]) == (0.0, [2 * 16 * -(-cell["inputs"] // 16)])
            else:
                noise = 4 * np.std(angles, ddof=1) / len(angles) ** 0.5
                assert abs(fmean(angles) - predicted) < noise + 0.1 * predicted, describe_cell(cell)


def test_a_model_that_does_not_come_in_other_widths_is_refused_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mirror_study, "WIDTHS", (1, 2))
    assert (
        run_cli("--study", "--model", "resnet18", "--data", "digits", "--parts", "width", "--out", tmp_path)
        == 2
    )
    assert "resnet18x2" in capsys.readouterr().err
    assert not (tmp_path / "study.json").exists()
