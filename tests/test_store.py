"""The store: files whole or not there, checkpoints in order and of their run alone, one job a folder."""

import errno
import os
import re
import socket
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from feedbackpath.errors import CheckpointError, ConfigError
from feedbackpath.train.store import (
    PARTIAL,
    Checkpoints,
    load_checkpoint,
    locked,
    write_json,
    write_model,
    write_text,
)

RUN = {"rule": "kp", "seed": 0, "lr": 0.2}
STATE = {"epoch": 1, "model": {"w": torch.arange(1000.0)}, "rng": [[torch.get_rng_state()]]}


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(AttributeError):
        write_text(tmp_path / "a.txt", 3)
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_json_has_null_for_what_is_not_a_number(tmp_path):
    write_json(tmp_path / "a.json", {"x": [float("nan"), float("inf"), 1.5]})
    assert "".join((tmp_path / "a.json").read_text().split()) == '{"x":[null,null,1.5]}'


def test_the_newest_are_kept_and_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, RUN, keep=2)
    assert checkpoints.load_newest() == (None, [])
    assert checkpoints.load_best() is None
    for epoch, consumed in ((1, 0), (1, 128), (2, 0), (10, 0)):
        checkpoints.save(STATE | {"epoch": epoch, "consumed": consumed}, (epoch, consumed))
        if epoch == 2:
            checkpoints.save_best(STATE | {"epoch": 1})
            checkpoints.save_best(STATE | {"epoch": 2})
    newest, damaged = checkpoints.load_newest()
    assert (newest["epoch"], damaged) == (10, [])
    assert [path.name[:10] for path in checkpoints.list_newest_first()] == ["epoch-0010", "epoch-0002"]
    assert checkpoints.load_best()["epoch"] == 2
    assert len(list(tmp_path.iterdir())) == 3
    checkpoints.remove()
    assert not tmp_path.exists()


def test_bytes_of_a_checkpoint_follow_from_its_values_alone(tmp_path):
    state = nn.BatchNorm1d(2).state_dict()
    own = {"model": state, "tally": {"model": 1, "names": ("model", ["model"])}}
    loaded = {
        "model": state,
        "tally": {"".join("model"): 1, "names": ("".join("model"), ["".join("model")])},
    }
    assert loaded["tally"]["names"][1][0] is not own["tally"]["names"][1][0]
    paths = [
        Checkpoints(tmp_path / name, {}).save_best(content) for name, content in (("a", own), ("b", loaded))
    ]
    assert paths[0].name == paths[1].name
    assert paths[0].read_bytes() == paths[1].read_bytes()
    read = Checkpoints(tmp_path / "a", {}).load_best()
    assert read["tally"] == own["tally"]
    assert read["model"]._metadata == state._metadata


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "text"])
def test_a_damaged_newest_one_falls_back_to_the_one_before(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path, RUN)
    checkpoints.save(STATE | {"epoch": 1}, (1, 0))
    newest = checkpoints.save(STATE | {"epoch": 2}, (2, 0))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"truncate": content[:100], "flip": content, "empty": b"", "text": b"not a checkpoint"}
    newest.write_bytes(damaged[damage])
    with pytest.raises(CheckpointError, match=rf"{newest.name} is damaged.*delete it"):
        load_checkpoint(newest)
    state, named = checkpoints.load_newest()
    assert (state["epoch"], named) == (1, [newest])


def test_checkpoints_hold_no_code(tmp_path):
    path = Checkpoints(tmp_path, RUN).save(STATE, (1, 0))
    loaded = torch.load(path, weights_only=True)
    assert torch.equal(loaded["model"]["w"], STATE["model"]["w"])


