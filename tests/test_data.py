"""The table of datasets, minibatches, counter-based random numbers, and the digits."""

import importlib.util
import json
import random
import subprocess
import sys

import numpy as np
import pytest
import sklearn.datasets
import torch

from feedbackpath.data import DATASETS, UNREADABLE, load_dataset, minibatches
from feedbackpath.data.counter import permutation, uniform
from feedbackpath.data.dataset import ArraySplit, stream_positions
from feedbackpath.data.digits import MEAN, STD
from feedbackpath.errors import DataError


def make_split(num_images=10, samples_per_epoch=10):
    images = torch.arange(num_images, dtype=torch.uint8).view(-1, 1, 1, 1)
    one = torch.ones(1, 1, 1)
    return ArraySplit(images, torch.arange(num_images), 0 * one, one, samples_per_epoch)


def labels_of(batches):
    return [y.tolist() for _, y in batches]


def epoch_labels(split, epoch=0, seed=0, **options):
    options = {"batch_size": 4, "shuffle": True, **options}
    return labels_of(minibatches(split, seed=seed, epoch=epoch, **options))


def test_uniform_is_a_pure_function_of_key_and_index():
    indices = torch.tensor([7, 0, 7, 2**40])
    draws = uniform(indices, 6, 1, 2)
    assert torch.equal(draws[0], draws[2])
    assert torch.equal(draws[3:], uniform(indices[3:], 6, 1, 2))
    assert torch.equal(draws[:, :2], uniform(indices, 2, 1, 2))
    for other_key in [(1, 3), (2, 1), (1,), (1, 2, 0), (-1, 2)]:
        assert not torch.equal(draws, uniform(indices, 6, *other_key))


def test_uniform_is_uniform_and_uncorrelated():
    draws = uniform(torch.arange(50_000), 4, 0)
    assert 0 <= draws.min() < 1e-3
    assert 0.999 < draws.max() < 1
    counts = torch.histc(draws, 20, 0, 1)
    assert ((counts - 10_000).abs() < 500).all()  # 5 standard deviations
    correlation = torch.corrcoef(torch.cat([draws, draws.roll(1, 0)], 1).T) - torch.eye(8)
    assert correlation.abs().max() < 0.025


def test_permutation_is_pure_and_complete():
    order = permutation(1000, 3, 1)
    assert torch.equal(order.sort().values, torch.arange(1000))
    assert torch.equal(order, permutation(1000, 3, 1))
    assert not torch.equal(order, permutation(1000, 3, 2))
    assert not torch.equal(order, permutation(1000, 4, 1))


def test_minibatches_shuffle_purely_and_see_every_sample():
    split = make_split()
    first = epoch_labels(split)
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert sorted(sum(first, [])) == list(range(10))
    assert first == epoch_labels(split)
    assert first != epoch_labels(split, epoch=1)
    assert first != epoch_labels(split, seed=1)


def test_minibatches_in_order_keep_a_last_batch_of_one():
    assert epoch_labels(make_split(5, 5), shuffle=False) == [[0, 1, 2, 3], [4]]


def test_shuffled_minibatches_leave_out_a_last_batch_of_one_unless_all_are():
    assert [len(batch) for batch in epoch_labels(make_split(5, 5))] == [4]
    assert len(epoch_labels(make_split(5, 5), batch_size=1)) == 5


@pytest.mark.parametrize(
    ("num_images", "world_size", "sizes"),
    [(3, 2, [3, 0]), (4, 2, [2, 2]), (5, 3, [3, 2, 0]), (7, 3, [3, 2, 2]), (7, 4, [3, 2, 2, 0])],
)
def test_no_process_trains_on_a_single_sample(num_images, world_size, sizes):
    split, options = make_split(num_images, num_images), {"batch_size": 8, "world_size": world_size}
    (whole,) = epoch_labels(split, batch_size=8)
    shares = [epoch_labels(split, rank=rank, **options)[0] for rank in range(world_size)]
    assert [len(share) for share in shares] == sizes
    assert sorted(sum(shares, [])) == sorted(whole)
    if num_images >= 2 * world_size:
        assert shares == [whole[rank::world_size] for rank in range(world_size)]


def test_processes_evaluate_on_every_so_many_samples_even_on_one():
    shares = [epoch_labels(make_split(5, 5), shuffle=False, rank=r, world_size=3) for r in range(3)]
    assert shares == [[[0, 3], [4]], [[1], []], [[2], []]]


def test_a_batch_size_of_one_leaves_all_processes_but_one_without():
    shares = [epoch_labels(make_split(3, 3), batch_size=1, rank=r, world_size=2) for r in range(2)]
    assert [[len(batch) for batch in share] for share in shares] == [[1, 1, 1], [0, 0, 0]]


def test_training_leaves_unreadable_samples_out_and_evaluation_does_not():
    split = make_split()
    split.labels[[2, 5]] = UNREADABLE
    assert sorted(sum(epoch_labels(split), [])) == [0, 1, 3, 4, 6, 7, 8, 9]
    assert epoch_labels(split, shuffle=False)[0] == [0, 1, UNREADABLE, 3]


