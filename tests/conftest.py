"""What every test starts from: one thread, and random numbers of a fixed seed."""

import os
import threading
import time

import pytest
import torch

from feedbackpath.auditing import passes


def pytest_configure():
    torch.set_num_threads(1)
    # torch.compile would leave a thread that waits for more to compile, and audits then fork no process.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


_staying = set()


@pytest.fixture(autouse=True)
def _alone():
    """Wait for threads of the test before, once: an audit forks only where there are no others."""
    deadline = time.monotonic() + 5.0
    while others := set(threading.enumerate()) - {threading.current_thread()} - _staying:
        if time.monotonic() > deadline:
            _staying.update(others)
        time.sleep(0.01)


@pytest.fixture
def forking(monkeypatch):
    """Let an audit fork though another test, a browser's say, has left a thread that waits."""
    monkeypatch.setattr(passes, "can_fork", lambda: True)
