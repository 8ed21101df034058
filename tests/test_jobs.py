"""train and eval as their users meet them; what all jobs share is in test_compare.py."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from image_folders import make_class_folders
from rich.console import Console
from safetensors.torch import load_file

import feedbackpath as fp
from feedbackpath import cli
from feedbackpath.jobs import run_job
from feedbackpath.report.live import LiveView
from feedbackpath.train.config import CompareConfig
from feedbackpath.train.results import Look, read_results

SMALL = ["--data", "digits", "--model", "mlp", "--samples-per-epoch", "256", "--num-threads", "1"]
ON_FOLDERS = ["--data", "imagenet", "--model", "lenet", "--image-size", 32]
ON_FOLDERS += ["--batch-size", 8, "--num-threads", 1]


def run_cli(*arguments) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return stop.value.code


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    assert run_cli("train", *SMALL, "--rule", "kp", "--epochs", 3, "--out", out) == 0
    return out


def test_train_leaves_all_that_it_promises(trained):
    (run,) = read_results(trained).runs
    assert (run.rule, run.status, len(run.history)) == ("kp", "finished", 3)
    assert run.best.validation == min(entry.validation for entry in run.history)
    state = load_file(trained / "model.safetensors")
    assert {"fc1.weight", "fc1.feedback"} <= state.keys()
    kept = sorted(path.name.rpartition("-")[0] for path in trained.glob("checkpoints/kp-seed0/*"))
    assert kept == ["best", "epoch-0003-sample-000000000", "epoch-0004-sample-000000000"]
    assert len((trained / "history.jsonl").read_text().splitlines()) == 3
    assert list(trained.glob("tensorboard/kp-seed0/events*"))
    assert (trained / "report.html").exists()
    assert yaml.safe_load((trained / "config.yaml").read_text())["rule"] == "kp"


@pytest.mark.parametrize("which", ["last", "best"])
def test_eval_measures_what_training_did(trained, capsys, which):
    assert run_cli("eval", trained, "--which", which) == 0
    printed = capsys.readouterr().out
    (run,) = read_results(trained).runs
    entry = run.history[-1] if which == "last" else run.best
    expected = f"validation error {entry.validation:.2f}%, test error {entry.test:.2f}%"
    assert expected in printed
    assert "fc1: matrix angle" in printed


def test_a_finished_run_resumes_to_nothing(trained):
    before = (trained / "history.jsonl").read_text()
    assert run_cli("train", "--resume", trained) == 0
    assert (trained / "history.jsonl").read_text() == before


def test_a_damaged_checkpoint_falls_back_and_says_so(tmp_path, capsys):
    out = tmp_path / "run"
    assert run_cli("train", *SMALL, "--rule", "fa", "--epochs", 3, "--out", out) == 0
    whole = load_file(out / "model.safetensors")
    newest = max(out.glob("checkpoints/*/epoch-*.pt"))
    newest.write_bytes(newest.read_bytes()[:1000])
    results = json.loads((out / "results.json").read_text())
    results["runs"][0]["status"] = "running"  # as a process that was killed leaves it
    (out / "results.json").write_text(json.dumps(results))
    assert run_cli("train", "--resume", out) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "is damaged: going on from the one before" in printed
    for key, value in load_file(out / "model.safetensors").items():
        assert torch.equal(value, whole[key]), key


def test_divergence_says_where_it_began_and_keeps_the_last_good_checkpoint(tmp_path, capsys):
    out = tmp_path / "run"
    code = run_cli(
        "train", *SMALL, "--out", out, "--lr", "1e17", "--momentum", 0, "--no-nesterov",
        "--schedule", "constant",
    )  # fmt: skip
    assert code == 3
    printed = " ".join(capsys.readouterr().out.split())
    assert "diverged at step" in printed
    assert "learning rate" in printed
    assert "layer 'fc" in printed
    (run,) = read_results(out).runs
    assert run.divergence.step >= 2
    assert (
        f"diverged at step {run.divergence.step} (learning rate 1e+17)" in (out / "report.html").read_text()
    )
    assert list(out.glob("checkpoints/*/epoch-*.pt"))


def test_a_full_disk_is_said_and_costs_no_checkpoint(tmp_path, capsys, monkeypatch):
    out, saves = tmp_path / "run", []
    save = torch.save

    def fill_up(state, file):
        saves.append(1)
        if len(saves) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(state, file)

    monkeypatch.setattr(torch, "save", fill_up)
    assert run_cli("train", *SMALL, "--rule", "fa", "--no-select-best", "--out", out) == 2
    printed = capsys.readouterr().err
    assert "No space left on device" in printed
    assert "--resume" in printed
    monkeypatch.undo()
    assert len(list(out.glob("checkpoints/*/*.pt"))) == 2
    assert run_cli("train", "--resume", out) == 0
    assert read_results(out).runs[0].status == "finished"


def test_print_config_shows_every_value_and_runs_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = ("--recipe", "imagenet-resnet50", "--rule", "wm", "--data", "/data/imagenet")
    assert run_cli("train", *recipe, "--norm", "before", "--batch-size", "512", "--print-config") == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["data"], shown["data_dir"], shown["norm"]) == ("imagenet", "/data/imagenet", "before")
    assert (shown["batch_size"], shown["mirror_epochs"], shown["rule"]) == (512, 2, "wm")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--recipe", "glyph-resnet8"], "did you mean 'glyphs-resnet8'"),
        (["train", "--rul", "kp"], "--rule"),
        (["train", "--rule", "kq"], "unknown rule 'kq'"),
        (["train", "--resume", "."], "has no run"),
        (["train", "--resume", ".", "--recipe", "glyphs-resnet8"], "leave --recipe"),
        (["train", "--schedule", "step"], "--schedule is 'step': choose 'cosine', 'constant' or 'steps'"),
        (["eval", "."], "has no run"),
        (["eval"], "folder"),
    ],
)
def test_bad_input_gives_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run_cli(*arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1


def test_a_run_resumed_with_other_settings_is_refused(trained, capsys):
    assert run_cli("train", "--resume", trained, "--lr", "0.5") == 2
    assert "lr (0.2 there, 0.5 now)" in capsys.readouterr().err


def test_a_run_goes_on_where_its_data_has_moved_but_not_with_other_data(tmp_path, capsys):
    here, there = make_class_folders(tmp_path / "here"), tmp_path / "there"
    out = tmp_path / "run"
    assert run_cli("train", *ON_FOLDERS, "--data-dir", here, "--epochs", 1, "--out", out) == 0
    here.rename(there)
    assert run_cli("train", "--resume", out, "--data-dir", there) == 0
    next(there.glob("train/*/*.JPEG")).unlink()
    assert run_cli("train", "--resume", out, "--data-dir", there) == 2
    assert "the data's checksum (" in capsys.readouterr().err


class Labelled(fp.FeedbackAlignment):
    """Keep B as it is drawn, in a colour of its own."""

    name, label, colour = "labelled", "a rule with looks", "#12AB34"


class PageReader(LiveView):
    """Keeps what the page says while a job runs."""

    def __init__(self, file):
        super().__init__(Console(quiet=True))
        self.file, self.pages = file, []

    def show_measured(self, measured):
        super().show_measured(measured)
        self.pages.append(self.file.read_text(encoding="utf-8"))


def test_the_page_of_a_running_job_says_how_far_it_is_and_has_the_looks_of_rules(tmp_path, monkeypatch):
    monkeypatch.setattr("feedbackpath.jobs.book.SHARE", 0)
    monkeypatch.setitem(fp.RULES, "labelled", Labelled)
    small = {"data": "digits", "model": "mlp", "samples_per_epoch": 256, "num_threads": 1}
    config = CompareConfig(**small, rules=("labelled", "bp"), epochs=2)
    view = PageReader(tmp_path / "report.html")
    results = run_job(config, tmp_path, resume=False, command="", view=view)
    first, second, *_ = view.pages
    assert "labelled, seed 0: running, epoch 1 of 2." in first
    assert "Incomplete: 1 of 2 runs have not started." in first
    assert "labelled, seed 0: running, epoch 2 of 2." in second
    assert "#12AB34" in second
    assert "a rule with looks (labelled)" in second
    assert read_results(tmp_path).looks == results.looks
    look = Look(
        label="a rule with looks", colour="#12AB34", what="Keep B as it is drawn, in a colour of its own."
    )
    assert results.looks == {"labelled": look}
    assert f"<dd>{look.what}</dd>" in second
    assert "tells apart the 10 classes of digits. Guesses at random have a test error of 90.0%." in second
    assert "Save the printed figure" not in second  # they are drawn at the end
    assert "Save the printed figure" in view.file.read_text(encoding="utf-8")
    assert "seed 0: running" not in view.file.read_text(encoding="utf-8")


def test_two_processes_in_one_folder_one_runs_and_one_is_refused(tmp_path):
    command = [
        sys.executable,
        "-m",
        "feedbackpath",
        "train",
        *SMALL,
        "--epochs",
        "3",
        "--out",
        tmp_path / "run",
    ]
    both = [
        subprocess.Popen([*command, *own], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        for own in (["--rule", "kp"], ["--rule", "bp", "--seed", "5"])
    ]
    errors = [process.communicate(timeout=300)[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], errors
    winner, loser = (both[codes.index(code)] for code in (0, 2))
    refusal = errors[codes.index(2)]
    # Where one has ended before the other looks, its results are in the way, not its lock.
    assert f"is in use by process {winner.pid} on " in refusal or "already has results" in refusal
    assert loser.pid != winner.pid
    assert len(read_results(tmp_path / "run").runs) == 1


@pytest.fixture
def interrupted(tmp_path, trained):
    """A folder whose results file is gone, as a copy of a trained one."""
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    (out / "results.json").unlink()
    return out


def test_a_run_whose_results_file_is_gone_is_taken_up_from_its_checkpoint(interrupted, trained):
    ahead = time.time() + 7200
    for path in interrupted.glob("checkpoints/*/*"):
        os.utime(path, (ahead, ahead))
    assert run_cli("train", *SMALL, "--rule", "kp", "--epochs", 3, "--out", interrupted) == 0
    found, whole = (read_results(folder).runs[0].model_dump() for folder in (interrupted, trained))
    assert found == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--lr", "1e-4"], "lr (0.2 there, 0.0001 now)"),
        (["--weight-decay", "0.1"], "weight_decay (0.002 there, 0.1 now)"),
        (["--warmup-epochs", "1"], "warmup_epochs (0.5 there, 1.0 now)"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(interrupted, capsys, changes, message):
    arguments = ["--rule", "kp", "--epochs", 3, *SMALL, *changes]
    assert run_cli("train", *arguments, "--out", interrupted) == 2
    printed = capsys.readouterr().err
    assert "belongs to another run" in printed
    assert message in printed


@pytest.mark.parametrize("own", [["--rule", "fa"], ["--rule", "kp", "--seed", "1"]])
def test_a_checkpoint_of_another_rule_or_seed_is_refused(interrupted, capsys, own):
    (folder,) = interrupted.glob("checkpoints/*")
    folder.rename(folder.with_name("fa-seed0" if own[1] == "fa" else "kp-seed1"))
    assert run_cli("train", *SMALL, *own, "--epochs", 3, "--out", interrupted) == 2
    assert "belongs to another run" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named_with_its_cause(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run_cli("train", *SMALL, "--out", tmp_path / "file" / "run") == 2
    printed = capsys.readouterr().err
    assert str(tmp_path / "file") in printed
    assert "Not a directory" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--mirror-epochs", "3", "--epochs", "1"], "leaves none for training"),
        (["compare", "--rules", "bp,kp", "--mirror-epochs", "1"], "no rule of this job mirrors"),
        (["compare", "--norm", "before"], "mlp has no BatchNorm"),
        (["compare", "--optimizer", "adamw", "--momentum", "0.9"], "belongs to --optimizer sgd"),
        (["compare", "--milestones", "1,2"], "belongs to --schedule steps"),
        (["train", "--channels-last"], "mlp has no convolution"),
        (["audit", "--samples-per-epoch", "64"], "an audit takes one minibatch"),
        (["tune", "--checkpoint-steps", "5"], "no effect in a search"),
    ],
)
def test_a_flag_without_effect_is_refused(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run_cli(*arguments, "--model", "mlp", "--data", "digits") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_early_efolds_that_need_more_steps_are_refused_before_anything_is_written(
    tmp_path, monkeypatch, capsys, optimizer
):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", "mlp", "--data", "digits", "--epochs", "1", "--early-efolds", "5"]
    assert run_cli("compare", *flags, "--optimizer", optimizer) == 2
    assert "--early-efolds 5: too many for a tenth of the training steps" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_milestones_are_flags_of_the_schedule_by_steps(capsys):
    flags = ["--schedule", "steps", "--milestones", "1,3", "--print-config"]
    assert run_cli("train", *flags) == 0
    assert yaml.safe_load(capsys.readouterr().out)["milestones"] == [1, 3]


def spoil(image):
    """Damage the lower half of an image, where a crop may not look."""
    raw = image.read_bytes()
    image.write_bytes(raw[: len(raw) // 2])


@pytest.mark.parametrize("part", ["train", pytest.param("val", marks=pytest.mark.slow)])
def test_a_run_that_a_bad_image_stopped_goes_on_as_its_message_says(tmp_path, capsys, part):
    data = make_class_folders(tmp_path / "data", classes=3, train=8, val=4)
    spoil(min((data / part).rglob("*.JPEG")))
    run = [*ON_FOLDERS, "--data-dir", data, "--rule", "kp", "--epochs", 2]
    assert run_cli("train", *run, "--out", tmp_path / "stopped") == 2
    message = capsys.readouterr().err
    assert "continue without such images by --resume RUN --on-bad-image skip" in message
    assert "begin a new run" in message
    assert run_cli("train", "--resume", tmp_path / "stopped", "--on-bad-image", "skip") == 0
    assert run_cli("train", *run, "--out", tmp_path / "whole", "--on-bad-image", "skip") == 0
    stopped, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("stopped", "whole"))
    for key, value in whole.items():
        assert torch.equal(value, stopped[key]), key
    last = read_results(tmp_path / "stopped").runs[0].history[-1]
    assert (last.unreadable_images, last.unreadable_test_images) == ((1, 0) if part == "train" else (0, 1))


def test_the_data_of_a_stopped_run_cannot_be_changed_and_a_new_run_can_begin(tmp_path, capsys):
    data = make_class_folders(tmp_path / "data", classes=3, train=8, val=4)
    bad = min((data / "train").rglob("*.JPEG"))
    spoil(bad)
    run = [*ON_FOLDERS, "--data-dir", data, "--rule", "fa", "--epochs", 1]
    assert run_cli("train", *run, "--out", tmp_path / "stopped") == 2
    bad.unlink()
    assert run_cli("train", "--resume", tmp_path / "stopped") == 2
    assert "the data's checksum" in capsys.readouterr().err
    assert run_cli("train", *run, "--out", tmp_path / "new") == 0


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("train", "training, epoch 1: none of 21 images could be read: feedbackpath data check DIR says why"),
        ("val", "evaluation: none of 12 images could be read"),
    ],
)
def test_where_no_image_can_be_read_there_is_no_result(tmp_path, capsys, part, message):
    data = make_class_folders(tmp_path / "data", classes=3, train=8, val=4)
    for image in (data / part).rglob("*.JPEG"):
        image.write_text("<html>")
    run = [*ON_FOLDERS, "--data-dir", data, "--rule", "fa", "--epochs", 1, "--no-select-best"]
    assert run_cli("train", *run, "--on-bad-image", "skip", "--out", tmp_path / "run") == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert read_results(tmp_path / "run").runs[0].test is None


def test_unreadable_test_images_are_no_errors(tmp_path):
    data = make_class_folders(tmp_path / "data", classes=3, train=8, val=4)
    run = [*ON_FOLDERS, "--data-dir", data, "--rule", "fa", "--epochs", 1, "--on-bad-image", "skip"]
    for image in sorted((data / "val").rglob("*.JPEG"))[4:]:
        image.write_text("<html>")
    assert run_cli("train", *run, "--out", tmp_path / "run") == 0
    (only,) = read_results(tmp_path / "run").runs[0].history
    assert only.unreadable_test_images == 8
    assert only.test in {0.0, 25.0, 50.0, 75.0, 100.0}  # of the four that are left


def test_a_comparison_does_not_take_over_the_folder_of_a_trained_network(tmp_path, trained, capsys):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    job = ["compare", *SMALL, "--rules", "kp", "--epochs", 3, "--select-best", "--out", out, "--resume"]
    assert run_cli(*job) == 2
    assert "was made by train, and compare cannot continue it" in capsys.readouterr().err
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("lost", ["model.safetensors", "checkpoints/kp-seed0/best-*.pt"])
def test_what_a_finished_run_has_lost_is_made_again(tmp_path, trained, lost):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    best = read_results(out).runs[0].best.epoch
    (path,) = out.glob(lost)
    content = path.read_bytes()
    path.unlink()
    results = json.loads((out / "results.json").read_text())
    results["runs"][0]["test_error"] = None
    (out / "results.json").write_text(json.dumps(results))
    assert run_cli("train", "--resume", out) == 0
    assert read_results(out).runs[0].test == read_results(trained).runs[0].test
    assert (read_results(out).runs[0].status, len(read_results(out).runs[0].history)) == ("finished", 3)
    if best == 3 or not lost.startswith("checkpoints"):
        assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["bq", "KP"])
def test_settings_of_a_rule_that_does_not_exist_are_refused(tmp_path, capsys, name):
    (tmp_path / "c.yaml").write_text(f"by_rule: {{{name}: {{lr: 0.1}}}}\n")
    job = ["compare", *SMALL, "--rules", "kp", "--config", tmp_path / "c.yaml", "--out", tmp_path / "run"]
    assert run_cli(*job) == 2
    assert f"unknown rule '{name}'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
