"""The examples run, and show what they say."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def two_chips(rule, steps, *flags):
    command = [sys.executable, EXAMPLES / "two_chips.py", "--rule", rule, "--steps", str(steps), *flags]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300
    )


@pytest.mark.parametrize("rule", ["kp", "wm"])
def test_of_two_chips_the_line_carries_signals_alone_and_b_goes_to_w(rule):
    done = two_chips(rule, 200)
    assert done.returncode == 0, done.stderr + done.stdout
    carried = set(re.findall(r"^forward to feedback: ([a-z ]+), \d+ bytes$", done.stdout, re.MULTILINE))
    assert carried == {"activities", "deltas"} | ({"noise", "answers to noise"} if rule == "wm" else set())
    assert set(re.findall(r"^feedback to forward: ([a-z ]+), ", done.stdout, re.MULTILINE)) == {"deltas"}
    angles = re.findall(r"([\d.]+) to ([\d.]+)", done.stdout.splitlines()[0])
    assert len(angles) == 3
    assert all(float(first) > 80 and float(last) < 40 for first, last in angles)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["kp", "wm"])
def test_devices_of_their_own_change_what_is_written_and_nothing_on_the_line(rule):
    ideal, real = (two_chips(rule, 40, *flags) for flags in ((), ("--chip", "reram")))
    assert ideal.returncode == real.returncode == 0
    assert ideal.stdout.splitlines()[0] != real.stdout.splitlines()[0]
    assert ideal.stdout.splitlines()[1:] == real.stdout.splitlines()[1:]


def test_a_byte_too_many_on_the_line_is_read(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    two_chips = importlib.import_module("two_chips")
    tapped = two_chips.Tapped()
    packet = two_chips.HEADER.pack(0, 16) + bytes(16)
    for part in (packet[:3], packet[3:12], packet[12:] + packet):
        tapped.read(part)
    assert tapped.counts == {"activities": 32}
    assert tapped.total == 2 * len(packet)
    expected = two_chips.expected_bytes("kp", 1)
    assert (tapped.counts, tapped.counts) != expected
