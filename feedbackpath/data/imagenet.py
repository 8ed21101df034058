"""ImageNet, or any images in its layouts, from local files: decoded and cropped on the fly, sent as bytes.

What ImageNet calls its validation images is the test split. The validation split is held out of the training
images: of every class the last twentieth by name, but at most 50 images, and one is left to learn from.

Training looks at random parts, evaluation at the centre. Random resized crops are those of Szegedy et al.
(2015), "Going deeper with convolutions", Section 6, in today's form: 8 to 100% of the area, aspect ratio 3/4
to 4/3. A crop depends on random numbers and the size of the image, not on the decoder.
"""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from feedbackpath.data.counter import uniform
from feedbackpath.data.dataset import UNREADABLE, Dataset, Samples, Split, stream_positions
from feedbackpath.data.decode import (
    Box,
    UnreadableImageError,
    decode,
    describe_decoders,
    fit_short_side,
    resize,
)
from feedbackpath.data.image_sets import ImageSet, Numbers
from feedbackpath.data.layouts import LAYOUTS, open_folder
from feedbackpath.errors import DataError, printable

DEFAULT_SIZE = 224  # pixels a side
VALIDATION_SHARE = 20  # one in so many
MAX_VALIDATION = 50  # images a class

AREA_SHARES = (0.08, 1.0)
ASPECT_RATIOS = (3 / 4, 4 / 3)
NUM_TRIES = 10
NUM_DRAWS = 2 * NUM_TRIES + 3
"""Random numbers that a training image takes: shapes to try, a position, and whether to flip."""

CENTRE_SHARE = 224 / 256  # of the short side

MEAN = tuple(255 * mean for mean in (0.485, 0.456, 0.406))  # of the training pixels; red, green, blue
STD = tuple(255 * std for std in (0.229, 0.224, 0.225))

OnBadImage = Literal["error", "skip"]


@dataclass(frozen=True, eq=False)
class ImageSplit(Split):
    """Images that are decoded when they are asked for."""

    images: ImageSet  # what the split is a part of
    numbers: Tensor  # which of them, int64 `[M]`
    size: int  # pixels a side of a sample
    samples_per_epoch: int  # where it is not M, epochs walk through the images in turn
    on_bad_image: OnBadImage = "error"  # or "skip": one that cannot be read is black, its label UNREADABLE
    augment: bool = False  # whether to take random parts, flipped half of the time, instead of the centre
    seed: int = 0  # chooses those

    def __len__(self) -> int:
        return self.samples_per_epoch

    def batch(self, indices: Tensor, epoch: int) -> Samples:
        """Return some samples of an epoch: see `Split.batch`. The inputs are bytes, for `prepare`."""
        positions = stream_positions(indices, epoch, self.samples_per_epoch, len(self.numbers))
        numbers = self.numbers[positions].tolist()
        labels = torch.from_numpy(self.images.labels[numbers])
        views = torch.empty(len(numbers), 3, self.size, self.size, dtype=torch.uint8)
        draws = uniform(indices, NUM_DRAWS, self.seed, epoch).tolist()
        for view, label, number, sample_draws in zip(views, labels, numbers, draws, strict=True):
            try:
                raw = self.images.read(number)
                view[:] = (
                    random_view(raw, self.size, sample_draws) if self.augment else centre_view(raw, self.size)
                )
            except (UnreadableImageError, OSError) as error:
                if self.on_bad_image == "error":
                    reason = getattr(error, "strerror", None) or error
                    raise DataError(
                        f"{self.images.locate(number)}: cannot be read ({reason}): continue without such "
                        "images by --resume RUN --on-bad-image skip, or repair or remove it and begin a new "
                        "run; feedbackpath data check DIR lists all of them"
                    ) from error
                view.zero_()
                label.fill_(UNREADABLE)
        return views, labels

    def prepare(self, x: Tensor) -> Tensor:
        """Scale bytes `[N, 3, H, W]` to ImageNet's mean 0 and deviation 1; runs on the device that trains."""
        mean, std = (torch.tensor(part, device=x.device).view(3, 1, 1) for part in (MEAN, STD))
        return (x.float() - mean) / std


