"""The audit: what is free of transport passes, and no leak does."""

import copy
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from leaks import LEAKS, UNSEEN_BY_OPERATORS, Task
from torch import nn

import feedbackpath as fp
from feedbackpath.auditing.locality import OWN, UNMOVED
from feedbackpath.mirror.noise import NOISES
from feedbackpath.models import build_model

FREE = ("fa", "kp", "wm", "wm-exact", "mirror-kp")
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=1e-2),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2, foreach=True),
    "fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=1e-2, foreach=True),
    "fused-adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=1e-2, fused=True),
}
MIRRORS = {
    **{name: fp.Mirror(noise=name) for name in (*NOISES, "orthogonal", "hadamard")},
    "paper": fp.Mirror.paper(samples=64),
    "printed": fp.Mirror.paper(samples=64, reading="printed"),
    "scaled": fp.Mirror(noise="gaussian", reading="scaled"),
    "baseline": fp.Mirror(noise="uniform", rates="baseline", baseline=4.0),
    "push-pull": fp.Mirror(rates="push-pull"),
    "share": fp.Mirror(when=fp.When(cost_share=0.1)),
    "turn": fp.Mirror(when=fp.When("turn")),
    "alternate": fp.Mirror(when=fp.When("alternate")),
    "every-second-step": fp.Mirror(when=fp.When("all", every=2)),
}


def state_of(task):
    values = {name: value.clone() for name, value in task.model.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in task.model.parameters()]
    return (
        values,
        gradients,
        copy.deepcopy(task.optimizer.state_dict()),
        copy.deepcopy(task.path.state_dict()),
    )


def assert_same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


