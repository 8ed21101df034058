"""The exact read-out: its shortcut equals the long way wherever it is taken, and is taken nowhere else."""

import copy

import pytest
import torch
from problems import KINDS, PLAIN_LAYERS, by_id
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import feedbackpath as fp
from feedbackpath.mirror import MirrorMode, mode
from feedbackpath.mirror.activations import odd_slope
from feedbackpath.mirror.mode import fire
from feedbackpath.mirror.shortcut import can_read_out, read_out

ODD = [nn.ReLU(), nn.LeakyReLU(0.3), nn.GELU(), nn.SiLU(), nn.Identity()]


def untie_alone(layer, activation, **settings):
    path = fp.untie(nn.Sequential(layer, activation), fp.ExactMirror(fp.Mirror.exact(**settings)))
    return path, path.weights[0]


def is_short(path):
    weight, rule = path.weights[0], path.rules["0"]
    path.context.part(MirrorMode).find_activations(path.weights)
    activation = path.context.part(MirrorMode).activations["0"]
    return can_read_out(weight, activation, odd_slope(activation), rule.mirror)


@pytest.fixture
def runs(monkeypatch):
    """Count the passes that run a layer."""
    fired = []
    monkeypatch.setattr(mode, "estimate", lambda *a, run=mode.estimate: fired.append(1) or run(*a))
    return fired


