"""The audit: what is free of transport passes, and no leak does."""

import copy
import gc
import os
import re
import signal
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import built_steps
import leaks
import pytest
import torch
import torch.nn.functional as F
from clean_steps import CLEAN, write_log
from disguised import DISGUISED, READ, REPEATED, transposed_copy
from leaks import LEAKS, UNSEEN_BY_OPERATORS, OwnMirror, Task, Whole
from problems import rule_that_starts_at_once
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import _pop_mode
from zoo import make_zoo, zoo_input

import feedbackpath as fp
from feedbackpath import cli
from feedbackpath.auditing import Finding, passes
from feedbackpath.auditing.locality import OWN, UNMOVED
from feedbackpath.auditing.process import EndlessStep
from feedbackpath.mirror.noise import NOISES
from feedbackpath.models import build_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]
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
    "pairs": fp.Mirror(pairs=True),
    "whole": fp.Mirror(pairs=True, draw="whole", target_angle_deg=3, forgetting=1.0),
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


def fast_and_slow(names, fast):
    """Return parameters of which some are left to the slow tests."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


FIRST = {name for kind in leaks.KINDS.values() for name in list(kind)[:1]}
CLEAN_FIRST = {
    "stacked", "logs-much", "counter-and-minibatches", "muon", "sam", "lbfgs", "average",
    "scaler-and-autocast", "checkpointed", "read-by-one-hot", "straight-through", "torch-func",
    "sparse-graph",
}  # fmt: skip
SOON = {"passage-looked-up", "product-by-pieces", "numpy-before", "relay-buffer", "module-in-hook"}


@pytest.mark.usefixtures("forking")
@pytest.mark.parametrize("clip", [None, 0.1], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("optimizer", fast_and_slow(OPTIMIZERS, {"fused-adamw"}))
@pytest.mark.parametrize("rule", ["fa", "kp"])
def test_every_optimizer_passes(rule, optimizer, clip):
    report = Task(rule, optimizer=OPTIMIZERS[optimizer], clip=clip).audit()
    assert (report.verdict, report.notes) == ("transport-free in the 2 steps watched", ()), str(report)


@pytest.mark.parametrize("name", fast_and_slow(MIRRORS, {"signs", "paper", "push-pull", "turn"}))
def test_every_design_and_schedule_of_the_mirror_is_a_reading(name):
    report = Task(fp.WeightMirror(MIRRORS[name])).audit(steps=3)
    assert report.transport_free, str(report)
    pattern = r"transport-free in the 3 steps watched; W read by \d+ noise probes a step"
    assert re.fullmatch(pattern, report.verdict), str(report)


@pytest.mark.filterwarnings("ignore::feedbackpath.UnconvertedLayerWarning")
@pytest.mark.parametrize("leak", fast_and_slow(LEAKS, FIRST | SOON))
def test_leaks_are_found(leak):
    task = LEAKS[leak]()
    report = task.audit(steps=3)
    assert report.transport_free is False, str(report)
    assert report.verdict.startswith("transports weights")
    assert all(finding.values > 0 or finding.sink == "calls" for finding in report.findings)


@pytest.mark.parametrize(
    "leak", fast_and_slow(DISGUISED, {"matrix-edges", "relative-signs", "hook-of-its-own"})
)
def test_leaks_in_disguise_are_found(leak):
    report = DISGUISED[leak]().audit()
    assert report.transport_free is False, str(report)


@pytest.mark.parametrize("layer", REPEATED)
def test_scales_of_repeated_signals_are_not_settled(layer):
    report = REPEATED[layer]().audit()
    assert report.transport_free is None
    assert "signals are repeated before 'layer.weight' scales them" in report.verdict


def test_a_part_that_uses_a_transposed_copy_is_not_settled():
    report = transposed_copy().audit()
    assert report.transport_free is None
    assert "in another way than elsewhere" in report.verdict


@pytest.mark.parametrize("way", READ)
def test_readings_that_look_like_training_are_counted(way):
    verdict = Task("fa", after_update=READ[way]).audit().verdict
    assert verdict == "transport-free in the 2 steps watched; W read by 8 noise probes a step"


@pytest.mark.parametrize("leak", fast_and_slow(leaks.SEEN, {"by-a-hook", "row-norms", "signs"}))
def test_where_an_operator_shows_layer_operation_and_line_are_named(leak):
    task = leaks.SEEN[leak]()
    seen = [finding for finding in task.audit(steps=3).findings if finding.method != "absence"]
    if leak == "shared-with-numpy":  # its operator copies from memory that PyTorch does not know
        return
    assert {finding.layer for finding in seen} <= {weight.name for weight in task.path.weights}
    assert seen
    for finding in seen:
        assert finding.operation
        if finding.method == "provenance":
            file, line = re.fullmatch(r"(.*\.py):(\d+)", finding.where).groups()
            assert int(line) > 0
            assert file.endswith(("leaks.py", "sign_symmetry.py"))


@pytest.mark.parametrize("leak", UNSEEN_BY_OPERATORS)
def test_of_what_leaves_pytorch_the_way_out_is_named(leak):
    report = UNSEEN_BY_OPERATORS[leak]().audit()
    assert {finding.method for finding in report.findings} == {"absence"}, str(report)
    assert {finding.sink for finding in report.findings} == {"feedback weight"}
    assert all("leaks.py:" in finding.where for finding in report.findings), str(report)


@pytest.mark.parametrize("leak", ["cast-kept-from-forward", "by-a-hook"])
def test_the_layer_whose_weight_is_transported_is_named(leak):
    assert {finding.layer for finding in LEAKS[leak]().audit().findings} == {"2"}


# of the other two, an untied layer's delta is what differs first
NAMED = [name for name in leaks.UNNAMED if name not in ("product-expanded", "product-solved")]


@pytest.mark.filterwarnings("ignore::feedbackpath.UnconvertedLayerWarning")
@pytest.mark.parametrize("name", fast_and_slow(NAMED, {"weight-in-buffer", "head-outside"}))
def test_weights_that_are_no_matrix_of_the_model_are_named(name):
    named = {
        "weight-in-buffer": "middle", "flat-parameter": "flat",
        "list-of-layers": "Linear.weight, outside the model",
        "dictionary-of-tensors": "a parameter of shape [8, 8], in no module",
        "head-outside": "Linear.weight, outside the model",
        "raw-head-outside": "parameter 4 of an optimizer, in no model",
        "tensors-outside": "a tensor that requires a gradient of shape [3, 3], in no module",
    }.get(name, "flat")  # fmt: skip
    assert {finding.layer for finding in LEAKS[name]().audit().findings} == {named}


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (leaks.WithBuffer, "'middle' (buffer in a product)"),
        (leaks.WithFlat, "'flat' (flat parameter)"),
        (leaks.WithList, "'layers' (layers in a plain list)"),
        (leaks.WithDictOfTensors, "'weights' (layers in a plain dict)"),
    ],
)
def test_strict_untie_names_them_too(model, named):
    with pytest.raises(fp.UntieError, match=re.escape(named)):
        fp.untie(model(), "fa", strict=True)
    fp.untie(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), "fa", strict=True)


RULE_OF = {name: ("fa", "kp")[number % 2] for number, name in enumerate(CLEAN)}


@pytest.mark.parametrize("name", fast_and_slow(CLEAN, CLEAN_FIRST))
def test_clean_steps_pass(name):
    report = CLEAN[name](RULE_OF[name]).audit()
    assert report.transport_free is True, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLEAN)
def test_clean_steps_pass_under_the_other_rule(name):
    report = CLEAN[name]({"fa": "kp", "kp": "fa"}[RULE_OF[name]]).audit(steps=3)
    assert report.transport_free is True, str(report)


@pytest.mark.parametrize("name", ["flattened", "sam"])
def test_the_mirror_passes_where_an_update_gives_weights_another_memory(name):
    assert CLEAN[name]("wm").audit().transport_free


def test_probes_are_counted():
    assert "W read by 8 noise probes a step" in CLEAN["read-by-one-hot"]("fa").audit().verdict
    assert "W read by 32 noise probes a step" in CLEAN["read-by-noise"]("fa").audit().verdict


def test_a_pass_that_an_error_ends_is_noted():
    report = CLEAN["logs-logarithm"]("fa").audit()
    assert report.transport_free
    (note,) = report.notes
    assert note.startswith("with zeros for W: ValueError")


def grow_until_large(task):
    while task.model[2].weight.norm() < 0.1:
        task.model[2].weight.mul_(1.1)


def grow_and_fail_at_an_end_from_outside(task):
    try:
        grow_until_large(task)
    except BaseException:  # as when it comes while torch enters or leaves one of its modes
        raise RuntimeError("trying to pop from empty mode stack") from None


def grow_and_spoil_the_modes_at_an_end_from_outside(task):
    try:
        grow_until_large(task)
    except BaseException:
        while True:
            _pop_mode()  # ends with the error above


def grow_and_miss_the_first_end_from_outside(task):
    try:
        grow_until_large(task)
    except EndlessStep:  # as when it comes in a finalizer, whose errors Python ignores
        grow_until_large(task)


@pytest.mark.usefixtures("forking")
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(
    "grow",
    [
        grow_until_large,
        grow_and_fail_at_an_end_from_outside,
        grow_and_spoil_the_modes_at_an_end_from_outside,
        grow_and_miss_the_first_end_from_outside,
    ],
)
def test_a_loop_that_never_ends_without_w_is_ended(grow, num_threads, monkeypatch):
    monkeypatch.setattr(passes, "PATIENCE", (1.0, 0.0))
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        report = Task("fa", before=grow).audit()
    finally:
        torch.set_num_threads(before)
    assert report.transport_free
    assert report.notes == ("with zeros for W: EndlessStep: it does not end",)


def test_a_rare_branch_takes_as_many_steps_to_see():
    report = LEAKS["rare-branch"]().audit(steps=1)
    assert (report.transport_free, report.verdict) == (True, "transport-free in the 1 step watched")
    assert LEAKS["rare-branch"]().audit(steps=3).transport_free is False


def test_signs_are_told_from_weights():
    report = Task("ss").audit()
    assert {finding.what for finding in report.findings} == {"sign"}
    assert report.verdict == "transports weights: their signs, 1 bit each"
    assert "1 bit per weight" in str(report.findings[0])


# In a fresh process


@pytest.mark.parametrize(
    ("name", "is_free"),
    [
        ("cached", False),
        *(
            pytest.param(name, is_free, marks=pytest.mark.slow)
            for name, is_free in (
                ("mirrored_first", True),
                ("clean_fa", True), ("clean_kp", True), ("clean_wm", True), ("copied_at_the_start", False),
                ("signs", False),
            )
        ),
    ],
)  # fmt: skip
def test_steps_that_are_built_in_a_fresh_process(name, is_free):
    report = fp.audit(build=getattr(built_steps, name))
    assert report.transport_free is is_free, str(report)
    assert "absent from the making of the model on" in str(report)
    if name == "copied_at_the_start":
        places = {finding.where.rpartition("/")[2].split(":")[0] for finding in report.findings}
        assert places == {"build", "built_steps.py"}  # B began as W did, and is made of it


def test_only_a_fresh_process_sees_what_was_kept_before():
    step, path = built_steps.cached()
    step()
    step()  # what is kept is no longer what W is
    report = fp.audit(step, path)
    assert report.transport_free
    assert "from now on (what it made before is not covered)" in str(report)


@pytest.mark.slow
def test_what_is_built_gets_advice_of_its_own():
    report = fp.audit(build=built_steps.set_anew)
    assert report.transport_free is None
    assert report.verdict.endswith("let the step update W itself, or write it by copy_"), report.verdict


def test_what_cannot_be_built_is_refused():
    with pytest.raises(fp.AuditError, match="another process can import"):
        fp.audit(build=lambda: None)
    with pytest.raises(fp.AuditError, match="not both"):
        fp.audit(lambda: None, build=built_steps.cached)
    with pytest.raises(fp.AuditError, match="which returns them"):
        fp.audit()


# Not settled


def test_steps_that_cannot_be_repeated_are_not_settled():
    task = Task(
        "kp", before=lambda task: torch.manual_seed(time.perf_counter_ns()), after_update=leaks.add_noise
    )
    report = task.audit()
    assert report.transport_free is None
    assert report.verdict.startswith("not settled: repeated with W unchanged")
    assert "build=" in report.verdict


def test_steps_that_stop_without_w_are_not_settled():
    def stop(task):
        if task.model[2].weight.flatten()[largest] <= 0:
            raise RuntimeError("W is strange")

    task = Task(before=stop)
    largest = task.model[2].weight.argmax()
    report = task.audit()
    assert report.transport_free is None
    assert "no pass without W came to its end" in report.verdict
    assert "W is strange" in report.verdict


@pytest.mark.parametrize("place", fast_and_slow(("numpy", "list", "one-tensor", "memory"), {"memory"}))
def test_weights_that_come_back_are_absent_too_but_past_pytorch(place):
    """Copies of W that are no tensors of W's size are found when they become some, if that shows."""
    task = Task("kp")
    w, b = leaks.first_pair(task)
    kept = {
        "numpy": w.detach().numpy().copy(), "memory": w.detach().numpy().copy(), "list": w.tolist(),
        "one-tensor": torch.cat([w.detach().flatten(), torch.zeros(9)]),
    }[place]  # fmt: skip

    def step():
        task.step()
        with torch.no_grad():
            if place == "memory":
                w.data.numpy()[:] = kept
            else:
                w.copy_(kept[:48].view(8, 6) if place == "one-tensor" else torch.as_tensor(kept))
            b.lerp_(w, 0.1)

    report = fp.audit(step, task.path)
    assert report.transport_free is (None if place == "memory" else False), str(report)
    if place == "memory":
        assert "W of '0' comes back while the step runs" in report.verdict