@pytest.mark.parametrize("clip", [None, 0.1], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rule", FREE)
def test_rules_that_transport_nothing_pass(rule, optimizer, clip):
    report = Task(rule, optimizer=OPTIMIZERS[optimizer], clip=clip).audit()
    assert (report.verdict, report.notes) == ("transport-free", ()), str(report)


@pytest.mark.parametrize("name", MIRRORS)
def test_every_design_and_schedule_of_the_mirror_passes(name):
    report = Task(fp.WeightMirror(MIRRORS[name])).audit(steps=3)
    assert (report.verdict, report.notes) == ("transport-free", ()), str(report)


@pytest.mark.parametrize("leak", LEAKS)
def test_leaks_are_found_with_layer_operation_and_line(leak):
    task = LEAKS[leak]()
    report = task.audit(steps=3)
    assert report.verdict.startswith("transports weights"), str(report)
    assert not report.transport_free
    assert {finding.layer for finding in report.findings} <= {weight.name for weight in task.path.weights}
    seen = [finding for finding in report.findings if finding.method != "replay"]
    assert seen
    for finding in seen:
        assert finding.operation
        assert finding.values > 0
        if finding.method == "provenance":
            file, line = re.fullmatch(r"(.*\.py):(\d+)", finding.where).groups()
            assert int(line) > 0
            assert file.endswith(("leaks.py", "sign_symmetry.py", "ops.py"))


@pytest.mark.parametrize("leak", UNSEEN_BY_OPERATORS)
def test_what_leaves_pytorch_on_the_way_is_found_by_replay_alone(leak):
    report = UNSEEN_BY_OPERATORS[leak]().audit()
    assert {finding.method for finding in report.findings} == {"replay"}, str(report)
    assert {finding.sink for finding in report.findings} == {"feedback weight"}


def test_what_was_kept_from_the_forward_pass_is_found_by_provenance_alone():
    report = LEAKS["cast-kept-from-forward"]().audit()
    assert {finding.method for finding in report.findings} == {"provenance"}
    assert {finding.layer for finding in report.findings} == {"2"}


def test_a_rare_branch_takes_as_many_steps_to_see():
    assert LEAKS["rare-branch"]().audit(steps=1).transport_free
    assert not LEAKS["rare-branch"]().audit(steps=3).transport_free


def test_signs_are_told_from_weights():
    findings = Task("ss").audit().findings
    assert {finding.what for finding in findings} == {"sign"}
    assert "1 bit a weight" in str(findings[0])


@pytest.mark.parametrize("rule", [*FREE, "bp", "ss"])
def test_everything_is_left_as_it_was(rule):
    task = Task(rule)
    for _ in range(2):
        task.step()
    twin = copy.deepcopy(state_of(task))
    random = torch.get_rng_state()
    task.audit()
    assert_same(state_of(task), twin)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(layer.untied.taps == () for layer in task.path.layers.values())


def test_training_goes_on_as_if_there_had_been_no_audit():
    audited, other = Task("wm"), Task("wm")
    audited.audit()
    for _ in range(4):
        audited.step()
        other.step()
    assert_same(state_of(audited), state_of(other))


@pytest.mark.parametrize("rule", FREE)
def test_batchnorms_scale_is_declared(rule):
    torch.manual_seed(0)
    model = build_model("resnet8", sample_shape=(1, 16, 16), num_classes=4)
    path = fp.untie(model, rule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    x, y = torch.randn(4, 1, 16, 16), torch.randint(4, (4,))

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        path.step()

    report = fp.audit(step, path, steps=1)
    channels = sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert report.transport_free
    assert report.verdict == f"transport-free except: BatchNorm scale ({channels} scalars)"
    assert report.crossings["conv1"].deltas == 4 * 16 * 16 * 16
    assert set(report.crossings) == {weight.name for weight in path.weights}


@pytest.mark.parametrize("tied", [None, "encoder.layers.0.linear1", "encoder.layers.1.self_attn"])
@pytest.mark.parametrize("rule", ["fa", "kp"])
def test_attention_passes_and_plain_layers_do_not(rule, tied):
    torch.manual_seed(0)
    model = build_model("transformer", sample_shape=(1, 8, 8), num_classes=4)
    path = fp.untie(model, rule, overrides={} if tied is None else {tied: "bp"})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, y = torch.randn(4, 1, 8, 8), torch.randint(4, (4,))

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        path.step()

    report = fp.audit(step, path, steps=1)
    expected = {} if tied is None else {tied}
    assert {finding.layer for finding in report.findings} == set(expected)
    if tied is None:
        assert report.verdict == "transport-free except: LayerNorm weight (512 scalars)"


class WithCell(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.cell, self.head = nn.Linear(4, 5), nn.GRUCell(5, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.cell(torch.relu(self.first(x))))


@pytest.mark.parametrize("rule", ["fa", "kp"])
def test_recurrent_layers_pass(rule):
    torch.manual_seed(0)
    model = WithCell()
    path = fp.untie(model, rule, strict=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-2)
    x, y = torch.randn(8, 4), torch.randint(2, (8,))

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        path.step()

    report = fp.audit(step, path)
    assert report.verdict == "transport-free", str(report)


def test_layers_that_cannot_be_untied_are_found():
    torch.manual_seed(0)
    model = WithCell()
    model.cell.forward = partial(nn.GRUCell.forward, model.cell)  # past whatever class it will have
    with pytest.warns(fp.UnconvertedLayerWarning):
        path = fp.untie(model, "fa")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(8, 4), torch.randint(2, (8,))

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    assert "cell.weight_ih" in {finding.layer for finding in fp.audit(step, path).findings}


def test_autocast_accumulation_and_checkpointing_pass():
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    path = fp.untie(model, "wm")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = torch.randn(16, 6), torch.randint(3, (16,))

    def step():
        optimizer.zero_grad()
        for part_x, part_y in zip(x.chunk(2), y.chunk(2), strict=True):
            with torch.autocast("cpu", torch.bfloat16):
                hidden = checkpoint(model[:4], part_x, use_reentrant=False)
                loss = F.cross_entropy(model[4](hidden), part_y)
            loss.backward()
        optimizer.step()
        path.step()

    report = fp.audit(step, path)
    assert report.verdict == "transport-free", str(report)


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_compiled_steps_run_eagerly_and_the_report_says_so():
    task = Task("kp")
    compiled = torch.compile(task.model, backend="aot_eager")

    def step():
        task.optimizer.zero_grad()
        F.cross_entropy(compiled(task.x), task.y).backward()
        task.optimizer.step()
        task.path.step()

    report = fp.audit(step, task.path)
    assert report.verdict == "transport-free"
    assert report.notes == ("compiled code was run eagerly",)


def test_schedulers_and_averages_are_part_of_the_step_when_named():
    task = Task("kp")
    scheduler = torch.optim.lr_scheduler.ExponentialLR(task.optimizer, 0.5)
    average = torch.optim.swa_utils.AveragedModel(task.model)

    def step():
        task.step()
        scheduler.step()
        average.update_parameters(task.model)

    report = fp.audit(step, task.path, stateful=[scheduler, average])
    assert report.verdict == "transport-free", str(report)
    assert scheduler.last_epoch == 0
    assert int(average.n_averaged) == 0


def test_steps_that_cannot_be_repeated_are_refused():
    task = Task("kp")
    batches = iter(torch.randn(100, 16, 6))

    def step():
        task.x = next(batches)
        task.step()

    with pytest.raises(fp.AuditError, match="fixed minibatch"):
        fp.audit(step, task.path)


def test_steps_that_train_nothing_are_refused():
    task = Task("kp")
    with pytest.raises(fp.AuditError, match="no delta"):
        fp.audit(lambda: None, task.path)
    with pytest.raises(fp.AuditError, match="at least one"):
        task.audit(steps=0)


def test_a_failing_step_leaves_everything_as_it_was():
    task = Task("kp")
    before = copy.deepcopy(state_of(task))

    def step():
        task.step()
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fp.audit(step, task.path)
    assert_same(state_of(task), before)


@pytest.mark.parametrize(("rule", "said"), [("fa", UNMOVED), ("kp", OWN), ("wm", OWN), ("mirror-kp", OWN)])
def test_updates_take_the_signals_of_their_own_neurons(rule, said):
    assert set(Task(rule).audit().locality.values()) == {said}


def test_a_clipped_norm_is_a_scalar_common_to_all():
    locality = Task("kp", clip=0.1, optimizer=OPTIMIZERS["sgd"]).audit().locality
    assert all("a scalar common to all" in said for said in locality.values())


def test_an_update_by_other_neurons_signals_is_flagged():
    def mix_rows(task):
        for _, _, b in task.path.pairs():
            b.copy_(0.5 * (b + b.roll(1, 0)))

    report = Task("kp", after_update=mix_rows).audit()
    assert report.transport_free
    assert all(said.startswith("NOT LOCAL") for said in report.locality.values())


def test_what_a_mirror_sends_is_counted():
    crossings = (
        Task(fp.WeightMirror(fp.Mirror(noise="signs", samples=600, when=fp.When("all")))).audit().crossings
    )
    assert {name: crossing.answers for name, crossing in crossings.items()} == {
        "0": 600 * 8,
        "2": 600 * 8,
        "4": 600 * 3,
    }
    assert "1800 answers to noise" in str(crossings["4"])


def test_the_report_reads_line_by_line():
    text = str(LEAKS["by-a-hook"]().audit())
    first, finding, *_ = text.splitlines()
    assert first == "transports weights"
    assert re.search(r"2: W in a delta, 128 values, by aten\.mul at .*leaks\.py:\d+ \[provenance\]", finding)


def test_a_passage_of_ones_own_is_forward():
    class OwnMirror(fp.Rule):
        name = "own-mirror"
        is_marked = True

        def start(self, weights, context):
            fp.draw_feedback(weights, context)

        @torch.no_grad()
        def step(self, weights, context):
            for weight in weights:
                noise = torch.randn(64, weight.fan_in, generator=context.generator(weight, "noise"))
                if self.is_marked:
                    with fp.forward_passage(weight.weight):
                        answer = noise @ weight.weight.T
                else:
                    answer = noise @ weight.weight.T
                weight.feedback.copy_(answer.T @ noise / len(noise))

    assert Task(OwnMirror()).audit().transport_free
    unmarked = OwnMirror()
    unmarked.is_marked = False
    assert not Task(unmarked).audit().transport_free
