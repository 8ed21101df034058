"""Two processes train as one does, and send no more than backprop."""

import socket
import subprocess
import sys

import distributed_jobs
import pytest
import torch
from problems import COVERING_RULES

from feedbackpath.errors import ConfigError
from feedbackpath.train.config import RunConfig
from feedbackpath.train.engine import Engine


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def by_two(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    arguments = (2, free_port(), str(folder))
    torch.multiprocessing.spawn(distributed_jobs.run_as_rank, arguments, nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def by_one() -> dict:
    return distributed_jobs.train_all_rules()


@pytest.mark.parametrize("rule", COVERING_RULES)
def test_two_processes_equal_one_after_50_steps(rule, by_one, by_two):
    alone, together = by_one[rule], by_two[0][rule]
    assert len(alone["losses"]) == len(together["losses"]) == distributed_jobs.STEPS
    torch.testing.assert_close(alone["losses"], together["losses"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone["model"], together["model"], rtol=1e-5, atol=1e-5)
    assert alone["test_error"] == together["test_error"]


@pytest.mark.parametrize("rule", COVERING_RULES)
def test_replicas_agree_bit_for_bit(rule, by_two):
    first, second = (found[rule] for found in by_two)
    assert first["losses"] == second["losses"]
    for key, value in first["model"].items():
        assert torch.equal(value, second["model"][key]), key


def test_no_rule_sends_more_than_backprop(by_two):
    sent = {rule: found["bytes"] for rule, found in by_two[0].items()}
    assert sent["bp"] > 0
    assert set(sent.values()) == {sent["bp"]}


def test_devices_that_cannot_be_used_are_named():
    with pytest.raises(ConfigError, match="device 'gpu' cannot be used"):
        Engine(RunConfig(device="gpu"))
    with pytest.raises(ConfigError, match="device 'meta' cannot be used"):
        Engine(RunConfig(device="meta"))


def test_torchrun_with_another_number_of_devices_is_refused(monkeypatch):
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("LOCAL_WORLD_SIZE", "4"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="devices is 2, but torchrun started 4 here"):
        Engine(RunConfig(devices=2))


def test_only_the_engine_imports_fabric():
    script = "import sys, feedbackpath.recipes; print('lightning_fabric' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