@pytest.mark.parametrize(
    ("unsettled", "is_found", "code"), [("", False, 0), ("", True, 4), ("why", False, 5)]
)
def test_the_command_exits_by_the_verdict(unsettled, is_found, code, monkeypatch):
    finding = Finding("2", "weight", "delta", "aten.mm", "file.py:1", "provenance", 8)
    report = fp.Report((finding,) * is_found, {}, {}, {}, unsettled=unsettled)
    monkeypatch.setattr("feedbackpath.jobs.audit.audit_run", lambda settings: report)
    with pytest.raises(SystemExit) as ended:
        cli.main(["audit", "--rule", "kp"])
    assert ended.value.code == code


def test_a_step_that_ends_its_process_is_not_settled(forking):
    report = Task(after_update=lambda task: os._exit(3)).audit()
    assert report.transport_free is None
    assert "exit code" in report.verdict


# Where no process can be forked


@pytest.fixture
def in_one_process(monkeypatch):
    monkeypatch.setattr("feedbackpath.auditing.passes.can_fork", lambda: False)


IN_ONE = ("numpy-before", "relay-buffer", "by-a-hook", "scale-of-layernorm")


@pytest.mark.parametrize("leak", fast_and_slow(IN_ONE, {"relay-buffer", "by-a-hook"}))
def test_leaks_are_found_in_one_process(leak, in_one_process):
    assert LEAKS[leak]().audit(steps=3).transport_free is False


