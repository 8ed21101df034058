"""The audit of what begins before ``untie``, and of what a model holds or does besides."""

import re
from pathlib import Path

import before_untie
import pytest
import torch
import torch.nn.functional as F
from before_untie import BUILDS
from clean_steps import InputFirst
from leaks import Back, Task, Whole
from torch import nn

import feedbackpath as fp
from feedbackpath.auditing.locality import OWN
from feedbackpath.auditing.process import in_fresh_process

SOON = ("read-list", "read-order", "source-lists", "source-drawn-alike", "carried-bias", "clean-two-models",
        "clean-saved-and-trained-again", "clean-trained-after-untie",
        "source-signs-of-the-draw")  # fmt: skip


@pytest.fixture(scope="module")
def reports():
    return in_fresh_process(before_untie.audit_all, SOON)


@pytest.mark.parametrize("name", SOON)
def test_w_is_absent_from_its_making_on(name, reports):
    assert reports[name].transport_free is BUILDS[name][1], str(reports[name])


def test_only_the_step_is_disturbed_and_not_what_build_trains(reports):
    assert set(reports["clean-trained-after-untie"].locality.values()) == {OWN}


@pytest.mark.slow
def test_all_that_begins_before_untie_is_found_and_nothing_else():
    reports = in_fresh_process(before_untie.audit_all, list(BUILDS))
    wrong = {name: str(r) for name, r in reports.items() if r.transport_free is not BUILDS[name][1]}
    assert not wrong, wrong


TABLE = re.compile(r"^\| ([^|]+) \| `([^|]+)` \| `([^|]+)` \| ([a-z -]+) \|$", re.MULTILINE)


@pytest.mark.slow
def test_the_table_of_what_make_does_is_right():
    page = (Path(__file__).parents[1] / "docs" / "audit.md").read_text(encoding="utf-8")
    rows = TABLE.findall(page[page.index("line before `untie`") : page.index("## Kinds of steps")])
    reports = in_fresh_process(before_untie.audit_lines, [row[:3] for row in rows])
    expected = {"transports": False, "transport-free": True, "not settled": None}
    wrong = {
        kind: str(reports[kind])
        for kind, *_, said in rows
        if reports[kind].transport_free is not expected[said]
    }
    assert len(rows) >= 7
    assert not wrong, wrong


@pytest.mark.slow
def test_a_model_that_was_there_before_is_refused():
    with pytest.raises(fp.AuditError, match="make its model itself"):
        fp.audit(build=before_untie.there_before)


# Matrices that a model holds besides its parameters and buffers

GLOBAL = torch.randn(8, 8, generator=torch.Generator().manual_seed(3)) / 3


class Holding(nn.Module):
    """Multiplies what is hidden by some matrix."""

    def __init__(self, use, **held):
        super().__init__()
        self.first, self.last, self.use = nn.Linear(6, 8), nn.Linear(8, 3), use
        vars(self).update(held)

    def forward(self, x, graph=None):
        return self.last(self.use(self, torch.relu(self.first(x)), graph))


def in_closure(matrix):
    return lambda model, h, graph: h @ matrix


HELD = {
    "attribute": lambda m: Holding(lambda model, h, graph: h @ model.matrix, matrix=m),
    "list": lambda m: Holding(lambda model, h, graph: F.linear(h, model.matrices[0]), matrices=[m]),
    "closure": lambda m: Holding(in_closure(m)),
    "global": lambda m: Holding(lambda model, h, graph: h @ GLOBAL),
    "array": lambda m: Holding(lambda model, h, graph: h @ torch.from_numpy(model.array), array=m.numpy()),
    "kernel": lambda m: Holding(
        lambda model, h, graph: F.conv1d(h.view(-1, 4, 2), model.kernel, padding=1).flatten(1),
        kernel=m.flatten()[:48].view(4, 4, 3),
    ),
}
DATA = {
    "graph": lambda model, h, graph: graph @ h,
    "attention": lambda model, h, graph: (h @ h.T).softmax(1) @ h,
    "made-in-the-step": lambda model, h, graph: torch.ones(16, 16).tril() @ h,
    "no-error-comes-back": lambda model, h, graph: h + h.detach() @ model.matrix,
}


