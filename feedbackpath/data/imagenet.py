"""ImageNet, or any images in its layouts, from local files: decoded and cropped on the fly, sent as bytes.

What ImageNet calls its validation images is the test split. The validation split is held out of the training
images: of every class the last twentieth by name, but at most 50 images, and one is left to learn from.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from feedbackpath.data.counter import uniform
from feedbackpath.data.crops import NUM_DRAWS, centre_view, normalise, random_view
from feedbackpath.data.dataset import UNREADABLE, Dataset, stream_positions
from feedbackpath.data.decode import UnreadableImageError, describe_decoders
from feedbackpath.data.image_sets import ImageSet, Numbers
from feedbackpath.data.layouts import LAYOUTS, ImageFolder, open_folder
from feedbackpath.errors import DataError

DEFAULT_SIZE = 224  # pixels a side
VALIDATION_SHARE = 20  # one in so many
MAX_VALIDATION = 50  # images a class

OnBadImage = Literal["error", "skip"]


@dataclass(frozen=True, eq=False)
class ImageSplit:
    """Images that are decoded when they are asked for.

    Attributes:
        images: What the split is a part of.
        numbers: Which of them, int64 `[M]`.
        size: Pixels a side of a sample.
        samples_per_epoch: Samples an epoch; where it is not M, epochs walk through the images in turn.
        on_bad_image: Whether one that cannot be read is an error, or black with the label `UNREADABLE`.
        augment: Whether to take random parts, flipped half of the time, instead of the centre.
        seed: Chooses those.
    """

    images: ImageSet
    numbers: Tensor
    size: int
    samples_per_epoch: int
    on_bad_image: OnBadImage = "error"
    augment: bool = False
    seed: int = 0

    def __len__(self) -> int:
        return self.samples_per_epoch

    def batch(self, indices: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Return some samples of an epoch: see `Split.batch`. The inputs are bytes, for `prepare`.

        Raises:
            DataError: An image cannot be read, and that is to be an error.
        """
        positions = stream_positions(indices, epoch, self.samples_per_epoch, len(self.numbers))
        numbers = self.numbers[positions].tolist()
        labels = torch.from_numpy(self.images.labels[numbers])
        views = torch.empty(len(numbers), 3, self.size, self.size, dtype=torch.uint8)
        draws = (
            uniform(indices, NUM_DRAWS, self.seed, epoch).tolist() if self.augment else [()] * len(numbers)
        )
        for view, label, number, sample_draws in zip(views, labels, numbers, draws, strict=True):
            try:
                raw = self.images.read(number)
                view[:] = (
                    random_view(raw, self.size, sample_draws) if self.augment else centre_view(raw, self.size)
                )
            except (UnreadableImageError, OSError) as error:
                if self.on_bad_image == "error":
                    raise DataError(self._explain(number, error)) from error
                view.zero_()
                label.fill_(UNREADABLE)
        return views, labels

    def prepare(self, x: Tensor) -> Tensor:
        """Scale bytes `[N, 3, H, W]` to ImageNet's mean 0 and deviation 1; runs on the device that trains."""
        return normalise(x)

    def _explain(self, number: int, error: Exception) -> str:
        reason = getattr(error, "strerror", None) or error
        return (
            f"{self.images.locate(number)}: cannot be read ({reason}): mend or remove it, or count such "
            "images with --on-bad-image skip; feedbackpath data check DIR lists all of them"
        )


def load_imagenet(
    *,
    data_dir: Path | None = None,
    seed: int = 0,
    samples_per_epoch: int | None = None,
    image_size: int = DEFAULT_SIZE,
    on_bad_image: OnBadImage = "error",
) -> Dataset:
    """Find the images of a folder, of any number of classes.

    Args:
        data_dir: Holds class folders, Kaggle's download or Parquet files: see `layouts`.
        seed: Chooses the training crops and flips.
        samples_per_epoch: Training samples an epoch; all of them by default.
        image_size: Pixels a side of a sample.
        on_bad_image: What to do with an image that cannot be read: ``error``, or ``skip``, which returns it
            black with the label `UNREADABLE`.

    Raises:
        DataError: The folder has none of the layouts, lacks a part of it, or has too few images.
    """
    if data_dir is None:
        raise DataError(
            f"imagenet: it is read from a folder and none was given: --data-dir DIR, with {LAYOUTS}"
        )
    if on_bad_image not in ("error", "skip"):
        raise DataError(f"imagenet: on_bad_image is {on_bad_image!r}; choose error or skip")
    if image_size < 1:
        raise DataError(f"imagenet: image_size is {image_size}; it must be at least 1")
    folder = open_folder(data_dir)
    _refuse_empty_classes(folder)
    train, validation = hold_out(folder.train.labels)
    num_samples = samples_per_epoch or len(train)
    test = torch.arange(len(folder.test.labels))
    return Dataset(
        "imagenet",
        len(folder.classes),
        (3, image_size, image_size),
        train=ImageSplit(folder.train, train, image_size, num_samples, on_bad_image, augment=True, seed=seed),
        validation=ImageSplit(folder.train, validation, image_size, len(validation), on_bad_image),
        test=ImageSplit(folder.test, test, image_size, len(test), on_bad_image),
        facts={
            "source": str(data_dir),
            "layout": folder.layout,
            "checksum": checksum(folder),
            "decoders": describe_decoders(),
            "samples_per_epoch": num_samples,
            "sizes": {"train": len(train), "validation": len(validation), "test": len(test)},
        },
    )


def checksum(folder: ImageFolder) -> str:
    """Return a digest of the names, sizes and classes of all images; none is read for it."""
    parts = (*folder.classes, folder.train.checksum(), folder.test.checksum())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def hold_out(labels: Numbers) -> tuple[Tensor, Tensor]:
    """Divide training images into those to learn from and those to choose hyperparameters by.

    Returns:
        The numbers of either, int64, in order.

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


def _refuse_empty_classes(folder: ImageFolder) -> None:
    counts = np.bincount(folder.train.labels, minlength=len(folder.classes))
    empty = [name for name, count in zip(folder.classes, counts, strict=True) if not count]
    if empty:
        raise DataError(
            f"imagenet: {len(empty)} classes of {folder.root} have no training images, such as {empty[0]}: "
            "feedbackpath data check DIR lists all of them"
        )
    if counts.max(initial=0) < 2 or not len(folder.test.labels):
        raise DataError(
            f"imagenet: {folder.root} needs at least one test image, and a class of two training images "
            f"to hold one out: see {LAYOUTS}"
        )
