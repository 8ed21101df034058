"""The examples run, and show what they say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("rule", ["kp", "wm-exact"])
def test_two_chips_learn_as_one_process_does_and_exchange_no_weight(rule):
    command = [sys.executable, EXAMPLES / "two_chips.py", "--rule", rule, "--steps", "8"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert done.returncode == 0, done.stderr + done.stdout
    sent = [
        line.split(": ")[1].split(",")[0]
        for line in done.stdout.splitlines()
        if " to " in line and ", " in line
    ]
    allowed = {"activities", "deltas"} | ({"noise", "answers to noise"} if rule == "wm-exact" else set())
    assert set(sent) == allowed
