"""How a job is asked to stop."""

import signal
from types import FrameType, TracebackType
from typing import Self


class Interrupted(BaseException):
    """The user or the system asked the job to stop; what was done is kept.

    Like KeyboardInterrupt no Exception, so that no code on the way takes it for an error of its own.

    Attributes:
        exit_code: 130 after SIGINT, 143 after SIGTERM.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


class StopRequest:
    """Takes SIGINT and SIGTERM: the first asks for a stop after the step, the second ends the job at once.

    Attributes:
        number: The signal that came; 0 while none has.
    """

    def __init__(self) -> None:
        self.number = 0

    def __bool__(self) -> bool:
        return self.number > 0

    def __enter__(self) -> Self:
        self._before = {
            number: signal.signal(number, self._take) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            raise Interrupted(128 + number)
        self.number = number
