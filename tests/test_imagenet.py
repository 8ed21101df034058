"""ImageNet in its three layouts: the same samples from each, and what is missing or damaged named."""

import csv
import json
import multiprocessing
import pickle
import re

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from image_folders import damage, make_class_folders, make_kaggle_folder, make_parquet_folder

from feedbackpath.data import UNREADABLE, load_dataset, minibatches
from feedbackpath.data.imagenet import hold_out
from feedbackpath.data.layouts import KAGGLE_IMAGES, KAGGLE_LABELS
from feedbackpath.errors import DataError

SMALL = {"classes": 3, "train": 6, "val": 2}
MAKERS = {
    "class folders": make_class_folders,
    "kaggle": make_kaggle_folder,
    "parquet": make_parquet_folder,
}


def load(root, **options):
    return load_dataset("imagenet", data_dir=root, **{"image_size": 32} | options)


@pytest.fixture(scope="module")
def class_folders(tmp_path_factory):
    return make_class_folders(tmp_path_factory.mktemp("images"), **SMALL)


def whole(split, epoch=0):
    return split.batch(torch.arange(len(split)), epoch)


@pytest.mark.parametrize("layout", MAKERS)
def test_every_layout_gives_the_same_samples(layout, tmp_path, class_folders):
    root = MAKERS[layout](tmp_path, **SMALL)
    dataset, reference = load(root), load(class_folders)
    assert (dataset.num_classes, dataset.sample_shape) == (3, (3, 32, 32))
    assert dataset.facts["layout"] == layout
    assert dataset.facts["sizes"] == {"train": 15, "validation": 3, "test": 6}
    for name in ("train", "validation", "test"):
        x, y = whole(getattr(dataset, name))
        expected_x, expected_y = whole(getattr(reference, name))
        assert (x.dtype, y.dtype) == (torch.uint8, torch.int64)
        assert torch.equal(x, expected_x)
        assert torch.equal(y, expected_y)


@pytest.mark.parametrize("structures", [True, False])
@pytest.mark.parametrize("subfolder", ["", "data"])
def test_parquet_columns_and_places(structures, subfolder, tmp_path, class_folders):
    root = make_parquet_folder(tmp_path, structures=structures, subfolder=subfolder, **SMALL)
    assert torch.equal(whole(load(root).test)[0], whole(load(class_folders).test)[0])


def test_samples_are_a_pure_function_of_seed_epoch_and_index(class_folders):
    train = load(class_folders, seed=1).train
    x, y = whole(train, epoch=3)
    assert torch.equal(train.batch(torch.tensor([7]), 3)[0][0], x[7])
    assert torch.equal(whole(load(class_folders, seed=1).train, epoch=3)[0], x)
    for other in (whole(train, epoch=4), whole(load(class_folders, seed=2).train, epoch=3)):
        assert not torch.equal(other[0], x)
        assert torch.equal(other[1], y)


def test_validation_and_test_are_the_same_in_every_epoch_and_for_every_seed(class_folders):
    first, second = load(class_folders, seed=1), load(class_folders, seed=2)
    for name in ("validation", "test"):
        assert torch.equal(whole(getattr(first, name))[0], whole(getattr(second, name), epoch=2)[0])


def test_no_training_image_is_held_out_as_well(class_folders):
    dataset = load(class_folders)
    train, validation = (set(split.numbers.tolist()) for split in (dataset.train, dataset.validation))
    assert not train & validation
    assert train | validation == set(range(18))


@pytest.mark.parametrize(
    ("count", "held_out"), [(1, 0), (2, 1), (8, 1), (40, 2), (41, 3), (1000, 50), (1300, 50)]
)
def test_a_twentieth_of_a_class_is_held_out_but_at_most_fifty(count, held_out):
    train, validation = hold_out(np.repeat([0, 1], count))
    assert validation.tolist() == [
        *range(count - held_out, count),
        *range(2 * count - held_out, 2 * count),
    ]
    assert len(train) + len(validation) == 2 * count


def test_prepare_normalises_bytes(class_folders):
    dataset = load(class_folders)
    x, _ = whole(dataset.test)
    prepared = dataset.test.prepare(x)
    assert prepared.dtype == torch.float32
    red = (x[:, 0].double() / 255 - 0.485) / 0.229
    torch.testing.assert_close(prepared[:, 0].double(), red, rtol=1e-5, atol=1e-5)


def test_other_datasets_prepare_nothing():
    train = load_dataset("digits").train
    x, _ = train.batch(torch.arange(3), 0)
    assert train.prepare(x) is x