def test_a_full_disk_is_named_and_leaves_the_one_before(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, RUN)
    checkpoints.save(STATE, (1, 0))

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match="No space left on device.*the one before is whole"):
        checkpoints.save(STATE | {"epoch": 2}, (2, 0))
    monkeypatch.undo()
    assert checkpoints.load_newest()[0]["epoch"] == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_a_write_that_the_system_cuts_short_is_named_and_leaves_the_one_before(tmp_path):
    # A limit on the size of files stands in for a disk that fills up while torch writes.
    script = f"""
import resource, torch
from pathlib import Path
from feedbackpath.train.store import Checkpoints
checkpoints = Checkpoints(Path({str(tmp_path)!r}), {{}})
checkpoints.save({{"w": torch.zeros(1000)}}, (1, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
checkpoints.save({{"w": torch.zeros(1_000_000)}}, (2, 0))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode != 0
    assert "the one before is whole" in done.stderr.splitlines()[-1]
    files = list(tmp_path.iterdir())
    assert [path.name[:10] for path in files] == ["epoch-0001"]
    assert load_checkpoint(files[0])["w"].shape == (1000,)


def test_a_model_file_holds_tied_and_strided_tensors(tmp_path):
    from safetensors.torch import load_file

    w = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    write_model(tmp_path / "m.safetensors", {"a": w, "b": w})
    loaded = load_file(tmp_path / "m.safetensors")
    assert torch.equal(loaded["a"], w)
    assert torch.equal(loaded["b"], w)


def test_order_is_by_epoch_and_samples_as_numbers_whatever_the_clock_says(tmp_path):
    checkpoints = Checkpoints(tmp_path, RUN, keep=3)
    ahead = time.time() + 7200
    for epoch, consumed in ((9999, 0), (9999, 128), (10000, 0)):
        path = checkpoints.save({"at": (epoch, consumed)}, (epoch, consumed))
        os.utime(path, (ahead, ahead))
    checkpoints.save({"at": (10000, 999_999_999_9)}, (10000, 9_999_999_999))
    assert checkpoints.load_newest()[0]["at"] == (10000, 9_999_999_999)
    assert len(checkpoints.list_newest_first()) == 3
    checkpoints.save({"at": (10001, 0)}, (10001, 0))
    assert checkpoints.load_newest()[0]["at"] == (10001, 0)


@pytest.mark.parametrize("other", [{"rule": "bp"}, {"seed": 1}, {"lr": 1e-4}, {"more": 1}])
def test_a_checkpoint_of_another_run_is_refused_and_the_difference_named(tmp_path, other):
    Checkpoints(tmp_path, RUN).save(STATE, (1, 0))
    Checkpoints(tmp_path, RUN).save_best(STATE)
    (name,) = other
    for load in (Checkpoints.load_newest, Checkpoints.load_best):
        with pytest.raises(ConfigError, match=rf"to another run: {name} \("):
            load(Checkpoints(tmp_path, RUN | other))


def test_a_folder_is_one_jobs_and_the_holder_is_named(tmp_path):
    script = f"""
from pathlib import Path
from feedbackpath.train.store import locked
with locked(Path({str(tmp_path)!r})):
    print("ready", flush=True)
    input()
"""
    command = [sys.executable, "-c", script]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "ready\n"
    message = rf"is in use by process {holder.pid} on {re.escape(socket.gethostname())}"
    with pytest.raises(ConfigError, match=message), locked(tmp_path):
        pass
    holder.kill()
    holder.communicate()
    (tmp_path / f".a.json{PARTIAL}").write_text("half")
    with locked(tmp_path), locked(tmp_path):  # recorders of one process share it
        assert not (tmp_path / f".a.json{PARTIAL}").exists()


def test_an_error_names_its_file(tmp_path):
    (tmp_path / "a").write_text("a file")
    with pytest.raises(OSError, match=str(tmp_path / "a")):
        write_text(tmp_path / "a" / "b.txt", "text")


def test_the_last_one_of_a_process_lets_go_of_a_folder(tmp_path):
    script = f"""
from pathlib import Path
from feedbackpath.train.store import locked
with locked(Path({str(tmp_path)!r})):
    pass
"""

    def others_may() -> bool:
        return subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0

    first, second = locked(tmp_path), locked(tmp_path)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not others_may()
    second.__exit__(None, None, None)
    assert others_may()


def test_what_a_job_within_a_folder_is_writing_is_left_alone(tmp_path):
    mine = [tmp_path / f".a.json{PARTIAL}", tmp_path / "checkpoints" / "kp-seed0" / f".b.pt{PARTIAL}"]
    theirs = [tmp_path / "run" / f".a.json{PARTIAL}", tmp_path / "run" / "checkpoints" / "x" / f".b{PARTIAL}"]
    for file in (*mine, *theirs):
        write_text(file, "half")
    with locked(tmp_path):
        assert [file.exists() for file in (*mine, *theirs)] == [False, False, True, True]
