"""Kill training with SIGKILL at random moments, resume it each time, and compare with an unbroken run.

A script, so that one start pays for all: it imports the package, then forks a process, or one for each rank,
for every attempt. ``python kill_jobs.py FOLDER WORLD_SIZE KILLS RULE...`` prints a line a rule and
fails where two runs differ. More kills get a longer job.
"""

import io
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from problems import settings_that_start_at_once
from rich.console import Console
from safetensors.torch import load_file

from feedbackpath.jobs import book, run_job
from feedbackpath.report.live import LiveView
from feedbackpath.train.config import RunConfig
from feedbackpath.train.results import read_results

SETTINGS = {
    "data": "digits", "model": "mlp", "samples_per_epoch": 1024, "batch_size": 32, "lr": 0.05,
    "checkpoint_steps": 3, "num_threads": 1, "select_best": False,
}  # fmt: skip
ATTEMPTS = 60
book.write_report = lambda *_, **__: []  # pages and figures take most of such a short job's time


def run(config: RunConfig, out: Path) -> None:
    """Run a job, or what is left of it."""
    view = LiveView(Console(file=io.StringIO()))
    run_job(config, out, resume=(out / "results.json").exists(), command="", view=view)


def start(config: RunConfig, out: Path, rank: int, port: int) -> int:
    """Fork one process of a job and return its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        if config.devices > 1:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
            os.environ |= {"WORLD_SIZE": str(config.devices), "LOCAL_RANK": str(rank)}
        run(config, out)
        code = 0
    except BaseException as error:
        sys.stderr.write(f"rank {rank}: {type(error).__name__}: {error}\n")
    finally:
        os._exit(code)


def start_all(config: RunConfig, out: Path) -> list[int]:
    """Fork every process of a job."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [start(config, out, rank, port) for rank in range(config.devices)]


def wait_all(children: list[int]) -> bool:
    """Wait for processes; whether all ended well."""
    codes = [os.waitpid(child, 0)[1] for child in children]
    return not any(codes)


def kill_and_resume(config: RunConfig, out: Path, kills: int, seconds: float, chance: random.Random) -> int:
    """Start a job until it ends, killing it at a random moment of each of the first starts."""
    done = 0
    for _ in range(ATTEMPTS):
        children = start_all(config, out)
        if done < kills:
            time.sleep(chance.uniform(0.05, 0.8) * seconds)
            victims = children if chance.random() < 0.5 else children[::-1]
            is_running = os.waitpid(victims[0], os.WNOHANG) == (0, 0)
            for victim in victims if is_running else victims[1:]:
                os.kill(victim, signal.SIGKILL)
            wait_all(victims if is_running else victims[1:])
            if is_running:
                done += 1
                continue
            raise SystemExit("a job ended before it was killed: make it longer")
        if wait_all(children):
            return done
    raise SystemExit(f"the job did not end in {ATTEMPTS} starts")


def main(folder: Path, world_size: int, kills: int, rules: list[str]) -> None:
    """Hold every rule's broken run against its unbroken one."""
    run(RunConfig(**SETTINGS, epochs=1, rule="kp"), folder / "first")  # what it imports is forked along
    epochs = 2 * (kills + 1)
    for number, rule in enumerate(rules):
        config = RunConfig(
            **SETTINGS, **settings_that_start_at_once(rule), epochs=epochs, rule=rule, devices=world_size
        )
        started = time.perf_counter()
        assert wait_all(start_all(config, folder / f"{rule}-whole"))
        seconds = time.perf_counter() - started
        chance = random.Random(number)
        done = kill_and_resume(config, folder / f"{rule}-broken", kills, seconds / (kills + 1), chance)
        whole, broken = (
            load_file(folder / f"{rule}-{kind}" / "model.safetensors") for kind in ("whole", "broken")
        )
        assert whole.keys() == broken.keys()
        for key, value in whole.items():
            assert torch.equal(value, broken[key]), f"{rule}: {key} differs"
        histories = [history_of(folder / f"{rule}-{kind}") for kind in ("whole", "broken")]
        assert histories[0] == histories[1], f"{rule}: histories differ"
        sys.stdout.write(f"{rule}: killed {done} times, bit-identical\n")


def history_of(folder: Path) -> list[dict]:
    """Return a run's history without its times."""
    (run,) = read_results(folder).runs
    return [entry.model_dump(exclude={"seconds"}) for entry in run.history]


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
