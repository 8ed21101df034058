"""The task of text: bytes in windows, bits per byte, and the networks that read them."""

import math

import pytest
import torch
from rich.console import Console

import feedbackpath as fp
from feedbackpath.errors import DataError
from feedbackpath.jobs import run_job
from feedbackpath.models import build_model
from feedbackpath.models.language import GPT
from feedbackpath.recipes import make_recipe
from feedbackpath.report.live import LiveView
from feedbackpath.tasks import load_task
from feedbackpath.tasks.text import CONTEXT, bits_per_byte, byte_loss
from feedbackpath.train.config import CompareConfig, RunConfig
from feedbackpath.train.engine import Engine
from feedbackpath.train.loop import Measured, train
from feedbackpath.train.results import read_results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("texts")
    for number in range(60):
        (place / f"{number}.txt").write_text(f"file {number}: " + "the cat sat on the mat. " * 40)
    return place


def test_windows_are_a_function_of_seed_epoch_and_number(folder):
    task = load_task("text", data_dir=folder, samples_per_epoch=50)
    x, y = task.train.batch(torch.arange(50), epoch=1)
    assert x.shape == y.shape == (50, CONTEXT)
    assert torch.equal(x[:, 1:], y[:, :-1])
    again = load_task("text", data_dir=folder, samples_per_epoch=50).train.batch(torch.tensor([7]), epoch=1)
    assert torch.equal(again[0][0], x[7])
    assert not torch.equal(task.train.batch(torch.arange(50), epoch=2)[0], x)
    other = load_task("text", seed=1, data_dir=folder, samples_per_epoch=50)
    assert not torch.equal(other.train.batch(torch.arange(50), epoch=1)[0], x)
    assert torch.equal(other.test.batch(torch.arange(5), 0)[0], task.test.batch(torch.arange(5), 0)[0])


def test_parts_share_no_file_and_depend_on_names_alone(folder, tmp_path):
    task = load_task("text", data_dir=folder)
    whole = sum(len(path.read_bytes()) for path in folder.iterdir())
    assert sum(task.facts["sizes"].values()) == whole
    texts = {
        name: bytes(getattr(task, name).text.tolist()).decode() for name in ("train", "validation", "test")
    }
    for number in range(60):
        assert sum(f"file {number}: " in text for text in texts.values()) == 1
    (folder / "0.txt").write_text((folder / "0.txt").read_text())
    assert load_task("text", data_dir=folder).facts["checksum"] == task.facts["checksum"]


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "has no files; give a folder of text files by --data-dir"),
        ({"a.txt": "", "b.txt": ""}, "has 2 files, and of these 0 bytes for train; more than 64 are needed"),
        ({"one.txt": "short"}, "has 1 files, and of these [05] bytes for train"),
        (
            {f"{n}.txt": "long" * 99 for n in range(3)},
            "0 bytes for validation.*: 1 in 20 of them are for validation",
        ),
    ],
)
def test_a_folder_with_too_little_text_is_refused_with_its_numbers(files, told, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=told):
        load_task("text", data_dir=tmp_path)


def test_a_file_is_no_folder_of_text(tmp_path):
    (tmp_path / "one.txt").write_text("short")
    with pytest.raises(DataError, match="is not a folder"):
        load_task("text", data_dir=tmp_path / "one.txt")


def test_the_built_in_corpus_is_pythons_standard_library():
    task = load_task("text")
    assert sum(task.facts["sizes"].values()) > 1_000_000
    assert task.facts["python"]
    assert (task.metric, task.unit, task.num_classes, task.sample_shape) == ("bits_per_byte", "", 256, (64,))


def test_bits_per_byte_of_chance_are_eight():
    logits, target = torch.zeros(3, 5, 256), torch.randint(256, (3, 5))
    assert bits_per_byte(logits, target).tolist() == pytest.approx([8.0] * 3)
    assert byte_loss(logits, target).item() == pytest.approx(8 * math.log(2))


