"""What commands print: never a reason to end, and never a command to the terminal.

A pipe that is closed or a terminal that has gone ends no training: from then on nothing is printed. What a
terminal cannot show is written out, as are control characters in the names of files, models and rules.
"""

import io
import os
import sys
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from feedbackpath import errors
from feedbackpath.errors import printable

_AS_PYTHON_DOES = warnings.formatwarning


class _Outlet(io.TextIOBase):
    """Standard output for as long as somebody reads it."""

    def __init__(self) -> None:
        # A live display puts something else there while it runs. None: whoever started us has closed it.
        self._stream = sys.stdout or io.TextIOWrapper(io.BytesIO())

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def write(self, text: str) -> int:
        with _going_on_unread(self._stream):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with _going_on_unread(self._stream):
            self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


class _PlainConsole(Console):
    """A console that takes text for text: no markup, and no control characters."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str("\n".join(map(printable, text.split("\n"))), **options)


def make_console(*, quiet: bool = False, soft_wrap: bool = False) -> Console:
    """Return the console on which a command prints its results."""
    return _PlainConsole(
        file=cast(IO[str], _Outlet()),
        quiet=quiet,
        soft_wrap=soft_wrap,
        highlight=False,
        markup=False,
        emoji=False,
    )


def make_table(*headings: str, names: Collection[int] = (0,)) -> Table:
    """Return a table of which nothing is cut: in a narrow terminal names fold, and numbers stay whole."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=0)
    for place, heading in enumerate(headings):
        if place in names:
            table.add_column(heading, overflow="fold")
        else:
            table.add_column(heading, justify="right", no_wrap=True)
    return table


def plain(number: float) -> str:
    """Print a number of any size for a reader: two digits or whole, thousands and more by their letter.

    Example:
        >>> [plain(number) for number in (0.0, 2e-7, 0.0312, 8.6, 1234.5, 7.4e4, 1.31e7, 6.8e9)]
        ['0', '<0.001', '0.031', '8.6', '1,234', '74k', '13M', '6.8G']
    """
    if 0 < number < 0.001:
        return "<0.001"
    for letter, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 10 * size or (letter != "k" and number >= size):
            return f"{number / size:.2g}{letter}" if number < 99.5 * size else f"{number / size:,.0f}{letter}"
    return f"{number:.2g}" if number < 9.95 else f"{number:,.0f}"


def write_out(text: str) -> None:
    """Write text that another program may read to standard output, as it is."""
    outlet = _Outlet()
    outlet.write(text)
    outlet.flush()


def complain(message: str) -> None:
    """Write one line to standard error."""
    with _going_on_unread(sys.stderr):
        sys.stderr.write(_one_line(message))
        sys.stderr.flush()


def show_warnings_in_one_line() -> None:
    """Print the library's warnings as ``complain`` prints; a line of its code would say nothing to a user."""
    warnings.formatwarning = _formatted


def _formatted(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    if category.__module__ != errors.__name__:
        return _AS_PYTHON_DOES(message, category, filename, lineno, line)
    return _one_line(f"warning: {message}")


def _one_line(message: str) -> str:
    return f"feedbackpath: {printable(' '.join(message.split()))}\n"


def write_out_what_cannot_be_encoded() -> None:
    """Let names that are not in the terminal's encoding be printed with escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def _going_on_unread(stream: IO[str]) -> Iterator[None]:
    """Where nobody reads a stream any more, send what it holds and all that follows to nowhere."""
    try:
        yield
    except OSError:  # a pipe that was closed (EPIPE), a terminal that has gone (EIO)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # Python itself flushes the stream when it ends
        os.close(nowhere)
