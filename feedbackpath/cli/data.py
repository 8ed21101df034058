"""The commands on image folders: `data check` and `data shrink`."""

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.progress import Progress

from feedbackpath.cli.exit_codes import BAD_INPUT, DONE
from feedbackpath.cli.output import make_console
from feedbackpath.data.layouts import ImageFolder, open_folder
from feedbackpath.data.upkeep import (
    Problem,
    Shrinking,
    check_images,
    find_missing,
    find_strays,
    prepare_copy,
    shrink_images,
)
from feedbackpath.errors import printable
from feedbackpath.jobs.signals import StopRequest
from feedbackpath.train.config import MOST_WORKERS

Folder = Annotated[Path, Parameter(help="image folder, in one of ImageNet's layouts")]
Workers = Annotated[
    int, Parameter(help="processes that decode images", validator=Number(gte=0, lte=MOST_WORKERS))
]


def check(folder: Folder, *, num_workers: Workers = 0) -> int:
    """Decode every image of a folder, and list what is wrong.

    Exit codes: 0 nothing is wrong, 2 something is, 130 or 143 interrupted.
    """
    images = open_folder(folder)
    parts = (check_images(part, num_workers) for part in (images.train, images.test))
    return _go_through(images, parts, [*find_strays(images), *find_missing(images)])


def shrink(
    folder: Folder,
    out: Annotated[Path, Parameter(help="folder for the copy; continues one that was begun")],
    *,
    size: Annotated[int, Parameter(help="short side in pixels", validator=Number(gte=1))] = 256,
    quality: Annotated[int, Parameter(help="quality of the JPEGs", validator=Number(gte=1, lte=95))] = 95,
    num_workers: Workers = 0,
) -> int:
    """Write a copy of an image folder with short sides of 256 pixels; list what could not be read.

    Parquet files become class folders. Exit codes: 0 all were copied, 2 some could not be read, 130 or 143
    interrupted: the same command goes on.
    """
    images, shrinking = open_folder(folder), Shrinking(size, quality)
    prepare_copy(images, out, shrinking)
    parts = (shrink_images(part, out, shrinking, num_workers) for part in (images.train, images.test))
    return _go_through(images, parts, find_strays(images))


def _go_through(
    folder: ImageFolder, parts: Iterable[Iterator[Problem | None]], problems: list[Problem]
) -> int:
    """Go through the images of a folder, show how far, and list the problems; return the exit code."""
    console = make_console(soft_wrap=True)
    num_images = len(folder.train.labels) + len(folder.test.labels)
    problems = [*problems]
    with (
        warnings.catch_warnings(),
        StopRequest() as stop,
        Progress(console=console, disable=not console.is_terminal) as progress,
    ):
        warnings.simplefilter("ignore")  # Pillow's: what is wrong with an image is listed
        task = progress.add_task(f"{num_images} images", total=num_images)
        for problem in chain.from_iterable(parts):
            if problem is not None:
                problems.append(problem)
            progress.advance(task)
            if stop:
                progress.stop()
                console.print("interrupted: what was done is kept")
                return 128 + stop.number
    for kind, count in Counter(problem.kind for problem in problems).items():
        console.print(f"{kind}: {count}")
        for problem in problems:
            if problem.kind == kind:
                console.print(f"  {printable(f'{problem.where}: {problem.reason}')}")
    console.print(f"{num_images} images, {len(problems)} problems")
    return BAD_INPUT if problems else DONE
