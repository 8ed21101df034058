"""Files that are made to do harm, by accident or not: each is one line, in bounded memory and time."""

import gzip
import io
import os
import pickle
import resource
import shutil
import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from image_folders import cut_photograph, encode, make_class_folders, make_kaggle_folder, make_parquet_folder
from PIL import Image
from test_data_check import call
from test_data_files import make_batch, write_cifar10, write_idx

from feedbackpath.data import decode as decoding
from feedbackpath.data import load_dataset
from feedbackpath.data.decode import UnreadableImageError, decode
from feedbackpath.data.imagenet import NUM_DRAWS, centre_view, random_view
from feedbackpath.data.layouts import KAGGLE_LABELS
from feedbackpath.data.upkeep import NOTE, Shrinking, shrink_image
from feedbackpath.errors import DataError, printable

SMALL = {"classes": 2, "train": 4, "val": 2}
MAX_GIB, MAX_SECONDS = 2, 10
PROCESS_GIB = 0.4  # what a process of its own has once PyTorch is imported
PHOTOGRAPH = cut_photograph(0, (96, 80))


def outcome_in_bounds(function):
    """Call a function in a process of its own; return its error's text, or "", if it kept within bounds.

    The process starts with all that earlier tests left in memory, so its growth is what counts.
    """
    reading, writing = os.pipe()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    at_start = pages * os.sysconf("SC_PAGE_SIZE") / 2**30
    started = time.monotonic()
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
        text = ""
        try:
            function()
        except (DataError, UnreadableImageError) as error:
            text = str(error)
        except BaseException as error:
            text = f"UNEXPECTED {error!r}"
        os.write(writing, text[:4000].encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read().decode()
    _, status, used = os.wait4(child, 0)
    assert status == 0
    assert used.ru_maxrss / 2**20 - at_start < MAX_GIB - PROCESS_GIB
    assert used.ru_utime + used.ru_stime < MAX_SECONDS
    assert time.monotonic() - started < 6 * MAX_SECONDS  # of a machine that may be busy
    assert not text.startswith("UNEXPECTED"), text
    assert "\n" not in text
    return text


def make_elsewhere(function):
    """Call a function in a process of its own: the memory of making a file is not that of reading it."""
    child = os.fork()
    if not child:
        function()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def claim(raw, width, height):
    """Return a JPEG whose frame header says another size."""
    frame = max(raw.find(b"\xff\xc0"), raw.find(b"\xff\xc2"))
    return raw[: frame + 5] + struct.pack(">HH", height, width) + raw[frame + 9 :]


def png(width, height, depth=8, colours=2):
    """Return a black PNG, whatever its size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = bytes(width * depth * {0: 1, 2: 3, 6: 4}[colours] // 8 + 1)
    packer = zlib.compressobj(1)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiff(*, bits=8, kind=1, white=1, tile=None, packing=1, data=bytes(1024)):
    """Return a grey TIFF of 16 x 16 pixels, of one strip or one tile."""
    tags = [(256, 16), (257, 16), (258, bits), (259, packing), (262, white), (277, 1), (339, kind)]
    tags += [(322, tile), (323, tile), (325, len(data))] if tile else [(278, 16), (279, len(data))]
    start = 8 + 2 + 12 * (len(tags) + 1) + 4
    tags = sorted([*tags, (324 if tile else 273, start)])
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + table + bytes(4) + data


def many_scans():
    raw = encode(Image.new("RGB", (8000, 8000)), progressive=True)
    last = raw.rindex(b"\xff\xda")
    return raw[:-2] + raw[last:-2] * 90 + raw[-2:]


HOSTILE_IMAGES = {
    "large claim": (lambda: claim(encode(PHOTOGRAPH), 65_500, 65_500), "claims 65500 x 65500 pixels"),
    "large progressive claim": (
        lambda: claim(encode(PHOTOGRAPH, progressive=True), 60_000, 60_000),
        "claims 60000 x 60000 pixels",
    ),
    "thin": (lambda: png(20_000, 1), "is 20000 x 1 pixels, one side is more than 100 times the other"),
    "many scans": (many_scans, "come in too many scans"),
    "large tile": (lambda: tiff(tile=40_000, packing=8, data=zlib.compress(bytes(99))), "claims tiles"),
    "postscript": (lambda: encode(PHOTOGRAPH, "EPS"), "not an image in JPEG, PNG, GIF"),
    "icon": (lambda: encode(PHOTOGRAPH, "ICO"), "not an image in JPEG, PNG, GIF"),
    "long comment": (
        lambda: b"P6\n#" + bytes(5_000_000) + b"\n1 1\n255\n" + bytes(3),
        "not an image in JPEG",
    ),
    "long blank": (lambda: b"P5" + b" " * 5_000_000 + b"1 1 255 " + bytes(1), "not an image in JPEG"),
    "long text": (lambda: b"P3\n6000 6000\n255\n" + b"1 " * 9_000_000, "text of more than 16,777,216 bytes"),
    "large and grey, 16 bits": (lambda: png(8192, 8192, 16, 0), ""),
    "large with alpha, 16 bits": (lambda: png(8192, 8192, 16, 6), ""),
    "large WebP": (lambda: encode(Image.new("RGB", (8192, 8192)), "WEBP", lossless=True, method=0), ""),
}


@pytest.mark.parametrize("view", ["centre", pytest.param("random", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", HOSTILE_IMAGES)
def test_a_hostile_image_is_one_line_or_an_image_in_bounds(name, view):
    make, message = HOSTILE_IMAGES[name]
    raw = make()
    look = {
        "centre": lambda raw: centre_view(raw, 224),
        "random": lambda raw: random_view(raw, 224, [0.5] * NUM_DRAWS),
    }[view]
    found = outcome_in_bounds(lambda: look(raw))
    assert message in found
    assert bool(message) == bool(found)


def test_pillow_alone_refuses_a_large_claim_too(monkeypatch):
    monkeypatch.setattr(decoding, "find_simplejpeg", lambda: None)
    for side in (8200, 10_000, 65_500):
        with pytest.raises(UnreadableImageError, match="67,108,864"):
            decode(claim(encode(PHOTOGRAPH), side, side))


@pytest.mark.parametrize(
    "raw",
    [
        encode(Image.fromarray(np.full((40, 40), 200, np.int32)), "TIFF"),
        encode(Image.fromarray(np.full((40, 40), 0.5, np.float32)), "TIFF"),
        tiff(bits=12),
        tiff(bits=16, kind=2),
        tiff(bits=8, kind=2),
        tiff(bits=16, white=0),
        b"Pf\n16 16\n-1.0\n" + bytes(1024),
    ],
    ids=["int32", "float", "12 bits", "signed 16 bits", "signed 8 bits", "white is zero", "PFM"],
)
def test_grey_values_without_an_agreed_white_are_refused(raw):
    with pytest.raises(
        UnreadableImageError, match="no standard says which .* is white: save it with 8 or 16 unsigned bits"
    ):
        decode(raw)


@pytest.mark.parametrize(
    "raw",
    [tiff(bits=16, data=b"\x34\x12" * 256), b"P5\n16 16\n65535\n" + b"\x12\x34" * 256],
    ids=["TIFF", "PGM"],
)
def test_sixteen_unsigned_bits_are_read(raw):
    assert (decode(raw) == 0x12).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: (folder / "x.JPEG").symlink_to("/gone"), "x.JPEG: No such file"),
        (lambda folder: (folder / "x.JPEG").symlink_to(folder / "x.JPEG"), "x.JPEG: Too many levels"),
        (lambda folder: (folder / "x").mkdir(), "x: Is a directory"),
        (lambda folder: os.mkfifo(folder / "x.JPEG"), "x.JPEG: it is not a regular file"),
        (lambda folder: (folder / "x.JPEG").symlink_to("/dev/zero"), "x.JPEG: it is not a regular file"),
        (lambda folder: os.truncate(open_new(folder / "x.JPEG"), 2**40), "x.JPEG: it has more than"),
        (lambda folder: (folder.parent / "x.JPEG").write_bytes(b""), "x.JPEG: it is no class folder"),
        (lambda folder: (folder / "\x1b[31mx\n.JPEG").write_bytes(b""), r"\x1b[31mx\n.JPEG: it is empty"),
        (lambda folder: (folder / os.fsdecode(b"caf\xe9.JPEG")).write_bytes(b""), r"caf\udce9.JPEG: it is"),
    ],
    ids=["dangling", "loop", "folder", "pipe", "device", "sparse", "stray", "escape", "not UTF-8"],
)
def test_whatever_lies_under_a_class_is_listed(tmp_path, capsys, make, message):
    root = make_class_folders(tmp_path, **SMALL)
    make(root / "train" / "n00000001")
    code, output = call(capsys, "check", root)
    assert code == 2
    assert message in output.out
    assert output.out.isascii()
    assert output.out.strip().endswith("1 problems")
    assert call(capsys, "shrink", root, tmp_path.with_name("copy"))[0] == 2


def open_new(path):
    path.touch()
    return path


@pytest.mark.parametrize("target", ["/gone", "nx"])
def test_a_class_that_leads_nowhere_is_refused(tmp_path, target):
    root = make_class_folders(tmp_path, **SMALL)
    (root / "train" / "nx").symlink_to(target)
    with pytest.raises(DataError, match="train has links without a target: nx: repair or remove"):
        load_dataset("imagenet", data_dir=root)


def test_names_that_are_not_utf8_are_read(tmp_path, capsys):
    root = make_class_folders(tmp_path / "in", **SMALL)
    folder, name = root / os.fsdecode(b"train/caf\xe9"), os.fsdecode(b"\xe9.JPEG")
    (root / "train" / "n00000001").rename(folder)
    shutil.rmtree(root / "val" / "n00000001")
    next(folder.iterdir()).rename(folder / name)
    dataset = load_dataset("imagenet", data_dir=root, image_size=32)
    assert dataset.facts["sizes"]["train"] == 6
    dataset.train.batch(torch.arange(6), 0)
    assert call(capsys, "check", root)[0] == 0
    assert call(capsys, "shrink", root, tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / folder.relative_to(root) / name).exists()


def test_errors_about_data_can_be_printed():
    assert str(DataError("a\x1b[31m\u202e\n\udce9 é")) == r"a\x1b[31m\u202e\n\udce9 é"
    assert printable(printable("\x07")) == printable("\x07")


# --- Parquet ---


def rows(labels, images=None, **options):
    def write(folder):
        count = len(labels)
        table = {"image": [encode(PHOTOGRAPH)] * count if images is None else images, "label": labels}
        path = folder / "train-00001-of-00002.parquet"
        pyarrow.parquet.write_table(pyarrow.table(table), path, **options)

    return write


def replace_by_pipe(folder):
    os.mkfifo(folder / "train-0.parquet")


def copy_shard(folder):
    shutil.copy(folder / "train-00001-of-00002.parquet", folder / "train-00001-of-00002-9af3.parquet")


def copy_to_root(folder):
    shutil.copytree(folder, folder.parent, dirs_exist_ok=True)


def two_numberings(folder):
    shutil.copy(folder / "train-00001-of-00002.parquet", folder / "train-00000-of-00001.parquet")


def two_columns(name):
    def write(folder):
        columns = {"image": pyarrow.array([encode(PHOTOGRAPH)] * 2), "label": pyarrow.array([0, 1])}
        table = pyarrow.Table.from_arrays([*columns.values(), columns[name]], names=[*columns, name])
        pyarrow.parquet.write_table(table, folder / "train-00001-of-00002.parquet")

    return write


def same_image_often(folder):
    images = pyarrow.DictionaryArray.from_arrays(np.zeros(6000, np.int32), pyarrow.array([bytes(900_000)]))
    rows([0, 1] * 3000, images, store_schema=False)(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (replace_by_pipe, r"train-0.parquet: cannot be read as Parquet ([Errno 22] it is not a regular file"),
        (lambda folder: (folder / "train-00001-of-00002.parquet").unlink(), "not each train file of 2 once"),
        (copy_shard, "not each train file of 2 once"),
        (copy_to_root, "not each train file of 2 once"),
        (two_numberings, "not each train file of 2 once"),
        (rows([0, 10**10]), "column 'label' must hold whole numbers from 0"),
        (rows(pyarrow.array([0, 2**64 - 1], pyarrow.uint64())), "column 'label' must hold whole numbers"),
        (rows([0, 10**9]), "label 1000000000 in train, which has 6 images"),
        (rows(np.zeros(10**7, np.int64), pyarrow.nulls(10**7, pyarrow.binary())), "claims 10,000,000 rows"),
        (
            rows([0, 1] * 3, [bytes(9 * 10**7)] * 6, compression="zstd", use_dictionary=False),
            "row group 0 has 540,000",
        ),
        (two_columns("image"), "it has several columns 'image'"),
        (two_columns("label"), "it has several columns 'label'"),
        (rows([0, 1], [{"bytes": "text"}] * 2), "column 'image' is struct<bytes: string>"),
    ],
    ids=[
        "pipe", "missing", "doubled", "in two places", "two numberings", "label 1e10", "label 2^64 - 1",
        "label 1e9", "rows", "zeros", "two images",
        "two labels", "text",
    ],
)  # fmt: skip
def test_hostile_parquet_is_one_line(tmp_path, make, message):
    make_elsewhere(lambda: make(make_parquet_folder(tmp_path, **SMALL) / "data"))
    assert message in outcome_in_bounds(lambda: load_dataset("imagenet", data_dir=tmp_path))


def test_one_large_image_in_many_rows_is_held_once(tmp_path):
    make_elsewhere(lambda: same_image_often(make_parquet_folder(tmp_path, **SMALL) / "data"))
    dataset = load_dataset("imagenet", data_dir=tmp_path)
    found = outcome_in_bounds(lambda: dataset.train.batch(torch.tensor([1000]), 0))
    assert "train-00001-of-00002.parquet, row 996: cannot be read (it is not an image" in found


def test_the_name_beside_an_images_bytes_may_be_anything(tmp_path):
    text = pyarrow.Array.from_buffers(
        pyarrow.string(),
        2,
        [None, pyarrow.py_buffer(struct.pack("<iii", 0, 1, 2)), pyarrow.py_buffer(b"\xff\xfe")],
    )
    images = pyarrow.StructArray.from_arrays(
        [pyarrow.array([encode(PHOTOGRAPH)] * 2), text], ["bytes", "path"]
    )
    rows([0, 1], images)(make_parquet_folder(tmp_path, **SMALL) / "data")
    dataset = load_dataset("imagenet", data_dir=tmp_path, image_size=32)
    dataset.train.batch(torch.arange(len(dataset.train)), 0)


# --- Kaggle's table ---


def edit_table(root, change):
    path = root / KAGGLE_LABELS
    path.write_bytes(change(path.read_bytes()))


def test_a_byte_order_mark_and_a_line_twice_change_nothing(tmp_path):
    root = make_kaggle_folder(tmp_path, **SMALL)
    before = load_dataset("imagenet", data_dir=root).facts["checksum"]
    edit_table(root, lambda table: b"\xef\xbb\xbf" + table + table.splitlines(keepends=True)[-1])
    assert load_dataset("imagenet", data_dir=root).facts["checksum"] == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda table: table + b"ILSVRC2012_val_00000004,n00000001 1 2 3 4\r\n",
            "two classes for ILSVRC2012_val_00000004: keep only the right one",
        ),
        (lambda table: table + b"a" * 200_000 + b",n00000001\r\n", "not Kaggle's table"),
        (lambda table: table.replace(b"n00000001", b"\xff"), "not Kaggle's table"),
    ],
    ids=["two classes", "long field", "not UTF-8"],
)
def test_hostile_tables_are_one_line(tmp_path, change, message):
    root = make_kaggle_folder(tmp_path, **SMALL)
    edit_table(root, change)
    assert message in outcome_in_bounds(lambda: load_dataset("imagenet", data_dir=root))


def test_a_table_that_is_a_pipe_does_not_wait(tmp_path):
    root = make_kaggle_folder(tmp_path, **SMALL)
    (root / KAGGLE_LABELS).unlink()
    os.mkfifo(root / KAGGLE_LABELS)
    assert "it is not a regular file" in outcome_in_bounds(lambda: load_dataset("imagenet", data_dir=root))


# --- IDX and CIFAR ---


def gzip_bomb(path):
    path.unlink()
    with gzip.open(path.with_name(f"{path.name}.gz"), "wb", 1) as file:
        for _ in range(40):
            file.write(bytes(2**24))


def gzipped(content):
    def make(path):
        path.unlink()
        path.with_name(f"{path.name}.gz").write_bytes(content)

    return make


GZIP = b"\x1f\x8b\x08"  # then flags, and six bytes more


def device(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (gzip_bomb, "it unpacks to more than 268,435,456 bytes"),
        (gzipped(GZIP + b"\x08" + bytes(6) + b"a" * 20_000_000), "it ends before its gzip stream does"),
        (gzipped(gzip.compress(b"") * 20_000), "it has more than 10,000 gzip streams"),
        (gzipped(gzip.compress(bytes(9))[:-3]), "it ends before its gzip stream does"),
        (device, "it is not a regular file"),
        (pipe, "it is not a regular file"),
        (lambda path: os.truncate(path, 2**40), "it has more than 268,435,456 bytes"),
    ],
    ids=["gzip bomb", "long name", "many streams", "cut off", "device", "pipe", "sparse"],
)
def test_hostile_idx_files_are_one_line(tmp_path, make, message):
    make_elsewhere(lambda: make(write_idx(tmp_path) / "train-images-idx3-ubyte"))
    assert message in outcome_in_bounds(lambda: load_dataset("mnist", data_dir=tmp_path))


@pytest.mark.parametrize("cut", [0, 20, 5000])
def test_gzip_files_that_follow_each_other_are_one(tmp_path, cut):
    path = write_idx(tmp_path) / "train-images-idx3-ubyte"
    raw = path.read_bytes()
    gzipped(gzip.compress(raw[:cut]) + gzip.compress(raw[cut:]))(path)
    assert load_dataset("mnist", data_dir=tmp_path).facts["sizes"]["train"] == 22


@pytest.mark.parametrize("held_out", ["nothing to test on", "nothing to hold out"])
def test_check_names_what_a_run_would_refuse_the_folder_for(tmp_path, capsys, held_out):
    root = make_class_folders(tmp_path, **SMALL)
    if held_out == "nothing to test on":
        shutil.rmtree(root / "val")
        (root / "val").mkdir()
    else:
        for image in root.glob("train/*/*_[1-9]*.JPEG"):
            image.unlink()
    with pytest.raises(DataError):
        load_dataset("imagenet", data_dir=root)
    code, output = call(capsys, "check", root)
    assert code == 2
    assert held_out in output.out


def test_one_image_to_train_on_is_refused(tmp_path):
    write_idx(tmp_path, num_train=1)
    with pytest.raises(DataError, match="has one training image; at least one more is held out"):
        load_dataset("mnist", data_dir=tmp_path)


class Objects:
    """Pickles as an array of objects whose pointers are the bytes 0x41."""

    def __reduce__(self):
        make, arguments, state = np.empty((4, 3072), object).__reduce__()
        return make, arguments, (*state[:4], b"\x41" * 8 * 4 * 3072)


def nested(depth=12):
    """Return a list of ten to the power of ``depth`` numbers, pickled in a few bytes."""
    numbers = [1]
    for _ in range(depth):
        numbers = [numbers] * 10
    return numbers


HOSTILE_BATCHES = {
    "objects": lambda: pickle.dumps(make_batch(0, 4) | {b"data": Objects()}, protocol=4),
    "floats": lambda: pickle.dumps(make_batch(0, 4) | {b"data": np.ones((4, 3072))}, protocol=4),
    "nested labels": lambda: pickle.dumps(make_batch(0, 4) | {b"labels": nested()}, protocol=4),
    "memo": lambda: b"\x80\x02]r\xff\xff\xff\x3f.",
    "bytearray": lambda: b"\x80\x05\x96" + struct.pack("<Q", 2**33) + b".",
    "many lists": lambda: b"\x80\x02" + b"]" * 10**7,
    "long name": lambda: b"c" + b"\x1b" * 10**7 + b"\nx\n.",
}


@pytest.mark.parametrize("name", HOSTILE_BATCHES)
def test_hostile_cifar_batches_are_one_line(tmp_path, name):
    make_elsewhere(lambda: (write_cifar10(tmp_path) / "data_batch_3").write_bytes(HOSTILE_BATCHES[name]()))
    found = outcome_in_bounds(lambda: load_dataset("cifar10", data_dir=tmp_path))
    assert "data_batch_3: not a CIFAR batch" in found
    assert len(found) < 1000


# --- shrink ---


@pytest.mark.parametrize("ending", [".psd", ".eps", ".pdf", ".xyz", ".mpo"])
def test_shrink_writes_a_jpeg_under_a_name_of_a_format_that_it_does_not_write(tmp_path, ending):
    raw = shrink_image(encode(PHOTOGRAPH, "PNG"), Path(f"a{ending}"), Shrinking(40))
    with Image.open(io.BytesIO(raw)) as image:
        assert (image.format, image.size) == ("JPEG", (48, 40))


def test_one_image_that_cannot_be_written_does_not_end_shrink(tmp_path, capsys):
    root, out = make_class_folders(tmp_path / "in", **SMALL), tmp_path / "out"
    (root / "train" / "n00000000" / "wide.webp").write_bytes(png(20_000, 250))  # WebP has at most 16,383
    code, output = call(capsys, "shrink", root, out)
    assert code == 2
    assert "wide.webp: it cannot be written as WEBP" in output.out
    assert len(list(out.rglob("*.JPEG"))) == 12


class Killed(BaseException):
    """Nothing handles it."""


@pytest.mark.parametrize("left", ["a part of the note", "a part of an image"])
def test_shrink_goes_on_wherever_it_was_killed_and_leaves_no_part(tmp_path, capsys, monkeypatch, left):
    root, out = make_kaggle_folder(tmp_path / "in", **SMALL), tmp_path / "out"
    real, moved = os.replace, []

    def be_killed(source, target):
        moved.append(target)
        if len(moved) > {"a part of the note": 0, "a part of an image": 4}[left]:
            raise Killed
        real(source, target)

    monkeypatch.setattr(os, "replace", be_killed)
    with pytest.raises(Killed):
        call(capsys, "shrink", root, out, "--size", 40)
    assert len(list(out.rglob(".*.part"))) == 1
    monkeypatch.undo()
    for image in root.rglob("*_0.JPEG"):  # what is never written anew leaves no part either
        image.write_bytes(b"")
    assert call(capsys, "shrink", root, out, "--size", 40)[0] == 2
    assert not list(out.rglob(".*.part"))
    assert (out / NOTE).exists()


def test_pillows_warnings_are_not_more_lines(tmp_path, capsys):
    root = make_class_folders(tmp_path, **SMALL)
    (root / "train" / "n00000000" / "x.png").write_bytes(png(10_000, 10_000, 8, 0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        _, output = call(capsys, "check", root)
    assert not caught
    assert not output.err
    assert "x.png: it claims 10000 x 10000 pixels" in output.out
