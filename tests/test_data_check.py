"""`feedbackpath data check` and `data shrink`, on folders with damaged files among the sound ones."""

import filecmp
import io

import pytest
import torch
from image_folders import (
    cut_photograph,
    damage,
    encode,
    make_class_folders,
    make_kaggle_folder,
    make_parquet_folder,
)
from PIL import Image

from feedbackpath import cli
from feedbackpath.data import load_dataset, upkeep
from feedbackpath.data.layouts import KAGGLE_LABELS
from feedbackpath.data.upkeep import Shrinking, shrink_image

SMALL = {"classes": 3, "train": 6, "val": 2}


def call(capsys, *arguments):
    """Run `feedbackpath data` and return its exit code and what it printed."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["data", *map(str, arguments)])
    return caught.value.code, capsys.readouterr()


def files_of(root):
    return sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())


@pytest.mark.parametrize("maker", [make_class_folders, make_kaggle_folder, make_parquet_folder])
def test_a_sound_folder_has_no_problems(maker, tmp_path, capsys):
    code, output = call(capsys, "check", maker(tmp_path, **SMALL))
    assert code == 0
    assert output.out.strip() == "24 images, 0 problems"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_every_problem_is_listed_under_its_kind(tmp_path, capsys, num_workers):
    faults = damage(make_class_folders(tmp_path, **SMALL))
    code, output = call(capsys, "check", tmp_path, "--num-workers", num_workers)
    lines = output.out.splitlines()
    assert code == 2
    expected = [
        "empty class: 1",
        f"  {faults['empty class']}: it has no training images",
        "truncated or damaged: 1",
        f"  {faults['truncated']}: it cannot be decoded: image file is truncated",
        "unreadable: 2",
        f"  {faults['empty file']}: it is empty",
        f"  {faults['not an image']}: it is not an image",
        "wrong ending: 1",
        f"  {faults['wrong ending']}: it is PNG",
        "18 images, 5 problems",
    ]
    assert len(lines) == len(expected)
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True))


def test_a_name_that_looks_like_markup_is_printed_as_it_is(tmp_path, capsys):
    root = make_class_folders(tmp_path, **SMALL)
    bad = root / "train" / "n00000000" / "[red]x.JPEG"
    bad.write_bytes(b"")
    assert f"  {bad}: it is empty" in call(capsys, "check", root)[1].out.splitlines()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_shrink_keeps_the_layout_and_makes_images_small(tmp_path, capsys, num_workers):
    root, out = make_class_folders(tmp_path / "in", **SMALL), tmp_path / "out"
    code, output = call(capsys, "shrink", root, out, "--size", 40, "--num-workers", num_workers)
    assert (code, output.out.splitlines()[0]) == (0, "24 images, 0 problems")
    assert {str(file) for file in files_of(out)} == {str(file) for file in files_of(root)} | {upkeep.NOTE}
    for file in files_of(root):
        with Image.open(out / file) as small, Image.open(root / file) as large:
            assert (small.size, small.format) == ((48, 40), "JPEG")
            again = io.BytesIO(encode(large.resize(small.size, Image.Resampling.BILINEAR)))
            difference = to_tensor(small) - to_tensor(Image.open(again))
        assert difference.abs().mean() < 1
    assert load_dataset("imagenet", data_dir=out).facts["sizes"] == {"train": 15, "validation": 3, "test": 6}


def to_tensor(image):
    return torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).double()


def test_shrink_keeps_kaggles_layout_with_its_table(tmp_path, capsys):
    root, out = make_kaggle_folder(tmp_path / "in", **SMALL), tmp_path / "out"
    assert call(capsys, "shrink", root, out, "--size", 40)[0] == 0
    assert filecmp.cmp(root / KAGGLE_LABELS, out / KAGGLE_LABELS, shallow=False)
    first, second = load_dataset("imagenet", data_dir=root), load_dataset("imagenet", data_dir=out)
    assert second.facts["layout"] == "kaggle"
    labels = [dataset.test.batch(torch.arange(6), 0)[1] for dataset in (first, second)]
    assert torch.equal(*labels)


def test_shrink_makes_class_folders_of_parquet(tmp_path, capsys):
    root, out = make_parquet_folder(tmp_path / "in", **SMALL), tmp_path / "out"
    assert call(capsys, "shrink", root, out)[0] == 0
    first, second = load_dataset("imagenet", data_dir=root), load_dataset("imagenet", data_dir=out)
    assert second.facts["layout"] == "class folders"
    for name in ("train", "validation", "test"):
        splits = [getattr(dataset, name) for dataset in (first, second)]
        (x, y), (copy_x, copy_y) = (split.batch(torch.arange(len(split)), 0) for split in splits)
        assert torch.equal(x, copy_x)
        assert torch.equal(y, copy_y)


def test_small_images_are_copied_as_they_are(tmp_path, capsys):
    root, out = make_class_folders(tmp_path / "in", **SMALL), tmp_path / "out"
    assert call(capsys, "shrink", root, out)[0] == 0
    assert all(filecmp.cmp(root / file, out / file, shallow=False) for file in files_of(root))


def test_a_wrong_ending_is_put_right(tmp_path):
    raw = encode(cut_photograph(0, (30, 20)), "PNG")
    with Image.open(io.BytesIO(shrink_image(raw, tmp_path / "a.JPEG", Shrinking()))) as image:
        assert (image.format, image.size) == ("JPEG", (30, 20))
    assert shrink_image(raw, tmp_path / "a.png", Shrinking()) == raw


def test_shrink_lists_what_cannot_be_read_and_copies_the_rest(tmp_path, capsys):
    root, out = make_class_folders(tmp_path / "in", **SMALL), tmp_path / "out"
    faults = damage(root)
    before = files_of(root)
    code, output = call(capsys, "shrink", root, out, "--size", 40)
    assert code == 2
    assert "18 images, 3 problems" in output.out
    bad = {faults[kind] for kind in ("truncated", "empty file", "not an image")}
    assert all(path in output.out for path in bad)
    copied = {root / file for file in files_of(out)}
    assert {root / file for file in before} - copied == {type(root)(path) for path in bad}
    assert files_of(root) == before


def test_shrink_goes_on_with_what_it_began(tmp_path, capsys, monkeypatch):
    root, out = make_class_folders(tmp_path / "in", **SMALL), tmp_path / "out"
    call(capsys, "shrink", root, out, "--size", 40)
    lost, kept = out / files_of(root)[0], out / files_of(root)[1]
    lost.unlink()
    made = []
    real = upkeep.shrink_image
    monkeypatch.setattr(
        upkeep, "shrink_image", lambda raw, name, how: made.append(name) or real(raw, name, how)
    )
    time = kept.stat().st_mtime_ns
    assert call(capsys, "shrink", root, out, "--size", 40)[0] == 0
    assert made == [lost]
    assert lost.exists()
    assert kept.stat().st_mtime_ns == time


def test_a_file_is_there_whole_or_not_at_all(tmp_path, capsys, monkeypatch):
    root, out = make_class_folders(tmp_path / "in", **SMALL), tmp_path / "out"

    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(upkeep.os, "replace", fail)
    code, output = call(capsys, "shrink", root, out, "--size", 40)
    assert code == 2
    assert "cannot be written (No space left on device): make room" in output.err
    assert not list(out.rglob("*.JPEG"))


def test_shrink_refuses_other_settings_or_a_folder_in_use(tmp_path, capsys):
    root, out = make_class_folders(tmp_path / "in", **SMALL), tmp_path / "out"
    call(capsys, "shrink", root, out, "--size", 40)
    for arguments, message in [
        ((root, out, "--size", 41), "has a copy with other settings"),
        ((root, tmp_path), "cannot be inside"),
        ((root, root / "train" / "small"), "cannot be inside"),
        ((root, make_class_folders(tmp_path / "other", **SMALL)), "has other files"),
        ((tmp_path / "nowhere", out), "there is no folder"),
        ((root, out, "--size", 0), "Must be >= 1"),
    ]:
        code, output = call(capsys, "shrink", *arguments)
        assert code == 2
        assert message in output.err
        assert output.err.count("\n") == 1


def test_an_interrupted_command_says_so(tmp_path, capsys, monkeypatch):
    class Asked(int):
        number = 2

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    monkeypatch.setattr("feedbackpath.cli.data.StopRequest", lambda: Asked(1))
    root, out = make_class_folders(tmp_path / "in", **SMALL), tmp_path / "out"
    code, output = call(capsys, "shrink", root, out)
    assert (code, output.out.strip()) == (130, "interrupted: what was done is kept")
    assert len(list(out.rglob("*.JPEG"))) == 1
