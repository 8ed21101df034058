"""How ImageNet lies in a folder: as class folders, as Kaggle ships it, or as Parquet files."""

import csv
import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from feedbackpath.data.image_sets import FileSet, ImageSet, class_name, open_parquet
from feedbackpath.data.reading import read_file
from feedbackpath.errors import DataError

KAGGLE_IMAGES = Path("ILSVRC", "Data", "CLS-LOC")
KAGGLE_LABELS = "LOC_val_solution.csv"
KAGGLE_TEXTS = (KAGGLE_LABELS, "LOC_synset_mapping.txt")
LAYOUTS = (
    "class folders (train/CLASS/*.JPEG and val/CLASS/*.JPEG), "
    f"Kaggle's download (train/CLASS/*.JPEG and val/*.JPEG in {KAGGLE_IMAGES}, and {KAGGLE_LABELS}), "
    "or Parquet files (train-*.parquet and validation-*.parquet, or these in data/)"
)


@dataclass(frozen=True)
class ImageFolder:
    """What a folder holds."""

    root: Path
    layout: str  # "class folders", "kaggle" or "parquet"
    classes: tuple[str, ...]  # in the order of their labels; for Parquet, which has no names, numbers
    train_folder: Path  # where the folders of the classes are, relative to `root`; for Parquet, in a copy
    train: ImageSet
    test: ImageSet  # what ImageNet calls its validation images

    def empty_classes(self) -> list[str]:
        """Return the names of the classes without training images."""
        counts = np.bincount(self.train.labels, minlength=len(self.classes))
        return [name for name, count in zip(self.classes, counts, strict=True) if not count]


def open_folder(root: Path) -> ImageFolder:
    """Find the images of a folder and their classes; none is read."""
    if not root.is_dir():
        raise DataError(f"imagenet: there is no folder {root}; give one with {LAYOUTS}")
    candidates = [
        ("class folders", _open_class_folders, (root / "train").is_dir()),
        ("kaggle", _open_kaggle, (root / KAGGLE_IMAGES).is_dir()),
        ("parquet", _open_parquet_folder, bool(_find_parquet(root, "train"))),
    ]
    found = {layout: opener for layout, opener, is_there in candidates if is_there}
    if len(found) != 1:
        what = " and ".join(found) or "no layout that is known"
        raise DataError(f"imagenet: {root} holds {what}; give a folder with one of these: {LAYOUTS}")
    (opener,) = found.values()
    return opener(root)


def list_strays(folder: ImageFolder) -> list[str]:
    """Return the paths of what lies beside class folders."""
    parents = {"class folders": ("train", "val"), "kaggle": (folder.train_folder,)}.get(folder.layout, ())
    return [
        entry.path
        for parent in parents
        for entry in _list_visible(folder.root / parent)
        if not entry.is_dir()
    ]


def _open_class_folders(root: Path) -> ImageFolder:
    classes = _list_folders(root / "train")
    strangers = sorted(set(_list_folders(root / "val")) - set(classes))
    if strangers:
        raise DataError(
            f"imagenet: {root / 'val'} has classes that {root / 'train'} does not have: {_shorten(strangers)}"
        )
    train, test = (_list_classes(root, root / part, classes) for part in ("train", "val"))
    return ImageFolder(root, "class folders", classes, Path("train"), train, test)


def _open_kaggle(root: Path) -> ImageFolder:
    images = root / KAGGLE_IMAGES
    classes = _list_folders(images / "train")
    train = _list_classes(root, images / "train", classes)
    labels = _read_kaggle_labels(root / KAGGLE_LABELS, {name: label for label, name in enumerate(classes)})
    found = _list_files(images / "val")
    names = {Path(name).stem for name, _ in found}
    unknown, absent = sorted(names - labels.keys()), sorted(labels.keys() - names)
    if unknown:
        raise DataError(f"imagenet: {root / KAGGLE_LABELS} has no class for {_shorten(unknown)}")
    if absent:
        raise DataError(f"imagenet: {images / 'val'} lacks {_shorten(absent)}, which {KAGGLE_LABELS} names")
    test = _make_set(root, images / "val", found, [labels[Path(name).stem] for name, _ in found])
    return ImageFolder(root, "kaggle", classes, KAGGLE_IMAGES / "train", train, test)


