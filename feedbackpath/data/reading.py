"""The one place that opens files of data: regular files alone, and no more bytes than a limit."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

MAX_BYTES = 2**28
"""Of a file that is read whole; the largest that is published, CIFAR-100 to train on, has 155 million."""


def open_file(path: Path) -> BinaryIO:
    """Open a regular file; an `OSError` refuses a pipe, which may block, or a device, which may never end."""
    file = open(path, "rb", buffering=0, opener=_open_at_once)  # noqa: SIM115 (the caller closes it)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return file


def read_file(path: Path) -> bytes:
    """Return the bytes of a regular file; an `OSError` refuses one of more than `MAX_BYTES`."""
    with open_file(path) as file:
        if os.fstat(file.fileno()).st_size > MAX_BYTES:
            raise OSError(errno.EFBIG, f"it has more than {MAX_BYTES:,} bytes", str(path))
        return file.read()


def _open_at_once(path: str, flags: int) -> int:
    """Open a file without waiting for a pipe's other end."""
    return os.open(path, flags | os.O_NONBLOCK)