@pytest.mark.parametrize(
    "name", fast_and_slow(("sam", "in-one-memory", "checkpointed", "batchnorm"), {"sam", "batchnorm"})
)
def test_clean_steps_pass_in_one_process_and_leave_all_as_it_was(name, in_one_process):
    task = CLEAN[name]("kp")
    before, random = copy.deepcopy(state_of(task)), torch.get_rng_state()
    assert task.audit().transport_free
    assert_same(state_of(task), before)
    assert torch.equal(torch.get_rng_state(), random)


def test_a_fresh_minibatch_is_not_settled_in_one_process(in_one_process):
    report = CLEAN["counter-and-minibatches"]("kp").audit()
    assert report.transport_free is None
    assert "fixed minibatch" in report.verdict


def test_a_copy_in_the_first_pass_alone_is_not_settled_in_one_process(in_one_process):
    times = []

    def copy_once(task):
        times.append(1)
        if len(times) == 2:
            task.model[2].feedback.copy_(task.model[2].weight)

    assert Task(after_update=copy_once).audit().transport_free is None


def test_equal_weights_of_two_layers_are_told_apart():
    model = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(6, 6), nn.ReLU())], nn.Linear(6, 3))
    for layer in model[2:8:2]:
        layer.load_state_dict(model[0].state_dict())
    task = Task("kp", model=model, after_update=lambda task: task.model[0].weight.norm().item())
    assert task.audit().transport_free


