"""Angles and gains against values known or computed in another way, and what measuring leaves alone."""

import copy
import math

import pytest
import reference
import torch
import torch.nn.functional as F
from problems import CONVNET, ENCODER, MLP, PAPER_RULES, Problem, by_id, make_attention, make_shared
from torch import nn

import feedbackpath as fp
from feedbackpath.measure.angles import angle_deg, chance_angle_deg


def make_in_place():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


IN_PLACE = Problem("in_place", make_in_place, ((4, 3, 6, 6),))
MEASURED = [MLP, CONVNET, ENCODER, IN_PLACE, Problem("shared", make_shared, ((5, 6),))]


@pytest.mark.parametrize("degrees", [0.0, 1e-6, 0.01, 30.0, 90.0, 135.0, 180.0])
def test_angles_that_are_known(degrees):
    angle = math.radians(degrees)
    one = torch.tensor([[3.0], [0.0]], dtype=torch.float64)
    other = 7 * torch.tensor([[math.cos(angle)], [math.sin(angle)]], dtype=torch.float64)
    assert angle_deg(one, other) == pytest.approx(degrees, rel=1e-7, abs=1e-12)


@pytest.mark.parametrize("broken", [0.0, float("nan"), float("inf")])
def test_the_angle_with_nothing_is_not_a_number(broken):
    assert math.isnan(angle_deg(torch.ones(3), torch.full((3,), broken)))


def test_matrix_angles_and_gains():
    model = MLP.build()
    path = fp.untie(model, "fa", overrides={"4": "bp"})
    model[0].feedback.data = 0.3 * model[0].weight.data
    model[2].feedback.data = torch.randn_like(model[2].weight)
    w, b = model[2].weight.detach(), model[2].feedback.detach()
    assert path.matrix_angles() == pytest.approx(
        {"0": 0.0, "2": reference.angle_deg(b, w), "4": 0.0}, abs=1e-5
    )
    assert path.gains() == pytest.approx({"0": 0.3, "2": ((b * w).sum() / (w * w).sum()).item(), "4": 1.0})


@pytest.mark.parametrize("problem", MEASURED, ids=by_id)
def test_backprop_is_aligned_with_itself(problem):
    model = problem.build()
    path = fp.untie(model, "bp")
    assert set(path.matrix_angles().values()) == {0.0}
    angles = path.delta_angles(lambda: problem.loss(model, problem.inputs()))
    assert angles.keys() == {weight.name for weight in path.weights}
    assert set(angles.values()) == {0.0}


def output_gradients(problem, model, names):
    """Return dL/d(output) of each named layer, over all the times that it ran; nothing may work in place."""
    outputs = {name: [] for name in names}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: outputs[name].append(output) or output.retain_grad()
        )
    problem.loss(model, problem.inputs()).backward()
    return {name: torch.cat([output.grad.flatten() for output in found]) for name, found in outputs.items()}


def make_out_of_place(module):
    for part in module.modules():
        if isinstance(part, nn.ReLU):
            part.inplace = False
    return module


@pytest.mark.parametrize("problem", [MLP, CONVNET, IN_PLACE, MEASURED[-1]], ids=by_id)
def test_delta_angles_are_those_of_two_separate_networks(problem):
    plain = problem.build()
    model = copy.deepcopy(plain)
    path = fp.untie(model, "fa")
    angles = path.delta_angles(lambda: problem.loss(model, problem.inputs()))
    ours, exact = (
        output_gradients(problem, make_out_of_place(network), path.layers) for network in (model, plain)
    )
    expected = {name: reference.angle_deg(ours[name], exact[name]) for name in ours}
    assert angles == pytest.approx(expected, abs=1e-4)
    *upstream, last = angles.values()
    assert last == pytest.approx(0.0, abs=1e-9)
    assert min(upstream) > 10


def test_delta_angles_of_attention_projections():
    problem = make_attention("three_inputs", ((5, 3, 8), (6, 3, 8), (6, 3, 8)), {"need_weights": False})
    model = problem.build()
    path = fp.untie(model, "fa")
    compute_loss = lambda: problem.loss(model, problem.inputs())  # noqa: E731
    angles = path.delta_angles(compute_loss)
    assert angles.keys() == {weight.name for weight in path.weights}
    assert angles["out_proj"] == pytest.approx(0.0, abs=1e-9)
    assert max(angles.values()) > 20
    for _, weight, feedback in path.pairs():
        feedback.data.copy_(weight)
    assert max(path.delta_angles(compute_loss).values()) < 1e-6


