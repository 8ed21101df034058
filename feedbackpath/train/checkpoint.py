"""What a run keeps on disk so that it can go on where it was."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from feedbackpath.errors import ConfigError


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file beside its place, sync and rename it: a reader sees the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write text, atomically."""

    def write(file: BinaryIO) -> None:
        file.write(text.encode("utf-8"))

    write_atomically(path, write)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically; not-a-number becomes null, which JSON knows."""
    write_text(path, json.dumps(_without_nan(value), indent=1, allow_nan=False) + "\n")


def write_json_lines(path: Path, values: list[Any]) -> None:
    """Write values as JSON, one a line, atomically."""
    lines = [json.dumps(_without_nan(value), allow_nan=False) + "\n" for value in values]
    write_text(path, "".join(lines))


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Save tensors and plain values, atomically."""
    write_atomically(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """Load a checkpoint, or return None where there is none.

    Raises:
        ConfigError: The file is damaged.
    """
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ConfigError(
            f"checkpoint {path} is damaged ({type(error).__name__}); delete it to start that run anew"
        ) from None
    return state


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