def test_threads_of_ones_own_keep_the_audit_in_one_process():
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        report = Task("kp").audit()
        assert report.transport_free
        assert report.notes == (
            "no process could be forked: what the step keeps in other objects is not put back",
        )
    finally:
        end.set()
        thread.join()


def in_a_thread(run):
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


def in_a_pool(run):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result()


@pytest.mark.parametrize("run", [in_a_thread, in_a_pool])
def test_a_step_that_trains_in_a_thread_is_not_settled(run):
    task = Task("kp")
    report = fp.audit(lambda: run(task.step), task.path)
    assert report.transport_free is None
    assert "'0' runs in another thread" in report.verdict
    task = Task("bp")
    assert fp.audit(lambda: run(task.step), task.path).transport_free is False


def test_data_may_be_made_in_a_thread():
    task, augment = Task("kp"), nn.Dropout(0.1)
    batches = [task.x]
    task.before = lambda task: in_a_thread(lambda: batches.append(augment(batches[-1])))
    report = task.audit()
    assert report.transport_free, str(report)


# Everything is left as it was


@pytest.mark.parametrize("is_forked", [True, False])
def test_files_are_put_back(is_forked, tmp_path, monkeypatch):
    monkeypatch.setattr("feedbackpath.auditing.passes.can_fork", lambda: is_forked)
    task = Task("kp", after_update=write_log)
    task.place = tmp_path / "log"
    task.place.write_text("begun\n")

    def step():
        task.step()
        torch.save(task.x, tmp_path / "new.pt")
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / "file").write_text("x")
        task.place.rename(tmp_path / "moved")
        (tmp_path / "moved").rename(task.place)

    assert fp.audit(step, task.path).transport_free
    assert task.place.read_text() == "begun\n"
    assert list(tmp_path.iterdir()) == [task.place]


