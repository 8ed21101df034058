"""What the paper's rules must hold, on every kind of network; see ``test_every_rule.py`` for all rules."""

import copy

import pytest
import torch
from problems import CONVNET, MLP, NETWORKS, PAPER_RULES, by_id
from torch.utils.checkpoint import checkpoint

import feedbackpath as fp

pytestmark = pytest.mark.parametrize("rule", PAPER_RULES)
over_networks = pytest.mark.parametrize("problem", NETWORKS, ids=by_id)


def forward_parameters(model):
    return {name: p for name, p in model.named_parameters() if "feedback" not in name}


def assert_close(ours, expected, tolerance=1e-10):
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def without_feedback(gradients):
    return {name: gradient for name, gradient in gradients.items() if "feedback" not in name}


@over_networks
def test_forward_is_bit_identical(rule, problem):
    model, inputs = problem.build(), problem.inputs()
    for training in (True, False):
        plain = copy.deepcopy(model).train(training)
        untied = fp.untie(copy.deepcopy(model), rule).model.train(training)
        assert torch.equal(*(problem.outputs(network, inputs)[0] for network in (untied, plain)))


@over_networks
def test_feedback_is_no_copy_of_the_weights(rule, problem):
    for weight in fp.untie(problem.build(), rule).weights:
        is_backprop = rule == "bp"
        assert weight.is_tied == is_backprop
        assert (weight.feedback is weight.weight) == is_backprop
        assert (weight.feedback.data_ptr() == weight.weight.data_ptr()) == is_backprop
        assert torch.equal(weight.feedback, weight.weight) == is_backprop
        assert weight.feedback.shape == weight.weight.shape


@over_networks
def test_backward_goes_through_feedback(rule, problem):
    plain = problem.build()
    model = copy.deepcopy(plain)
    path = fp.untie(model, rule)
    expected = problem.gradients(plain)
    ours = without_feedback(problem.gradients(model))
    difference = (ours["input0"] - expected["input0"]).norm() / expected["input0"].norm()
    assert difference == 0 if rule == "bp" else difference > 0.3
    for _, weight, feedback in path.pairs():
        feedback.data.copy_(weight.data)
    assert_close(without_feedback(problem.gradients(model)), expected)


@over_networks
def test_weights_go_both_ways_between_plain_and_untied(rule, problem):
    plain, model = problem.build(), problem.build()
    for parameter in plain.parameters():
        parameter.data.normal_()
    keys = set(plain.state_dict())
    path = fp.untie(model, rule)
    feedbacks = [b.detach().clone() for _, _, b in path.pairs()]
    added = set(model.state_dict()) - keys
    assert keys <= set(model.state_dict())
    assert all(key.rpartition(".")[2] == "feedback" for key in added)
    assert bool(added) == (rule != "bp")
    model.load_state_dict(plain.state_dict())
    assert all(torch.equal(p, plain.state_dict()[name]) for name, p in forward_parameters(model).items())
    if rule != "bp":
        assert all(torch.equal(b, old) for (_, _, b), old in zip(path.pairs(), feedbacks, strict=True))
    again = fp.untie(problem.build(), rule, seed=1)
    again.model.load_state_dict(model.state_dict())
    for ours, theirs in zip(path.pairs(), again.pairs(), strict=True):
        assert torch.equal(ours[2], theirs[2])
    path.retie().load_state_dict(plain.state_dict())


@over_networks
def test_retie_restores_types_keys_and_parameters(rule, problem):
    model = problem.build()
    types = [type(module) for module in model.modules()]
    keys, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    expected = problem.gradients(model)
    path = fp.untie(model, rule)
    assert [id(p) for p in forward_parameters(model).values()] == parameters
    assert path.retie() is model
    assert [type(module) for module in model.modules()] == types
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == parameters
    assert_close(problem.gradients(model), expected, tolerance=0)


@over_networks
def test_a_copy_of_an_untied_model_stands_on_its_own(rule, problem):
    model = problem.build()
    fp.untie(model, rule)
    double = copy.deepcopy(model)
    assert {p.data_ptr() for p in double.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())
    assert_close(problem.gradients(double), problem.gradients(model), tolerance=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("problem", [MLP, CONVNET], ids=by_id)
def test_autocast(rule, problem, dtype):
    model, inputs = problem.build(torch.float32), problem.inputs(torch.float32)
    with torch.autocast("cpu", dtype):
        (expected,) = problem.outputs(copy.deepcopy(model), inputs)
    fp.untie(model, rule)
    exact = problem.gradients(copy.deepcopy(model))
    with torch.autocast("cpu", dtype):
        (output,) = problem.outputs(model, inputs)
        loss = problem.loss(model, inputs)
    assert output.dtype == expected.dtype == dtype
    assert torch.equal(output, expected)
    loss.backward()
    assert loss.isfinite()
    assert inputs[0].grad.dtype == torch.float32
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    ours, full = (torch.cat([grads[name].flatten() for name in found]) for grads in (found, exact))
    assert (ours - full).norm() / full.norm() < (0.1 if dtype == torch.bfloat16 else 0.01)


@over_networks
def test_activation_checkpointing_gives_equal_gradients(rule, problem):
    model = problem.build()
    fp.untie(model, rule)
    expected = problem.gradients(model)

    def checkpointed(module, *inputs):
        return checkpoint(problem.call, module, *inputs, use_reentrant=False)

    recomputing = type(problem)(problem.id, problem.make, problem.shapes, checkpointed)
    assert_close(recomputing.gradients(model), expected, tolerance=0)


def test_gradients_accumulate_over_parts_of_a_batch(rule):
    model, (x,) = MLP.build(), MLP.inputs()
    fp.untie(model, rule)
    gradients = []
    for parts in (x.split(2), [x]):
        model.zero_grad()
        for part in parts:
            model(part).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert_close(*gradients)


def test_channels_last_is_kept(rule):
    model = CONVNET.build(torch.float32).to(memory_format=torch.channels_last)
    x = CONVNET.inputs(torch.float32)[0].to(memory_format=torch.channels_last)
    expected = model[0](x)
    path = fp.untie(model, rule)
    assert path.weights[0].feedback.is_contiguous(memory_format=torch.channels_last)
    output = model[0](x)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(output, expected)
    model(x).sum().backward()
    path.step()
    for _, weight, feedback in path.pairs():
        assert weight.stride() == feedback.stride()
        for parameter in (weight, feedback):
            assert parameter.grad is None or parameter.grad.stride() == weight.stride()


@pytest.mark.parametrize("problem", [MLP, CONVNET], ids=by_id)
def test_what_is_done_to_one_gradient_does_not_reach_the_other(rule, problem):
    """An optimizer that works in place on W's gradient must not change B's, nor the other way round."""
    model = problem.build()
    path = fp.untie(model, rule)
    for changed, kept in ((0, 1), (1, 0)):
        model.zero_grad()
        problem.loss(model, problem.inputs()).backward()
        for _, *pair in path.pairs():
            if pair[0] is pair[1] or pair[1].grad is None:
                continue
            assert torch.equal(pair[0].grad, pair[1].grad)
            before = pair[kept].grad.clone()
            pair[changed].grad.add_(1.0)
            assert torch.equal(pair[kept].grad, before)
            assert torch.equal(pair[changed].grad, before + 1.0)
