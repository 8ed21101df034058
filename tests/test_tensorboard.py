import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_report import make_run

from feedbackpath.report.tensorboard import TensorBoardLog
from feedbackpath.train.results import Metric


def read(folder):
    """Return every scalar of a log, by tag: (epoch, value) in the order written."""
    log = EventAccumulator(str(folder))
    log.Reload()
    return {tag: [(event.step, event.value) for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


def write(folder, run, entries):
    log = TensorBoardLog(folder)
    for entry in entries:
        log.add(run, entry, Metric())
    log.close()


def test_every_run_has_a_log_with_each_measured_number_by_epoch(tmp_path):
    log = TensorBoardLog(tmp_path)
    runs = [make_run("bp", 0, [99.0, 20.0]), make_run("kp", 1, [99.0, 30.0])]
    measured = runs[0].history[1]
    measured.train_loss, measured.gain, measured.unreadable_images = None, {"fc": float("nan")}, 5
    for run in runs:
        for entry in run.history:
            log.add(run, entry, Metric())
    log.close()
    bp, kp = read(tmp_path / "bp-seed0"), read(tmp_path / "kp-seed1")
    assert kp["test_error"] == [(0, 99.0), (1, 30.0)]
    assert kp["delta_angle_deg/layer1.0.conv1"] == [(0, 11.0), (1, 11.0)]
    assert "epoch" not in kp
    assert bp["unreadable_images"] == [(1, 5.0)]
    assert bp["train_loss"] == [(0, pytest.approx(99 / 20))]  # not measured, not finite: left out
    assert bp["gain/fc"] == [(0, pytest.approx(1.2))]


def test_a_resumed_run_takes_back_epochs_that_it_repeats(tmp_path):
    run = make_run("kp", 0, [99.0, 50.0, 40.0])
    write(tmp_path, run, run.history)
    again = make_run("kp", 0, [99.0, 50.0, 30.0, 20.0])
    write(tmp_path, again, again.history[2:])
    assert read(tmp_path / "kp-seed0")["test_error"] == [(0, 99.0), (1, 50.0), (2, 30.0), (3, 20.0)]


def test_without_tensorboard_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run = make_run("kp", 0, [99.0])
    write(tmp_path, run, run.history)
    assert list(tmp_path.iterdir()) == []