def test_facts_are_json_and_follow_the_files(class_folders, tmp_path):
    facts = load(class_folders).facts
    assert json.loads(json.dumps(facts)) == facts
    other = make_class_folders(tmp_path, **SMALL)
    assert load(other).facts["checksum"] == facts["checksum"]
    file = next((other / "train" / "n00000001").iterdir())
    file.write_bytes(file.read_bytes() + b"\0")
    assert load(other).facts["checksum"] != facts["checksum"]


def test_hidden_files_are_no_images(tmp_path, class_folders):
    root = make_class_folders(tmp_path, **SMALL)
    (root / "train" / ".DS_Store").write_text("")
    (root / "train" / "n00000000" / ".DS_Store").write_text("")
    assert load(root).facts["checksum"] == load(class_folders).facts["checksum"]


def test_samples_per_epoch(class_folders):
    train = load(class_folders, samples_per_epoch=4).train
    labels = [whole(train, epoch)[1] for epoch in range(15)]
    assert torch.bincount(torch.cat(labels)).tolist() == [20, 20, 20]


def test_workers_give_the_same_batches_in_the_same_order(class_folders):
    train = load(class_folders).train
    options = {"batch_size": 4, "seed": 0, "epoch": 1, "shuffle": True, "start": 4}
    state = torch.get_rng_state()
    plain, by_workers = (list(minibatches(train, num_workers=n, **options)) for n in (0, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(plain) == len(by_workers) == 3
    for (x, y), (worker_x, worker_y) in zip(plain, by_workers, strict=True):
        assert torch.equal(x, worker_x)
        assert torch.equal(y, worker_y)
    assert not multiprocessing.active_children()


def test_workers_end_when_the_batches_are_left(class_folders):
    batches = minibatches(
        load(class_folders).train, batch_size=2, seed=0, epoch=0, shuffle=True, num_workers=1
    )
    next(batches)
    assert len(multiprocessing.active_children()) == 1
    del batches
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image_is_one_line_that_names_it(tmp_path, num_workers):
    root = make_class_folders(tmp_path, **SMALL)
    bad = root / "train" / "n00000001" / "n00000001_2.JPEG"
    bad.write_bytes(bad.read_bytes()[:300])
    batches = minibatches(
        load(root).train, batch_size=5, seed=0, epoch=0, shuffle=True, num_workers=num_workers
    )
    with pytest.raises(
        DataError, match=rf"^{re.escape(str(bad))}: cannot be read .*skip.*data check"
    ) as caught:
        list(batches)
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_images_are_left_out_or_marked_when_they_are_to_be_skipped(tmp_path, num_workers):
    root = make_class_folders(tmp_path, classes=2, train=10, val=2)
    for place in (0, 3):
        (root / "train" / "n00000001" / f"n00000001_{place}.JPEG").write_bytes(b"nothing")
    train = load(root, on_bad_image="skip").train
    options = {"batch_size": 6, "seed": 0, "epoch": 0, "num_workers": num_workers}
    trained, evaluated = (list(minibatches(train, shuffle=shuffle, **options)) for shuffle in (True, False))
    x, y = (torch.cat(parts) for parts in zip(*trained, strict=True))
    assert sorted(y.tolist()) == [0] * 9 + [1] * 7
    assert x.flatten(1).any(1).all()
    x, y = (torch.cat(parts) for parts in zip(*evaluated, strict=True))
    assert sorted(y.tolist()) == [UNREADABLE] * 2 + [0] * 9 + [1] * 7
    assert not x[y == UNREADABLE].any()
    assert x[y != UNREADABLE].flatten(1).any(1).all()


def test_an_image_that_disappeared_is_named(tmp_path):
    root = make_class_folders(tmp_path, **SMALL)
    dataset = load(root)
    (root / "val" / "n00000002" / "ILSVRC2012_val_00020007.JPEG").unlink()
    with pytest.raises(DataError, match=r"00020007\.JPEG: cannot be read \(No such file"):
        whole(dataset.test)


def test_damaged_rows_of_parquet_are_named(tmp_path):
    rows = [b"nothing", None]
    root = make_parquet_folder(tmp_path, subfolder="", **SMALL)
    table = pyarrow.table({"image": pyarrow.array(rows, pyarrow.binary()), "label": [0, 1]})
    (root / "validation-00000-of-00001.parquet").rename(root / "validation-00000-of-00002.parquet")
    path = root / "validation-00001-of-00002.parquet"
    pyarrow.parquet.write_table(table, path)
    test = load(root).test
    for row, reason in enumerate(["it is not an image in JPEG, .*", "it is empty"]):
        with pytest.raises(DataError, match=rf"{path.name}, row {row}: cannot be read \({reason}\)"):
            test.batch(torch.tensor([6 + row]), 0)


def test_splits_can_be_sent_to_workers_that_do_not_fork(class_folders):
    split = load(class_folders).train
    assert torch.equal(whole(pickle.loads(pickle.dumps(split)))[0], whole(split)[0])


def remove_all(root):
    for path in sorted(root.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def remove_val(root):
    remove_all(root / "val")
    (root / "val").rmdir()


def add_parquet(root):
    make_parquet_folder(root, **SMALL)


def add_class_to_val(root):
    (root / "val" / "n99").mkdir()


def empty_class(root):
    damage(root)


def empty_val(root):
    for file in (root / "val").rglob("*.JPEG"):
        file.unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_all, "holds no layout that is known.*class folders .*Kaggle's download .*Parquet"),
        (remove_val, r"val cannot be read \(No such file"),
        (add_parquet, "holds class folders and parquet"),
        (add_class_to_val, "val has classes that .*train does not have: n99"),
        (empty_class, "1 classes of .* have no training images, such as n00000001: .*data check"),
        (empty_val, "at least one test image"),
    ],
)
def test_class_folders_that_lack_something(tmp_path, change, message):
    change(make_class_folders(tmp_path, **SMALL))
    refuse(tmp_path, message)


