"""Bring your own: tasks, networks and rules from a Python file, and numbers of a loop of one's own."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import feedbackpath as fp
from feedbackpath import cli
from feedbackpath.errors import ConfigError, DataError
from feedbackpath.jobs.imports import import_files
from feedbackpath.measure.deltas import Delta
from feedbackpath.tasks import load_task
from feedbackpath.train.results import read_results

EXAMPLES = Path(__file__).parent.parent / "examples"
SHORT = ["--epochs", "1", "--samples-per-epoch", "256", "--num-threads", "1"]


def run_cli(*arguments) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return stop.value.code


def in_a_new_process(*arguments, cwd=None):
    command = [sys.executable, "-m", "feedbackpath", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd)


def test_a_comparison_of_ones_own_task_network_and_rule(tmp_path):
    file = EXAMPLES / "my_task.py"
    own = ["--import", file, "--data", "mine", "--model", "mynet", "--epochs", "2", "--num-threads", "1"]
    done = in_a_new_process("compare", *own, "--rules", "bp,kp,myrule", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    results = read_results(tmp_path / "run")
    assert [run.rule for run in results.runs] == ["bp", "kp", "myrule"]
    assert results.runs[0].test < 40
    assert results.looks["myrule"].label == "half-size feedback"
    assert "half-size feedback" in (tmp_path / "run" / "report.html").read_text()
    # What results.json tells works again, from another folder too.
    words = shlex.split(results.command)[1:]
    words[words.index("--out") + 1] = str(tmp_path / "again")
    again = in_a_new_process(*words, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert [run.test for run in read_results(tmp_path / "again").runs] == [run.test for run in results.runs]


@pytest.mark.parametrize(
    ("example", "data", "model", "metric"),
    [
        pytest.param("digits_by_row", "digit-rows", "row-lstm", "error", marks=pytest.mark.slow),
        ("regression", "sine", "curve", "mse"),
    ],
)
def test_the_examples_run_as_their_first_line_says(tmp_path, example, data, model, metric):
    text = (EXAMPLES / f"{example}.py").read_text()
    assert len(text.splitlines()) <= 30
    (command,) = re.findall(r"^feedbackpath (.*)$", text, flags=re.MULTILINE)
    short = ["--epochs", "1", "--num-threads", "1", "--out", tmp_path / "run"]
    done = in_a_new_process(*shlex.split(command), *short, cwd=EXAMPLES.parent)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "run" / "results.json").read_text())
    assert content["metric"]["name"] == metric
    assert all(run[f"test_{metric}"] is not None for run in content["runs"])
    assert (content["data"]["name"], content["model"]) == (data, model)


@pytest.mark.parametrize("command", ["compare", "train", "tune", "audit", "mirror plan"])
def test_every_command_takes_import_and_names_what_fails(tmp_path, capsys, command):
    (tmp_path / "broken.py").write_text("import feedbackpath\nfeedbackpath.nothing\n")
    for file, message in (("none.py", "there is no such file"), ("broken.py", "broken.py, line 2")):
        assert run_cli(*command.split(), "--import", tmp_path / file, *(
            [] if command in ("audit", "mirror plan") else ["--out", tmp_path / "run"]
        )) == 2  # fmt: skip
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_names_that_are_taken_are_refused(tmp_path):
    with pytest.raises(DataError, match="there is a dataset 'digits' already"):
        fp.register_task("digits", lambda seed: None)
    with pytest.raises(ConfigError, match="there is a model 'mlp' already"):
        fp.register_model("mlp", lambda: None)
    file = tmp_path / "once.py"
    file.write_text("import feedbackpath as fp\nfp.register_model('once', lambda: None)\n")
    import_files([file, file])
    import_files([file])


def test_a_task_of_tensors_checks_its_parts_and_counts_its_epochs():
    x, y = torch.randn(10, 3), torch.randint(2, (10,))
    part = (x, y)
    task = fp.Task.of_tensors("t", train=part, validation=part, test=part, num_outputs=2, samples_per_epoch=4)
    first, second = (task.train.batch(torch.arange(4), epoch)[0] for epoch in (0, 1))
    assert torch.equal(torch.cat([first, second]), x[:8])
    with pytest.raises(DataError, match="validation has 9 inputs and 10 targets"):
        fp.Task.of_tensors("t", train=part, validation=(x[1:], y), test=part, num_outputs=2)
    other = fp.Task.of_tensors("t", train=(x + 1, y), validation=part, test=part, num_outputs=2)
    assert other.facts["checksum"] != task.facts["checksum"]


def test_images_are_judged_by_the_error_in_percent():
    task = load_task("digits")
    logits = torch.eye(3)
    assert task.score(logits, torch.tensor([0, 1, 0])).tolist() == [0.0, 0.0, 100.0]
    assert (task.metric, task.unit, task.lower_is_better) == ("error", "%", True)


def test_a_loop_of_ones_own_stands_in_the_same_table(tmp_path, capsys):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    path = fp.untie(model, "kp")
    for seed in (0, 1):
        with fp.Recorder(
            tmp_path, rule="kp", seed=seed, metric="test_error", model="net", data="mine"
        ) as record:
            record.epoch(0, value=50.0, path=path)
            record.epoch(1, train_loss=0.5, value=4.0 + seed, path=path)
            record.epoch(2, train_loss=0.4, value=3.0 + seed, path=path)
    results = read_results(tmp_path)
    assert [(run.seed, run.status, run.test) for run in results.runs] == [
        (0, "finished", 3.0),
        (1, "finished", 4.0),
    ]
    assert (results.summary["kp"].n, results.summary["kp"].test_mean) == (2, 3.5)
    assert set(results.runs[0].history[0].matrix_angle_deg) == {"0", "2"}
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 4
    assert list(tmp_path.glob("figures/*.png"))
    assert run_cli("report", tmp_path) == 0
    assert "3.5(5)%" in capsys.readouterr().out


def test_recorders_refuse_what_would_mix_numbers(tmp_path):
    with fp.Recorder(tmp_path, rule="kp", metric="test_error") as record:
        record.epoch(1, value=4.0)
        with fp.Recorder(tmp_path, rule="bp", metric="test_error") as other:  # both go on at once
            other.epoch(1, value=2.0)
        record.epoch(2, value=3.0)
    assert [(run.rule, run.test) for run in read_results(tmp_path).runs] == [("bp", 2.0), ("kp", 3.0)]
    with pytest.raises(ConfigError, match="holds kp, seed 0 already"):
        fp.Recorder(tmp_path, rule="kp", metric="test_error")
    with pytest.raises(ConfigError, match="holds test_error"):
        fp.Recorder(tmp_path, rule="fa", metric="mse", unit="")
    with fp.Recorder(tmp_path, rule="kp", metric="test_error", resume=True) as record:
        record.epoch(2, value=2.5)
    assert [entry.test for entry in read_results(tmp_path).run_of("kp", 0).history] == [4.0, 2.5]


def test_a_recorder_says_how_a_run_ended(tmp_path):
    with pytest.raises(ZeroDivisionError), fp.Recorder(tmp_path, rule="kp") as record:
        record.epoch(1, value=4.0 / len(tmp_path.name[:0]))
    assert read_results(tmp_path).runs[0].status == "interrupted"
    record = fp.Recorder(tmp_path, rule="fa")
    record.epoch(1, value=90.0)
    record.close("diverged")
    assert read_results(tmp_path).run_of("fa", 0).diverged_epoch == 2


OWN = """
import sys
import torch
import feedbackpath as fp
from torch import nn

