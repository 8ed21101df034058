"""scikit-learn's handwritten digits: 1,797 real scans of 8 x 8 pixels, for runs of seconds."""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from feedbackpath.data.counter import permutation
from feedbackpath.data.dataset import Dataset, array_dataset
from feedbackpath.errors import DataError

SIZES = [1_200, 250, 347]  # training, validation and test
SPLIT_SEED = 0  # of the order that the samples are split in; the same for every run
MEAN, STD = 4.884, 6.017  # of the pixels, which are 0 to 16


def load_digits(*, seed: int = 0, samples_per_epoch: int | None = None) -> Dataset:
    """Read the digits that scikit-learn carries: see `load_dataset`. Nothing is augmented."""
    table = torch.from_numpy(_read_table())  # a row for each scan: 64 pixels and its digit
    table = table[permutation(len(table), SPLIT_SEED)]
    images, labels = table[:, :-1].reshape(-1, 1, 8, 8), table[:, -1].long()
    return array_dataset(
        "digits",
        *zip(torch.split(images, SIZES), torch.split(labels, SIZES), strict=True),
        num_classes=10,
        mean=[MEAN],
        std=[STD],
        source="scikit-learn",
        seed=seed,
        samples_per_epoch=samples_per_epoch,
    )


def _read_table() -> NDArray[np.uint8]:
    """Read the file that scikit-learn's own `load_digits` reads. Importing the package takes a second."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise DataError(
            "digits: these data come with scikit-learn, which is not installed: pip install scikit-learn"
        )
    path = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    return np.loadtxt(path, delimiter=",", dtype=np.uint8)
