"""The processes of ``--devices``: started by the first one, watched, and ended together."""

import atexit
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from typing import IO, NamedTuple

from feedbackpath.errors import UserError

ENDED_WELL = (0, 3, 129, 130, 143)  # done, diverged, or asked to stop: the first process knows of it
PATIENCE_S = 2.0  # in which this process may say itself that another is lost


class LostProcessError(UserError):
    """A process of the job has ended while the others still needed it.

    Attributes:
        exit_code: What the job ends with: 128 and the number of the signal, as for one process.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class _Child(NamedTuple):
    rank: int
    process: subprocess.Popen[bytes]
    errors: IO[bytes]  # what it wrote to standard error: shown only if it alone fails


class Processes:
    """The other processes of a machine; each runs the command that this one runs.

    Args:
        devices: How many processes a machine has.
        nodes: How many machines.
    """

    def __init__(self, devices: int, nodes: int) -> None:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
        os.environ.setdefault("NODE_RANK", "0")
        os.environ |= {"WORLD_SIZE": str(devices * nodes), "LOCAL_RANK": "0"}
        self._devices = devices
        self._children = [_start(rank) for rank in range(1, devices)]
        atexit.register(self._end)
        threading.Thread(target=self._watch, daemon=True).start()

    def find_lost(self, patience_s: float = 0.0) -> LostProcessError | None:
        """Return what there is to say of a process that has ended too early; wait a while for its end."""
        until = time.monotonic() + patience_s
        while True:
            for child in self._children:
                code = child.process.poll()
                if code is not None and code not in ENDED_WELL:
                    return self._describe(child, code)
            if time.monotonic() >= until:
                return None
            time.sleep(0.05)

    def _describe(self, child: _Child, code: int) -> LostProcessError:
        name = f"process {child.rank + 1} of {self._devices}"
        if code < 0:
            return LostProcessError(f"{name} was ended by signal {-code}", 128 - code)
        child.errors.seek(0)
        lines = child.errors.read().decode(errors="replace").strip().splitlines() or [f"exit code {code}"]
        return LostProcessError(f"{name} has ended: {lines[-1].removeprefix('feedbackpath: ')}", code)

    def _watch(self) -> None:
        """End the job where a process is lost and this one waits for it in vain, deep within PyTorch."""
        while (lost := self.find_lost()) is None:
            if all(child.process.poll() is not None for child in self._children):
                return
            time.sleep(0.2)
        time.sleep(PATIENCE_S)
        with suppress(OSError):
            os.write(2, f"feedbackpath: {lost}; --resume continues\n".encode())
        self._kill()
        os._exit(lost.exit_code)

    def _end(self) -> None:
        """Wait until the others have ended; end them where they do not."""
        until = time.monotonic() + 1.0
        for child in self._children:
            with suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, until - time.monotonic()))
        self._kill()

    def _kill(self) -> None:
        for child in self._children:
            if child.process.poll() is None:
                child.process.send_signal(signal.SIGKILL)


def _start(rank: int) -> _Child:
    """Start the command that this process runs once more, as another rank."""
    main = sys.modules["__main__"]
    module = [] if main.__spec__ is None else ["-m", main.__spec__.name]
    command = [sys.executable, *(module or [os.path.abspath(sys.argv[0])]), *sys.argv[1:]]
    errors = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the child)
    environment = os.environ | {"LOCAL_RANK": str(rank)}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stderr=errors)
    return _Child(rank, process, errors)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
