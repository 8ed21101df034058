"""Strike at a job's file operations: kill it before each, or let the disk be full from each on.

A job runs in a forked process that tells of every operation in its folder (Python's audit events: opening a
file to write, renaming, removing, making and removing folders). Run again, it is struck before the n-th of
them. Then it is resumed, and its folder is held against that of a job that nobody struck.
"""

import errno
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from feedbackpath.train.store import load_checkpoint

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
TIMES = {"seconds", "command"}  # what two equal jobs do not share


class Struck(Exception):
    """A job did not end as it was to."""


def operations_in(job: Callable[[], int], folder: Path) -> list[str]:
    """Run a job to its end and return its file operations, each as its kind and its file's name."""
    code, log = _run(job, folder, None, "kill")
    if code != 0:
        raise Struck(f"the whole job ended with {code}: {log}")
    return log


def strike(job: Callable[[], int], folder: Path, number: int, how: str) -> int:
    """Run a job and strike before its operation ``number``; return its exit code, 137 where it was killed."""
    return _run(job, folder, number, how)[0]


def first_of_each_kind(operations: list[str]) -> Iterator[int]:
    """Yield the number of the first operation of each kind: digits and digests make no difference."""
    seen: set[str] = set()
    for number, operation in enumerate(operations):
        kind = re.sub(r"[0-9a-f]{16}|\d+", "N", operation)
        if kind not in seen:
            seen.add(kind)
            yield number


def contents_of(folder: Path) -> dict[str, Any]:
    """Return every file of a folder in a form in which two equal jobs have equal ones."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or name == ".lock" or name.startswith("tensorboard/"):
            continue
        if path.suffix == ".pt":
            found[re.sub(r"-[0-9a-f]{16}\.pt", "", name)] = _comparable(load_checkpoint(path))
        elif path.suffix == ".json":
            found[name] = _comparable(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            found[name] = [_comparable(json.loads(line)) for line in path.read_text().splitlines()]
        else:
            found[name] = path.read_bytes()
    return found


def _comparable(value: Any) -> Any:
    import torch

    if isinstance(value, dict):
        return {key: _comparable(item) for key, item in value.items() if key not in TIMES}
    if isinstance(value, list | tuple):
        return [_comparable(item) for item in value]
    return (value.dtype, value.numpy().tobytes()) if isinstance(value, torch.Tensor) else value


def _run(job: Callable[[], int], folder: Path, number: int | None, how: str) -> tuple[int, list[str]]:
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        _be_struck(job, folder, number, how, writer)
    os.close(writer)
    with os.fdopen(reader) as file:
        log = file.read().splitlines()
    _, status = os.waitpid(child, 0)
    return (137 if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)), log


def _be_struck(job: Callable[[], int], folder: Path, number: int | None, how: str, writer: int) -> None:
    """Run a job in this process, and end it."""
    count = 0
    where = str(folder)

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        is_opened = event == "open" and isinstance(args[2], int) and args[2] & WRITES
        if not (is_opened or event in CHANGES) or not str(args[0]).startswith(where):
            return
        if "/tensorboard/" in str(args[0]):
            return
        os.write(writer, f"{event} {Path(str(args[0])).name}\n".encode())
        if number is not None and count == number and how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if number is not None and count >= number and how == "full" and (is_opened or event == "os.mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))
        count += 1

    code = 1
    try:
        sys.addaudithook(watch)
        code = job()
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        code = 2
    finally:
        os._exit(code)
