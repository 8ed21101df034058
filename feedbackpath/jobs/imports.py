"""Rules, layers, models and tasks of the user's, from Python files given by ``--import``."""

import importlib.util
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

from feedbackpath.errors import ConfigError

_IMPORTED: set[Path] = set()


def import_files(files: Iterable[Path]) -> None:
    """Run Python files, each once: they register what is the user's by the public calls.

    Raises:
        ConfigError: A file is not there, or fails; its own line is named.
    """
    for file in files:
        place = file.resolve()
        if place in _IMPORTED:
            continue
        if not place.is_file():
            raise ConfigError(f"--import {file}: there is no such file; give a Python file")
        name = f"feedbackpath_import_{len(_IMPORTED)}_{place.stem}"
        spec = importlib.util.spec_from_file_location(name, place)
        if spec is None or spec.loader is None:
            raise ConfigError(f"--import {file}: it is no Python file; give one whose name ends in .py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # what it defines can then be pickled
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            own = [at for at in traceback.extract_tb(error.__traceback__) if Path(at.filename) == place]
            line = f", line {own[-1].lineno}" if own else ""
            raise ConfigError(f"--import {file}{line}: {type(error).__name__}: {error}") from error
        _IMPORTED.add(place)
