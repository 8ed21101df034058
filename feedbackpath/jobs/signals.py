"""How a job is asked to stop."""

import os
import signal
from types import FrameType, TracebackType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """The user or the system asked the job to stop; what was done is kept.

    Like KeyboardInterrupt no Exception, so that no code on the way takes it for an error of its own.

    Attributes:
        exit_code: 129 after SIGHUP, 130 after SIGINT, 143 after SIGTERM.
        is_at_once: Whether it was asked a second time: nothing more is to be done.
        reason: Why, for the user.
    """

    def __init__(self, exit_code: int, *, is_at_once: bool = False, reason: str = "interrupted") -> None:
        super().__init__(exit_code)
        self.exit_code, self.is_at_once, self.reason = exit_code, is_at_once, reason


class StopRequest:
    """Takes signals to stop: the first asks for a stop after the step, the second ends the job at once.

    Those are SIGINT (Ctrl-C), SIGTERM, and SIGHUP (the terminal has gone) unless `nohup` keeps it away.

    Args:
        is_told: Whether the first one is answered by a line on standard error.

    Attributes:
        number: The signal that came; 0 while none has.
    """

    def __init__(self, *, is_told: bool = True) -> None:
        self.number, self._is_told = 0, is_told

    def __bool__(self) -> bool:
        return self.number > 0

    def __enter__(self) -> Self:
        taken = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._take) for number in taken}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            raise Interrupted(128 + number, is_at_once=True)
        self.number = number
        if self._is_told:
            _answer(b"feedbackpath: stopping after this step; once more ends it at once\n")


def _answer(line: bytes) -> None:
    """Write a line, whatever standard error is in the middle of; nobody may read it any more."""
    try:
        os.write(2, line)
    except OSError:
        return
