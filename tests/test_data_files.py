"""Datasets read from files: IDX (MNIST, Fashion-MNIST) and CIFAR's pickled batches, good and damaged."""

import gzip
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from feedbackpath.data import load_dataset
from feedbackpath.data.files import IDX_FILES as FILES
from feedbackpath.data.files import SOURCES, _read_bytes, random_crop_and_flip
from feedbackpath.errors import DataError

DEBIAN_FOLDER = SOURCES["fashion-mnist"].system_folder


def idx_bytes(array):
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def write_idx(folder, num_train=24, num_test=6, compress=False):
    """Write four tiny IDX files; image i is filled with the byte i."""
    folder.mkdir(parents=True, exist_ok=True)
    for images_file, labels_file, count in (FILES[:2] + (num_train,), FILES[2:] + (num_test,)):
        images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None], (count, 28, 28))
        for file, array in ((images_file, images), (labels_file, np.arange(count, dtype=np.uint8) % 10)):
            raw = idx_bytes(array)
            (folder / (file + ".gz" * compress)).write_bytes(gzip.compress(raw) if compress else raw)
    return folder


@pytest.mark.parametrize("subfolder", ["", "FashionMNIST/raw"])
@pytest.mark.parametrize("compress", [False, True])
def test_idx_files_are_found_and_read(tmp_path, subfolder, compress):
    folder = write_idx(tmp_path / subfolder, compress=compress)
    dataset = load_dataset("fashion-mnist", data_dir=tmp_path)
    assert (dataset.num_classes, dataset.sample_shape) == (10, (1, 28, 28))
    assert dataset.facts["sizes"] == {"train": 22, "validation": 2, "test": 6}
    assert dataset.facts["source"] == str(folder)
    x, y = dataset.validation.batch(torch.tensor([0, 1]), 0)
    assert y.tolist() == [2, 3]
    torch.testing.assert_close(x[:, 0, 5, 5], (torch.tensor([22.0, 23.0]) / 255 - 0.2860) / 0.3530)


def test_mnist_has_a_folder_and_constants_of_its_own(tmp_path):
    write_idx(tmp_path / "MNIST" / "raw")
    x, _ = load_dataset("mnist", data_dir=tmp_path).test.batch(torch.tensor([0]), 0)
    assert x[0, 0, 0, 0].item() == pytest.approx(-0.1307 / 0.3081)


def first_image_file(data_dir):
    return data_dir / FILES[0]


def swap_magic(data_dir):
    file = first_image_file(data_dir)
    file.write_bytes(b"\0\0\x0d\x03" + file.read_bytes()[4:])


def cut_short(data_dir):
    file = first_image_file(data_dir)
    file.write_bytes(file.read_bytes()[:-10])


def cut_header(data_dir):
    file = first_image_file(data_dir)
    file.write_bytes(file.read_bytes()[:9])


def cut_gzip(data_dir):
    file = first_image_file(data_dir)
    file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes())[:-20])
    file.unlink()


def not_gzip(data_dir):
    file = first_image_file(data_dir)
    file.rename(file.with_name(f"{file.name}.gz"))


def empty(data_dir):
    first_image_file(data_dir).write_bytes(b"")


def remove(data_dir):
    first_image_file(data_dir).unlink()


def put_a_folder_in_its_place(data_dir):
    first_image_file(data_dir).unlink()
    first_image_file(data_dir).mkdir()


def change_image_size(data_dir):
    first_image_file(data_dir).write_bytes(idx_bytes(np.zeros((24, 28, 14), np.uint8)))


def lose_labels(data_dir):
    (data_dir / FILES[1]).write_bytes(idx_bytes(np.zeros(23, np.uint8)))


def spoil_label(data_dir):
    (data_dir / FILES[1]).write_bytes(idx_bytes(np.full(24, 10, np.uint8)))


