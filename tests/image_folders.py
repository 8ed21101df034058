"""Small folders of real JPEGs in ImageNet's layouts, cut from the photographs that scikit-learn ships."""

import csv
import io
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image
from sklearn.datasets import load_sample_images

from feedbackpath.data.layouts import KAGGLE_IMAGES, KAGGLE_LABELS


@cache
def photographs():
    return [Image.fromarray(image) for image in load_sample_images().images]


def cut_photograph(number, size):
    """Return a part of a photograph, another for every number."""
    image = photographs()[number % 2]
    width, height = size
    rng = np.random.default_rng(number)
    left, top = rng.integers(image.width - width + 1), rng.integers(image.height - height + 1)
    return image.crop((left, top, left + width, top + height))


def encode(image, file_format="JPEG", **options):
    stream = io.BytesIO()
    image.save(stream, file_format, **({"quality": 95} if file_format == "JPEG" else {}) | options)
    return stream.getvalue()


def class_names(classes):
    return [f"n{number:08}" for number in range(classes)]


def make_images(classes, train, val, size):
    """Return (part, class, name, JPEG) of every image; no two are alike."""
    images = []
    for label, name in enumerate(class_names(classes)):
        for place in range(train + val):
            raw = encode(cut_photograph(label * (train + val) + place, size))
            is_train = place < train
            file = f"{name}_{place}" if is_train else f"ILSVRC2012_val_{label:04}{place:04}"
            images.append(("train" if is_train else "val", name, f"{file}.JPEG", raw))
    return images


def make_class_folders(root: Path, *, classes=10, train=8, val=4, size=(96, 80)) -> Path:
    """Write train/CLASS/*.JPEG and val/CLASS/*.JPEG and return the folder."""
    for part, name, file, raw in make_images(classes, train, val, size):
        _write(root / part / name / file, raw)
    return root


def make_kaggle_folder(root: Path, *, classes=10, train=8, val=4, size=(96, 80)) -> Path:
    """Write what Kaggle ships: a flat folder of validation images, and their classes in a table."""
    rows = []
    for part, name, file, raw in make_images(classes, train, val, size):
        folder = root / KAGGLE_IMAGES / part
        _write((folder / name if part == "train" else folder) / file, raw)
        if part == "val":
            rows.append((Path(file).stem, f"{name} 1 2 30 40"))
    with (root / KAGGLE_LABELS).open("w", newline="") as table:
        csv.writer(table).writerows([("ImageId", "PredictionString"), *reversed(rows)])
    return root


def make_parquet_folder(
    root: Path, *, classes=10, train=8, val=4, size=(96, 80), structures=True, subfolder="data"
) -> Path:
    """Write Parquet files as Hugging Face names them: two of training images, one of validation images."""
    images = make_images(classes, train, val, size)
    folder = root / subfolder
    folder.mkdir(parents=True, exist_ok=True)
    rows = {part: [image for image in images if image[0] == part] for part in ("train", "val")}
    half = len(rows["train"]) // 2
    _write_parquet(folder / "train-00000-of-00002.parquet", rows["train"][:half], structures)
    _write_parquet(folder / "train-00001-of-00002.parquet", rows["train"][half:], structures)
    _write_parquet(folder / "validation-00000-of-00001.parquet", rows["val"], structures)
    return root


def _write_parquet(path, rows, structures):
    images = [{"bytes": raw, "path": file} if structures else raw for _, _, file, raw in rows]
    labels = [int(name.removeprefix("n")) for _, name, _, _ in rows]
    table = pyarrow.table({"image": images, "label": pyarrow.array(labels, pyarrow.int64())})
    pyarrow.parquet.write_table(table, path, row_group_size=7)


def _write(path, raw):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)


def damage(folder: Path) -> dict[str, str]:
    """Spoil six files of a class and empty another; return the path of each fault."""
    spoilt, empty = class_names(2)
    files = sorted((folder / "train" / spoilt).iterdir())
    photograph = cut_photograph(0, (96, 80))
    raw = encode(photograph)
    files[0].write_bytes(raw[: len(raw) // 2])
    files[1].write_bytes(b"")
    files[2].write_text("not an image")
    files[3].write_bytes(encode(photograph, "PNG"))
    files[4].write_bytes(encode(photograph.convert("CMYK")))  # sound, as is a grey one
    files[5].write_bytes(encode(photograph.convert("L")))
    for file in (folder / "train" / empty).iterdir():
        file.unlink()
    return {
        "truncated": str(files[0]),
        "empty file": str(files[1]),
        "not an image": str(files[2]),
        "wrong ending": str(files[3]),
        "empty class": str(folder / "train" / empty),
    }