def test_a_file_that_is_open_already_is_left_alone(tmp_path):
    place = tmp_path / "log"
    with place.open("w") as file:
        file.write("begun\n")
        file.flush()

        def write(task):
            file.write(f"{task.model[0].weight.norm():.4f}\n")
            file.flush()

        assert Task("kp", after_update=write).audit().transport_free
        file.write("ended\n")
    assert place.read_text() == "begun\nended\n"


@pytest.mark.parametrize("buffering", [-1, 0])
@pytest.mark.parametrize("mode", ["rb", "r+b"])
def test_data_may_come_from_a_file_that_is_open_already(mode, buffering, tmp_path):
    place = tmp_path / "data"
    torch.randn(9, 16, 6).numpy().tofile(place)
    with place.open(mode, buffering) as file:

        def read(task):
            task.x = torch.frombuffer(bytearray(file.read(16 * 6 * 4)), dtype=torch.float32).view(16, 6)

        assert Task("kp", before=read).audit().transport_free
        assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == 0
        assert file.read() == place.read_bytes()


@pytest.mark.parametrize("is_forked", [True, False])
def test_an_interrupt_leaves_everything_as_it_was(is_forked, tmp_path, monkeypatch, request):
    monkeypatch.setattr("feedbackpath.auditing.passes.can_fork", lambda: is_forked)
    task = Task("kp", after_update=write_log)
    task.place = tmp_path / "log"
    before = copy.deepcopy(state_of(task))
    parent = os.getpid()
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, usual))

    def step():
        task.step()
        os.kill(parent, signal.SIGINT)
        time.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        fp.audit(step, task.path)
    assert_same(state_of(task), before)
    assert not list(tmp_path.iterdir())
    assert all(layer.untied.taps == () for layer in task.path.layers.values())


# Layers


LAYERS = {
    "zoo": lambda: make_zoo(dtype=torch.float32),
    "gru": lambda: nn.Sequential(nn.Linear(6, 12), First(nn.GRU(12, 5, num_layers=2, bidirectional=True))),
    "rnn": lambda: nn.Sequential(nn.Linear(6, 12), First(nn.RNN(12, 5))),
    "encoder": lambda: nn.Sequential(nn.Linear(6, 12), nn.TransformerEncoderLayer(12, 2, 16, dropout=0.1)),
    "conv2d": lambda: nn.Sequential(
        nn.Unflatten(0, (3, 1)), nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(4, 2, 3),
        nn.ReLU(), nn.Conv2d(2, 4, 3, groups=2, padding_mode="reflect", padding=1),
    ),
    "conv3d": lambda: nn.Sequential(
        nn.Unflatten(2, (1, 2, 3)), nn.Conv3d(4, 4, (1, 1, 3), padding="same"), nn.ReLU(), nn.Conv3d(4, 2, 1)
    ),
    "cells": lambda: nn.Sequential(nn.Flatten(0, 1), nn.Linear(6, 5), nn.GRUCell(5, 4), nn.Linear(4, 3)),
    "embedding": lambda: nn.Sequential(
        Rounded(), nn.Embedding(9, 6), nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3)
    ),
    "product-and-sum": lambda: nn.Sequential(nn.Linear(6, 5), BySum(5, 4), nn.Linear(4, 2)),
}  # fmt: skip