def fast_and_slow(names, fast):
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", fast_and_slow(HELD, {"attribute", "closure"}))
def test_a_matrix_that_the_model_holds_is_not_settled(name):
    report = Whole(lambda: HELD[name](torch.randn(8, 8) / 3), "kp").audit()
    assert report.transport_free is None, str(report)
    assert "no parameter and no buffer multiplies signals of the model at" in report.verdict
    assert "test_audit_build.py" in report.verdict


@pytest.mark.parametrize("name", fast_and_slow(DATA, {"graph"}))
def test_a_matrix_that_is_data_or_of_signals_passes(name):
    task = Whole(lambda: Holding(DATA[name], matrix=torch.randn(8, 8)), "kp")
    graph = torch.rand(16, 16)

    def step():
        task.optimizer.zero_grad()
        F.cross_entropy(task.model(task.x, graph=graph), task.y).backward()
        task.optimizer.step()
        task.path.step()

    report = fp.audit(step, task.path)
    assert report.transport_free, str(report)


# Parts of the model that multiply the other way round, and only seem to train


class Cloned(Back):
    def forward(self, delta):
        return delta @ self.weight.clone()


class Summed(Back):
    def forward(self, delta):
        return torch.einsum("bo,oi->bi", delta, self.weight)


class ByRow(Back):
    def forward(self, delta):
        return torch.stack([self.weight.t().mv(row) for row in delta])


@pytest.mark.filterwarnings("ignore::feedbackpath.UnconvertedLayerWarning")
@pytest.mark.parametrize("part", fast_and_slow((Back, Cloned, Summed, ByRow), {Back}))
def test_training_that_is_feigned_is_not_settled(part):
    sent = []

    def on_loss(task, loss):
        sent[:] = [task.model[2].back(torch.ones(8, 8).tril())]
        return loss + 1e-9 * sent[0].sum()

    task = Task(on_loss=on_loss, after_update=lambda task: task.model[2].feedback.add_(sent[0], alpha=0.1))
    task.model[2].back = part(task.model[2].weight)
    report = task.audit()
    assert report.transport_free is None, str(report)
    assert "multiplies by W of '2'" in report.verdict


class Centred(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)


@pytest.mark.parametrize("layer", [pytest.param(InputFirst, marks=pytest.mark.slow), Centred])
def test_parts_that_always_multiply_alike_pass(layer):
    layer = layer() if layer is InputFirst else layer(8, 8)
    task = Task("kp", model=nn.Sequential(nn.Linear(6, 8), nn.ReLU(), layer, nn.ReLU(), nn.Linear(8, 3)))
    plain = task.step

    def step():
        plain()
        hidden = task.model[1](task.model[0](task.x))
        F.cross_entropy(task.model[4](task.model[3](task.model[2](hidden))), task.y).backward()
        task.log = task.model(task.x[0]).tolist()

    report = fp.audit(step, task.path)
    assert report.transport_free, str(report)


# Locality


def test_a_report_says_why_locality_was_not_measured():
    task = Task("kp")
    task.step()
    F.cross_entropy(task.model(task.x), task.y).backward()
    seen = []
    usual = task.audit().locality

    def refuse_other_gradient(task):
        norm = task.model[0].bias.grad.norm().item()
        if not seen and abs(norm - first) > 1e-5:
            raise ValueError("odd gradient")
        seen.append(norm)

    task.optimizer.zero_grad()
    F.cross_entropy(task.model(task.x), task.y).backward()
    first = task.model[0].bias.grad.norm().item()
    task.after_update = refuse_other_gradient
    report = task.audit()
    assert usual
    assert report.transport_free, str(report)
    assert not report.locality
    (note,) = report.notes
    assert (
        note == "locality was not measured: with neurons disturbed, ValueError ended the step: odd gradient"
    )
