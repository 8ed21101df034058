"""MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100, read from the files that they are published as.

The last 5,000 training images are the validation split, or the same share of files with fewer images.
CIFAR's training images are shifted by up to 4 pixels, the border filled with black, and flipped left to
right half of the time; MNIST's and Fashion-MNIST's are not augmented.
"""

import io
import math
import pickle
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from feedbackpath.data.dataset import Augmentation, Dataset, Samples, array_dataset
from feedbackpath.data.reading import MAX_BYTES, read_file
from feedbackpath.errors import DataError, printable

GREY_SIZE, COLOUR_SIZE = 28, 32  # pixels a side
PADDING = 4  # pixels
STEP, MAX_PARTS = 2**16, 10_000  # bytes of a gzip file at once, and streams in one
IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@dataclass(frozen=True)
class _Source:
    torchvision_name: str
    folder: str  # where torchvision puts the files within its root
    train_files: tuple[str, ...]
    test_files: tuple[str, ...]
    read: Callable[[Sequence[Path], int], Samples]  # from files, gzipped or not, and the number of classes
    num_classes: int
    validation_share: int  # one training image in so many is held out
    mean: tuple[float, ...]  # of the training pixels, scaled to 0 to 1, by channel
    std: tuple[float, ...]
    augment: Augmentation | None = None
    system_folder: Path | None = None  # where Debian's package puts the files
    advice: str = ""  # how to get that


def load_files(
    name: str, *, data_dir: Path | None = None, seed: int = 0, samples_per_epoch: int | None = None
) -> Dataset:
    """Read one of `SOURCES`: see `load_dataset`.

    The files, gzipped or not, lie in ``data_dir`` itself or where torchvision puts them within its root.
    """
    source = SOURCES[name]
    try:
        paths = _find_files(source, data_dir)
        num_train_files = len(source.train_files)
        images, labels = source.read(paths[:num_train_files], source.num_classes)
        test = source.read(paths[num_train_files:], source.num_classes)
    except DataError as error:
        raise DataError(
            f"{name}: {error}: {source.advice}torchvision.datasets.{source.torchvision_name}(root, "
            "download=True) on a connected machine, then --data-dir root"
        ) from error
    num_train = len(labels) - math.ceil(len(labels) / source.validation_share)
    if not num_train:
        raise DataError(f"{name}: {paths[0].parent} has one training image; at least one more is held out")
    return array_dataset(
        name,
        train=(images[:num_train], labels[:num_train]),
        validation=(images[num_train:], labels[num_train:]),
        test=test,
        num_classes=source.num_classes,
        mean=[255 * mean for mean in source.mean],
        std=[255 * std for std in source.std],
        source=printable(str(paths[0].parent)),
        seed=seed,
        samples_per_epoch=samples_per_epoch,
        augment=source.augment,
    )


def _find_files(source: _Source, data_dir: Path | None) -> list[Path]:
    """Return the paths of all files in the first folder that holds any of them."""
    if data_dir is not None:
        if not data_dir.is_dir():
            raise DataError(f"there is no folder {data_dir}")
        folders = [data_dir, data_dir / source.folder]
    elif source.system_folder is not None:
        folders = [source.system_folder]
    else:
        raise DataError("it is read from a folder and none was given")
    files = source.train_files + source.test_files
    for folder in folders:
        found = [_plain_or_gzipped(folder / file) for file in files]
        missing = [path.name for path in found if not path.exists()]
        if not missing:
            return found
        if len(missing) < len(files):
            raise DataError(f"{folder} lacks {', '.join(missing)} (or with .gz)")
    looked_in = " and ".join(map(str, folders))
    raise DataError(f"found none of {', '.join(files)} (or with .gz) in {looked_in}")


def _plain_or_gzipped(path: Path) -> Path:
    gzipped = path.with_name(f"{path.name}.gz")
    return gzipped if gzipped.exists() and not path.exists() else path