def refuse(root, message):
    with pytest.raises(DataError, match=message) as caught:
        load(root)
    assert "\n" not in str(caught.value)
    assert str(root) in str(caught.value)


def rewrite_labels(root, change):
    path = root / KAGGLE_LABELS
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(change(rows))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / KAGGLE_LABELS).unlink(), r"LOC_val_solution\.csv: cannot be read"),
        (lambda root: rewrite_labels(root, lambda rows: rows[1:]), "not Kaggle's table"),
        (lambda root: rewrite_labels(root, lambda rows: rows[:-1]), "has no class for ILSVRC2012_val_0000"),
        (
            lambda root: rewrite_labels(root, lambda rows: [*rows, ("other", "n00000000 1 2 3 4")]),
            "lacks other, which LOC_val_solution.csv names",
        ),
        (
            lambda root: rewrite_labels(root, lambda rows: [*rows[:-1], (rows[-1][0], "n77")]),
            "classes without a folder in train: n77",
        ),
        (
            lambda root: rewrite_labels(root, lambda rows: [*rows[:-1], (rows[-1][0], "")]),
            "not Kaggle's table",
        ),
    ],
)
def test_kaggle_folders_that_lack_something(tmp_path, change, message):
    change(make_kaggle_folder(tmp_path, **SMALL))
    assert (tmp_path / KAGGLE_IMAGES).is_dir()
    refuse(tmp_path, message)


def write_validation(root, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), validation_file(root))


def validation_file(root):
    return root / "data" / "validation-00000-of-00001.parquet"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: validation_file(root).unlink(), "no validation-"),
        (lambda root: validation_file(root).write_bytes(b"PAR1 or not"), "cannot be read as Parquet"),
        (lambda root: write_validation(root, img=[b""], label=[0]), "no column image, only img, label"),
        (lambda root: write_validation(root, image=["a.JPEG"], label=[0]), "column 'image' is string"),
        (lambda root: write_validation(root, image=[b""], label=["cat"]), "whole numbers"),
        (lambda root: write_validation(root, image=[b"", b""], label=[0, None]), "whole numbers"),
        (lambda root: write_validation(root, image=[b""], label=[-1]), "whole numbers"),
        (
            lambda root: write_validation(root, image=[b""], label=[3]),
            "label 3 in validation, but none above 2",
        ),
    ],
)
def test_parquet_files_that_lack_something(tmp_path, change, message):
    change(make_parquet_folder(tmp_path, **SMALL))
    refuse(tmp_path, message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "imagenet: it is read from a folder and none was given"),
        ({"data_dir": "nowhere"}, "there is no folder nowhere"),
        ({"data_dir": ".", "on_bad_image": "ignore"}, "on_bad_image is 'ignore'; choose error or skip"),
        ({"data_dir": ".", "image_size": 0}, "image_size is 0"),
        ({"data_dir": ".", "num_classes": 5}, "imagenet takes no num_classes"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(DataError, match=message):
        load_dataset("imagenet", **options)


@pytest.mark.parametrize("option", [{"image_size": 64}, {"on_bad_image": "skip"}])
def test_other_datasets_refuse_the_options_of_photographs(option):
    with pytest.raises(DataError, match=f"digits takes no {next(iter(option))}"):
        load_dataset("digits", **option)


def test_without_pyarrow_the_error_says_what_to_install(tmp_path, monkeypatch):
    make_parquet_folder(tmp_path, **SMALL)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install pyarrow"):
        load(tmp_path)
