"""TensorBoard logs of runs, where the ``tensorboard`` package is installed."""

from math import isfinite
from pathlib import Path
from typing import Any

from feedbackpath.report.curves import Run


class TensorBoardLog:
    """Writes history entries as scalars by epoch, in a log of its own for each run; idle without tensorboard.

    Args:
        folder: Where the logs go, a folder such as ``kp-seed0`` for each run.

    Example:
        >>> import tempfile
        >>> log = TensorBoardLog(Path(tempfile.mkdtemp()))
        >>> log.add({"rule": "kp", "seed": 0}, {"epoch": 1, "test_error": 3.6, "gain": {"fc": 1.0}})
        >>> log.close()
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writers: dict[str, Any] = {}
        try:
            from torch.utils.tensorboard import SummaryWriter  # heavy; imports tensorboard
        except ImportError:
            self._make_writer: Any = None
        else:
            self._make_writer = SummaryWriter

    def add(self, run: Run, entry: dict[str, Any]) -> None:
        """Write the numbers of a history entry, those of layers under tags such as ``matrix_angle_deg/fc``.

        A run that goes on after an interruption takes back what its log had from this epoch on.
        """
        if self._make_writer is None:
            return
        name = f"{run['rule']}-seed{run['seed']}"
        if name not in self._writers:
            self._writers[name] = self._make_writer(self.folder / name, purge_step=entry["epoch"])
        for tag, value in _scalars(entry).items():
            self._writers[name].add_scalar(tag, value, entry["epoch"])
        self._writers[name].flush()

    def close(self) -> None:
        """Close the logs."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()


def _scalars(entry: dict[str, Any]) -> dict[str, float]:
    """Return the finite numbers of an entry by tag, those of layers as ``quantity/layer``."""
    flat: dict[str, Any] = {}
    for name, value in entry.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{layer}": number for layer, number in value.items()}
        elif name != "epoch":
            flat[name] = value
    return {tag: value for tag, value in flat.items() if value is not None and isfinite(value)}
