"""Every layer kind, attention included: bit-identical forward, backward through B, and back to plain."""

import pytest
import torch
from problems import ATTENTIONS, LAYERS, by_id
from torch import nn

import feedbackpath as fp

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def let_feedback_be_weights(path):
    for _, weight, feedback in path.pairs():
        feedback.data.copy_(weight.data)


def assert_close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("problem", LAYERS, ids=by_id)
def test_forward_is_bit_identical(problem):
    layer, inputs = problem.build(), problem.inputs()

    def run_all():
        for training in (True, False):
            layer.train(training)
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    yield from problem.outputs(layer, inputs)

    expected = list(run_all())
    fp.untie(layer, "fa")
    assert all(torch.equal(ours, plain) for ours, plain in zip(run_all(), expected, strict=True))


@pytest.mark.parametrize("problem", LAYERS, ids=by_id)
def test_feedback_that_equals_the_weights_gives_autograds_gradients(problem):
    layer = problem.build()
    expected = problem.gradients(layer)
    let_feedback_be_weights(fp.untie(layer, "fa"))
    assert_close(problem.gradients(layer), expected)


@pytest.mark.parametrize("problem", LAYERS, ids=by_id)
def test_random_feedback_changes_what_goes_back_and_not_what_is_learned(problem):
    layer = problem.build()
    expected = problem.gradients(layer)
    path = fp.untie(layer, "fa")
    if "out_proj" in path.layers:  # behind it lie all projections; only theirs is random here
        layer.out_proj.feedback.data.copy_(layer.out_proj.weight)
    for name, ours in problem.gradients(layer).items():
        if name.startswith("input"):
            assert (ours - expected[name]).norm() / expected[name].norm() > 0.3
        else:
            assert_close(ours, expected[name])


@pytest.mark.parametrize("problem", ATTENTIONS, ids=by_id)
def test_random_feedback_of_attentions_last_projection_changes_what_the_others_learn(problem):
    layer = problem.build()
    expected = problem.gradients(layer)
    let_feedback_be_weights(fp.untie(layer, "fa"))
    layer.out_proj.feedback.data.normal_()
    for name, ours in problem.gradients(layer).items():
        if name.startswith("out_proj"):
            assert_close(ours, expected[name])
        elif name.endswith("proj_weight"):
            assert (ours - expected[name]).norm() / expected[name].norm() > 0.1


@pytest.mark.parametrize("problem", LAYERS, ids=by_id)
def test_kolen_pollack_feedback_gets_the_gradient_of_its_weight(problem):
    layer = problem.build()
    path = fp.untie(layer, "kp")
    found = problem.gradients(layer)
    names = {id(parameter): name for name, parameter in layer.named_parameters()}
    for _, weight, feedback in path.pairs():
        assert torch.equal(found[names[id(weight)]], found[names[id(feedback)]])


@pytest.mark.parametrize("problem", LAYERS, ids=by_id)
def test_retie_gives_the_plain_layer_back(problem):
    layer = problem.build()
    types = [type(module) for module in layer.modules()]
    keys, parameters = list(layer.state_dict()), [id(p) for p in layer.parameters()]
    path = fp.untie(layer, "fa")
    assert [type(module) for module in layer.modules()] != types
    assert path.retie() is layer
    assert [type(module) for module in layer.modules()] == types
    assert list(layer.state_dict()) == keys
    assert [id(p) for p in layer.parameters()] == parameters


@pytest.mark.parametrize("rule", ["fa", "bp"])
def test_what_attention_refuses_is_refused_in_torchs_own_words(rule):
    plain, layer = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)
    fp.untie(layer, rule)
    x, y = torch.randn(5, 3, 8), torch.randn(6, 3, 7)
    for inputs, settings in (((x, x, x), {"is_causal": True}), ((y, y, y), {}), ((x, x[0], x), {})):
        with pytest.raises((RuntimeError, AssertionError)) as expected:
            plain(*inputs, **settings)
        with pytest.raises(type(expected.value)) as found:
            layer(*inputs, **settings)
        assert str(found.value) == str(expected.value)
    with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
        layer(x, x, x, is_causal=True)


@pytest.mark.parametrize("problem", ATTENTIONS, ids=by_id)
def test_attention_under_backprop_has_pytorchs_gradients(problem):
    layer = problem.build()
    expected = problem.gradients(layer)
    fp.untie(layer, "bp")
    assert_close(problem.gradients(layer), expected)


def test_fans_count_the_values_a_neuron_sees():
    fans = {}
    for name, layer in {
        "linear": nn.Linear(5, 4),
        "conv": nn.Conv2d(4, 6, (3, 2), groups=2),
        "transposed": nn.ConvTranspose1d(4, 6, 3, groups=2),
    }.items():
        (weight,) = fp.untie(layer, "fa").weights
        fans[name] = (weight.fan_in, weight.fan_out)
    assert fans == {"linear": (5, 4), "conv": (2 * 6, 3 * 6), "transposed": (2 * 3, 3 * 3)}