@pytest.mark.parametrize("sigma", [0.01, 1.0])
@pytest.mark.parametrize("activation", ODD, ids=str)
@pytest.mark.parametrize("problem", KINDS, ids=by_id)
def test_the_shortcut_is_the_long_way_to_rounding_wherever_it_is_taken(problem, activation, sigma):
    path, weight = untie_alone(problem.build(), activation, sigma=sigma)
    assert is_short(path)
    found = fire(path.context.part(MirrorMode), weight, path.rules["0"].mirror).at_gain_one()
    read_out(weight)
    torch.testing.assert_close(weight.feedback.detach(), found, rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("problem", PLAIN_LAYERS, ids=by_id)
def test_the_read_out_is_the_weight_itself(problem):
    path, weight = untie_alone(problem.build(torch.float32), nn.ReLU())
    path.step()
    assert torch.equal(weight.feedback, weight.weight)


def test_no_layer_runs_where_nothing_stands_between(runs):
    path, weight = untie_alone(nn.Linear(30, 20), nn.ReLU())
    for _ in range(3):
        nn.init.normal_(weight.weight)
        path.step()
        torch.testing.assert_close(weight.feedback, weight.weight)
    assert not runs


class Watched(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class OwnLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 1.0


def hook_layer(path):
    path.weights[0].layer.register_forward_hook(lambda *args: None)


def hook_activation(path):
    path.model[1].register_forward_hook(lambda *args: None)


def hook_input(path):
    path.weights[0].layer.register_forward_pre_hook(lambda *args: None)


@pytest.mark.parametrize("between", [hook_layer, hook_input, hook_activation])
def test_the_layer_runs_where_a_hook_stands_between(between, runs):
    path, weight = untie_alone(nn.Linear(30, 20), nn.ReLU())
    between(path)
    path.step()
    assert runs
    assert path.matrix_angles()["0"] < 1e-3


@pytest.mark.parametrize(
    "context",
    [Watched, Dispatched, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["function mode", "dispatch mode", "autocast"],
)
def test_the_layer_runs_where_operations_are_watched_or_cast(context, runs):
    path, _ = untie_alone(nn.Linear(30, 20), nn.ReLU())
    with context():
        path.step()
    assert runs


def test_the_layer_runs_under_a_hook_on_all_modules(runs):
    path, _ = untie_alone(nn.Linear(30, 20), nn.ReLU())
    handle = register_module_forward_hook(lambda *args: None)
    try:
        path.step()
    finally:
        handle.remove()
    assert runs


@pytest.mark.parametrize(
    ("layer", "activation", "settings"),
    [
        (nn.Linear, nn.ReLU(), {"block_bias": False}),
        (nn.Linear, nn.ReLU(), {"rates": "push-pull"}),
        (nn.Linear, nn.ReLU(), {"rates": "baseline"}),
        (nn.Linear, nn.ReLU(), {"reading": "inside"}),
        (nn.Linear, nn.ReLU(), {"noise": "hadamard"}),
        (nn.Linear, nn.ReLU(), {"noise": "gaussian"}),
        (nn.Linear, nn.Tanh(), {}),
        (nn.Linear, nn.PReLU(), {}),
        (nn.Linear, nn.LeakyReLU(-1.0), {}),
        (OwnLinear, nn.ReLU(), {}),
    ],
    ids=str,
)
def test_the_layer_runs_where_more_than_the_drive_counts(layer, activation, settings):
    path, _ = untie_alone(layer(30, 20), activation, **settings)
    assert not is_short(path)


def test_the_layer_runs_where_a_bias_is_a_buffer_or_an_activation_has_a_forward_of_its_own():
    layer = nn.Linear(6, 4)
    bias = layer.bias.data
    del layer.bias
    layer.register_buffer("bias", bias)
    assert not is_short(untie_alone(layer, nn.ReLU())[0])
    activation = nn.ReLU()
    activation.forward = lambda z: z.relu() / z.abs().mean()
    assert not is_short(untie_alone(nn.Linear(6, 4), activation)[0])


def test_biases_that_are_not_there_need_not_be_blocked():
    path, _ = untie_alone(nn.Linear(6, 4, bias=False), nn.ReLU(), block_bias=False)
    assert is_short(path)


@pytest.mark.parametrize("settings", [{"block_bias": False}, {"rates": "push-pull"}], ids=str)
def test_biases_and_rates_are_worked_out_by_the_layer(settings):
    layer = nn.Linear(30, 20)
    nn.init.constant_(layer.bias, 0.003)
    path, weight = untie_alone(layer, nn.LeakyReLU(0.3), **settings)
    path.mirror()
    # An open bias bends the answers to codes that are as weak; of push and pull it cancels.
    assert path.matrix_angles()["0"] < (1e-3 if "rates" in settings else 10)
    assert path.gains()["0"] == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("name", ["tanh", "softplus", "hardswish"])
def test_weak_codes_are_nearly_exact_behind_smooth_activations(name):
    activation = {"tanh": nn.Tanh(), "softplus": nn.Softplus(), "hardswish": nn.Hardswish()}[name]
    path, _ = untie_alone(nn.Linear(64, 30), activation)
    path.mirror()
    assert path.matrix_angles()["0"] < 0.05
    assert path.gains()["0"] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    "memory",
    [torch.randn(6, 5)[:, :4], torch.randn(25)[1:].view(6, 4), torch.randn(4, 6).t()],
    ids=["padded", "shifted", "transposed"],
)
def test_weights_may_lie_in_memory_as_they_like(memory):
    path, weight = untie_alone(nn.Linear(4, 6), nn.ReLU())
    weight.layer.weight = nn.Parameter(memory)
    path.mirror(2)
    assert torch.equal(weight.feedback, weight.weight)


@pytest.mark.parametrize("move", [
    lambda model: model.double(),
    lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
    lambda model: model.to(memory_format=torch.channels_last),
], ids=["precision", "loading", "order"])  # fmt: skip
@pytest.mark.parametrize("rule", ["wm", "wm-exact"])
def test_weights_may_move(move, rule):
    path = fp.untie(nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU()), rule)
    path.mirror(steps=30)
    move(path.model)
    path.mirror(steps=1)
    assert path.matrix_angles()["0"] < 5
    assert path.weights[0].feedback.dtype == path.weights[0].weight.dtype


def test_a_weight_that_was_pruned_for_good_is_read_out_as_it_is():
    path, weight = untie_alone(nn.Linear(30, 20), nn.ReLU())
    prune.l1_unstructured(weight.layer, "weight", 0.5)
    with pytest.raises(fp.UntieError, match="is no parameter any more"):
        path.step()
    prune.remove(weight.layer, "weight")
    path.step()
    assert (weight.feedback.abs() < 1e-6).float().mean() == 0.5
    assert path.matrix_angles()["0"] < 1e-3


def test_a_copied_model_mirrors_its_own_weights():
    for rule in ("wm", "wm-exact"):
        path = fp.untie(nn.Sequential(nn.Linear(30, 20), nn.ReLU()), rule)
        path.mirror(steps=1)
        twin, before = copy.deepcopy(path), path.weights[0].feedback.detach().clone()
        nn.init.normal_(twin.weights[0].weight)
        twin.mirror(steps=40)
        assert twin.matrix_angles()["0"] < 10
        assert torch.equal(path.weights[0].feedback, before)


def test_a_weight_that_blew_up_leaves_nothing_behind():
    path, weight = untie_alone(nn.Linear(5, 3), nn.ReLU())
    good = weight.weight.detach().clone()
    for value in (float("inf"), float("nan")):
        weight.weight.detach().fill_(value)
        path.step()
        weight.weight.detach().copy_(good)
        path.step()
        torch.testing.assert_close(weight.feedback.detach(), good)


@pytest.mark.parametrize("rule", ["wm", "wm-exact"])
def test_mirroring_in_inference_mode_does_not_hinder_the_next(rule):
    path = fp.untie(nn.Sequential(nn.Linear(5, 3), nn.ReLU()), rule)
    with torch.inference_mode():
        path.mirror(3)
    path.mirror(30)
    assert path.matrix_angles()["0"] < 5