@pytest.mark.parametrize("name", ["gpt", "lstm"])
def test_feedback_equal_to_w_is_backprop_in_networks_that_read_text(name):
    torch.manual_seed(0)
    model = build_model(name, sample_shape=(8,), num_classes=11).double()
    tokens, target = torch.randint(11, (3, 8)), torch.randint(11, (3, 8))
    parameters = [p for p in model.parameters() if p.requires_grad]
    exact = torch.autograd.grad(byte_loss(model(tokens), target), parameters)
    path = fp.untie(model, "fa")
    with torch.no_grad():
        for _, w, b in path.pairs():
            b.copy_(w)
    ours = torch.autograd.grad(byte_loss(model(tokens), target), parameters)
    assert all(torch.equal(one, other) for one, other in zip(ours, exact, strict=True))
    with torch.no_grad():
        for _, _, b in path.pairs():
            b.normal_()
    random = torch.autograd.grad(byte_loss(model(tokens), target), parameters)
    assert not torch.allclose(random[0], exact[0])


def test_a_gpt_sees_no_byte_that_comes_later():
    model = build_model("gpt", sample_shape=(8,), num_classes=11).eval()
    tokens = torch.randint(11, (2, 8))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    assert torch.allclose(model(tokens)[:, :5], model(changed)[:, :5], atol=1e-6)


@pytest.mark.parametrize(
    ("model", "rule"),
    [("gpt", "kp"), ("lstm", "fa"), pytest.param("gpt", "mirror-kp", marks=pytest.mark.slow)],
)
def test_text_trains_through_the_one_loop(folder, model, rule):
    config = CompareConfig(
        data="text", data_dir=folder, model=model, epochs=1, samples_per_epoch=64, batch_size=16,
        optimizer="adamw", lr=0.003, weight_decay=0.1,
    )  # fmt: skip
    task = load_task("text", data_dir=folder, samples_per_epoch=64)
    measured = [e.entry for e in train(config, rule, 0, task, Engine(config)) if isinstance(e, Measured)]
    assert measured[-1].test < measured[0].test < 9


def test_longer_windows_for_longer_networks(tmp_path):
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text(f"file {number}: " + "the cat sat on the mat. " * 100)
    task = load_task("text-1024", data_dir=tmp_path, samples_per_epoch=3)
    assert (task.name, task.sample_shape) == ("text-1024", (1024,))
    x, y = task.train.batch(torch.arange(3), epoch=1)
    assert x.shape == (3, 1024)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert 0 < len(task.test) <= 128


def test_a_tied_head_is_the_embeddings_table_and_b_learns_all_that_it_learns():
    torch.manual_seed(0)
    model = GPT(8, 11, width=8, num_heads=2, is_tied=True)
    assert model.head.weight is model.embed.weight
    path = fp.untie(model, "kp")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.1)
    fp.share_moments(path, optimizer)
    tokens = torch.randint(11, (3, 8))
    byte_loss(model(tokens), tokens).backward()
    optimizer.step()
    assert all(torch.equal(w.grad, b.grad) for _, w, b in path.pairs())
    moments = [optimizer.state[p]["exp_avg"] for p in (model.head.weight, model.head.feedback)]
    assert torch.equal(*moments)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("text-gpt-small", marks=pytest.mark.slow),
        pytest.param("text-lstm-small", marks=pytest.mark.slow),
        "text-gpt-124m",
    ],
)
def test_recipes_run(folder, tmp_path, name):
    """The large one runs with a small network here, in bf16; it was run whole by hand."""
    small = {"data_dir": folder, "samples_per_epoch": 32, "epochs": 1, "batch_size": 16, "num_threads": 1}
    if name == "text-gpt-124m":
        small |= {
            "data": "text",
            "model": "gpt",
            "micro_batch_size": 8,
            "warmup_epochs": 0.5,
            "compile": False,
        }
    recipe = make_recipe(name, rule="kp")
    config = RunConfig.model_validate(recipe.model_dump() | small)
    run_job(config, tmp_path / "run", resume=False, command="", view=LiveView(Console(quiet=True)))
    (run,) = read_results(tmp_path / "run").runs
    assert (run.status, len(run.history)) == ("finished", 1)


def test_the_large_recipe_has_the_size_that_it_says():
    with torch.device("meta"):
        model = build_model("gpt-124m", sample_shape=(1024,), num_classes=256)
    assert sum(p.numel() for p in model.parameters()) == 126_042_176