class First(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)[0]


class Rounded(nn.Module):
    def forward(self, x):
        return x.mul(2).round().long().clamp(-4, 4) + 4


class BySum(nn.Module):
    """A dense layer, written as a product and a sum."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(n_out, n_in))

    def forward(self, x):
        return (x.unsqueeze(-2) * self.kernel).sum(-1)


def step_on(model, path, x):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-2)

    def step():
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()
        path.step()

    return step


@pytest.mark.filterwarnings("ignore::feedbackpath.KolenPollackWarning")
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rule", ["kp", pytest.param("fa", marks=pytest.mark.slow)])
def test_every_kind_of_layer_passes(kind, rule):
    torch.manual_seed(0)
    model = LAYERS[kind]()
    path = fp.untie(model, rule)
    report = fp.audit(step_on(model, path, zoo_input(torch.float32)), path)
    assert report.transport_free, str(report)


@pytest.mark.parametrize("kind", fast_and_slow(LAYERS, {"zoo", "gru"}))
def test_no_kind_of_layer_passes_with_backprop(kind):
    torch.manual_seed(0)
    model = LAYERS[kind]()
    path = fp.untie(model, "bp")
    assert fp.audit(step_on(model, path, zoo_input(torch.float32)), path).transport_free is False


@pytest.mark.parametrize(
    ("send_back", "is_free"),
    [(fp.Broadcast(), True), (fp.Target(lambda weight, y: y @ weight.feedback), True)],
)
def test_broadcast_and_target_rules_pass(send_back, is_free):
    class Own(fp.Rule):
        name = "own"

    Own.send_back = send_back
    path_of = Whole(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), Own())
    path_of.step()
    report = path_of.audit()
    assert report.transport_free is is_free, str(report)


@pytest.mark.parametrize("rule", [*FREE, "bp", "ss"])
def test_everything_is_left_as_it_was(rule):
    task = Task(rule)
    for _ in range(2):
        task.step()
    twin = copy.deepcopy(state_of(task))
    random = torch.get_rng_state()
    taps = [layer.untied.taps for layer in task.path.layers.values()]
    task.audit()
    assert_same(state_of(task), twin)
    assert torch.equal(torch.get_rng_state(), random)
    assert [layer.untied.taps for layer in task.path.layers.values()] == taps


def test_training_goes_on_as_if_there_had_been_no_audit():
    audited, other = Task("wm"), Task("wm")
    audited.audit()
    for _ in range(4):
        audited.step()
        other.step()
    assert_same(state_of(audited), state_of(other))


@pytest.mark.parametrize("rule", fast_and_slow(FREE, {"kp", "wm"}))
def test_batchnorms_scale_is_declared(rule):
    torch.manual_seed(0)
    model = build_model("resnet8", sample_shape=(1, 16, 16), num_classes=4)
    path = fp.untie(model, rule_that_starts_at_once(rule))
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
    assert report.verdict.startswith(
        f"transport-free in the 1 step watched, except: BatchNorm scale ({channels} scalars)"
    )
    assert report.crossings["conv1"].deltas == 4 * 16 * 16 * 16
    assert set(report.crossings) == {weight.name for weight in path.weights}


@pytest.mark.parametrize("rule", ["fa", "kp"])
def test_the_scale_of_weight_norm_is_a_transport(rule):
    task = Task(rule)
    task.path.retie()
    parametrizations.weight_norm(task.model[2])
    task.path = fp.untie(task.model, rule)
    task.optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
    report = task.audit()
    assert report.transport_free is False, str(report)
    assert {finding.sink for finding in report.findings} >= {"delta"}


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
        assert report.verdict.endswith("except: LayerNorm weight (512 scalars)")


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
    assert report.transport_free, str(report)


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
    assert report.transport_free, str(report)


@pytest.mark.usefixtures("forking")
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
    assert report.transport_free, str(report)
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
    assert report.transport_free, str(report)
    assert scheduler.last_epoch == 0
    assert int(average.n_averaged) == 0


def test_steps_that_train_nothing_are_refused():
    task = Task("kp")
    with pytest.raises(fp.AuditError, match="no delta"):
        fp.audit(lambda: None, task.path)
    with pytest.raises(fp.AuditError, match="at least one"):
        task.audit(steps=0)


def test_a_step_that_ties_its_layers_again_is_refused():
    task = Task("kp", after_update=lambda task: task.path.retie())
    with pytest.raises(fp.AuditError, match="the step ties '0' again"):
        task.audit()


def test_a_model_in_shared_memory_is_left_as_it_was():
    task = Task("kp")
    task.model.share_memory()
    before = copy.deepcopy(state_of(task))
    assert task.audit().transport_free
    assert_same(state_of(task), before)


def test_an_error_of_the_steps_own_is_raised_where_b_is_w_too():
    task = Task("bp")

    def step():
        raise ValueError("no data")

    with pytest.raises(ValueError, match="no data"):
        fp.audit(step, task.path)


def test_a_failing_step_leaves_everything_as_it_was():
    task = Task("kp")
    before = copy.deepcopy(state_of(task))

    def step():
        task.step()
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fp.audit(step, task.path)
    assert_same(state_of(task), before)


@pytest.mark.parametrize("is_forked", [True, False])
def test_an_audit_keeps_nothing_alive_that_it_has_looked_at(is_forked, monkeypatch, request):
    monkeypatch.setattr("feedbackpath.auditing.passes.can_fork", lambda: is_forked)

    class Thing:
        pass

    thing, task = Thing(), Task("kp")
    gone = weakref.ref(thing)
    gc.disable()
    request.addfinalizer(gc.enable)
    assert task.audit().transport_free
    del thing
    assert gone() is None


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


def test_an_unmarked_product_is_no_reading():
    class Unmarked(OwnMirror):
        @torch.no_grad()
        def step(self, weights, context):
            for weight in weights:
                noise = torch.randn(64, weight.fan_in, generator=context.generator(weight, "noise"))
                weight.feedback.copy_((noise @ weight.weight.T).T @ noise / len(noise))

    assert Task(Unmarked(None)).audit().transport_free is False
    marked = Task(OwnMirror(lambda weight, noise: noise @ weight.weight.T)).audit()
    assert marked.transport_free
    assert marked.verdict.endswith("W read by 64 noise probes a step")


TABLE = re.compile(r"^\| ([^|]+) \| `([^|]+)` \| `([^|]+)` \| ([a-z -]+) \|$", re.MULTILINE)
PAGE = (Path(__file__).parents[1] / "docs" / "audit.md").read_text(encoding="utf-8")
ROWS = TABLE.findall(PAGE[PAGE.index("## Kinds of steps") :])


@pytest.mark.parametrize(
    ("kind", "begin", "end", "verdict"),
    [
        pytest.param(*row, id=row[0], marks=[pytest.mark.slow] * (number % 3 > 0))
        for number, row in enumerate(ROWS)
    ],
)
def test_the_table_of_kinds_is_right(kind, begin, end, verdict, forking, tmp_path, monkeypatch):
    """Each row has a line that runs when a step begins, and one that runs when it ends."""
    monkeypatch.chdir(tmp_path)
    task = Task("kp")
    w, b = task.model[2].weight, task.model[2].feedback
    names = {
        "torch": torch, "fp": fp, "os": os, "model": task.model, "path": task.path, "w": w, "b": b,
        "layer": task.model[2], "task": task, "optimizer": task.optimizer, "notes": {},
        "batches": iter(range(99)), "kept": w.detach().numpy().copy(),
    }  # fmt: skip

    def step():
        with torch.no_grad():
            exec(begin, names)
        task.step()
        with torch.no_grad():
            exec(end, names)

    report = fp.audit(step, task.path, steps=3)
    expected = {"transports": False, "transport-free": True, "not settled": None}[verdict]
    assert report.transport_free is expected, str(report)


def test_the_table_is_read():
    assert len(ROWS) >= 16
    assert {verdict for *_, verdict in ROWS} == {"transports", "transport-free", "not settled"}
