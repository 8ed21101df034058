"""How jobs end that somebody stops, and that nothing is lost or overwritten: one process or two."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import feedbackpath as fp
from feedbackpath import cli
from feedbackpath.errors import ConfigError
from feedbackpath.jobs.signals import Interrupted, StopRequest
from feedbackpath.tasks import load_task
from feedbackpath.train.config import RunConfig
from feedbackpath.train.engine import Engine
from feedbackpath.train.loop import Paused, train
from feedbackpath.train.results import read_results

LONG = ["--data", "digits", "--model", "mlp", "--rule", "kp", "--lr", "0.01", "--epochs", "300"]
LONG += ["--samples-per-epoch", "512", "--checkpoint-steps", "2", "--num-threads", "1"]
SMALL = [
    "--data",
    "digits",
    "--model",
    "mlp",
    "--epochs",
    "1",
    "--samples-per-epoch",
    "64",
    "--num-threads",
    "1",
]
STOPPING = "feedbackpath: stopping after this step; once more ends it at once"


def start(out, *more, **options):
    """Start a long training as the leader of a group of processes, as a shell does."""
    command = [sys.executable, "-m", "feedbackpath", "train", *LONG, "--out", str(out), *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(command, text=True, start_new_session=True, **pipes)


def wait_until_it_trains(process, out):
    until = time.monotonic() + 200
    while not list(Path(out).glob("checkpoints/*/epoch-0001-sample-0*[1-9]*")) and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()


def lines_of(text):
    return [line for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("number", [signal.SIGHUP, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_one_signal_is_answered_and_the_work_kept(tmp_path, number):
    out = tmp_path / "run"
    process = start(out)
    wait_until_it_trains(process, out)
    os.killpg(process.pid, number)
    printed, told = process.communicate(timeout=200)
    assert process.returncode == 128 + number
    assert lines_of(told) == [STOPPING]
    assert "what was done is kept" in printed
    assert read_results(out).runs[0].status == "interrupted"


def test_the_second_signal_ends_a_job_at_once():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop
        assert stop.number == signal.SIGTERM
        with pytest.raises(Interrupted) as asked:
            os.kill(os.getpid(), signal.SIGINT)
    assert (asked.value.exit_code, asked.value.is_at_once) == (130, True)


def test_nohup_keeps_the_hangup_away():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop
    finally:
        signal.signal(signal.SIGHUP, before)


def children_of(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.slow
def test_two_processes_are_stopped_as_one(tmp_path):
    out = tmp_path / "run"
    process = start(out, "--devices", "2")
    wait_until_it_trains(process, out)
    children = children_of(process)
    os.killpg(process.pid, signal.SIGINT)
    printed, told = process.communicate(timeout=200)
    assert process.returncode == 130, told
    assert lines_of(told) == [STOPPING]
    assert "interrupted: what was done is kept" in printed
    assert not any(Path(f"/proc/{child}").exists() for child in children)


@pytest.mark.slow
def test_a_killed_child_ends_both_in_a_line(tmp_path):
    out = tmp_path / "run"
    process = start(out, "--devices", "2")
    wait_until_it_trains(process, out)
    os.kill(children_of(process)[0], signal.SIGKILL)
    printed, told = process.communicate(timeout=200)
    assert process.returncode == 128 + signal.SIGKILL, told
    assert len(lines_of(told)) + ("process 2 of 2" in printed) == 1, told
    assert "process 2 of 2 was ended by signal 9" in told + printed.replace("\n", " ")


@pytest.mark.slow
def test_a_refusal_of_two_processes_is_one_line(tmp_path):
    (tmp_path / "config.yaml").write_text("mine: 1\n")
    process = start(tmp_path, "--devices", "2")
    _, told = process.communicate(timeout=200)
    assert process.returncode == 2
    assert len(lines_of(told)) == 1, told


def test_a_closed_output_pipe_ends_no_training(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    out = tmp_path / "run"
    process = start(out, "--max-steps", "9", stdout=writer)
    os.close(writer)
    _, told = process.communicate(timeout=200)
    assert process.returncode == 0, told
    assert not told
    assert read_results(out).runs[0].status == "finished"


@pytest.mark.slow
def test_any_name_of_a_folder_and_any_terminal(tmp_path):
    out = os.fsencode(tmp_path) + b"/[/x] caf\xe9 \x1b[31m"
    command = [sys.executable, "-m", "feedbackpath", "train", *SMALL, "--out", out]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "POSIX"}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    assert b"\x1b" not in done.stdout
    assert rb"[/x] caf\udce9 \x1b[31m" in done.stdout.replace(b"\n", b"")
    again = [sys.executable, "-m", "feedbackpath", "train", "--resume", out]
    done = subprocess.run(again, capture_output=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return stop.value.code


# --- torchrun ----------------------------------------------------------------------------------------------


@pytest.fixture
def torchrun(monkeypatch):
    """Be what torchrun has started, again and again."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    for name in ("LOCAL_RANK", "GROUP_RANK"):
        monkeypatch.setenv(name, "0")
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "GROUP_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    return lambda count: monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))


