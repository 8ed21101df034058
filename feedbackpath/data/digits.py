"""scikit-learn's handwritten digits: 1,797 real scans of 8 x 8 pixels, for runs of seconds."""

import torch

from feedbackpath.data.counter import permutation
from feedbackpath.data.dataset import Dataset, LabelledImages, array_dataset
from feedbackpath.errors import DataError

NUM_TRAIN = 1_200
NUM_VALIDATION = 250  # the other 347 are the test
SPLIT_SEED = 0  # of the order that the samples are split in; the same for every run
MEAN, STD = 4.884, 6.017  # of the pixels, which are 0 to 16


def load_digits(*, seed: int = 0, samples_per_epoch: int | None = None) -> Dataset:
    """Read the digits that scikit-learn carries and split them, always in the same way.

    Args:
        seed: Changes nothing, as these samples are not augmented.
        samples_per_epoch: Training samples an epoch, 1,200 by default.

    Raises:
        DataError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as read_digits
    except ImportError as error:
        raise DataError(
            "digits: scikit-learn carries these data and is not installed: pip install 'feedbackpath[data]'"
        ) from error
    scans = read_digits()
    samples = LabelledImages(
        torch.from_numpy(scans.images).to(torch.uint8)[:, None], torch.from_numpy(scans.target).long()
    )[permutation(len(scans.target), SPLIT_SEED)]
    return array_dataset(
        "digits",
        train=samples[:NUM_TRAIN],
        validation=samples[NUM_TRAIN : NUM_TRAIN + NUM_VALIDATION],
        test=samples[NUM_TRAIN + NUM_VALIDATION :],
        num_classes=10,
        mean=[MEAN],
        std=[STD],
        source="scikit-learn",
        seed=seed,
        samples_per_epoch=samples_per_epoch,
    )
