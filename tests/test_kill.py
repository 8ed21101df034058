"""Nothing is lost: kill -9 at random moments, and the resumed run ends where an unbroken one does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from problems import COVERING_RULES

SCRIPT = Path(__file__).parent / "kill_jobs.py"


@pytest.mark.parametrize(
    ("world_size", "kills", "rules"),
    [
        (1, 1, ("kp", "wm")),
        pytest.param(1, 4, COVERING_RULES, marks=pytest.mark.slow),  # 24 kills over the six rules
        pytest.param(2, 4, COVERING_RULES, marks=pytest.mark.slow),
    ],
    ids=["one process", "one process, often", "two processes, often"],
)
def test_killed_and_resumed_runs_end_bit_identical_to_unbroken_ones(tmp_path, world_size, kills, rules):
    command = [sys.executable, str(SCRIPT), str(tmp_path), str(world_size), str(kills), *rules]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    for rule in rules:
        assert f"{rule}: killed {kills} times, bit-identical" in done.stdout


@pytest.mark.slow
def test_a_worker_killed_under_torchrun_goes_on_from_the_last_checkpoint(tmp_path):
    settings = ["--data", "digits", "--model", "mlp", "--rule", "kp", "--epochs", "25", "--lr", "0.05"]
    settings += ["--checkpoint-steps", "2", "--num-threads", "1"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    train = ["-m", "feedbackpath", "train", *settings]
    run(*launch, *train, "--out", str(tmp_path / "whole"))
    process = subprocess.Popen(
        [*launch, "--max-restarts", "2", *train, "--out", str(tmp_path / "broken")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not list(tmp_path.glob("broken/checkpoints/*/epoch-0003-*.pt")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    os.kill(worker_of(process.pid), signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    whole, broken = (history_of(tmp_path / kind) for kind in ("whole", "broken"))
    assert whole == broken


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=300)


def worker_of(parent: int) -> int:
    """Return the process number of the last worker that torchrun has started."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return int(children[-1])


def history_of(folder: Path) -> list[dict]:
    (run,) = json.loads((folder / "results.json").read_text())["runs"]
    assert run["status"] == "finished"
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in run["history"]]