def load_imagenet(
    *,
    data_dir: Path | None = None,
    seed: int = 0,
    samples_per_epoch: int | None = None,
    image_size: int = DEFAULT_SIZE,
    on_bad_image: OnBadImage = "error",
) -> Dataset:
    """Find the images of a folder, of any number of classes: see `load_dataset` and `layouts`."""
    if data_dir is None:
        raise DataError(
            f"imagenet: it is read from a folder and none was given: --data-dir DIR, with {LAYOUTS}"
        )
    if on_bad_image not in ("error", "skip"):
        raise DataError(f"imagenet: on_bad_image is {on_bad_image!r}; choose error or skip")
    if image_size < 1:
        raise DataError(f"imagenet: image_size is {image_size}; it must be at least 1")
    folder = open_folder(data_dir)
    empty = folder.empty_classes()
    if empty:
        raise DataError(
            f"imagenet: {len(empty)} classes of {data_dir} have no training images, such as {empty[0]}: "
            "feedbackpath data check DIR lists all of them"
        )
    train, validation = hold_out(folder.train.labels)
    test = torch.arange(len(folder.test.labels))
    if not len(validation) or not len(test):
        raise DataError(
            f"imagenet: {data_dir} needs at least one test image, and a class of two training images "
            f"to hold one out: see {LAYOUTS}"
        )
    num_samples = samples_per_epoch or len(train)
    # The digest is of the names, sizes and classes of all images; none is read for it.
    names = "\n".join((*folder.classes, folder.train.checksum(), folder.test.checksum()))
    return Dataset(
        "imagenet",
        len(folder.classes),
        (3, image_size, image_size),
        train=ImageSplit(folder.train, train, image_size, num_samples, on_bad_image, augment=True, seed=seed),
        validation=ImageSplit(folder.train, validation, image_size, len(validation), on_bad_image),
        test=ImageSplit(folder.test, test, image_size, len(test), on_bad_image),
        facts={
            "source": printable(str(data_dir)),
            "layout": folder.layout,
            "checksum": hashlib.sha256(os.fsencode(names)).hexdigest(),
            "decoders": describe_decoders(),
            "samples_per_epoch": num_samples,
            "sizes": {"train": len(train), "validation": len(validation), "test": len(test)},
        },
    )


def hold_out(labels: Numbers) -> tuple[Tensor, Tensor]:
    """Divide training images into those to learn from and those to choose hyperparameters by.

    Returns the numbers of either, int64, in order.

    Example:
        >>> train, validation = hold_out(np.array([0, 0, 0, 1, 1, 2]))
        >>> train.tolist(), validation.tolist()
        ([0, 1, 3, 5], [2, 4])
    """
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    shares = np.minimum(np.minimum(-(-counts // VALIDATION_SHARE), MAX_VALIDATION), counts - 1)
    place_from_end = np.repeat(np.cumsum(counts), counts) - np.arange(len(labels))
    is_held_out = place_from_end <= np.repeat(shares, counts)
    train, validation = (torch.from_numpy(np.sort(order[part])) for part in (~is_held_out, is_held_out))
    return train, validation


def random_view(raw: bytes, size: int, draws: Sequence[float]) -> Tensor:
    """Decode a random part of an image to uint8 `[3, size, size]`, flipped left to right half of the time.

    The draws are `NUM_DRAWS` numbers in [0, 1).
    """
    pixels = decode(raw, lambda width, height: random_box(width, height, draws))
    view = resize(pixels, size, size)
    return view.flip(2) if draws[-1] < 0.5 else view


def centre_view(raw: bytes, size: int) -> Tensor:
    """Decode the centre of an image, `CENTRE_SHARE` of its short side, to uint8 `[3, size, size]`."""
    pixels = decode(raw)
    height, width = fit_short_side(pixels.shape[0], pixels.shape[1], round(size / CENTRE_SHARE))
    top, left = round((height - size) / 2), round((width - size) / 2)
    return resize(pixels, height, width)[:, top : top + size, left : left + size]


def random_box(width: int, height: int, draws: Sequence[float]) -> Box:
    """Choose a part of an image: area uniform in `AREA_SHARES`, aspect ratio log-uniform in `ASPECT_RATIOS`.

    Shapes are tried until one fits; if none does, it is the largest centred part of an allowed ratio. The
    draws are `NUM_DRAWS` numbers in [0, 1); the last is not used here.

    Example:
        >>> random_box(500, 375, [0.5] * NUM_DRAWS)
        (91, 29, 409, 347)
    """
    low, high = (math.log(ratio) for ratio in ASPECT_RATIOS)
    right, down = draws[2 * NUM_TRIES : 2 * NUM_TRIES + 2]
    for share_draw, ratio_draw in zip(draws[: 2 * NUM_TRIES : 2], draws[1 : 2 * NUM_TRIES : 2], strict=True):
        area = width * height * (AREA_SHARES[0] + (AREA_SHARES[1] - AREA_SHARES[0]) * share_draw)
        ratio = math.exp(low + (high - low) * ratio_draw)
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left, top = int((width - box_width + 1) * right), int((height - box_height + 1) * down)
            return left, top, left + box_width, top + box_height
    ratio = min(max(width / height, ASPECT_RATIOS[0]), ASPECT_RATIOS[1])
    box_width, box_height = min(width, round(height * ratio)), min(height, round(width / ratio))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height
