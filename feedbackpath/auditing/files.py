"""Files that a pass writes to are put back: a copy of each is made before it is first opened for writing."""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
NAMED = {"os.remove": 1, "os.rename": 2, "os.mkdir": 1, "os.rmdir": 1, "os.link": 2, "os.symlink": 2}


class _Journal:
    """Copies files before they change; the copies outlive the process that made them.

    Args:
        folder: Where copies go.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._seen: set[str] = set()
        self._is_busy = False

    def note(self, path: Any) -> None:
        """Copy a file, if there is one, that is about to change."""
        if self._is_busy or not isinstance(path, (str, bytes, os.PathLike)):
            return
        name = os.path.abspath(os.fsdecode(path))
        is_device = os.path.exists(name) and not (os.path.isfile(name) or os.path.isdir(name))
        if is_device or name in self._seen or name.startswith(("/proc/", str(self.folder))):
            return
        self._is_busy = True
        try:
            place = self.folder / str(time.time_ns())  # two processes may take notes
            self._seen.add(name)
            if os.path.isfile(name):
                shutil.copy2(name, place)
            place.with_suffix(".name").write_text(name)
        finally:
            self._is_busy = False

    def put_back(self) -> None:
        """Make all files what they were."""
        notes = sorted(self.folder.glob("*.name"), key=lambda note: int(note.stem), reverse=True)
        for note in notes:
            name, kept = note.read_text(), note.with_suffix("")
            if kept.exists():
                shutil.copy2(kept, name)
            elif os.path.isfile(name) or os.path.islink(name):
                os.remove(name)
            elif os.path.isdir(name) and not os.listdir(name):
                os.rmdir(name)


_journals: list[_Journal] = []
_is_listening: list[bool] = []


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if not _journals:
        return
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES:
        _journals[-1].note(arguments[0])
    if event in NAMED and arguments[-1] == -1:  # else a name is relative to some open folder
        for path in arguments[: NAMED[event]]:
            _journals[-1].note(path)


@contextmanager
def files_put_back() -> Iterator[None]:
    """Put back, at the end, the files that Python or ``torch.save`` writes meanwhile, here or in a fork."""
    if not _is_listening:
        _is_listening.append(True)
        sys.addaudithook(_listen)
    plain = torch._C.PyTorchFileWriter

    def write(name: Any, *args: Any, **kwargs: Any) -> Any:
        if _journals:
            _journals[-1].note(name)
        return plain(name, *args, **kwargs)

    with tempfile.TemporaryDirectory() as folder:
        journal = _Journal(folder)
        _journals.append(journal)
        torch._C.PyTorchFileWriter = write  # type: ignore[assignment,misc]
        try:
            yield
        finally:
            torch._C.PyTorchFileWriter = plain  # type: ignore[misc]
            _journals.remove(journal)
            journal.put_back()


def release_files() -> None:
    """Let this process, a fork, write what is to stay."""
    _journals.clear()


def detach_open_files() -> None:
    """Let a forked process have files that are open already to itself: it writes to copies of them.

    Else what it reads would be gone for all other passes, and for the user's own process.
    """
    import fcntl  # where processes cannot be forked, there is none

    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        number, place = int(name), f"/proc/self/fd/{name}"  # which works for files without a name, too
        try:
            flags = fcntl.fcntl(number, fcntl.F_GETFL)
            is_written = bool(flags & (os.O_WRONLY | os.O_RDWR))
            if os.path.isfile(place):
                own = _open_copy(place) if is_written else os.open(place, flags)
                os.lseek(own, os.lseek(number, 0, os.SEEK_CUR), os.SEEK_SET)
                os.dup2(own, number)
                os.close(own)
        except OSError:
            continue


def _open_copy(place: str) -> int:
    """Return the number of a new file, without a name, that holds what a file does."""
    with tempfile.TemporaryFile() as copy:
        with open(place, "rb") as original:
            shutil.copyfileobj(original, copy)
        copy.flush()
        return os.dup(copy.fileno())
