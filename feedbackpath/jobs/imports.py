"""Rules, layers, models and tasks of the user's, from Python files given by ``--import``."""

import importlib.util
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from feedbackpath.errors import ConfigError, UserError

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
            raise ConfigError(f"--import {file}: it is not a Python file; give one whose name ends in .py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # what it defines can then be pickled
        with naming_faults(f"--import {file}", [place]):
            spec.loader.exec_module(module)
        _IMPORTED.add(place)


@contextmanager
def naming_faults(what: str, files: Iterable[Path]) -> Iterator[None]:
    """Turn what the user's own code raises into one line that names the file and line.

    Args:
        what: What was tried.
        files: The user's files; where there are none, errors are left as they are.

    Raises:
        ConfigError: Their code failed, or left Python.
    """
    places = {file.resolve() for file in files}
    try:
        yield
    except (Exception, SystemExit) as error:
        own = [at for at in traceback.extract_tb(error.__traceback__) if Path(at.filename) in places]
        if not places or (isinstance(error, UserError | OSError) and not own):
            raise
        line = f", {Path(own[-1].filename).name}, line {own[-1].lineno}" if own else ""
        raise ConfigError(f"{what}{line}: {type(error).__name__}: {error}; correct it there") from error