def test_minibatches_stop_and_resume_within_the_same_order():
    split = make_split()
    whole = epoch_labels(split, batch_size=2)
    assert epoch_labels(split, batch_size=2, num_samples=6) == whole[:3]
    assert epoch_labels(split, batch_size=2, start=4) == whole[2:]
    assert epoch_labels(split, batch_size=2, start=10) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"num_samples": 11}, "samples 0 to 11 were asked for; an epoch of this split has 10"),
        ({"start": 5, "num_samples": 4}, "samples 5 to 4"),
    ],
)
def test_minibatches_refuse_before_the_first_batch(options, message):
    options = {"batch_size": 2, "shuffle": True, **options}
    with pytest.raises(ValueError, match=message):
        minibatches(make_split(), seed=0, epoch=0, **options)


@pytest.mark.parametrize("samples_per_epoch", [3, 10, 15])
def test_epochs_of_any_length_see_all_samples_equally_often(samples_per_epoch):
    split = make_split(10, samples_per_epoch)
    seen = [
        label for epoch in range(10) for batch in epoch_labels(split, epoch, shuffle=False) for label in batch
    ]
    assert torch.bincount(torch.tensor(seen)).tolist() == [samples_per_epoch] * 10


@pytest.mark.parametrize("index", [-1, 3])
def test_an_index_outside_the_epoch_is_refused(index):
    with pytest.raises(IndexError, match=r"outside \[0, 3\)"):
        stream_positions(torch.tensor([0, index]), 0, 3, 10)


def test_digits():
    digits = load_dataset("digits")
    assert (digits.num_classes, digits.sample_shape) == (10, (1, 8, 8))
    assert digits.facts["sizes"] == {"train": 1200, "validation": 250, "test": 347}
    splits = (digits.train, digits.validation, digits.test)
    samples = [split.batch(torch.arange(len(split)), 0) for split in splits]
    x, y = (torch.cat(parts) for parts in zip(*samples, strict=True))
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert abs(x.mean()) < 0.01
    assert abs(x.std() - 1) < 0.01
    assert torch.bincount(y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # as published
    assert all(torch.bincount(labels, minlength=10).min() >= 15 for _, labels in samples)


def test_digits_are_the_same_every_time_and_their_facts_are_json():
    first, second = load_dataset("digits"), load_dataset("digits", seed=5)
    assert json.loads(json.dumps(first.facts)) == first.facts == second.facts
    assert len(first.facts["checksum"]) == 64


def test_samples_per_epoch_sets_the_length_of_the_training_split_only():
    digits = load_dataset("digits", samples_per_epoch=100)
    assert (len(digits.train), len(digits.test)) == (100, 347)
    assert not torch.equal(*(digits.train.batch(torch.arange(100), epoch)[0] for epoch in (0, 1)))


def test_digits_are_those_that_scikit_learn_loads():
    theirs = sklearn.datasets.load_digits()
    scans = theirs.images.astype(np.uint8)
    labels_of_scans = {scan.tobytes(): label for scan, label in zip(scans, theirs.target, strict=True)}
    digits = load_dataset("digits")
    for part in (digits.train, digits.validation, digits.test):
        images, labels = part.batch(torch.arange(len(part)), 0)
        scans = (images * STD + MEAN).round().to(torch.uint8).numpy()
        assert [labels_of_scans[scan[0].tobytes()] for scan in scans] == labels.tolist()


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"digits: .*pip install scikit-learn"):
        load_dataset("digits")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fashion_mnst", {}, "there is no dataset 'fashion_mnst': did you mean 'fashion-mnist'?"),
        ("imagnet", {}, r"did you mean 'imagenet'\? choose from glyphs, digits, mnist"),
        ("digits", {"num_classes": 5}, "digits takes no num_classes"),
        ("glyphs", {"data_dir": "somewhere"}, "glyphs takes no data_dir"),
        ("digits", {"samples_per_epoch": 0}, "samples_per_epoch is 0; it must be at least 1"),
        ("glyphs", {"samples_per_epoch": -1}, "samples_per_epoch is -1"),
        ("glyphs", {"num_classes": 1}, "num_classes is 1; choose 2 to 1000"),
        ("glyphs", {"num_classes": 1001}, "num_classes is 1001; choose 2 to 1000"),
        ("mnist", {}, r"mnist: .* none was given: torchvision\.datasets\.MNIST\(root, download=True\)"),
        (
            "cifar100",
            {},
            r"cifar100: .* none was given: torchvision\.datasets\.CIFAR100\(root, download=True\)",
        ),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(name, options, message):
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(name, **options)
    assert "\n" not in str(caught.value)


def test_no_global_random_state_is_touched():
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    for name in ("digits", "glyphs"):
        dataset = load_dataset(name, seed=3)
        next(minibatches(dataset.train, batch_size=8, seed=0, epoch=0, shuffle=True))
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])
    assert states[2] == random.getstate()


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, feedbackpath.data; "
        "print([name for name in ('PIL', 'matplotlib', 'sklearn', 'scipy') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_every_loader_is_in_the_table():
    images = ["glyphs", "digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "imagenet"]
    assert list(DATASETS)[: len(images)] == images  # behind them stand those that tasks register
