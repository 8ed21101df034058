"""MNIST and Fashion-MNIST, read from IDX files: 60,000 + 10,000 grey images of 28 x 28 pixels.

The last twelfth of the training images, 5,000 of 60,000, is the validation split. Nothing is augmented.

IDX is a header of big-endian numbers, then the data: two zero bytes, a byte for the type (8: unsigned
bytes), a byte for the number of dimensions, and the size of each dimension in four bytes.
"""

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from feedbackpath.data.dataset import Dataset, LabelledImages, array_dataset
from feedbackpath.errors import DataError

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
IMAGE_SHAPE = (28, 28)
NUM_CLASSES = 10
VALIDATION_SHARE = 12  # one in so many


@dataclass(frozen=True)
class _Source:
    torchvision_name: str
    mean: float  # of the training pixels, scaled to 0 to 1
    std: float
    system_folder: Path | None = None  # where Debian's package puts the files
    package: str = ""


SOURCES = {
    "mnist": _Source("MNIST", 0.1307, 0.3081),
    "fashion-mnist": _Source(
        "FashionMNIST",
        0.2860,
        0.3530,
        Path("/usr/share/datasets/fashion-mnist"),
        "apt install dataset-fashion-mnist, or ",
    ),
}


def load_mnist(
    *, data_dir: Path | None = None, seed: int = 0, samples_per_epoch: int | None = None
) -> Dataset:
    """Read MNIST from a folder: see `load_fashion_mnist`."""
    return _load("mnist", data_dir, seed, samples_per_epoch)


def load_fashion_mnist(
    *, data_dir: Path | None = None, seed: int = 0, samples_per_epoch: int | None = None
) -> Dataset:
    """Read Fashion-MNIST from a folder, or from Debian's package if none is given.

    Args:
        data_dir: Holds the four IDX files, gzipped or not, itself or in `FashionMNIST/raw`.
        seed: Changes nothing, as these samples are not augmented.
        samples_per_epoch: Training samples an epoch; all of them by default.

    Raises:
        DataError: If a file is missing or damaged.
    """
    return _load("fashion-mnist", data_dir, seed, samples_per_epoch)


def _load(name: str, data_dir: Path | None, seed: int, samples_per_epoch: int | None) -> Dataset:
    source = SOURCES[name]
    advice = (
        f"{source.package}torchvision.datasets.{source.torchvision_name}(root, download=True) "
        "on a connected machine, then --data-dir root"
    )
    paths = _find_files(name, source, data_dir, advice)
    train = _read_images(paths[0], paths[1], advice)
    test = _read_images(paths[2], paths[3], advice)
    num_train = len(train.labels) - math.ceil(len(train.labels) / VALIDATION_SHARE)
    return array_dataset(
        name,
        train=train[:num_train],
        validation=train[num_train:],
        test=test,
        num_classes=NUM_CLASSES,
        mean=[255 * source.mean],
        std=[255 * source.std],
        source=str(paths[0].parent),
        seed=seed,
        samples_per_epoch=samples_per_epoch,
    )


def _find_files(name: str, source: _Source, data_dir: Path | None, advice: str) -> list[Path]:
    """Return the paths of `FILES` in the first folder that holds any of them."""
    if data_dir is not None:
        folders = [data_dir, data_dir / source.torchvision_name / "raw"]
    elif source.system_folder is not None:
        folders = [source.system_folder]
    else:
        raise DataError(f"{name}: it is read from a folder and none was given: {advice}")
    for folder in folders:
        found = [_plain_or_gzipped(folder / file) for file in FILES]
        missing = [file for file, path in zip(FILES, found, strict=True) if path is None]
        if not missing:
            return [path for path in found if path is not None]
        if len(missing) < len(FILES):
            raise DataError(f"{name}: {folder} lacks {', '.join(missing)} (or with .gz): {advice}")
    looked_in = " and ".join(map(str, folders))
    raise DataError(f"{name}: found none of {', '.join(FILES)} (or with .gz) in {looked_in}: {advice}")


def _plain_or_gzipped(path: Path) -> Path | None:
    return next((p for p in (path, path.with_name(f"{path.name}.gz")) if p.exists()), None)


def _read_images(images_path: Path, labels_path: Path, advice: str) -> LabelledImages:
    images, labels = read_idx(images_path, 3, advice), read_idx(labels_path, 1, advice)
    if images.shape[1:] != IMAGE_SHAPE:
        raise DataError(
            f"{images_path}: images of shape {images.shape[1:]}, expected {IMAGE_SHAPE}: {advice}"
        )
    if len(images) != len(labels) or not len(labels):
        raise DataError(
            f"{labels_path}: {len(labels)} labels for the {len(images)} images of {images_path.name}, "
            f"expected as many, and at least one: {advice}"
        )
    if labels.max() >= NUM_CLASSES:
        raise DataError(f"{labels_path}: label {labels.max()}, expected 0 to {NUM_CLASSES - 1}: {advice}")
    return LabelledImages(torch.from_numpy(images)[:, None], torch.from_numpy(labels).long())


def read_idx(path: Path, num_dims: int, advice: str = "fetch it again") -> npt.NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes, gzipped if its name ends in `.gz`.

    Args:
        path: The file.
        num_dims: The number of dimensions it must have.
        advice: How to get a good one, for error messages.

    Raises:
        DataError: If it cannot be read, or is not such a file, or is shorter or longer than its header says.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}): {advice}") from error
    magic = bytes([0, 0, 8, num_dims])
    header_size = 4 + 4 * num_dims
    if raw[:4] != magic or len(raw) < header_size:
        raise DataError(
            f"{path}: not an IDX file of {num_dims}-dimensional bytes: "
            f"it starts with '{raw[:4].hex(' ')}', expected '{magic.hex(' ')}' and {num_dims} sizes: {advice}"
        )
    shape = tuple(int(size) for size in np.frombuffer(raw, ">u4", num_dims, offset=4))
    if len(raw) - header_size != math.prod(shape):
        raise DataError(
            f"{path}: {len(raw) - header_size} bytes of data, expected {' x '.join(map(str, shape))}"
            f" = {math.prod(shape)} by its header: {advice}"
        )
    return np.frombuffer(raw, np.uint8, offset=header_size).reshape(shape).copy()