x = torch.ones(40, 3)
HERE = {here!r}


def make(seed):
    parts = {{name: (x, x.sum(1, keepdim=True)) for name in ("train", "validation", "test")}}
    return fp.Task.of_tensors(
        "own", **parts | {parts}, num_outputs=1, loss={loss}, score={score}, metric="mse", unit=""
    )


fp.register_task("own" + HERE, make)
fp.register_model("net" + HERE, lambda: {model})
{more}
"""
GOOD = {
    "parts": "{}",
    "loss": "nn.functional.mse_loss",
    "score": "lambda output, y: (output - y).square().mean(1)",
    "model": "nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))",
    "more": "",
}


def run_own(folder, *arguments, **changes):
    """Compare on a task and network of one's own, in this process, under names that are new."""
    here = folder.name
    (folder / "own.py").write_text(OWN.format(here=here, **(GOOD | changes)))
    own = ["--import", folder / "own.py", "--data", f"own{here}", "--model", f"net{here}", *arguments]
    return run_cli(
        "compare", *own, "--rules", "bp", "--epochs", 2, "--num-threads", 1, "--out", folder / "run"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": "nn.functional.mse_loss"}, "the score []"),
        ({"score": "lambda output, y: (output - y).square()"}, "the score [2, 1]"),
        ({"loss": "lambda output, y: (output - y).square().mean(1)"}, "the loss has the shape [2]"),
        ({"model": "nn.Linear(5, 1)"}, "RuntimeError: mat1 and mat2 shapes"),
        ({"model": "nn.LSTM(3, 1)"}, "'tuple' object"),
        ({"model": "1 / 0"}, "own.py, line 19: ZeroDivisionError"),
        ({"parts": "{'train': (x[:1], x[:1])}"}, "own.py, line 13: DataError: own: train has 1 inputs"),
        ({"parts": "{'validation': (x[:0], x[:0])}"}, "validation has 0 inputs and 0 targets"),
        ({"more": "sys.exit(0)"}, "own.py, line 20: SystemExit: 0"),
        ({"more": "fp.register_task('a/b', make)"}, "cannot be called 'a/b'"),
        ({"more": "fp.register_task('c', lambda: 3)"}, "must accept seed=0"),
        ({"more": "fp.register_model('own', None)"}, "register_model: make must be a function, not None"),
    ],
)
def test_what_of_ones_own_does_not_fit_is_one_line_before_anything_is_written(
    tmp_path, capsys, changes, message
):
    assert run_own(tmp_path, **changes) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_a_score_that_is_not_finite_counts_as_not_measured(tmp_path, number):
    score = f"lambda output, y: (output - y).square().mean(1) * float('{number}')"
    assert run_own(tmp_path, "--select-best", score=score) == 0
    (run,) = read_results(tmp_path / "run").runs
    assert (run.status, run.test, run.best) == ("finished", None, None)
    assert run_cli("report", tmp_path / "run") == 0


