"""Datasets and their minibatches: built in or read from local files, never downloaded."""

import difflib
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path

from feedbackpath.data.dataset import UNREADABLE, Dataset, Split, minibatches
from feedbackpath.data.digits import load_digits
from feedbackpath.data.files import SOURCES, load_files
from feedbackpath.data.glyphs import load_glyphs
from feedbackpath.data.imagenet import load_imagenet
from feedbackpath.errors import DataError

__all__ = ["DATASETS", "UNREADABLE", "Dataset", "Split", "load_dataset", "minibatches"]

_FLAGS = {"num_classes": "num_classes (--classes)"}  # options whose flags have other names

DATASETS: dict[str, Callable[..., Dataset]] = {
    "glyphs": load_glyphs,
    "digits": load_digits,
    **{name: partial(load_files, name) for name in SOURCES},
    "imagenet": load_imagenet,
}


def load_dataset(
    name: str,
    *,
    data_dir: str | Path | None = None,
    seed: int = 0,
    num_classes: int | None = None,
    samples_per_epoch: int | None = None,
    image_size: int | None = None,
    on_bad_image: str | None = None,
) -> Dataset:
    """Load a dataset by its name in `DATASETS`.

    Args:
        name: Which.
        data_dir: Where its files are, for a dataset that is read from files: the folder itself, or that which
            torchvision has them in. Fashion-MNIST is also read from Debian's package.
        seed: Chooses the training samples of glyphs and the augmentation of others, never the splits.
        num_classes: How many classes, 2 to 1000, of glyphs: fewer are the first of more.
        samples_per_epoch: Training samples an epoch; by default all, or 25,000 of glyphs, which are endless.
        image_size: Pixels a side, for a dataset of photographs: imagenet.
        on_bad_image: Whether an image that cannot be read is an ``error``, or is black with the label
            `UNREADABLE`, to ``skip`` and count it: imagenet.

    Raises:
        DataError: If there is no such dataset, it does not take such an option, or its files are
            missing or damaged.

    Example:
        >>> digits = load_dataset("digits")
        >>> digits.sample_shape, len(digits.train), len(digits.validation), len(digits.test)
        ((1, 8, 8), 1200, 250, 347)
    """
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise DataError(f"there is no dataset {name!r}: {hint}choose from {', '.join(DATASETS)}")
    if samples_per_epoch is not None and samples_per_epoch < 1:
        raise DataError(f"samples_per_epoch is {samples_per_epoch}; it must be at least 1")
    options = {
        "data_dir": None if data_dir is None else Path(data_dir),
        "num_classes": num_classes,
        "samples_per_epoch": samples_per_epoch,
        "image_size": image_size,
        "on_bad_image": on_bad_image,
    }
    given = {option: value for option, value in options.items() if value is not None}
    refused = given.keys() - inspect.signature(DATASETS[name]).parameters.keys()
    if refused:
        other = " (for images of your own, --data imagenet --data-dir DIR)" if "data_dir" in refused else ""
        names = [_FLAGS.get(option, option) for option in sorted(refused)]
        raise DataError(f"{name} takes no {' and no '.join(names)}: leave it out{other}")
    return DATASETS[name](seed=seed, **given)
