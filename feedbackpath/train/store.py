"""What a job keeps on disk: one writer of files, one lock for each folder, and checkpoints in their order.

Every file is written beside its place, synced, and renamed: a reader sees the old one or the new one, whole.
A job that is killed leaves at most a file whose name begins with a dot and ends in ``.partial``; the next job
in that folder removes it.
"""

import fcntl
import hashlib
import json
import os
import re
import socket
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import torch
from torch import Tensor

from feedbackpath.errors import CheckpointError, ConfigError

DIGEST_DIGITS = 16
PARTIAL = ".partial"
_NAME = re.compile(r"epoch-(\d+)-sample-(\d+)-[0-9a-f]+\.pt")


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """Write a file beside its place, sync it, and rename it to its place.

    Args:
        path: Its place. ``{digest}`` in its name stands for the first digits of its SHA-256.
        write: Writes the content.

    Raises:
        OSError: It could not be written; it names the file. What was there before is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        with partial.open("w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:DIGEST_DIGITS]
        place = path.with_name(path.name.replace("{digest}", digest))
        os.replace(partial, place)
        _sync_folder(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise
    return place


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes, atomically."""
    write_atomically(path, lambda file: file.write(content))


def write_text(path: Path, text: str) -> None:
    """Write text, atomically."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))  # a file may have any name


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically; what is not finite becomes null, which JSON knows."""
    write_text(path, json.dumps(_without_nan(value), indent=1, allow_nan=False) + "\n")


def write_json_lines(path: Path, values: list[Any]) -> None:
    """Write values as JSON, one per line, atomically."""
    lines = [json.dumps(_without_nan(value), allow_nan=False) + "\n" for value in values]
    write_text(path, "".join(lines))


def write_model(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a network's state, feedback weights too, as safetensors, atomically."""
    from safetensors.torch import save  # only runs that keep their networks need it

    whole = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }
    write_bytes(path, save(whole))