def random_crop_and_flip(images: Tensor, draws: Tensor) -> Tensor:
    """Shift images `[N, C, H, W]` by up to 4 pixels and flip half of them; what is shifted in is 0.

    The draws `[N, 3]` are numbers in [0, 1): for the row, the column and the flip.
    """
    num_images, _, height, width = images.shape
    windows = F.pad(images, [PADDING] * 4).unfold(2, height, 1).unfold(3, width, 1)
    row, column = (draws[:, :2] * (2 * PADDING + 1)).long().unbind(1)
    crops = windows[torch.arange(num_images), :, row, column]
    return torch.where(draws[:, 2, None, None, None] < 0.5, crops.flip(-1), crops)


def _read_idx_images(paths: Sequence[Path], num_classes: int) -> Samples:
    images_path, labels_path = paths
    images, labels = _read_idx(images_path, 3), _read_idx(labels_path, 1)
    if images.shape[1:] != (GREY_SIZE, GREY_SIZE):
        raise DataError(
            f"{images_path}: images of shape {images.shape[1:]}, expected {(GREY_SIZE, GREY_SIZE)}"
        )
    _check_labels(labels_path, labels, len(images), num_classes)
    return torch.from_numpy(images)[:, None], torch.from_numpy(labels).long()


def _read_idx(path: Path, num_dims: int) -> npt.NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes: a header of big-endian numbers, then the data.

    The header is two zero bytes, a byte for the type (8: unsigned bytes), a byte for the number of
    dimensions, and the size of each dimension in four bytes.
    """
    raw = _read_bytes(path)
    magic = bytes([0, 0, 8, num_dims])
    header_size = 4 + 4 * num_dims
    if raw[:4] != magic or len(raw) < header_size:
        raise DataError(
            f"{path}: not an IDX file of {num_dims}-dimensional bytes: "
            f"it starts with '{raw[:4].hex(' ')}', expected '{magic.hex(' ')}' and {num_dims} sizes"
        )
    shape = tuple(int(size) for size in np.frombuffer(raw, ">u4", num_dims, offset=4))
    if len(raw) - header_size != math.prod(shape):
        raise DataError(
            f"{path}: {len(raw) - header_size} bytes of data, expected {' x '.join(map(str, shape))}"
            f" = {math.prod(shape)} by its header"
        )
    return np.frombuffer(raw, np.uint8, offset=header_size).reshape(shape).copy()


def _read_cifar_batches(paths: Sequence[Path], num_classes: int) -> Samples:
    batches = [_read_cifar_batch(path, num_classes) for path in paths]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return images, labels


def _read_cifar_batch(path: Path, num_classes: int) -> Samples:
    label_key = b"labels" if num_classes == 10 else b"fine_labels"
    row = 3 * COLOUR_SIZE**2
    raw = _read_bytes(path)
    try:
        batch = _ArrayUnpickler(_CountedReads(raw), encoding="bytes").load()
        data, labels = _array_of_bytes(batch[b"data"]), batch[label_key]
        if data.shape[1:] != (row,) or not all(type(label) is int for label in labels):
            raise TypeError(f"data of shape {data.shape}, labels in a {type(labels).__name__}")
        labels = np.array(labels, np.int64)
    except Exception as error:  # a damaged pickle may raise nearly anything
        raise DataError(
            f"{path}: not a CIFAR batch, which is a dictionary with data, N x {row} bytes, and "
            f"{label_key.decode()}, N whole numbers ({repr(error):.200})"
        ) from error
    _check_labels(path, labels, len(data), num_classes)
    return torch.from_numpy(data.reshape(-1, 3, COLOUR_SIZE, COLOUR_SIZE)), torch.from_numpy(labels)


class _Pickled:
    """What a pickle says of an array or of its dtype: NumPy would take raw bytes for pointers if told so."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _array_of_bytes(pickled: _Pickled) -> npt.NDArray[np.uint8]:
    """Make the array of unsigned bytes that was pickled; others are refused."""
    _, shape, dtype, is_in_columns, raw = pickled.state
    if dtype.arguments[0] not in ("u1", b"u1"):
        raise TypeError("an array of other values than unsigned bytes")
    return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if is_in_columns else "C").copy()


_ARRAY_GLOBALS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),  # where it was before NumPy 2
    ("numpy._core.multiarray", "_reconstruct"),
}


def _skip_frame(unpickler: Any) -> None:
    """Read over the size of a frame; what is in it follows."""
    unpickler.read(8)


