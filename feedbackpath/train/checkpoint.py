"""What a run keeps on disk so that it can go on where it was."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from feedbackpath.errors import CheckpointError

DIGEST_DIGITS = 16


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file beside its place, sync and rename it: a reader sees the old one or the new one, whole."""
    _write_and_name(path.parent, path.name, write, lambda _: path)


def write_text(path: Path, text: str) -> None:
    """Write text, atomically."""
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically; not-a-number becomes null, which JSON knows."""
    write_text(path, json.dumps(_without_nan(value), indent=1, allow_nan=False) + "\n")


def write_json_lines(path: Path, values: list[Any]) -> None:
    """Write values as JSON, one a line, atomically."""
    lines = [json.dumps(_without_nan(value), allow_nan=False) + "\n" for value in values]
    write_text(path, "".join(lines))


def write_model(path: Path, state: dict[str, Tensor]) -> None:
    """Write a network's state, feedback weights too, as safetensors, atomically."""
    from safetensors.torch import save  # only runs that keep their networks need it

    whole = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }
    write_atomically(path, lambda file: file.write(save(whole)))


class Checkpoints:
    """The checkpoints of one run: the newest few, and perhaps the best.

    Each is a file that ``torch.load(..., weights_only=True)`` reads. Its name ends in the first digits of
    its SHA-256, so that a damaged one is known, and one rename puts it in its place whole.

    Args:
        folder: Where they are; made when the first is saved.
        keep: How many of the newest are kept.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(self, state: dict[str, Any], position: tuple[int, int]) -> Path:
        """Save tensors and plain values, as of an epoch and the samples of it; remove all but the newest.

        Raises:
            CheckpointError: It could not be written; those before it are as they were.
        """
        path = self._write("epoch-{:04}-sample-{:09}".format(*position), state)
        for old in self.list_newest_first()[self.keep :]:
            old.unlink(missing_ok=True)
        return path

    def save_best(self, state: dict[str, Any]) -> Path:
        """Save the best state so far in place of the one before."""
        before = list(self.folder.glob("best-*.pt"))
        path = self._write("best", state)
        for old in before:
            if old != path:
                old.unlink(missing_ok=True)
        return path

    def list_newest_first(self) -> list[Path]:
        """Return the files of the newest states."""
        files = self.folder.glob("epoch-*.pt")
        return sorted(
            files, key=lambda path: (path.name.split("-")[1], path.stat().st_mtime_ns), reverse=True
        )

    def load_newest(self) -> tuple[dict[str, Any] | None, list[Path]]:
        """Return the newest state that is whole, or None, and the damaged files that came before it."""
        damaged: list[Path] = []
        for path in self.list_newest_first():
            try:
                return load_checkpoint(path), damaged
            except CheckpointError:
                damaged.append(path)
        return None, damaged

    def load_best(self) -> dict[str, Any] | None:
        """Return the best state, or None.

        Raises:
            CheckpointError: It is damaged.
        """
        files = list(self.folder.glob("best-*.pt"))
        return load_checkpoint(files[0]) if files else None

    def remove(self) -> None:
        """Remove all of them."""
        for path in (*self.folder.glob("epoch-*.pt"), *self.folder.glob("best-*.pt")):
            path.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _write(self, stem: str, state: dict[str, Any]) -> Path:
        try:
            return _write_and_name(
                self.folder,
                stem,
                lambda file: torch.save(state, file),
                lambda digest: self.folder / f"{stem}-{digest[:DIGEST_DIGITS]}.pt",
            )
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise CheckpointError(
                f"the checkpoint {self.folder / stem} could not be written ({reason}); the one before is "
                "whole: make room, and go on with --resume"
            ) from None


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
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(f"checkpoint {path} is damaged ({error}); delete it") from None
    return state


def _write_and_name(
    folder: Path, prefix: str, write: Callable[[BinaryIO], object], name: Callable[[str], Path]
) -> Path:
    """Write and sync a temporary file, then rename it to what ``name`` makes of its SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{prefix}-")
    try:
        with os.fdopen(descriptor, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            path = name(hashlib.file_digest(file, "sha256").hexdigest())
        os.replace(temporary, path)
        _sync_folder(folder)
        return path
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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
