"""What every test starts from: one thread, and random numbers of a fixed seed."""

import pytest
import torch

from feedbackpath.auditing import passes


def pytest_configure():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def forking(monkeypatch):
    """Let an audit fork though another test, a browser's say, has left a thread that waits."""
    monkeypatch.setattr(passes, "can_fork", lambda: True)