def no_images(data_dir):
    first_image_file(data_dir).write_bytes(idx_bytes(np.zeros((0, 28, 28), np.uint8)))
    (data_dir / FILES[1]).write_bytes(idx_bytes(np.zeros(0, np.uint8)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (swap_magic, "train-images-idx3-ubyte: not an IDX file .* '00 00 0d 03', expected '00 00 08 03'"),
        (cut_short, "train-images-idx3-ubyte: 18806 bytes of data, expected 24 x 28 x 28 = 18816"),
        (cut_header, "train-images-idx3-ubyte: not an IDX file"),
        (cut_gzip, r"train-images-idx3-ubyte\.gz: cannot be read \(it ends before its gzip stream does"),
        (not_gzip, r"train-images-idx3-ubyte\.gz: cannot be read \(it is no gzip file"),
        (empty, "train-images-idx3-ubyte: not an IDX file .* starts with ''"),
        (remove, r"lacks train-images-idx3-ubyte \(or with \.gz\)"),
        (put_a_folder_in_its_place, "train-images-idx3-ubyte: cannot be read .*directory"),
        (change_image_size, r"train-images-idx3-ubyte: images of shape \(28, 14\), expected \(28, 28\)"),
        (lose_labels, "train-labels-idx1-ubyte: 23 labels for 24 images"),
        (spoil_label, "train-labels-idx1-ubyte: labels 10 to 10, expected 0 to 9"),
        (no_images, "train-labels-idx1-ubyte: 0 labels for 0 images, .* at least one"),
    ],
)
def test_damaged_idx_files_are_named_with_a_remedy(tmp_path, damage, message):
    damage(write_idx(tmp_path))
    with pytest.raises(DataError, match=message) as caught:
        load_dataset("fashion-mnist", data_dir=tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert str(caught.value).endswith(
        "apt install dataset-fashion-mnist, or torchvision.datasets.FashionMNIST(root, download=True) "
        "on a connected machine, then --data-dir root"
    )


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100"])
@pytest.mark.parametrize("folder", ["", "nowhere"])
def test_an_empty_or_absent_folder_says_what_was_looked_for_where(tmp_path, name, folder):
    found = "there is no folder .*" if folder else "found none of .* in .* and .*"
    with pytest.raises(DataError, match=f"{name}: {found}: .*download=True") as caught:
        load_dataset(name, data_dir=tmp_path / folder)
    assert str(tmp_path / folder) in str(caught.value)


@pytest.mark.skipif(not DEBIAN_FOLDER.exists(), reason=f"needs Debian's package in {DEBIAN_FOLDER}")
def test_fashion_mnist_of_debian():
    dataset = load_dataset("fashion-mnist")
    assert dataset.facts["sizes"] == {"train": 55_000, "validation": 5_000, "test": 10_000}
    x, y = dataset.train.batch(torch.arange(0, 55_000, 11), 0)
    assert abs(x.mean()) < 0.02
    assert abs(x.std() - 1) < 0.02
    assert torch.bincount(dataset.test.batch(torch.arange(10_000), 0)[1]).tolist() == [1000] * 10
    assert torch.bincount(y).min() > 400


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes as Python 2 wrote `str`, which is what CIFAR's own files hold."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_python2_str(self, value):
        raw = value.encode("latin-1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + len(raw).to_bytes(4, "little") + raw)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_python2_str


def dump_as_python2(batch, path):
    with path.open("wb") as file:
        Python2Pickler(file, protocol=2).dump(batch)
    raw = path.read_bytes().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    false_true, zero_one = b"\x89\x88\x87R", b"K\x00K\x01\x87R"  # the flags of a dtype
    path.write_bytes(raw.replace(false_true, zero_one))


def dump_as_python3(batch, path):
    path.write_bytes(pickle.dumps(batch, protocol=4))


def make_batch(first, count, label_key=b"labels", num_classes=10):
    """Make a batch whose image i is filled with the byte i, and 10 more in each next channel."""
    fill = np.arange(first, first + count, dtype=np.uint8)[:, None] + np.repeat([0, 10, 20], 1024)
    return {
        b"data": fill.astype(np.uint8),
        label_key: [i % num_classes for i in range(first, first + count)],
        b"batch_label": b"a batch",
    }


def write_cifar10(folder, dump=dump_as_python3):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(5):
        dump(make_batch(4 * number, 4), folder / f"data_batch_{number + 1}")
    dump(make_batch(100, 3), folder / "test_batch")
    return folder


@pytest.mark.parametrize("subfolder", ["", "cifar-10-batches-py"])
@pytest.mark.parametrize("dump", [dump_as_python2, dump_as_python3])
def test_cifar10_batches_are_found_and_read(tmp_path, subfolder, dump):
    folder = write_cifar10(tmp_path / subfolder, dump)
    dataset = load_dataset("cifar10", data_dir=tmp_path)
    assert (dataset.num_classes, dataset.sample_shape) == (10, (3, 32, 32))
    assert dataset.facts["sizes"] == {"train": 18, "validation": 2, "test": 3}
    assert dataset.facts["source"] == str(folder)
    x, y = dataset.validation.batch(torch.tensor([0]), 0)
    assert y.tolist() == [18 % 10]
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    torch.testing.assert_close(x[0, :, 7, 9], (torch.tensor([18.0, 28.0, 38.0]) / 255 - mean) / std)


def test_cifar100_reads_fine_labels(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for file, count in (("train", 200), ("test", 100)):
        dump_as_python2(make_batch(0, count, b"fine_labels", 100), folder / file)
    dataset = load_dataset("cifar100", data_dir=tmp_path)
    assert dataset.num_classes == 100
    assert dataset.test.batch(torch.arange(100), 0)[1].tolist() == list(range(100))


def test_cifar_augments_training_purely(tmp_path):
    write_cifar10(tmp_path)
    indices = torch.arange(18)
    train = load_dataset("cifar10", data_dir=tmp_path).train
    x, _ = train.batch(indices, 0)
    assert torch.equal(x[[3, 5]], train.batch(torch.tensor([3, 5]), 0)[0])
    assert not torch.equal(x, train.batch(indices, 1)[0])
    assert not torch.equal(x, load_dataset("cifar10", data_dir=tmp_path, seed=1).train.batch(indices, 0)[0])


@pytest.mark.parametrize(
    ("row", "column", "flip"), [(4, 4, False), (0, 8, False), (7, 1, True), (4, 4, True)]
)
def test_crop_and_flip_is_a_shift_and_a_mirror_image(row, column, flip):
    image = torch.arange(1, 2 * 32 * 32 + 1).view(1, 2, 32, 32)
    padded = torch.zeros(2, 40, 40, dtype=image.dtype)
    padded[:, 4:36, 4:36] = image[0]
    expected = padded[:, row : row + 32, column : column + 32]
    draws = torch.tensor([[(row + 0.5) / 9, (column + 0.5) / 9, 0.2 if flip else 0.7]])
    assert torch.equal(random_crop_and_flip(image, draws)[0], expected.flip(-1) if flip else expected)


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("owned"),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a CIFAR batch, .*EOFError"),
        (b"no pickle at all", "not a CIFAR batch, .*invalid load key"),
        (pickle.dumps(make_batch(0, 4), protocol=4)[:-100], "not a CIFAR batch, .*truncated"),
        (
            pickle.dumps(Malicious()),
            "not a CIFAR batch, .*asks for pathlib.*, which CIFAR batches do not contain",
        ),
        (pickle.dumps([1, 2]), "not a CIFAR batch, .* a dictionary with data, .* and labels"),
        (pickle.dumps({b"data": [1], b"labels": [1]}), "not a CIFAR batch, .*N x 3072 bytes"),
        (pickle.dumps(make_batch(0, 4) | {b"labels": [1, 2]}, protocol=4), "2 labels for 4 images"),
        (pickle.dumps(make_batch(0, 4) | {b"labels": "1234"}, protocol=4), "N whole numbers"),
        (pickle.dumps(make_batch(0, 4) | {b"labels": [1, 2, 3, 10]}, protocol=4), "labels 1 to 10"),
    ],
)
def test_damaged_cifar_batches_are_named_with_a_remedy(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    write_cifar10(tmp_path)
    (tmp_path / "data_batch_3").write_bytes(content)
    with pytest.raises(DataError, match=f"data_batch_3: .*{message}") as caught:
        load_dataset("cifar10", data_dir=tmp_path)
    assert "\n" not in str(caught.value)
    assert "torchvision.datasets.CIFAR10(root, download=True)" in str(caught.value)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("replace_by_folder", [False, True])
def test_a_missing_or_unreadable_cifar_batch_is_named(tmp_path, replace_by_folder):
    write_cifar10(tmp_path)
    (tmp_path / "test_batch").unlink()
    if replace_by_folder:
        (tmp_path / "test_batch").mkdir()
    message = "test_batch: cannot be read" if replace_by_folder else "lacks test_batch"
    with pytest.raises(DataError, match=message):
        load_dataset("cifar10", data_dir=tmp_path)


def test_gzip_files_may_follow_each_other_and_be_filled_up_with_zeros(tmp_path):
    packed, path = gzip.compress(b"abc"), tmp_path / "x.gz"
    for content, expected in ((2 * packed, b"abcabc"), (packed + bytes(512), b"abc")):
        path.write_bytes(content)
        assert _read_bytes(path) == expected
    path.write_bytes(packed + b"more")
    with pytest.raises(DataError, match="it is no gzip file, or has something else behind it"):
        _read_bytes(path)