def test_with_restarts_a_refusal_stays_a_refusal(tmp_path, torchrun, monkeypatch):
    out = tmp_path / "run"
    torchrun(0)
    assert run("train", *SMALL, "--out", out) == 0
    before = (out / "results.json").read_bytes()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another job")
    for attempt in range(3):
        torchrun(attempt)
        assert run("train", *SMALL, "--out", out) == 2
    assert (out / "results.json").read_bytes() == before
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    torchrun(1)
    assert run("train", *SMALL, "--out", out) == 0  # its own: it goes on


# --- Files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.yaml", "model.safetensors", "report.html", "history.jsonl"])
def test_a_file_of_the_users_is_not_overwritten(tmp_path, capsys, name):
    (tmp_path / name).write_text("epochs: 1\n")
    more = ["--config", tmp_path / name] if name == "config.yaml" else []
    for command in ("train", "compare"):
        assert run(command, *SMALL, *more, "--out", tmp_path) == 2
        assert f"{name} exists, is not from a job" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "epochs: 1\n"
    if name in ("history.jsonl", "report.html"):
        with pytest.raises(ConfigError, match="not from a job"):
            fp.Recorder(tmp_path, rule="kp")


def test_chosen_settings_and_figures_of_others_are_not_overwritten(tmp_path, capsys):
    (tmp_path / "chosen.yaml").write_text("epochs: 1\n")
    assert run("tune", *SMALL, "--config", tmp_path / "chosen.yaml", "--out", tmp_path) == 2
    (tmp_path / "mine.json").write_text("{}")
    assert run("bench", "--models", "mlp", "--rules", "bp", "--out", tmp_path / "mine.json") == 2
    assert (tmp_path / "mine.json").read_text() == "{}"
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_run_folder_has_one_mode_and_the_umask_decides_which(tmp_path):
    before = os.umask(0o027)
    try:
        assert run("train", *SMALL, "--out", tmp_path / "run") == 0
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert modes == {0o640}
    folders = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run").rglob("*") if path.is_dir()}
    assert folders == {0o750}
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_a_folder_that_was_deleted_meanwhile_is_made_again(tmp_path):
    import shutil

    from feedbackpath.jobs.book import ResultsBook

    out, config = tmp_path / "run", RunConfig(data="digits", model="mlp", rule="kp")
    book = ResultsBook(out, config, load_task("digits"), "", resume=False)
    book.open(is_writer=True)
    shutil.rmtree(out)
    book.end(book.results.runs[0], "interrupted")
    assert yaml.safe_load((out / "config.yaml").read_text())["rule"] == "kp"
    assert json.loads((out / "results.json").read_text())["runs"][0]["status"] == "interrupted"


def test_passes_of_mirror_mode_are_saved_as_often_as_steps():
    config = RunConfig(
        data="digits", model="mlp", rule="wm", epochs=2, mirror_epochs=1, samples_per_epoch=320,
        batch_size=32, checkpoint_steps=4, num_threads=1, select_best=False, max_steps=1,
    )  # fmt: skip
    task = load_task("digits", samples_per_epoch=320)
    events = list(train(config, "wm", 0, task, Engine(config)))
    assert [event.state["consumed"] for event in events if isinstance(event, Paused)] == [4 * 32, 8 * 32]


def test_eval_says_that_a_best_checkpoint_cannot_be_made_afterwards(tmp_path, capsys):
    assert run("train", *SMALL, "--no-select-best", "--out", tmp_path / "run") == 0
    capsys.readouterr()
    assert run("eval", tmp_path / "run", "--which", "best") == 2
    told = capsys.readouterr().err
    assert "--which last" in told
    assert "--resume" not in told