def _open_parquet_folder(root: Path) -> ImageFolder:
    files = {split: _find_parquet(root, split) for split in ("train", "validation")}
    for split, shards in files.items():
        _check_shards(root, split, shards)
    if not files["validation"]:
        raise DataError(f"imagenet: {root} has train-*.parquet but no validation-*.parquet; put it there")
    train, test = open_parquet("train", files["train"]), open_parquet("val", files["validation"])
    num_classes = int(train.labels.max(initial=-1)) + 1
    if num_classes > len(train.labels):
        raise DataError(
            f"imagenet: {root} has label {num_classes - 1} in train, which has {len(train.labels)} images: "
            "number the classes from 0 without gaps"
        )
    if test.labels.max(initial=-1) >= num_classes:
        raise DataError(
            f"imagenet: {root} has label {test.labels.max()} in validation, but none above {num_classes - 1} "
            "in train: a train file is missing"
        )
    classes = tuple(map(class_name, range(num_classes)))
    return ImageFolder(root, "parquet", classes, Path("train"), train, test)


def _read_kaggle_labels(path: Path, classes: Mapping[str, int]) -> dict[str, int]:
    """Return the class of every validation image, by the name of its file without the ending."""
    try:
        text = io.StringIO(read_file(path).decode("utf-8-sig"), newline="")
        rows = [(row["ImageId"], row["PredictionString"].split()[0]) for row in csv.DictReader(text)]
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}): it belongs to Kaggle's layout"
        ) from error
    except (KeyError, AttributeError, IndexError, ValueError, csv.Error) as error:
        raise DataError(
            f"{path}: not Kaggle's table; each row must have an ImageId and a PredictionString that begins "
            "with a class"
        ) from error
    strangers = sorted({name for _, name in rows} - classes.keys())
    if strangers:
        raise DataError(f"{path}: classes without a folder in train: {_shorten(strangers)}")
    found: dict[str, int] = {}
    doubled = sorted(
        {image for image, name in rows if found.setdefault(image, classes[name]) != classes[name]}
    )
    if doubled:
        raise DataError(f"{path}: two classes for {_shorten(doubled)}: keep only the right one")
    return found


def _list_classes(root: Path, folder: Path, classes: Sequence[str]) -> FileSet:
    """List the files of class folders, class by class; a class without a folder has none."""
    found, labels = [], []
    for label, name in enumerate(classes):
        files = _list_files(folder / name) if (folder / name).is_dir() else []
        found += [(f"{name}/{file}", size) for file, size in files]
        labels += [label] * len(files)
    return _make_set(root, folder, found, labels)


def _make_set(root: Path, folder: Path, found: Sequence[tuple[str, int]], labels: Sequence[int]) -> FileSet:
    prefix = folder.relative_to(root)
    names = [os.fsencode(prefix / name) for name, _ in found]
    sizes = [size for _, size in found]
    return FileSet(root, np.array(names, np.bytes_), np.array(sizes, np.int64), np.array(labels, np.int64))


def _list_folders(folder: Path) -> tuple[str, ...]:
    names = [entry.name for entry in _list_visible(folder) if _leads_nowhere(entry)]
    if names:
        raise DataError(
            f"imagenet: {folder} has links without a target: {_shorten(names)}: repair or remove them"
        )
    return tuple(entry.name for entry in _list_visible(folder) if entry.is_dir())


def _leads_nowhere(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)


def _list_files(folder: Path) -> list[tuple[str, int]]:
    """Return the names and sizes of all that a folder holds; what is no image is found when it is read."""
    return [(entry.name, _size(entry)) for entry in _list_visible(folder)]


def _size(entry: os.DirEntry[str]) -> int:
    """Return the bytes of a file; 0 of a folder, or a link that leads nowhere."""
    try:
        return entry.stat().st_size if entry.is_file() else 0
    except OSError:
        return 0


def _list_visible(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(
            f"imagenet: {folder} cannot be read ({error.strerror}): it must hold images"
        ) from error
    return sorted(visible, key=lambda entry: entry.name)


def _find_parquet(root: Path, split: str) -> list[Path]:
    return sorted([*root.glob(f"{split}-*.parquet"), *root.glob(f"data/{split}-*.parquet")])


def _check_shards(root: Path, split: str, files: Sequence[Path]) -> None:
    """Refuse numbered files, such as ``train-00000-of-00002.parquet``, if one is missing or doubled."""
    names = [re.match(rf"{split}-(\d+)-of-(\d+)", file.name) for file in files]
    numbers = sorted((int(name[2]), int(name[1])) for name in names if name)
    if numbers and numbers != [(len(numbers), number) for number in range(len(numbers))]:
        raise DataError(
            f"imagenet: {root} has not each {split} file of {numbers[-1][0]} once, but "
            f"{_shorten([file.name for file in files])}: add missing files, and remove duplicates"
        )


def _shorten(names: Sequence[str], shown: int = 3) -> str:
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest
