"""What the core takes from inside PyTorch: where a name is missing, its fallback gives the same gradients."""

import ast
import copy
from pathlib import Path

import pytest
import torch
from problems import CONVNET, MLP, by_id
from torch import nn
from torch.func import grad
from torch.utils.checkpoint import CheckpointError, checkpoint
from zoo import ZooWithoutRecurrence, difference, gradients, let_feedback_be_weights, make_zoo, zoo_input

import feedbackpath as fp
from feedbackpath.core import pytorch

# What is put in the place of names of ``feedbackpath.core.pytorch``, as it is where PyTorch lacks them.
FALLBACKS = {
    "_C._autograd._top_saved_tensors_default_hooks": {"_top_hooks": None},
    "_C._are_functorch_transforms_active": {"_transforms": None},
    "_lazy_clone": {"_lazy_clone": None},
    "_C._current_graph_task_id": {"_graph_task": None},
    "_version": {"version_of": lambda tensor: 0},
    "autograd.Variable._execution_engine": {"_engine": None},
}
FALLBACKS["all"] = {name: other for others in FALLBACKS.values() for name, other in others.items()}


# Without these it cannot be told that checkpointing runs a layer again.
CANNOT_TELL = {"_C._autograd._top_saved_tensors_default_hooks", "_C._current_graph_task_id", "all"}


@pytest.fixture(params=FALLBACKS)
def lacking(request, monkeypatch):
    """A PyTorch that lacks one of the names, or all of them."""
    for name, other in FALLBACKS[request.param].items():
        monkeypatch.setattr(pytorch, name, other)
    return request.param


def test_this_pytorch_has_them_all_and_each_has_its_fallback_here():
    tree = ast.parse(Path(pytorch.__file__).read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found = {
        ast.literal_eval(call.args[0])
        for call in calls
        if getattr(call.func, "id", getattr(call.func, "attr", "")) in ("_find", "attrgetter")
    }
    assert found == FALLBACKS.keys() - {"all"}
    assert all(pytorch._find(name) is not None for name in found - {"_version"})
    assert pytorch._find("_C.no.such_thing") is None


def untied(problem, rule):
    torch.manual_seed(1)
    model = problem.build()
    return model, fp.untie(model, rule)


def without_feedback(found):
    return {name: gradient for name, gradient in found.items() if "feedback" not in name}


@pytest.mark.parametrize("problem", [MLP, CONVNET], ids=by_id)
@pytest.mark.parametrize("rule", ["fa", "kp"])
def test_gradients_are_the_same(lacking, rule, problem):
    expected = problem.gradients(problem.build())
    model, path = untied(problem, rule)
    random = problem.gradients(model)
    assert difference(random["input0"], expected["input0"]) > 0.3
    for _, weight, feedback in path.pairs():
        feedback.data.copy_(weight.data)
    ours = problem.gradients(model)
    for name, gradient in without_feedback(ours).items():
        assert torch.equal(gradient, expected[name]), name
    if rule == "kp":
        names = {id(p): name for name, p in model.named_parameters()}
        for _, weight, feedback in path.pairs():
            assert torch.equal(ours[names[id(weight)]], ours[names[id(feedback)]])


@pytest.mark.parametrize("rule", ["fa", "kp"])
def test_gradients_of_everything_that_reads_a_weight_are_the_same(lacking, rule):
    _, expected = gradients(make_zoo(), zoo_input())
    model = make_zoo()
    path = fp.untie(model, rule, overrides={"head": "fa"})
    _, random = gradients(model, zoo_input())
    assert difference(random["x"], expected["x"]) > 0.3
    let_feedback_be_weights(path)
    _, ours = gradients(model, zoo_input())
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    for name, weight, feedback in path.pairs():
        assert (rule == "fa" or name == "head") or torch.equal(weight.grad, feedback.grad), name


def ways_of_running(model):
    """Yield ways of running a model that have hooks of their own in force, or run it again."""

    def on_cpu(x):
        with torch.autograd.graph.save_on_cpu():
            return model(x)

    yield "save_on_cpu", on_cpu
    for reentrant in (False, True):
        yield f"checkpoint {reentrant}", lambda x, r=reentrant: checkpoint(model, x, use_reentrant=r)


@pytest.mark.parametrize("rule", ["fa", "kp"])
def test_gradients_under_other_hooks_are_the_same(lacking, rule):
    model = make_zoo()
    fp.untie(model, rule, overrides={"head": "fa"})
    _, expected = gradients(model, zoo_input())
    for way, run in ways_of_running(model):
        _, found = gradients(model, zoo_input(), run)
        assert found.keys() == expected.keys(), way
        assert all(torch.equal(found[name], expected[name]) for name in expected), way


class Direct(fp.Rule):
    """Direct feedback alignment."""

    name = "direct"
    send_back = fp.Broadcast()


def test_broadcast_gradients_inside_checkpointing_are_the_same(lacking):
    """The layers run again in the backward pass, where nothing is to be broadcast."""

    class Checkpointed(nn.Module):
        is_checkpointed = False

        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 3), nn.Linear(3, 3)
            self.middle = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh())

        def forward(self, x):
            h = self.first(x).tanh()
            if self.is_checkpointed:
                return self.last(checkpoint(self.middle, h, use_reentrant=False))
            return self.last(self.middle(h))

    model = Checkpointed().double()
    fp.untie(model, Direct())
    x = torch.randn(5, 6, dtype=torch.float64)
    _, expected = gradients(model, x)
    model.is_checkpointed = True
    if (
        lacking in CANNOT_TELL
    ):  # that the layers run again: it is said, by torch or by us, and no error is lost
        with pytest.raises((fp.RuleError, CheckpointError)):
            gradients(model, x)
        return
    _, found = gradients(model, x)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("rule", ["fa", "kp"])
