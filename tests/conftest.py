"""What every test starts from: one thread, and random numbers of a fixed seed."""

import pytest
import torch


def pytest_configure():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)
