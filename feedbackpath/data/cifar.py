"""CIFAR-10 and CIFAR-100, read from their Python batches: 50,000 + 10,000 colour images of 32 x 32 pixels.

The last tenth of the training images, 5,000 of 50,000, is the validation split. Training images are
shifted by up to 4 pixels, the border filled with black, and flipped left to right half of the time.

The batches are pickles, and a pickle may run any code: here one may rebuild NumPy arrays and nothing else.
"""

import io
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from feedbackpath.data.dataset import Dataset, LabelledImages, array_dataset
from feedbackpath.errors import DataError

SIZE = 32  # pixels a side
PADDING = 4  # pixels
VALIDATION_SHARE = 10  # one in so many


@dataclass(frozen=True)
class _Source:
    folder: str
    train_files: tuple[str, ...]
    test_file: str
    label_key: bytes
    num_classes: int
    torchvision_name: str
    mean: tuple[float, float, float]  # of the training pixels, scaled to 0 to 1; red, green, blue
    std: tuple[float, float, float]


SOURCES = {
    "cifar10": _Source(
        "cifar-10-batches-py",
        tuple(f"data_batch_{number}" for number in range(1, 6)),
        "test_batch",
        b"labels",
        10,
        "CIFAR10",
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
    ),
    "cifar100": _Source(
        "cifar-100-python",
        ("train",),
        "test",
        b"fine_labels",
        100,
        "CIFAR100",
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
    ),
}


def load_cifar10(
    *, data_dir: Path | None = None, seed: int = 0, samples_per_epoch: int | None = None
) -> Dataset:
    """Read CIFAR-10 from a folder.

    Args:
        data_dir: Holds the batches, itself or in `cifar-10-batches-py`.
        seed: Chooses the training augmentation.
        samples_per_epoch: Training samples an epoch; all of them by default.

    Raises:
        DataError: If a file is missing or damaged.
    """
    return _load("cifar10", data_dir, seed, samples_per_epoch)


def load_cifar100(
    *, data_dir: Path | None = None, seed: int = 0, samples_per_epoch: int | None = None
) -> Dataset:
    """Read CIFAR-100, with its 100 fine labels, from a folder or `cifar-100-python`: see `load_cifar10`."""
    return _load("cifar100", data_dir, seed, samples_per_epoch)


def random_crop_and_flip(images: Tensor, draws: Tensor) -> Tensor:
    """Shift images by up to 4 pixels and flip half of them left to right.

    Args:
        images: `[N, C, H, W]`.
        draws: Numbers in [0, 1): the row, the column and the flip, `[N, 3]`.

    Returns:
        `[N, C, H, W]`; what was shifted in is 0.
    """
    num_images, _, height, width = images.shape
    windows = F.pad(images, [PADDING] * 4).unfold(2, height, 1).unfold(3, width, 1)
    row, column = (draws[:, :2] * (2 * PADDING + 1)).long().unbind(1)
    crops = windows[torch.arange(num_images), :, row, column]
    return torch.where(draws[:, 2, None, None, None] < 0.5, crops.flip(-1), crops)


def _load(name: str, data_dir: Path | None, seed: int, samples_per_epoch: int | None) -> Dataset:
    source = SOURCES[name]
    advice = (
        f"torchvision.datasets.{source.torchvision_name}(root, download=True) on a connected machine, "
        "then --data-dir root"
    )
    folder = _find_folder(name, source, data_dir, advice)
    parts = [_read_batch(folder / file, source, advice) for file in source.train_files]
    train = LabelledImages(torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]))
    num_train = len(train.labels) - math.ceil(len(train.labels) / VALIDATION_SHARE)
    return array_dataset(
        name,
        train=train[:num_train],
        validation=train[num_train:],
        test=_read_batch(folder / source.test_file, source, advice),
        num_classes=source.num_classes,
        mean=[255 * mean for mean in source.mean],
        std=[255 * std for std in source.std],
        source=str(folder),
        seed=seed,
        samples_per_epoch=samples_per_epoch,
        augment=random_crop_and_flip,
    )


def _find_folder(name: str, source: _Source, data_dir: Path | None, advice: str) -> Path:
    """Return the first folder that holds any of the files; reading them says if another is missing."""
    if data_dir is None:
        raise DataError(f"{name}: it is read from a folder and none was given: {advice}")
    folders = [data_dir, data_dir / source.folder]
    files = (*source.train_files, source.test_file)
    for folder in folders:
        if any((folder / file).exists() for file in files):
            return folder
    looked_in = " and ".join(map(str, folders))
    raise DataError(f"{name}: found none of {', '.join(files)} in {looked_in}: {advice}")


def _read_batch(path: Path, source: _Source, advice: str) -> LabelledImages:
    try:
        batch = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}): {advice}") from error
    except Exception as error:  # a damaged pickle may raise nearly anything
        raise DataError(f"{path}: not a CIFAR batch ({error!r}): {advice}") from error
    problem = _find_problem(batch, source)
    if problem:
        raise DataError(f"{path}: not a CIFAR batch ({problem}): {advice}")
    images = torch.from_numpy(batch[b"data"].reshape(-1, 3, SIZE, SIZE))
    return LabelledImages(images, torch.tensor(batch[source.label_key]))


def _find_problem(batch: Any, source: _Source) -> str | None:
    """Say what keeps an unpickled object from being a batch."""
    if not isinstance(batch, dict) or not {b"data", source.label_key} <= batch.keys():
        return f"expected a dictionary with data and {source.label_key.decode()}"
    data, labels = batch[b"data"], batch[source.label_key]
    row = 3 * SIZE * SIZE
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != row:
        return f"expected data of bytes, N x {row}"
    if not isinstance(labels, list) or len(labels) != len(data) or not labels:
        return f"expected a list of {len(data)} labels, and at least one"
    if not all(isinstance(label, int) and 0 <= label < source.num_classes for label in labels):
        return f"expected labels 0 to {source.num_classes - 1}"
    return None


def _make_dtype(spec: Any, align: Any, copy: Any) -> np.dtype[Any]:
    """Rebuild a dtype; the files hold its flags as integers, of which newer NumPy warns."""
    dtype: np.dtype[Any] = np.dtype(spec, align=bool(align), copy=bool(copy))
    return dtype


# Where `_reconstruct` lives has changed over NumPy's versions; any array names the present one.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ALLOWED_GLOBALS = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _make_dtype,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds NumPy arrays, numbers, text, lists and dictionaries, and refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR batch needs")
        return _ALLOWED_GLOBALS[module, name]
