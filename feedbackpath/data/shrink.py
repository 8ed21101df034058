"""A copy of an image folder with the short sides at 256 pixels, which is read several times as fast."""

import io
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from feedbackpath.data.check import Problem, has_right_ending, make_problem
from feedbackpath.data.decode import UnreadableImageError, decode, fit_short_side, resize
from feedbackpath.data.image_sets import ImageSet
from feedbackpath.data.layouts import KAGGLE_TEXTS, ImageFolder
from feedbackpath.data.workers import map_in_order
from feedbackpath.errors import DataError

NOTE = "shrink.json"


@dataclass(frozen=True)
class Shrinking:
    """How images are shrunk.

    Attributes:
        size: Short side, in pixels; smaller images stay as they are.
        quality: Of the JPEGs, 1 to 95.
    """

    size: int = 256
    quality: int = 95


def prepare_copy(folder: ImageFolder, out: Path, shrinking: Shrinking) -> None:
    """Make the folders of a copy, or take up one that was begun with the same settings.

    Raises:
        DataError: `out` lies within the folder or around it, or holds other files or a copy made otherwise.
    """
    source, target = folder.root.resolve(), out.resolve()
    if source.is_relative_to(target) or target.is_relative_to(source):
        raise DataError(
            f"{out}: the copy cannot lie within {folder.root}, nor around it: choose another folder"
        )
    note = {"source": str(source), "size": shrinking.size, "quality": shrinking.quality}
    path = out / NOTE
    if path.exists():
        begun = path.read_text(encoding="utf-8").strip()
        if begun != json.dumps(note):
            raise DataError(
                f"{out} holds a copy made otherwise ({begun}): go on with the same, or choose another folder"
            )
    elif out.exists() and any(out.iterdir()):
        raise DataError(f"{out} holds other files: choose an empty folder, or one that does not exist")
    for name in folder.classes:
        (out / folder.train_folder / name).mkdir(parents=True, exist_ok=True)
    for name in KAGGLE_TEXTS:
        if (folder.root / name).exists():
            shutil.copyfile(folder.root / name, out / name)
    path.write_text(json.dumps(note) + "\n", encoding="utf-8")


def shrink_images(
    images: ImageSet, out: Path, shrinking: Shrinking, num_workers: int = 0
) -> Iterator[Problem | None]:
    """Write the images that a copy lacks, and return for each what is wrong with it, or none.

    Raises:
        DataError: A file cannot be written.
    """
    return map_in_order(_Copier(images, out, shrinking), range(len(images.labels)), num_workers)


def shrink_image(raw: bytes, name: Path, shrinking: Shrinking) -> bytes:
    """Return the bytes of an image whose short side is at most `size`.

    One that is small enough, and is what its name says, is returned as it is. Others are decoded to RGB,
    resized with an antialiased bilinear filter, and encoded in the format of their name, without EXIF data.

    Raises:
        UnreadableImageError: It cannot be decoded.
    """
    from PIL import Image

    pixels = decode(raw)
    height, width = pixels.shape[:2]
    is_small = min(height, width) <= shrinking.size
    if is_small and has_right_ending(name, raw):
        return raw
    if not is_small:
        pixels = resize(pixels, *fit_short_side(height, width, shrinking.size)).permute(1, 2, 0).numpy()
    stream = io.BytesIO()
    file_format = Image.registered_extensions().get(name.suffix.lower(), "JPEG")
    Image.fromarray(pixels).save(stream, file_format, quality=shrinking.quality)
    return stream.getvalue()


@dataclass(frozen=True)
class _Copier:
    images: ImageSet
    out: Path
    shrinking: Shrinking

    def __call__(self, number: int) -> Problem | None:
        target = self.out / self.images.target(number)
        if target.exists():
            return None
        try:
            shrunk = shrink_image(self.images.read(number), target, self.shrinking)
        except (UnreadableImageError, OSError) as error:
            return make_problem(self.images, number, error)
        try:
            _write_whole(target, shrunk)
        except OSError as error:
            raise DataError(
                f"{target}: cannot be written ({error.strerror}): make room, or choose another folder, and "
                "run the command again"
            ) from error
        return None


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")  # hidden, so that it is no image if the process is killed
    part.write_bytes(content)
    os.replace(part, path)