class _ArrayUnpickler(pickle._Unpickler):
    """Rebuilds arrays as `_Pickled`, numbers, text, lists and dictionaries; a plain one would run any code.

    It is the one in Python, for that in C takes memory for as many objects as a file of ten bytes claims.
    """

    dispatch = {**pickle._Unpickler.dispatch, pickle.FRAME[0]: _skip_frame}
    del dispatch[pickle.BYTEARRAY8[0]]  # it takes as much memory as it claims

    def load(self) -> Any:
        try:
            return super().load()
        except (KeyError, EOFError) as error:
            raise pickle.UnpicklingError(f"invalid load key, or truncated: {error!r}") from error

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAY_GLOBALS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which CIFAR batches do not contain")
        return _Pickled


class _CountedReads(io.BytesIO):
    """Bytes that are read in so many parts at most: a byte of a pickle can make an object of sixty."""

    parts_left = 1_000_000  # CIFAR-100's training batch has half a million

    def read(self, size: int | None = -1) -> bytes:
        self.parts_left -= 1
        if self.parts_left < 0:
            raise pickle.UnpicklingError("it has more parts than any CIFAR batch")
        return super().read(size)


def _read_bytes(path: Path) -> bytes:
    """Return the content of a file, gzipped or not."""
    try:
        raw = read_file(path)
        return _unzip(raw) if path.suffix == ".gz" else raw
    except (OSError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _unzip(raw: bytes) -> bytes:
    """Unpack gzip files that follow each other; Python's own module goes through a header byte by byte."""
    whole, left = bytearray(), memoryview(raw)
    for _ in range(MAX_PARTS):
        if left and bytes(left[:2]) != b"\x1f\x8b":
            raise OSError("it is no gzip file, or has something else behind it")
        part = zlib.decompressobj(zlib.MAX_WBITS + 16)
        while left and not part.eof:
            whole += part.decompress(left[:STEP], MAX_BYTES + 1 - len(whole))
            if len(whole) > MAX_BYTES:
                raise OSError(f"it unpacks to more than {MAX_BYTES:,} bytes")
            unused = len(part.unconsumed_tail) + len(part.unused_data)
            left = left[min(STEP, len(left)) - unused :]
        if not part.eof:
            raise OSError("it ends before its gzip stream does")
        if not left or (left[0] == 0 and not bytes(left).strip(b"\0")):  # zeros may fill it up
            return bytes(whole)
    raise OSError(f"it has more than {MAX_PARTS:,} gzip streams")


def _check_labels(path: Path, labels: npt.NDArray[Any], num_images: int, num_classes: int) -> None:
    if labels.shape != (num_images,) or not num_images:
        raise DataError(
            f"{path}: {labels.size} labels for {num_images} images, expected equal numbers, and at least one"
        )
    if not 0 <= labels.min() <= labels.max() < num_classes:
        raise DataError(f"{path}: labels {labels.min()} to {labels.max()}, expected 0 to {num_classes - 1}")


_GREY = partial(
    _Source,
    train_files=IDX_FILES[:2],
    test_files=IDX_FILES[2:],
    read=_read_idx_images,
    num_classes=10,
    validation_share=12,
)
_COLOUR = partial(_Source, read=_read_cifar_batches, validation_share=10, augment=random_crop_and_flip)
SOURCES = {
    "mnist": _GREY(torchvision_name="MNIST", folder="MNIST/raw", mean=(0.1307,), std=(0.3081,)),
    "fashion-mnist": _GREY(
        torchvision_name="FashionMNIST",
        folder="FashionMNIST/raw",
        mean=(0.2860,),
        std=(0.3530,),
        system_folder=Path("/usr/share/datasets/fashion-mnist"),
        advice="apt install dataset-fashion-mnist, or ",
    ),
    "cifar10": _COLOUR(
        torchvision_name="CIFAR10",
        folder="cifar-10-batches-py",
        train_files=tuple(f"data_batch_{number}" for number in range(1, 6)),
        test_files=("test_batch",),
        num_classes=10,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
    "cifar100": _COLOUR(
        torchvision_name="CIFAR100",
        folder="cifar-100-python",
        train_files=("train",),
        test_files=("test",),
        num_classes=100,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    ),
}
