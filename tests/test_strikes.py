"""A kill or a full disk at any file operation: a resume leaves what an unbroken run leaves."""

import io
import os
from pathlib import Path

import file_strikes
import pytest
from rich.console import Console

from feedbackpath.jobs import book, run_job
from feedbackpath.report import figures, page
from feedbackpath.report.live import LiveView
from feedbackpath.train.config import CompareConfig, RunConfig

SMALL = {
    "data": "digits", "model": "mlp", "epochs": 2, "samples_per_epoch": 256, "batch_size": 64, "lr": 0.05,
    "num_threads": 1,
}  # fmt: skip
JOBS = {
    "train": RunConfig(**SMALL, rule="kp", checkpoint_steps=2),
    "compare": CompareConfig(**SMALL, rules=("bp", "kp")),
}


@pytest.fixture(autouse=True)
def plain_outputs(monkeypatch):
    """Write the same files as ever, with less in them: drawing takes most of so small a job's time."""
    monkeypatch.setattr(
        figures, "render_figures", lambda panels: {"one.png": str(len(panels[0].runs)).encode()}
    )
    monkeypatch.setattr(page, "render_page", lambda panels, **_: str([run.status for run in panels[0].runs]))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a kill loses nothing that is written
    monkeypatch.setattr(book, "SHARE", 0)  # else the clock decides how often the page is written


def job_of(config, out: Path):
    def run() -> int:
        view = LiveView(Console(file=io.StringIO()))
        run_job(config, out, resume=(out / "results.json").exists(), command="", view=view)
        return 0

    return run


def strike_everywhere(tmp_path, kind, how, choose):
    config = JOBS[kind]
    job_of(config, tmp_path / "first")()  # imports what forked processes would each import
    operations = file_strikes.operations_in(job_of(config, tmp_path / "whole"), tmp_path / "whole")
    whole = file_strikes.contents_of(tmp_path / "whole")
    for number in choose(operations):
        if how == "full" and not operations[number].startswith(("open", "os.mkdir")):
            continue  # what takes no room works on a full disk
        out = tmp_path / f"struck-{number}"
        code = file_strikes.strike(job_of(config, out), out, number, how)
        assert code == (137 if how == "kill" else 2), (number, operations[number])
        assert file_strikes.strike(job_of(config, out), out, 10**9, "kill") == 0, (number, operations[number])
        found = file_strikes.contents_of(out)
        assert found.keys() == whole.keys(), (number, operations[number])
        differing = [name for name in whole if found[name] != whole[name]]
        assert not differing, (number, operations[number])


@pytest.mark.parametrize(("kind", "how"), [("train", "kill"), ("compare", "full")])
def test_a_strike_at_one_file_operation_of_each_kind(tmp_path, kind, how):
    strike_everywhere(tmp_path, kind, how, file_strikes.first_of_each_kind)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "full"])
@pytest.mark.parametrize("kind", JOBS)
def test_a_strike_between_every_two_file_operations(tmp_path, kind, how):
    strike_everywhere(tmp_path, kind, how, lambda operations: range(len(operations)))