@pytest.mark.parametrize("rule", PAPER_RULES)
@pytest.mark.parametrize("problem", [CONVNET, ENCODER], ids=by_id)
def test_measuring_leaves_everything_as_it_was(problem, rule):
    model = problem.build()
    path = fp.untie(model, rule)
    problem.loss(model, problem.inputs()).backward()
    x, taps = problem.inputs(), [layer.untied.taps for layer in path.layers.values()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    random_state, path_state = torch.random.get_rng_state(), path.state_dict()
    path.delta_angles(lambda: (F.dropout(model(*x)) * torch.rand(1)).square().sum())
    path.matrix_angles()
    path.gains()
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert path.state_dict() == path_state
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, gradients, rtol=0, atol=0)
    assert [layer.untied.taps for layer in path.layers.values()] == taps


def test_a_loss_that_fails_leaves_everything_as_it_was():
    model = CONVNET.build()
    path = fp.untie(model, "fa")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def fail():
        model(*CONVNET.inputs())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        path.delta_angles(fail)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(layer.untied.taps == () for layer in path.layers.values())


@pytest.mark.parametrize("problem", [MLP, CONVNET], ids=by_id)
def test_delta_angles_under_autocast_are_those_of_full_precision(problem):
    model = problem.build(torch.float32)
    path = fp.untie(model, "fa")

    def compute_loss(enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return problem.loss(model, problem.inputs(torch.float32))

    low, full = (path.delta_angles(lambda e=enabled: compute_loss(e)) for enabled in (True, False))
    assert low == pytest.approx(full, abs=3.0)
    assert low["0"] > 10


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_delta_angles_of_a_compiled_model():
    model = MLP.build()
    path = fp.untie(model, "fa")
    compiled = torch.compile(model, backend="aot_eager")
    eager = path.delta_angles(lambda: MLP.loss(model, MLP.inputs()))
    assert path.delta_angles(lambda: MLP.loss(compiled, MLP.inputs())) == eager
    MLP.loss(compiled, MLP.inputs()).backward()
    assert path.delta_angles(lambda: MLP.loss(compiled, MLP.inputs())) == eager
    torch._dynamo.reset()


def test_delta_angles_with_activation_checkpointing():
    model = MLP.build()
    path = fp.untie(model, "fa")
    x = MLP.inputs()[0]
    checkpointed = path.delta_angles(
        lambda: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).square().sum()
    )
    assert checkpointed == pytest.approx(path.delta_angles(lambda: model(x).square().sum()), abs=1e-9)


def test_a_loss_of_another_model_is_refused():
    path, other = fp.untie(MLP.build(), "fa"), MLP.build()
    with pytest.raises(
        fp.UntieError,
        match="compute_loss ran no untied layer of this path .*: let it run the model of this path",
    ):
        path.delta_angles(lambda: other(MLP.inputs()[0]).sum())


def test_another_minibatch_the_second_time_is_refused():
    """The model runs twice; angles between the errors of two minibatches say nothing."""
    model = MLP.build()
    path = fp.untie(model, "fa")
    batches = iter(torch.randn(4, 5, 6, dtype=torch.float64))
    with pytest.raises(fp.UntieError, match="let it run the same minibatch each time"):
        path.delta_angles(lambda: model(next(batches)).square().sum())
    assert all(layer.untied.taps == () for layer in path.layers.values())


def test_the_second_run_draws_the_random_numbers_of_the_first():
    model = nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.5), nn.Linear(9, 3))
    path = fp.untie(model, "bp")
    x = torch.randn(5, 6)
    assert set(path.delta_angles(lambda: model(x + torch.randn(5, 6)).square().sum()).values()) == {0.0}


def test_a_model_run_whole_under_reentrant_checkpointing_shows_no_layer():
    model = MLP.build()
    path = fp.untie(model, "fa")
    x = MLP.inputs()[0]
    with pytest.raises(fp.UntieError, match="reentrant checkpointing"):
        path.delta_angles(
            lambda: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=True).square().sum()
        )