_HELD: dict[tuple[int, Path], list[Any]] = {}  # of processes and folders: the lock's file, and who has it


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a job's folder, and remove what a killed one has left half written.

    The system lets go of the lock when the process ends, however it ends.

    Raises:
        ConfigError: Another process has the folder; its number and machine are named.
    """
    held = os.getpid(), folder.resolve()
    if held not in _HELD:
        _HELD[held] = [_lock(folder)]
    token = object()
    _HELD[held].append(token)  # recorders of one process share a folder; the last one lets go of it
    try:
        yield
    finally:
        _HELD[held].remove(token)
        if len(_HELD[held]) == 1:
            _HELD.pop(held)[0].close()


def _lock(folder: Path) -> TextIO:
    """Return the file whose being open keeps other processes out of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a forked worker does not inherit it
    except (BlockingIOError, PermissionError):  # which of the two depends on the system
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise ConfigError(
            f"{folder} is in use by {holder}: wait until it has ended, or choose another --out"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    for partial in (*folder.glob(f".*{PARTIAL}"), *folder.glob(f"checkpoints/*/.*{PARTIAL}")):
        partial.unlink(missing_ok=True)  # not those of a job whose folder lies in this one
    return file


class Checkpoints:
    """The checkpoints of one run: the newest few, and perhaps the best.

    Each is a file that ``torch.load(..., weights_only=True)`` reads. Its name ends in the first digits of its
    SHA-256, so that a damaged one is known.

    Args:
        folder: Where they are; made when the first is saved.
        fingerprint: What decides the numbers of the run: settings, rule, seed, data. Kept in each checkpoint;
            one that has another is refused.
        keep: How many of the newest are kept.
        check: Fails for a content that nobody can go on from: the file then counts as damaged.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: Mapping[str, Any],
        keep: int = 2,
        check: Callable[[dict[str, Any]], None] = lambda content: None,
    ) -> None:
        self.folder, self.fingerprint, self.keep, self._check = folder, dict(fingerprint), keep, check

    def save(self, content: Mapping[str, Any], position: tuple[int, int]) -> Path:
        """Save tensors and plain values, as of an epoch and the samples of it; remove all but the newest.

        Raises:
            CheckpointError: It could not be written; those before it are as they were.
        """
        path = self._write("epoch-{:04}-sample-{:09}".format(*position), content)
        self.prune()
        return path

    def prune(self) -> None:
        """Remove all but the newest; a kill may have come between."""
        for old in self.list_newest_first()[self.keep :]:
            old.unlink(missing_ok=True)

    def save_best(self, content: Mapping[str, Any]) -> Path:
        """Save the best state so far in place of the one before."""
        path = self._write("best", content)
        for old in self.folder.glob("best-*.pt"):
            if old != path:
                old.unlink(missing_ok=True)
        return path

    def list_newest_first(self) -> list[Path]:
        """Return the files of the newest states, the one that has come furthest first."""
        named = [(path, _NAME.fullmatch(path.name)) for path in self.folder.glob("epoch-*.pt")]
        found = [(int(name[1]), int(name[2]), path.name, path) for path, name in named if name]
        return [path for *_, path in sorted(found, reverse=True)]

    def load_newest(self) -> tuple[dict[str, Any] | None, list[Path]]:
        """Return the newest state that is whole, or None, and the damaged files that came before it.

        Raises:
            ConfigError: It belongs to another run.
        """
        damaged: list[Path] = []
        for path in self.list_newest_first():
            try:
                return self._load(path), damaged
            except CheckpointError:
                damaged.append(path)
        return None, damaged

    def load_best(self) -> dict[str, Any] | None:
        """Return the best state, or None.

        Raises:
            CheckpointError: It is damaged.
            ConfigError: It belongs to another run.
        """
        files = list(self.folder.glob("best-*.pt"))
        return self._load(files[0]) if files else None

    def remove(self) -> None:
        """Remove all of them."""
        for path in (*self.folder.glob("epoch-*.pt"), *self.folder.glob("best-*.pt")):
            path.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _write(self, stem: str, content: Mapping[str, Any]) -> Path:
        place = self.folder / f"{stem}-{{digest}}.pt"
        whole = _with_one_of_each_string({"fingerprint": self.fingerprint, **content}, {})
        try:
            return write_atomically(place, lambda file: torch.save(whole, file))
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise CheckpointError(
                f"the checkpoint {self.folder / stem} could not be written ({reason}); the one before is "
                "whole: make room, and continue by --resume"
            ) from None

    def _load(self, path: Path) -> dict[str, Any]:
        content = load_checkpoint(path)
        differing = differences(content.get("fingerprint", {}), self.fingerprint)
        if differing:
            raise ConfigError(
                f"checkpoint {path} belongs to another run: {', '.join(differing)}; choose another --out, or "
                "delete it"
            )
        try:
            self._check(content)
        except Exception as error:  # whatever a content of another form leads to
            raise _damaged(path, error) from None
        return content


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say in what settings or facts differ, as ``lr (0.2 there, 0.1 now)``.

    Example:
        >>> differences({"lr": 0.2, "seed": 0}, {"lr": 0.1, "seed": 0})
        ['lr (0.2 there, 0.1 now)']
    """
    return [
        f"{name} ({there.get(name)!r} there, {now.get(name)!r} now)"
        for name in dict.fromkeys([*now, *there])
        if there.get(name) != now.get(name)
    ]


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint onto the CPU.

    Raises:
        CheckpointError: The file is not what was written.
    """
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not path.stem.endswith(f"-{digest[:DIGEST_DIGITS]}"):
            raise ValueError("its checksum is not the one in its name")
        content: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises many kinds for a damaged file
        raise _damaged(path, error) from None
    if not isinstance(content, dict):
        raise _damaged(path, TypeError("it holds no mapping"))
    return content


def _with_one_of_each_string(value: Any, strings: dict[str, str]) -> Any:
    """Return the same content, so that its bytes depend on it alone: pickle tells equal strings from one."""
    if type(value) is str:
        return strings.setdefault(value, value)
    if type(value) in (list, tuple):
        return type(value)(_with_one_of_each_string(part, strings) for part in value)
    if type(value) in (dict, OrderedDict):
        pairs = ([_with_one_of_each_string(part, strings) for part in pair] for pair in value.items())
        copied = type(value)(pairs)
        if isinstance(copied, OrderedDict):  # a model's state has the versions of its parts beside it
            vars(copied).update(_with_one_of_each_string(vars(value), strings))
        return copied
    return value


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return CheckpointError(f"checkpoint {path} is damaged ({reason}); delete it")


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
