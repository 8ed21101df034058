"""Passes in processes of their own: each begins with Python's state as it was, and leaves none behind."""

import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from feedbackpath.auditing.files import detach_open_files, files_put_back, release_files
from feedbackpath.auditing.report import AuditError
from feedbackpath.core.pytorch import has_processes

SECONDS_BETWEEN_RINGS = 1.0  # of a step that does not end when it is told to
T = TypeVar("T")


class LostProcess(Exception):
    """A forked process ended without a result."""


class EndlessStep(Exception):
    """A step takes so long that it may never end: what it waits for depends on W."""

    def __str__(self) -> str:
        return "it does not end"


def can_fork() -> bool:
    """Whether a copy of this process can go on by itself.

    Backward passes cannot once a GPU's threads have begun, and threads of the user's would be missing, as
    would those that exchange values with other processes.
    """
    has_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    is_alone = threading.active_count() == 1 and not has_processes()
    return hasattr(os, "fork") and is_alone and not has_gpu


def in_fork(run: Callable[[], T], seconds: float = 0.0) -> T:
    """Run something in a forked process and return what it returns; files are put back afterwards.

    Args:
        run: What to run.
        seconds: After this time an EndlessStep is raised in what runs; 0 lets it run.

    Raises:
        LostProcess: The process ended without a result.
    """
    with tempfile.TemporaryDirectory() as folder, files_put_back():
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # threads of OpenMP are no threads of Python's
            child = os.fork()
        if child == 0:
            _be_child(run, f"{folder}/result", seconds)
        try:
            _, status = os.waitpid(child, 0)
        except BaseException:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise
        try:
            result = torch.load(f"{folder}/result", weights_only=False, mmap=True)
        except (OSError, RuntimeError):
            code = os.waitstatus_to_exitcode(status)
            raise LostProcess(f"the step ended its process (exit code {code})") from None
    if isinstance(result, BaseException):
        raise result
    return result  # type: ignore[no-any-return]


def _be_child(run: Callable[[], object], place: str, seconds: float) -> None:
    detach_open_files()
    _keep_freed_memory()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a step prints would be printed once a pass
    results: list[object] = []
    has_rung, is_over = threading.Event(), threading.Event()

    def work() -> None:
        result: object
        try:
            try:
                result = run()
            finally:
                is_over.set()
        except BaseException as error:  # it is raised in the parent
            result = error
        results.append(_as_endless(result) if has_rung.is_set() else result)

    # OpenMP's threads did not come along; a thread that has never used them gets new ones.
    thread = threading.Thread(target=work, daemon=True)
    if torch.get_num_threads() > 1:
        thread.start()
        _end_after(seconds, thread.ident, has_rung, is_over)
        thread.join()
    else:
        _end_after(seconds, threading.get_ident(), has_rung, is_over)
        work()
    signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        release_files()
        _write(results[0], place)
    finally:
        os._exit(0)


def _as_endless(result: Any) -> object:
    """Return a result after the time is up: an EndlessStep amid torch's bookkeeping leads to other errors."""
    if isinstance(result, BaseException):
        return EndlessStep()
    if getattr(result, "error", None) is not None:
        result.error = EndlessStep()
    return result


def _end_after(
    seconds: float, thread: int | None, has_rung: threading.Event, is_over: threading.Event
) -> None:
    """Raise an EndlessStep in a thread after some time, and note it; again and again until it is over.

    Where Python ignores errors, as in a finalizer that happens to run then, one alone would be lost.
    """

    def ring(*_: object) -> None:
        if is_over.is_set():
            return
        has_rung.set()
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread or 0), ctypes.py_object(EndlessStep))

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, SECONDS_BETWEEN_RINGS)


def _keep_freed_memory() -> None:
    """Let what is freed stay with this process, which ends soon: pages given back would be cleared anew."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if sys.platform == "linux" and set_option is not None:  # of the C library of GNU
        set_option(-3, 32 << 20)  # up to this size from one heap
        set_option(-1, 1 << 30)  # of which so much may be free at its end


def _write(result: object, place: str) -> None:
    try:
        torch.save(result, place)
    except (pickle.PicklingError, TypeError, AttributeError):
        error = getattr(result, "error", None) or result
        torch.save(AuditError(f"audit: {type(error).__name__}: {error}"), place)


def in_fresh_process(function: Callable[..., T], *args: object) -> T:
    """Call a function in a process that has run nothing before, and return what it returns.

    Raises:
        AuditError: Function or arguments cannot be sent there.
        LostProcess: The process ended without a result.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, function, *args))
    try:
        process.start()
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise AuditError(
            f"audit: build has to be a function that another process can import ({error}): define it at the "
            "top level of a file"
        ) from None
    theirs.close()
    try:
        result = ours.recv()
    except EOFError:
        raise LostProcess("the process that build ran in ended") from None
    except BaseException:
        process.terminate()
        raise
    finally:
        process.join()
    if isinstance(result, BaseException):
        raise result
    return result  # type: ignore[no-any-return]


def _serve(connection: Any, function: Callable[..., object], *args: object) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        result: object = function(*args)
    except Exception as error:
        result = error
    try:
        connection.send(result)
    except (pickle.PicklingError, TypeError, AttributeError):
        connection.send(AuditError(f"audit: {type(result).__name__}: {result}"))