def test_layers_that_learn_nothing_and_pass_nothing_back_are_absent():
    model = MLP.build()
    model[0].requires_grad_(False)
    path = fp.untie(model, "fa")
    x = MLP.inputs(requires_grad=False)[0]
    assert list(path.delta_angles(lambda: model(x).sum())) == ["2", "4"]


def test_deltas_have_the_lengths_of_two_separate_networks():
    plain = MLP.build()
    model = copy.deepcopy(plain)
    path = fp.untie(model, "fa")
    found = path.deltas(lambda: MLP.loss(model, MLP.inputs()))
    ours, exact = (output_gradients(MLP, network, path.layers) for network in (model, plain))
    for name, delta in found.items():
        assert delta.norm == pytest.approx(ours[name].norm().item(), rel=1e-9)
        assert delta.backprop_norm == pytest.approx(exact[name].norm().item(), rel=1e-9)
        assert delta.norm_ratio == pytest.approx(delta.norm / delta.backprop_norm)
    assert {name: delta.angle_deg for name, delta in found.items()} == path.delta_angles(
        lambda: MLP.loss(model, MLP.inputs())
    )


def test_errors_that_vanish_have_a_length_of_zero_and_no_angle():
    model = MLP.build()
    path = fp.untie(model, "fa")
    model[2].feedback.data.zero_()
    delta = path.deltas(lambda: MLP.loss(model, MLP.inputs()))["0"]
    assert (delta.norm, delta.norm_ratio) == (0.0, 0.0)
    assert math.isnan(delta.angle_deg)


@pytest.mark.parametrize("size", [20, 400])
def test_one_random_pair_in_twenty_is_closer_than_chance(size):
    one, other = torch.randn(2, 20_000, size, generator=torch.Generator().manual_seed(0))
    angles = torch.rad2deg(torch.acos(F.cosine_similarity(one, other)))
    assert (angles < chance_angle_deg(size)).float().mean() == pytest.approx(0.05, abs=0.005)


def gradients_of(problem, model, names):
    problem.loss(model, problem.inputs()).backward()
    return {name: model.get_parameter(name).grad.flatten() for name in names}


@pytest.mark.parametrize("problem", [MLP, CONVNET], ids=by_id)
@pytest.mark.parametrize("rule", ["fa", "kp", "dfa"])
def test_update_angles_are_those_of_two_separate_networks(rule, problem):
    plain = problem.build()
    names = [name for name, _ in plain.named_parameters()]
    model = copy.deepcopy(plain)
    path = fp.untie(model, rule)
    angles = path.update_angles(lambda: problem.loss(model, problem.inputs()))
    assert all(p.grad is None for p in model.parameters())
    ours, exact = (gradients_of(problem, network, names) for network in (model, plain))
    whole = [torch.cat(list(found.values())) for found in (ours, exact)]
    expected = {name: reference.angle_deg(ours[name], exact[name]) for name in names}
    assert angles == pytest.approx(expected | {"whole update": reference.angle_deg(*whole)}, abs=1e-4)
    assert 5 < angles["whole update"] < 175


def test_the_update_of_backprop_is_its_own():
    model = CONVNET.build()
    path = fp.untie(model, "bp")
    assert set(path.update_angles(lambda: CONVNET.loss(model, CONVNET.inputs())).values()) == {0.0}
    with pytest.raises(fp.UntieError, match="update_angles: compute_loss ran no untied layer"):
        path.update_angles(lambda: next(model.parameters()).sum())


@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_recurrent_layer_has_the_delta_of_its_last_layer_alone(kind, bidirectional):
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), kind(5, 6, num_layers=3, bidirectional=bidirectional))
    path = fp.untie(model, "fa")
    angles = path.delta_angles(lambda: model(torch.ones(7, 2, 4))[0].square().sum())
    last = {
        f"1.weight_{part}_l2{end}" for part in ("ih", "hh") for end in ("", "_reverse")[: 1 + bidirectional]
    }
    assert set(angles) == {"0", *last}
    assert angles["0"] > 20
    assert all(angles[name] == 0 for name in last)
