"""The built-in glyphs: pure samples, balanced classes, faces held out, no two characters alike."""

import json
import unicodedata

import pytest
import torch

from feedbackpath.data import characters, load_dataset
from feedbackpath.data.glyphs import TEST_FACES, TRAIN_FACES, VALIDATION_FACES
from feedbackpath.errors import DataError


@pytest.fixture(scope="module")
def glyphs():
    return load_dataset("glyphs")


@pytest.fixture(scope="module")
def reseeded():
    return load_dataset("glyphs", seed=1)


def everything(split, epoch=0):
    return split.batch(torch.arange(len(split)), epoch)


def test_shape_type_and_scale(glyphs):
    assert (glyphs.num_classes, glyphs.sample_shape) == (200, (1, 24, 24))
    x, y = glyphs.train.batch(torch.arange(0, 25_000, 10), 0)
    assert x.shape == (2500, 1, 24, 24)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert abs(x.mean()) < 0.05
    assert abs(x.std() - 1) < 0.1


def test_a_sample_does_not_depend_on_its_batch(glyphs):
    indices = [3, 5, 24_999, 3, *range(100, 133)]
    x, y = glyphs.train.batch(torch.tensor(indices), 2)
    for row, index in enumerate(indices):
        x_alone, y_alone = glyphs.train.batch(torch.tensor([index]), 2)
        assert torch.equal(x[row], x_alone[0])
        assert torch.equal(y[row], y_alone[0])


def test_training_samples_differ_by_epoch_and_seed(glyphs, reseeded):
    indices = torch.arange(20)
    x, _ = glyphs.train.batch(indices, 0)
    assert torch.equal(x, glyphs.train.batch(indices, 0)[0])
    for other, _ in (glyphs.train.batch(indices, 1), reseeded.train.batch(indices, 0)):
        assert not any(torch.equal(a, b) for a, b in zip(x, other, strict=True))


@pytest.mark.parametrize("name", ["validation", "test"])
def test_evaluation_ignores_epoch_and_seed(glyphs, reseeded, name):
    x, y = everything(getattr(glyphs, name))
    for other_x, other_y in (everything(getattr(glyphs, name), 1), everything(getattr(reseeded, name))):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)


def test_test_samples_are_all_different(glyphs):
    x, _ = everything(glyphs.test)
    assert len(x.flatten(1).unique(dim=0)) == len(x)


def test_faces_are_disjoint_and_complete():
    assert sorted(TRAIN_FACES + VALIDATION_FACES + TEST_FACES) == sorted(characters.FACES)
    assert (len(TRAIN_FACES), len(VALIDATION_FACES), len(TEST_FACES)) == (9, 1, 2)


def test_classes_are_balanced(glyphs):
    counts = torch.bincount(everything(glyphs.train)[1], minlength=200)
    assert counts.tolist() == [125] * 200
    assert torch.bincount(everything(glyphs.test)[1]).tolist() == [20] * 200
    assert torch.bincount(everything(glyphs.validation)[1]).tolist() == [10] * 200


@pytest.mark.parametrize(("num_classes", "num_test", "num_validation"), [(7, 4004, 2002), (300, 4200, 2100)])
def test_evaluation_splits_are_whole_multiples_of_their_classes(num_classes, num_test, num_validation):
    dataset = load_dataset("glyphs", num_classes=num_classes)
    assert (len(dataset.test), len(dataset.validation)) == (num_test, num_validation)
    assert torch.bincount(everything(dataset.test)[1]).tolist() == [num_test // num_classes] * num_classes


def test_fewer_classes_are_the_first_of_more(glyphs):
    few = load_dataset("glyphs", num_classes=30, samples_per_epoch=90)
    assert glyphs.facts["characters"].startswith(few.facts["characters"])
    assert len(few.train) == 90


def test_facts_are_json_and_the_checksum_tells_class_sets_apart(glyphs, reseeded):
    facts = glyphs.facts
    assert json.loads(json.dumps(facts)) == facts == reseeded.facts
    assert len(set(facts["characters"])) == 200
    assert facts["checksum"] != load_dataset("glyphs", num_classes=199).facts["checksum"]


def test_look_alikes_are_left_out(glyphs):
    chosen = set(glyphs.facts["characters"])
    for alike in (
        "AΑАΛ",
        "BΒВ",
        "HΗНһ"[:3],
        "0OoΟοОо",
        "1lI|"[1:],
        "CcСсϹ",
        "KΚКκк",
        "ЫыꙐ",
        "Лл",
        "Ъъ",
        "Щщ",
    ):
        assert len(chosen & set(alike)) == 1, alike
    assert all(unicodedata.category(character)[0] in "LNSP" for character in chosen)


def test_no_two_masks_of_a_face_are_alike(glyphs):
    for split in (glyphs.train, glyphs.validation, glyphs.test):
        for masks in split.masks.flatten(2).float():
            unit = masks / masks.norm(dim=1, keepdim=True)
            cosine = unit @ unit.T - 2 * torch.eye(200)
            assert cosine.max() < 0.97


def test_a_thousand_classes_have_ink_in_every_face():
    dataset = load_dataset("glyphs", num_classes=1000)
    assert len(set(dataset.facts["characters"])) == 1000
    for split in (dataset.train, dataset.validation, dataset.test):
        assert (split.masks.flatten(2).amax(2) > 100).all()


def test_ink_fills_its_box_and_stays_inside():
    mask = torch.from_numpy(characters.draw("H", characters.open_face("sans")))
    rows = mask.amax(1).nonzero()
    assert rows.max() - rows.min() + 1 == characters.INK_SIZE
    assert mask[[0, -1]].max() == 0
    assert mask[:, [0, -1]].max() == 0


def test_a_missing_font_is_named(monkeypatch, tmp_path):
    import matplotlib as mpl

    monkeypatch.setattr(mpl, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(
        DataError, match=r"DejaVuSans\.ttf is missing; .*pip install --force-reinstall matplotlib"
    ):
        load_dataset("glyphs")


def test_too_few_distinct_characters_are_reported(monkeypatch):
    monkeypatch.setattr(characters, "_candidates", lambda: list("AAB"))
    with pytest.raises(DataError, match="these fonts hold 2 distinct characters, not 200"):
        load_dataset("glyphs")
