"""A path in other people's training loops, against the packages themselves where they are installed."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import feedbackpath as fp
from feedbackpath.integrations import follow

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the other packages; ours are asked for by name
RULES = ["kp", "wm"]
X = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(3, (24,), generator=torch.Generator().manual_seed(2))


def make(rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    return model, fp.untie(model, rule)


def make_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def by_hand(rule, batches, *, accumulate=2, max_norm=0.05):
    """Train as a plain loop does: what every integration is compared with."""
    model, path = make(rule)
    optimizer = make_optimizer(model)
    for number, (x, y) in enumerate(batches, 1):
        (nn.functional.cross_entropy(model(x), y) / accumulate).backward()
        if number % accumulate == 0:
            path.clip_grad_norm_(max_norm)
            optimizer.step()
            path.step()
            optimizer.zero_grad()
    return model, path


def batches(epochs=2):
    return [(X[i : i + 4], Y[i : i + 4]) for _ in range(epochs) for i in range(0, 24, 4)]


def are_equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_path_steps_with_its_optimizer_and_stops_when_told():
    expected, _ = by_hand("wm", batches())
    model, path = make("wm")
    optimizer = make_optimizer(model)
    following = follow(optimizer, path, max_norm=0.05)
    for number, (x, y) in enumerate(batches(), 1):
        (nn.functional.cross_entropy(model(x), y) / 2).backward()
        if number % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert path.context.steps == 6
    assert are_equal(model.state_dict(), expected.state_dict())
    following.stop()
    optimizer.step()
    assert path.context.steps == 6


def test_an_optimizer_of_something_else_is_refused():
    _, path = make("fa")
    with pytest.raises(fp.RuleError, match="SGD has no weight of the path's model: make it from"):
        follow(make_optimizer(nn.Linear(2, 2)), path)


def lightning_fit(rule, folder, *, epochs, max_norm=0.05, ckpt_path=None, **settings):
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    from feedbackpath.integrations.lightning import StepPath

    model, path = make(rule)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = model

        def training_step(self, batch, number):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return make_optimizer(self.net)

    trainer = lightning.Trainer(
        max_epochs=epochs, accumulate_grad_batches=2, callbacks=[StepPath(path, max_norm=max_norm)],
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, enable_checkpointing=False, **settings,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=4)
    trainer.fit(Module(), loader, ckpt_path=ckpt_path, weights_only=False)
    return trainer, model, path


@pytest.mark.parametrize("rule", RULES)
def test_lightning_steps_clips_and_resumes_bit_for_bit(rule, tmp_path):
    expected, its_path = by_hand(rule, batches(2))
    trainer, _, _ = lightning_fit(rule, tmp_path, epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    for ckpt in (None, tmp_path / "one.ckpt"):
        _, model, path = lightning_fit(rule, tmp_path, epochs=2, ckpt_path=ckpt)
        assert path.context.steps == its_path.context.steps == 6
        assert are_equal(model.state_dict(), expected.state_dict())


def test_lightnings_own_clipping_is_refused(tmp_path):
    with pytest.raises(fp.RuleError, match=r"gradient_clip_val=.* W and B together: leave it out, and give"):
        lightning_fit("kp", tmp_path, epochs=1, gradient_clip_val=1.0)


def trainer_train(rule, folder, *, epochs, resume=None, max_grad_norm=0.0):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate, which Trainer needs, is not installed")
    from feedbackpath.integrations.transformers import StepPath

    model, path = make(rule)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x, labels):
            logits = self.net(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    data = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    args = transformers.TrainingArguments(
        output_dir=str(folder), num_train_epochs=epochs, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, max_grad_norm=max_grad_norm, save_strategy="epoch", report_to=[],
        disable_tqdm=True, lr_scheduler_type="constant", use_cpu=True, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = transformers.Trainer(
        Wrapped(), args, train_dataset=data, callbacks=[StepPath(path, max_norm=0.05)],
        optimizers=(make_optimizer(model), None),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return model, path


@pytest.mark.parametrize("rule", RULES)
def test_transformers_trainer_steps_clips_and_resumes_bit_for_bit(rule, tmp_path):
    expected, its_path = by_hand(rule, batches(2))
    model, path = trainer_train(rule, tmp_path / "a", epochs=2)
    assert path.context.steps == its_path.context.steps == 6
    assert are_equal(model.state_dict(), expected.state_dict())
    model, path = trainer_train(rule, tmp_path / "a", epochs=2, resume=str(tmp_path / "a" / "checkpoint-3"))
    assert path.context.steps == 6
    assert are_equal(model.state_dict(), expected.state_dict())
    (tmp_path / "a" / "checkpoint-3" / "feedbackpath.pt").unlink()
    with pytest.raises(fp.RuleError, match="feedbackpath.pt is missing: the checkpoint was saved without"):
        trainer_train(rule, tmp_path / "a", epochs=2, resume=str(tmp_path / "a" / "checkpoint-3"))


def test_the_trainers_own_clipping_is_refused(tmp_path):
    with pytest.raises(fp.RuleError, match=r"max_grad_norm=1\.0\), the default, .* set it to 0, and give"):
        trainer_train("kp", tmp_path, epochs=1, max_grad_norm=1.0)


@pytest.mark.parametrize("rule", RULES)
def test_accelerate_steps_clips_and_resumes_bit_for_bit(rule, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    from feedbackpath.integrations.accelerate import step_path

    def prepare():
        model, path = make(rule)
        accelerator = accelerate.Accelerator(gradient_accumulation_steps=2, cpu=True)
        prepared, optimizer = accelerator.prepare(model, make_optimizer(model))
        step_path(accelerator, optimizer, path, max_norm=0.05)
        return accelerator, prepared, optimizer, path

    def train(prepared, some):
        accelerator, model, optimizer, _ = prepared
        for x, y in some:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()

    expected, _ = by_hand(rule, batches(2))
    one = prepare()
    train(one, batches(1))
    one[0].save_state(str(tmp_path))
    train(one, batches(1))
    two = prepare()
    two[0].load_state(str(tmp_path))
    train(two, batches(1))
    for _, model, _, path in (one, two):
        assert path.context.steps == 6
        assert are_equal(model.state_dict(), expected.state_dict())


SNIPPETS = re.findall(
    r"^```py\n(.*?)^```$",
    (Path(__file__).parents[1] / "docs" / "loops.md").read_text(encoding="utf-8"),
    re.MULTILINE | re.DOTALL,
)


@pytest.mark.parametrize("package", ["lightning", "transformers", "accelerate"])
def test_the_page_on_loops_has_lines_that_run(package, tmp_path, monkeypatch):
    (code,) = [code for code in SNIPPETS if f"feedbackpath.integrations.{package} " in code]
    compile(code, "docs/loops.md", "exec")
    pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/loops.md", "exec"), {"__name__": "snippet"})
