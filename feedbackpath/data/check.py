"""What is wrong with the images of a folder: each is decoded to its end."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from feedbackpath.data.decode import UnreadableImageError, decode, image_format
from feedbackpath.data.image_sets import FileSet, ImageSet
from feedbackpath.data.layouts import ImageFolder
from feedbackpath.data.workers import map_in_order

UNREADABLE, TRUNCATED = "unreadable", "truncated or damaged"
WRONG_ENDING, EMPTY_CLASS = "wrong ending", "empty class"


@dataclass(frozen=True)
class Problem:
    """Something wrong.

    Attributes:
        kind: One of the kinds above.
        where: The file, the row of a Parquet file, or the folder.
        reason: What is wrong with it.
    """

    kind: str
    where: str
    reason: str


def check_images(images: ImageSet, num_workers: int = 0) -> Iterator[Problem | None]:
    """Decode every image, and return for each what is wrong with it, or none."""
    return map_in_order(partial(check_image, images), range(len(images.labels)), num_workers)


def check_image(images: ImageSet, number: int) -> Problem | None:
    """Decode an image to its end, and compare the ending of its name with what it is."""
    try:
        raw = images.read(number)
        decode(raw)
    except (UnreadableImageError, OSError) as error:
        return make_problem(images, number, error)
    if not isinstance(images, FileSet) or has_right_ending(images.target(number), raw):
        return None
    return Problem(WRONG_ENDING, images.locate(number), f"it is {image_format(raw)}")


def make_problem(images: ImageSet, number: int, error: UnreadableImageError | OSError) -> Problem:
    """Say of an image why it could not be read."""
    is_truncated = isinstance(error, UnreadableImageError) and error.is_truncated
    reason = getattr(error, "strerror", None) or str(error)
    return Problem(TRUNCATED if is_truncated else UNREADABLE, images.locate(number), reason)


def find_empty_classes(folder: ImageFolder) -> list[Problem]:
    """Return the classes without training images."""
    counts = np.bincount(folder.train.labels, minlength=len(folder.classes))
    return [
        Problem(EMPTY_CLASS, str(folder.root / folder.train_folder / name), "it has no training images")
        for name, count in zip(folder.classes, counts, strict=True)
        if not count
    ]


def has_right_ending(path: Path, raw: bytes) -> bool:
    """Whether a file's name ends as its format has it.

    Example:
        >>> has_right_ending(Path("cat.jpg"), b"GIF89a and more")
        False
    """
    from PIL import Image

    return Image.registered_extensions().get(path.suffix.lower()) == image_format(raw)
