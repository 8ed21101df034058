"""Encoded images with labels, read one at a time: as files of their own, or as rows of Parquet files."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from feedbackpath.data.reading import open_file, read_file
from feedbackpath.errors import DataError

MIN_IMAGE_BYTES = 4  # of a row in a Parquet file, compressed
MAX_GROUP_BYTES = 2**29
MAX_LABEL = 2**31

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class FileSet:
    """Images in files of their own."""

    root: Path
    # Relative to `root`. Not a list of paths: a million of them would be copied into every worker process.
    names: npt.NDArray[np.bytes_]
    sizes: Numbers  # bytes of each file, `[M]`
    labels: Numbers  # the classes, `[M]`

    def read(self, number: int) -> bytes:
        """Return the bytes of an image; an `OSError` says why they cannot be read."""
        return read_file(self.root / self.target(number))

    def locate(self, number: int) -> str:
        """Say where an image is, for messages."""
        return str(self.root / self.target(number))

    def target(self, number: int) -> Path:
        """Return the path of an image as a file, relative to the top folder, here or in a copy."""
        return Path(os.fsdecode(self.names[number]))

    def checksum(self) -> str:
        """Return a digest of names, sizes and labels; the images are not read for it."""
        return _digest(b"\0".join(self.names), self.sizes, self.labels)


@dataclass(frozen=True, eq=False)
class ParquetSet:
    """Images in the rows of Parquet files; its methods are those of `FileSet`.

    An image is read with its whole row group, the least that pyarrow reads. The last group is kept at hand:
    images in order cost little, and images in any other order much.
    """

    split: str  # the folder of the images in a copy as class folders: train or val
    files: tuple[Path, ...]
    sizes: Numbers  # bytes of each file
    groups: Numbers  # file, row group within the file, and first row within the set, of every group `[G, 3]`
    labels: Numbers  # the classes, `[M]`

    def read(self, number: int) -> bytes:
        """Return the bytes of an image."""
        file, group, first = self._find(number)
        raw: bytes | None = _read_group(self.files[file], group)[number - first].as_py()
        return raw or b""

    def locate(self, number: int) -> str:
        """Say in which row of which file an image is; rows are counted from 0."""
        file = self._find(number)[0]
        first_row = int(self.groups[self.groups[:, 0] == file, 2].min())
        return f"{self.files[file]}, row {number - first_row}"

    def target(self, number: int) -> Path:
        """Return the path that an image has in a copy as class folders."""
        return Path(self.split, class_name(int(self.labels[number])), f"{number:08}.JPEG")

    def checksum(self) -> str:
        """Return a digest of the names and sizes of the files, and of the labels."""
        return _digest(b"\0".join(os.fsencode(file.name) for file in self.files), self.sizes, self.labels)

    def _find(self, number: int) -> list[int]:
        """Return the file, the row group and its first row that an image is in."""
        row = int(np.searchsorted(self.groups[:, 2], number, side="right")) - 1
        found: list[int] = self.groups[row].tolist()
        return found


ImageSet = FileSet | ParquetSet


def open_parquet(split: str, files: Sequence[Path]) -> ParquetSet:
    """Read where the images of Parquet files are, and their labels, but no images.

    Each file has a column `image`, of bytes or of structures with a field `bytes`, and a column `label`, of
    whole numbers from 0.
    """
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            "Parquet files are read by pyarrow, which is not installed: pip install pyarrow"
        ) from error
    groups, labels, num_rows = [], [], 0
    for place, path in enumerate(files):
        try:
            with open_file(path) as source, parquet.ParquetFile(source) as file:
                _check_columns(path, file.schema_arrow)
                _check_claims(path, file.metadata)
                labels.append(file.read(["label"], use_threads=False)["label"].to_numpy())
                for group in range(file.num_row_groups):
                    groups.append((place, group, num_rows))
                    num_rows += file.metadata.row_group(group).num_rows
            if len(labels[-1]) != file.metadata.num_rows:
                raise OSError("its row groups have another number of rows than it claims")
        except (arrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: cannot be read as Parquet ({error}): download it again") from error
        if not np.issubdtype(labels[-1].dtype, np.integer) or not (
            0 <= labels[-1].min(initial=0) <= labels[-1].max(initial=0) < MAX_LABEL
        ):
            raise DataError(f"{path}: column 'label' must hold whole numbers from 0, and no gaps")
    sizes = np.array([path.stat().st_size for path in files], np.int64)
    table = np.array(groups, np.int64).reshape(-1, 3)
    return ParquetSet(split, tuple(files), sizes, table, np.concatenate(labels).astype(np.int64))


def class_name(label: int) -> str:
    """Return the name of a class that has only a number, so that names sort as the numbers do."""
    return f"{label:05}"


def _check_columns(path: Path, schema: Any) -> None:
    missing = [name for name in ("image", "label") if name not in schema.names]
    if doubled := [name for name in ("image", "label") if schema.names.count(name) > 1]:
        raise DataError(f"{path}: it has several columns {doubled[0]!r}: keep only the right one")
    if missing:
        raise DataError(
            f"{path}: it has no column {' and no column '.join(missing)}, "
            f"only {', '.join(schema.names)}: rename the columns to image and label"
        )
    from pyarrow import types

    whole = kind = schema.field("image").type
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (types.is_binary(kind) or types.is_large_binary(kind)):
        raise DataError(f"{path}: column 'image' is {whole}; it must be bytes, or structures with 'bytes'")


def _check_claims(path: Path, metadata: Any) -> None:
    """Refuse what would take much memory, before it is read."""
    if metadata.num_rows * MIN_IMAGE_BYTES > path.stat().st_size:
        raise DataError(
            f"{path}: it claims {metadata.num_rows:,} rows, more than its bytes can hold: download it again"
        )
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        size = sum(group.column(column).total_uncompressed_size for column in range(group.num_columns))
        if size > MAX_GROUP_BYTES:
            raise DataError(
                f"{path}: row group {number} has {size:,} bytes, more than the {MAX_GROUP_BYTES:,} that are "
                "read at once: write it again with smaller groups"
            )


@lru_cache(maxsize=1)
def _read_group(path: Path, group: int) -> Any:
    """Return the bytes of the images of a row group; pyarrow makes scalars of them one by one."""
    import pyarrow as arrow
    from pyarrow import compute, parquet, types

    try:
        with open_file(path) as source:
            metadata = parquet.read_metadata(source)
            leaves = {metadata.schema.column(number).path for number in range(metadata.num_columns)}
            leaves &= {"image", "image.bytes"}
            # As a dictionary: one large image that stands in many rows is held once.
            file = parquet.ParquetFile(source, metadata=metadata, read_dictionary=leaves)
            column = file.read_row_group(group, columns=list(leaves), use_threads=False)["image"]
            return compute.struct_field(column, "bytes") if types.is_struct(column.type) else column
    except arrow.ArrowException as error:
        raise OSError(f"row group {group} cannot be read ({error})") from error


def _digest(names: bytes, *columns: Numbers) -> str:
    digest = hashlib.sha256(names)
    for column in columns:
        digest.update(column.tobytes())
    return digest.hexdigest()
