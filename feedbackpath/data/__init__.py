"""Datasets and their minibatches: built in or read from local files, never downloaded."""

import difflib
import inspect
from collections.abc import Callable
from pathlib import Path

from feedbackpath.data.cifar import load_cifar10, load_cifar100
from feedbackpath.data.dataset import UNREADABLE, Dataset, Split, minibatches
from feedbackpath.data.digits import load_digits
from feedbackpath.data.glyphs import load_glyphs
from feedbackpath.data.idx import load_fashion_mnist, load_mnist
from feedbackpath.data.imagenet import load_imagenet
from feedbackpath.errors import DataError

__all__ = ["DATASETS", "UNREADABLE", "Dataset", "Split", "load_dataset", "minibatches"]

DATASETS: dict[str, Callable[..., Dataset]] = {
    "glyphs": load_glyphs,
    "digits": load_digits,
    "mnist": load_mnist,
    "fashion-mnist": load_fashion_mnist,
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
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
        data_dir: Where its files are, for a dataset that is read from files.
        seed: Chooses the training samples of glyphs and the augmentation of others, never the splits.
        num_classes: How many classes, for a dataset that can be had with more or fewer: glyphs.
        samples_per_epoch: Training samples an epoch.
        image_size: Pixels a side, for a dataset of photographs: imagenet.
        on_bad_image: Whether an image file that cannot be read is an ``error``, or is given the label
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
    folder = None if data_dir is None else Path(data_dir)
    options = {
        "data_dir": folder,
        "num_classes": num_classes,
        "samples_per_epoch": samples_per_epoch,
        "image_size": image_size,
        "on_bad_image": on_bad_image,
    }
    given = {option: value for option, value in options.items() if value is not None}
    refused = given.keys() - inspect.signature(DATASETS[name]).parameters.keys()
    if refused:
        raise DataError(f"{name} takes no {' and no '.join(sorted(refused))}: leave it out")
    return DATASETS[name](seed=seed, **given)
