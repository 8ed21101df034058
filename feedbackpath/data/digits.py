"""scikit-learn's handwritten digits: 1,797 real scans of 8 x 8 pixels, for runs of seconds."""

import torch

from feedbackpath.data.counter import permutation
from feedbackpath.data.dataset import Dataset, array_dataset
from feedbackpath.errors import DataError

SIZES = [1_200, 250, 347]  # training, validation and test
SPLIT_SEED = 0  # of the order that the samples are split in; the same for every run
MEAN, STD = 4.884, 6.017  # of the pixels, which are 0 to 16


def load_digits(*, seed: int = 0, samples_per_epoch: int | None = None) -> Dataset:
    """Read the digits that scikit-learn carries: see `load_dataset`. Nothing is augmented."""
    try:
        from sklearn.datasets import load_digits as read_digits
    except ImportError as error:
        raise DataError(
            "digits: these data come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    scans = read_digits()
    order = permutation(len(scans.target), SPLIT_SEED)
    images = torch.from_numpy(scans.images).to(torch.uint8)[order, None]
    labels = torch.from_numpy(scans.target).long()[order]
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