def test_numbers_that_are_not_finite_at_first_are_never_the_best(tmp_path):
    score = "lambda output, y, n=[0]: (n.append(0), (output - y).square().mean(1) / (len(n) > 6))[1]"
    assert run_own(tmp_path, "--select-best", score=score) == 0
    (run,) = read_results(tmp_path / "run").runs
    assert run.best.epoch == 2


@pytest.mark.parametrize("value", [np.float32(2.5), torch.tensor(2.5), np.float64(2.5)])
def test_recorders_take_numbers_of_any_kind(tmp_path, value):
    with fp.Recorder(tmp_path, rule="kp") as record:
        record.epoch(1, value=value, train_loss=value, deltas={"fc": Delta(value, 80.0, 1.0, 2.0)})
    assert read_results(tmp_path).runs[0].test == 2.5


def test_a_recorder_takes_a_loss_that_is_still_in_autograds_graph(tmp_path):
    loss = nn.Linear(3, 1)(torch.ones(2, 3)).square().mean()
    with fp.Recorder(tmp_path, rule="kp") as record:
        record.epoch(1, value=loss, train_loss=loss, validation=loss)
    (run,) = read_results(tmp_path).runs
    assert run.test == run.history[0].train_loss == run.history[0].validation == loss.item()


@pytest.mark.parametrize(
    "misuse",
    [
        lambda record: record.epoch(2, value="high"),
        lambda record: record.epoch(1.5, value=1.0),
        lambda record: record.epoch(-1, value=1.0),
        lambda record: record.close("done"),
        lambda record: (record.close(), record.epoch(2, value=1.0)),
        lambda record: fp.Recorder(record.folder, rule=None),
        lambda record: fp.Recorder(record.folder, rule="fa", seed="a"),
        lambda record: fp.Recorder(record.folder, rule="fa", config={"x": torch.ones(1)}),
    ],
)
def test_recorders_refuse_what_cannot_be_written_and_lose_nothing(tmp_path, misuse):
    record = fp.Recorder(tmp_path, rule="kp")
    record.epoch(1, value=4.0)
    with pytest.raises(ConfigError):
        misuse(record)
    record.close()
    record.close("interrupted")  # says nothing new
    (run,) = read_results(tmp_path).runs
    assert (run.rule, run.status, [entry.test for entry in run.history]) == ("kp", "finished", [4.0])


def test_a_recorder_leaves_what_a_job_has_written_into_its_folder(tmp_path):
    job = ["compare", "--data", "digits", "--model", "mlp", "--rules", "bp", *SHORT, "--out", tmp_path]
    assert run_cli(*job) == 0
    before = read_results(tmp_path)
    with fp.Recorder(tmp_path, rule="mine") as record:
        record.epoch(1, value=5.0)
    after = read_results(tmp_path)
    assert (after.data, after.model, after.config) == (before.data, before.model, before.config)
    assert run_cli(*job, "--resume") == 0
    assert [run.rule for run in read_results(tmp_path).runs] == ["bp", "mine"]
