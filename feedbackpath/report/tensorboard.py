"""TensorBoard logs of runs, where the ``tensorboard`` package is installed."""

from collections.abc import Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from feedbackpath.train.results import Entry, Metric, Run, entry_to_json


class TensorBoardLog:
    """Writes history entries as scalars by epoch, in a log of its own for each run; idle without tensorboard.

    Args:
        folder: Where the logs go, a folder such as ``kp-seed0`` for each run.

    Example:
        >>> import tempfile
        >>> log = TensorBoardLog(Path(tempfile.mkdtemp()))
        >>> log.add(Run(rule="kp", seed=0), Entry(epoch=1, test=3.6, gain={"fc": 1.0}), Metric())
        >>> log.close()
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writers: dict[str, Any] = {}
        try:
            str(folder).encode()  # what writes the logs can open no other names
            from torch.utils.tensorboard import SummaryWriter  # heavy; imports tensorboard
        except (ImportError, UnicodeEncodeError):
            self._make_writer: Any = None
        else:
            self._make_writer = SummaryWriter

    def add(self, run: Run, entry: Entry, metric: Metric) -> None:
        """Write the numbers of an entry by their names in files, those of layers as ``matrix_angle_deg/fc``.

        A run that goes on after an interruption takes back what its log had from this epoch on.
        """
        if self._make_writer is None:
            return
        if run.name not in self._writers:
            self._writers[run.name] = self._make_writer(self.folder / run.name, purge_step=entry.epoch)
        for tag, number in _numbers(entry_to_json(entry, metric)):
            if tag != "epoch" and isfinite(number):
                self._writers[run.name].add_scalar(tag, number, entry.epoch)
        self._writers[run.name].flush()

    def close(self) -> None:
        """Close the logs."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()


def _numbers(entry: Mapping[str, JsonValue], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in entry.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, value