def test_transforms_go_through_feedback_or_are_refused(lacking, rule):
    """Never back through W in silence."""
    model = make_zoo(ZooWithoutRecurrence)
    fp.untie(model, rule, overrides={"head": "fa"})
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    _, expected = gradients(model, x)
    through_feedback = grad(lambda x: model(x).square().sum())
    if pytorch._transforms is None:
        with pytest.raises(RuntimeError):
            through_feedback(x)
    else:
        torch.testing.assert_close(through_feedback(x), expected["x"])


@pytest.mark.parametrize("rule", ["fa", "kp"])
def test_training_is_the_same(rule, monkeypatch):
    def train():
        model, path = untied(MLP, rule)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        for step in range(5):
            optimizer.zero_grad()
            model(torch.full((4, 6), 0.1 * step, dtype=torch.float64)).square().sum().backward()
            path.clip_grad_norm_(0.5)
            optimizer.step()
            path.step()
        return copy.deepcopy(model.state_dict())

    expected = train()
    for name, other in FALLBACKS["all"].items():
        monkeypatch.setattr(pytorch, name, other)
    found = train()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_change_between_forward_and_backward_goes_unnoticed_without_versions(monkeypatch):
    """The fallback's price, as it is documented."""
    model = nn.LSTM(6, 3)
    fp.untie(model, "fa")

    def change_between():
        loss = model(torch.randn(2, 6, requires_grad=True))[0].sum()
        with torch.no_grad():
            model.weight_ih_l0_feedback.mul_(2.0)
        loss.backward()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        change_between()
    monkeypatch.setattr(pytorch, "version_of", lambda tensor: 0)
    change_between()


def test_a_forward_pass_that_fails_leaves_no_hooks_in_force(lacking):
    for model in (nn.Linear(6, 3), nn.LSTM(6, 3)):
        fp.untie(model, "fa")
        with pytest.raises((RuntimeError, ValueError)):
            model(torch.randn(2, 7))
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_what_is_shared_is_written_to_apart(lacking):
    gradient = torch.arange(6.0)
    with torch.no_grad():
        shared = pytorch.share(gradient)
    assert shared is not gradient
    shared.add_(1.0)
    assert torch.equal(gradient, torch.arange(6.0))
    gradient.mul_(3.0)
    assert torch.equal(shared, torch.arange(6.0) + 1.0)


def test_what_waits_for_a_backward_pass_is_called_once_or_nothing_waits(lacking):
    """Where nothing can wait for W's average, B is averaged between devices by itself."""
    model = nn.Linear(3, 2)
    fp.untie(model, "kp")
    assert hasattr(model, "_ddp_params_and_buffers_to_ignore") == pytorch.can_wait()
    if not pytorch.can_wait():
        return
    calls = []
    x = torch.ones(3, requires_grad=True)
    y = 2 * x
    y.register_hook(lambda _: pytorch.after_backward(lambda: calls.append(x.grad is not None)))
    y.sum().backward()
    assert calls == [True]


def test_random_numbers_are_drawn_once_more_and_go_on():
    torch.manual_seed(3)
    like = torch.zeros(4)
    state = pytorch.random_state(like)
    first = torch.rand(4)
    with pytorch.random_numbers_from(state, like):
        again = torch.rand(4)
    following = torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(torch.stack([first, following]), torch.stack([torch.rand(4), torch.rand(4)]))
    assert torch.equal(first, again)
