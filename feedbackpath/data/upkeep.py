"""What is wrong with the images of a folder; and a copy of small ones, read several times as fast."""

import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from feedbackpath.data.decode import (
    FORMATS,
    UnreadableImageError,
    decode,
    fit_short_side,
    image_format,
    resize,
)
from feedbackpath.data.image_sets import FileSet, ImageSet
from feedbackpath.data.imagenet import hold_out
from feedbackpath.data.layouts import KAGGLE_TEXTS, ImageFolder, list_strays
from feedbackpath.data.reading import read_file
from feedbackpath.data.workers import map_in_order
from feedbackpath.errors import DataError

NOTE = "shrink.json"  # with the settings of a copy
PARTIAL = ".part"  # ends the name of a file that is being written; it begins with a dot, as of no image


@dataclass(frozen=True)
class Problem:
    """Something wrong."""

    kind: str  # problems of one kind are listed together
    where: str  # the file, the row of a Parquet file, or the folder
    reason: str


def check_images(images: ImageSet, num_workers: int = 0) -> Iterator[Problem | None]:
    """Decode every image to its end, and return for each what is wrong with it, or none."""
    return map_in_order(partial(_check_image, images), range(len(images.labels)), num_workers)


def _check_image(images: ImageSet, number: int) -> Problem | None:
    try:
        raw = images.read(number)
        decode(raw)
    except (UnreadableImageError, OSError) as error:
        return _make_problem(images, number, error)
    if not isinstance(images, FileSet) or _has_right_ending(images.target(number), raw):
        return None
    return Problem("wrong ending", images.locate(number), f"it is {image_format(raw)}")


def find_missing(folder: ImageFolder) -> list[Problem]:
    """Return the classes without training images, and what a run would refuse the whole folder for."""
    parent, where = folder.root / folder.train_folder, str(folder.root)
    missing = [
        Problem("empty class", str(parent / name), "it has no training images")
        for name in folder.empty_classes()
    ]
    if not len(folder.test.labels):
        missing.append(Problem("nothing to test on", where, "it has no test images"))
    if not len(hold_out(folder.train.labels)[1]):
        missing.append(Problem("nothing to hold out", where, "no class has two training images"))
    return missing


def find_strays(folder: ImageFolder) -> list[Problem]:
    """Return what lies beside the class folders, where no image is looked for."""
    return [Problem("not looked at", path, "it is no class folder") for path in list_strays(folder)]


@dataclass(frozen=True)
class Shrinking:
    """How images are shrunk."""

    size: int = 256  # short side, in pixels; smaller images stay as they are
    quality: int = 95  # of the JPEGs, 1 to 95


def prepare_copy(folder: ImageFolder, out: Path, shrinking: Shrinking) -> None:
    """Make the folders of a copy, or take up one that was begun with the same settings."""
    source, target = folder.root.resolve(), out.resolve()
    if source.is_relative_to(target) or target.is_relative_to(source):
        raise DataError(
            f"{out}: the copy cannot be inside {folder.root}, nor contain it: choose another folder"
        )
    note = {"source": str(source), "size": shrinking.size, "quality": shrinking.quality}
    path = out / NOTE
    if path.exists():
        begun = read_file(path).decode(errors="replace").strip()
        if begun != json.dumps(note):
            raise DataError(
                f"{out} has a copy with other settings ({begun}): use the same, or choose another folder"
            )
    elif out.exists() and any(entry.name != f".{NOTE}{PARTIAL}" for entry in out.iterdir()):
        raise DataError(f"{out} has other files: choose an empty folder, or one that does not exist")
    # First of all: a copy that is killed from here on is known for one.
    _write_whole(path, (json.dumps(note) + "\n").encode())
    for left_over in out.rglob(f".*{PARTIAL}"):
        left_over.unlink(missing_ok=True)
    for name in folder.classes:
        (out / folder.train_folder / name).mkdir(parents=True, exist_ok=True)
    for name in KAGGLE_TEXTS:
        if (folder.root / name).exists():
            _write_whole(out / name, read_file(folder.root / name))


def shrink_images(
    images: ImageSet, out: Path, shrinking: Shrinking, num_workers: int = 0
) -> Iterator[Problem | None]:
    """Write the images that a copy lacks, and return for each what is wrong with it, or none."""
    copy = partial(_copy_image, images, out, shrinking)
    return map_in_order(copy, range(len(images.labels)), num_workers)


def _copy_image(images: ImageSet, out: Path, shrinking: Shrinking, number: int) -> Problem | None:
    target = out / images.target(number)
    if target.exists():
        return None
    try:
        shrunk = shrink_image(images.read(number), target, shrinking)
    except (UnreadableImageError, OSError) as error:
        return _make_problem(images, number, error)
    _write_whole(target, shrunk)
    return None


def _write_whole(target: Path, content: bytes) -> None:
    """Write a file beside its place and move it there: it is whole, or not there."""
    beside = target.with_name(f".{target.name}{PARTIAL}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content)
        os.replace(beside, target)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise DataError(
            f"{target}: cannot be written ({error.strerror}): make room, or choose another folder, and "
            "run the command again"
        ) from error


def shrink_image(raw: bytes, name: Path, shrinking: Shrinking) -> bytes:
    """Return the bytes of an image whose short side is at most `size`.

    One that is small enough, and is what its name says, is returned as it is. Others are decoded to RGB,
    resized with an antialiased bilinear filter, and encoded in the format of their name, or as a JPEG where
    that is not one of `FORMATS`, without EXIF data.
    """
    from PIL import Image

    pixels = decode(raw)
    height, width = pixels.shape[:2]
    is_small = min(height, width) <= shrinking.size
    if is_small and _has_right_ending(name, raw):
        return raw
    if not is_small:
        pixels = resize(pixels, *fit_short_side(height, width, shrinking.size)).permute(1, 2, 0).numpy()
    stream = io.BytesIO()
    file_format = Image.registered_extensions().get(name.suffix.lower(), "JPEG")
    file_format = file_format if file_format in FORMATS else "JPEG"
    try:
        Image.fromarray(pixels).save(stream, file_format, quality=shrinking.quality)
    except Exception as error:  # WebP, for one, has at most 16,383 pixels a side
        raise UnreadableImageError(f"it cannot be written as {file_format}: {error}") from error
    return stream.getvalue()


def _make_problem(images: ImageSet, number: int, error: UnreadableImageError | OSError) -> Problem:
    """Say of an image why it could not be read."""
    is_truncated = isinstance(error, UnreadableImageError) and error.is_truncated
    kind = "truncated or damaged" if is_truncated else "unreadable"
    return Problem(kind, images.locate(number), getattr(error, "strerror", None) or str(error))


def _has_right_ending(path: Path, raw: bytes) -> bool:
    """Whether a file's name ends as its format has it."""
    from PIL import Image

    return Image.registered_extensions().get(path.suffix.lower()) == image_format(raw)
