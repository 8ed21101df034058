"""What a dataset is, how an epoch is cut into minibatches, and splits held in memory."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from feedbackpath.data.counter import permutation, uniform
from feedbackpath.data.workers import map_in_order

Augmentation = Callable[[Tensor, Tensor], Tensor]
"""From images `[N, C, H, W]` and numbers in [0, 1) `[N, 3]` to images of the same shape."""

Samples = tuple[Tensor, Tensor]
"""Inputs `[N, C, H, W]` and labels, int64 `[N]`."""

UNREADABLE = -1
"""The label of an image that could not be read, where those are to be counted and left out."""


class Split(Protocol):
    """Samples that are each a pure function of (seed, epoch, index)."""

    def __len__(self) -> int:
        """Return the number of samples of an epoch."""
        ...

    def batch(self, indices: Tensor, epoch: int) -> Samples:
        """Return some samples of an epoch; the others of a batch do not matter.

        Args:
            indices: Which, int64 `[N]`, each in [0, len(self)).
            epoch: The epoch, at least 0; a split without augmentation is the same in every one.

        Returns:
            Inputs `[N, C, H, W]` and labels, int64 `[N]`; `UNREADABLE` where an image could not be read.
        """
        ...

    def prepare(self, x: Tensor) -> Tensor:
        """Turn what `batch` returned into float32 inputs, on the device that trains; most need nothing."""
        return x


@dataclass(frozen=True)
class Dataset:
    """A classification task.

    Attributes:
        name: Its name in `DATASETS`.
        num_classes: How many classes.
        sample_shape: `(C, H, W)` of a sample.
        train: What to learn from.
        validation: What to choose hyperparameters by; the same samples whatever the seed.
        test: What to report; the same samples whatever the seed.
        facts: Where it came from, its checksum and its sizes, ready for JSON.
    """

    name: str
    num_classes: int
    sample_shape: tuple[int, int, int]
    train: Split
    validation: Split
    test: Split
    facts: dict[str, Any]


def minibatches(
    split: Split,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    shuffle: bool,
    num_samples: int | None = None,
    start: int = 0,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Samples]:
    """Iterate over an epoch, in an order that is a pure function of (seed, epoch).

    The last batch may be short. Shuffling is for training: batch normalisation has no variance over a single
    sample, so a last batch of one is left out, and a small batch is shared by fewer processes, none of which
    gets a single one. Images that could not be read are left out too. Evaluation gets every sample, and one
    that could not be read has the label `UNREADABLE`: `leave_out_unreadable`.

    Args:
        split: The samples.
        batch_size: Samples a batch.
        seed: Chooses the orders.
        epoch: Which epoch, at least 0.
        shuffle: Whether to shuffle; otherwise the samples come in the order of their indices.
        num_samples: Stop after this many samples of the epoch's order; all of them by default.
        start: Samples of the epoch's order that were consumed already, to resume in mid-epoch.
        num_workers: Processes that read samples ahead; 0 reads them in this one.
        rank: Which of several processes that train together this is.
        world_size: How many they are; each gets every `world_size`-th sample of a batch, of a small batch
            perhaps none.

    Returns:
        An iterator over this process's inputs `[N, C, H, W]`, as the split's `batch` returns them, and their
        labels, int64 `[N]`.

    Raises:
        ValueError: If `batch_size` is below 1, or `num_samples` or `start` is outside the split.

    Example:
        >>> from feedbackpath.data import load_dataset
        >>> train = load_dataset("digits").train
        >>> batches = minibatches(train, batch_size=500, seed=0, epoch=0, shuffle=True)
        >>> [tuple(x.shape) for x, y in batches]
        [(500, 1, 8, 8), (500, 1, 8, 8), (200, 1, 8, 8)]
    """
    stop = len(split) if num_samples is None else num_samples
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    if not 0 <= start <= stop <= len(split):
        raise ValueError(
            f"samples {start} to {stop} were asked for; an epoch of this split has {len(split)}: "
            "choose 0 <= start <= num_samples <= len(split)"
        )
    order = permutation(len(split), seed, epoch) if shuffle else torch.arange(len(split))
    batches = torch.split(order[start:stop], batch_size) if start < stop else ()
    smallest = min(2, batch_size) if shuffle else 1
    own = [_share(batch, smallest, rank, world_size) for batch in batches if len(batch) >= smallest]
    read = partial(_read_readable, split) if shuffle else split.batch
    return map_in_order(partial(read, epoch=epoch), own, num_workers)


def _share(batch: Tensor, smallest: int, rank: int, world_size: int) -> Tensor:
    """Return a process's part of a batch: at least ``smallest`` samples, or none."""
    num_sharing = min(world_size, len(batch) // smallest)
    return batch[rank::num_sharing] if rank < num_sharing else batch[:0]


def _read_readable(split: Split, indices: Tensor, epoch: int) -> Samples:
    x, y = split.batch(indices, epoch)
    return leave_out_unreadable(x, y)


def leave_out_unreadable(x: Tensor, y: Tensor) -> Samples:
    """Return the samples of a batch that could be read."""
    if y.is_floating_point() or y.dim() != 1:  # no labels of images
        return x, y
    is_readable = y != UNREADABLE
    return x[is_readable], y[is_readable]


def stream_positions(indices: Tensor, epoch: int, samples_per_epoch: int, num_items: int) -> Tensor:
    """Map the samples of an epoch onto a list of items that is walked round and round, epoch after epoch.

    Every item comes up equally often in the long run, whether an epoch is shorter or longer than the list.

    Example:
        >>> stream_positions(torch.arange(3), epoch=1, samples_per_epoch=3, num_items=5)
        tensor([3, 4, 0])
    """
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < samples_per_epoch:
        raise IndexError(f"a sample index is outside [0, {samples_per_epoch}), the samples of an epoch")
    return (indices + epoch * samples_per_epoch) % num_items


@dataclass(frozen=True, eq=False)
class ArraySplit(Split):
    """Images held in memory as bytes, perhaps augmented, and normalised when asked for."""

    images: Tensor  # uint8 `[M, C, H, W]`
    labels: Tensor  # int64 `[M]`
    mean: Tensor  # subtracted from the bytes, `[C, 1, 1]`
    std: Tensor  # what the difference is divided by, `[C, 1, 1]`
    samples_per_epoch: int  # where it is not M, epochs walk through the images in turn
    seed: int = 0  # chooses the augmentation
    augment: Augmentation | None = None

    def __len__(self) -> int:
        return self.samples_per_epoch

    def batch(self, indices: Tensor, epoch: int) -> Samples:
        """Return some samples of an epoch: see `Split.batch`."""
        rows = stream_positions(indices, epoch, self.samples_per_epoch, len(self.images))
        images = self.images[rows]
        if self.augment is not None:
            images = self.augment(images, uniform(indices, 3, self.seed, epoch))
        return (images.float() - self.mean) / self.std, self.labels[rows]


def array_dataset(
    name: str,
    train: Samples,
    validation: Samples,
    test: Samples,
    *,
    num_classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    source: str,
    seed: int,
    samples_per_epoch: int | None,
    augment: Augmentation | None = None,
) -> Dataset:
    """Make a dataset of images held in memory; only those of training are augmented.

    ``mean`` and ``std`` are of the bytes, one number a channel.
    """
    digest = hashlib.sha256()
    for part in (*train, *validation, *test):
        digest.update(part.contiguous().numpy().data)
    centre, spread = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
    sizes = {"train": len(train[1]), "validation": len(validation[1]), "test": len(test[1])}
    num_samples = samples_per_epoch or sizes["train"]
    _, channels, height, width = train[0].shape
    return Dataset(
        name,
        num_classes,
        (channels, height, width),
        train=ArraySplit(*train, centre, spread, num_samples, seed, augment),
        validation=ArraySplit(*validation, centre, spread, sizes["validation"]),
        test=ArraySplit(*test, centre, spread, sizes["test"]),
        facts={
            "source": source,
            "checksum": digest.hexdigest(),
            "samples_per_epoch": num_samples,
            "sizes": sizes,
        },
    )
