"""The short way of self-attention: the bits of PyTorch forward, and of the watched way backward."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import feedbackpath as fp
from feedbackpath import attention
from feedbackpath.core.modules import tapped

WIDTH = 8


def make(**settings):
    torch.manual_seed(0)
    return nn.MultiheadAttention(WIDTH, 2, **{"batch_first": True} | settings)


CASES = {
    "batch first": ({}, {}),
    "sequence first": ({"batch_first": False}, {}),
    "weights asked for": ({}, {"need_weights": True}),
    "no bias": ({"bias": False}, {}),
    "added keys": ({"add_bias_kv": True, "add_zero_attn": True}, {}),
    "dropout": ({"dropout": 0.5}, {}),
    "causal": ({}, {"attn_mask": nn.Transformer.generate_square_subsequent_mask(5).double()}),
    "padding": ({}, {"key_padding_mask": torch.tensor([[False] * 4 + [True]] * 3)}),
}


def run(layer, x, call, *, is_long=False):
    """Return the output and all gradients, by the short way or by the watched one."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    with tapped([layer], lambda *signals: None) if is_long else nullcontext():
        torch.manual_seed(1)
        output, _ = layer(x, x, x, **{"need_weights": False} | call)
    output.square().sum().backward()
    return output, x.grad, {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}


@pytest.fixture
def taken(monkeypatch):
    """Return what went the short way."""
    found = []
    before = attention._forward
    monkeypatch.setattr(attention, "_forward", lambda *a, **k: found.append(1) or before(*a, **k))
    return found


@pytest.mark.parametrize("rule", ["fa", "kp", "ss"])
@pytest.mark.parametrize("case", CASES)
def test_the_short_way_gives_what_the_watched_way_gives(taken, rule, case):
    settings, call = CASES[case]
    layer = make(**settings).double()
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    if case == "sequence first":
        x = x.transpose(0, 1).contiguous()
    plain, *_ = run(copy.deepcopy(layer), x, call)
    path = fp.untie(layer, rule)
    output, at_x, gradients = run(layer, x, call)
    assert taken
    taken.clear()
    long_output, long_at_x, long_gradients = run(layer, x, call, is_long=True)
    assert not taken
    assert torch.equal(output, plain)
    assert torch.equal(long_output, plain)
    torch.testing.assert_close(at_x, long_at_x, rtol=1e-12, atol=1e-13)
    assert gradients.keys() == long_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, long_gradients[name], rtol=1e-12, atol=1e-13, msg=name)
    assert min(path.matrix_angles().values()) > 5  # B is not W, or this would show nothing


@pytest.mark.parametrize("case", CASES)
def test_with_b_equal_to_w_it_is_backprop(taken, case):
    settings, call = CASES[case]
    layer = make(**settings).double()
    x = torch.randn(
        5 if case == "sequence first" else 3, 3 if case == "sequence first" else 5, WIDTH
    ).double()
    _, plain_at_x, plain_gradients = run(copy.deepcopy(layer), x, call)
    path = fp.untie(layer, "kp")
    for _, w, b in path.pairs():
        b.data.copy_(w)
    _, at_x, gradients = run(layer, x, call)
    assert taken
    torch.testing.assert_close(at_x, plain_at_x, rtol=1e-12, atol=1e-13)
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-12, atol=1e-13, msg=name)


def test_an_encoder_layer_goes_the_short_way_and_a_causal_mask_is_no_reason_to_watch(taken):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
            self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(5))

        def forward(self, x):
            return self.layers(x, mask=self.mask, is_causal=True)

    model = Model()
    plain, x = copy.deepcopy(model), torch.randn(3, 5, WIDTH)
    fp.untie(model, "kp")
    assert not model.untied.is_watched
    assert torch.equal(model(x), plain(x))
    assert len(taken) == 2


OTHERWISE = {
    "another key": lambda layer, x: layer(x, 2 * x, 2 * x),
    "another value": lambda layer, x: layer(x, x, 2 * x),
    "one sequence": lambda layer, x: layer(x[0], x[0], x[0]),
    "keywords": lambda layer, x: layer(query=x, key=x, value=x),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_other_calls_go_the_long_way(taken, case):
    layer, x = make(), torch.randn(3, 5, WIDTH, requires_grad=True)
    plain, _ = OTHERWISE[case](copy.deepcopy(layer), x)
    fp.untie(layer, "fa")
    output, _ = OTHERWISE[case](layer, x)
    assert torch.equal(output, plain)
    assert not taken


def on_class(layer, *args, forward=nn.MultiheadAttention.forward, **kwargs):
    output, weights = forward(layer, *args, **kwargs)
    return 2 * output, weights


def test_autocast_and_a_patched_pytorch_go_the_long_way(taken, monkeypatch):
    x = torch.randn(3, 5, WIDTH, requires_grad=True)
    layer = make()
    plain = copy.deepcopy(layer)
    fp.untie(layer, "fa")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x, x, x)[0], plain(x, x, x)[0])
    function = torch.nn.functional.multi_head_attention_forward
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, function.__name__, lambda *a, **k: function(*a, **k))
        assert torch.equal(layer(x, x, x)[0], plain(x, x, x)[0])
    with monkeypatch.context() as patch:
        patch.setattr(nn.MultiheadAttention, "forward", on_class)
        assert torch.equal(layer(x, x, x)[0], plain(x, x, x)[0])
    assert not taken


@pytest.mark.parametrize("name", ["softmax", "scaled_dot_product_attention"])
def test_a_patched_part_of_attention_is_used(monkeypatch, name):
    x = torch.randn(3, 5, WIDTH, requires_grad=True)
    layer = make()
    plain = copy.deepcopy(layer)
    fp.untie(layer, "fa")
    before, part = layer(x, x, x, need_weights=name == "softmax")[0], getattr(torch.nn.functional, name)
    monkeypatch.setattr(torch.nn.functional, name, lambda *a, **k: 2 * part(*a, **k))
    found = layer(x, x, x, need_weights=name == "softmax")[0]
    assert torch.equal(found, plain(x, x, x, need_weights=name == "softmax")[0])
    assert not torch.equal(found, before)


@pytest.mark.filterwarnings("ignore:no untied form")
@pytest.mark.parametrize(
    ("rule", "overrides"),
    [("fa", {"attn": "bp"}), ("fa", {"attn": "ia"}), ("bp", {"attn.out_proj": "kp"}), ("ia", {})],
)
@pytest.mark.parametrize("has_mask", [False, True])
def test_an_output_projection_under_a_rule_of_its_own_sends_errors_through_its_b(rule, overrides, has_mask):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.attn = nn.Linear(WIDTH, WIDTH), nn.MultiheadAttention(WIDTH, 2)
            self.register_buffer("mask", torch.zeros(5, 5))

        def forward(self, x):
            x = self.first(x)
            return self.attn(x, x, x, attn_mask=self.mask if has_mask else None, need_weights=False)[0]

    torch.manual_seed(0)
    model = Model().double()
    x = torch.randn(5, 3, WIDTH, dtype=torch.float64)
    model(x).square().sum().backward()
    by_backprop, model.attn.in_proj_weight.grad = model.attn.in_proj_weight.grad, None
    fp.untie(model, rule, overrides=overrides)
    model(x).square().sum().backward()
    assert fp.measure.angles.angle_deg(model.attn.in_proj_weight.grad, by_backprop) > 5


def test_attention_within_attention_leaves_the_outer_one_its_feedback_weights():
    outer, inner, x = make(), make(), torch.randn(3, 5, WIDTH, requires_grad=True)
    fp.untie(outer, "fa")
    fp.untie(inner, "fa", seed=1)
    expected = torch.autograd.grad(outer(x, x, x)[0].sum(), x)[0]

    class Another(torch.overrides.TorchFunctionMode):
        is_within = False

        def __torch_function__(self, func, types, args=(), kwargs=None):
            if not self.is_within:
                self.is_within = True
                inner(x.detach(), x.detach(), x.detach())
                self.is_within = False
            return func(*args, **(kwargs or {}))

    with Another():
        output = outer(x, x, x)[0]
    assert torch.equal(torch.autograd.grad(output.sum(), x)[0], expected)


@pytest.mark.parametrize("shape", [(5, WIDTH), (3, 0, WIDTH), (0, 5, WIDTH)])
def test_outputs_and_random_numbers_are_pytorchs(shape):
    layer = make(dropout=0.5)
    plain, x = copy.deepcopy(layer), torch.randn(shape, requires_grad=True)
    fp.untie(layer, "fa")
    found = []
    for attend in (layer, plain):
        torch.manual_seed(3)
        found.append((attend(x, x, x)[0], torch.rand(1)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    found[0][0].sum().backward()


@pytest.mark.filterwarnings("ignore:a weight of shape")
def test_a_parametrized_output_projection_is_not_run_twice():
    layer = make(dropout=0.5)
    fp.untie(layer, "fa")
    plain, x = make(dropout=0.5), torch.randn(3, 5, WIDTH, requires_grad=True)
    for attend in (layer, plain):
        nn.utils.parametrizations.weight_norm(attend.out_proj)
    torch.manual_seed(3)
    output = layer(x, x, x)[0]
    torch.manual_seed(3)
    assert torch.equal(output, plain(x, x, x)[0])


def test_a_b_that_does_not_fit_is_refused_by_name():
    layer, x = make().double(), torch.randn(3, 5, WIDTH, requires_grad=True)
    fp.untie(layer, "fa")
    layer.in_proj_weight = nn.Parameter(layer.in_proj_weight.detach().float())
    layer.out_proj.weight = nn.Parameter(layer.out_proj.weight.detach().float())
    for name in ("in_proj_bias", "out_proj.bias"):
        layer.get_parameter(name).data = layer.get_parameter(name).data.float()
    with pytest.raises(fp.UntieError, match="W is .* of torch.float32 on cpu, B .* of torch.float64"):
        layer(x, x, x)


def test_a_pytorch_that_projects_by_other_means_is_watched(monkeypatch):
    layer, x = make(), torch.randn(3, 5, WIDTH, requires_grad=True)
    path = fp.untie(layer, "fa")
    by_short_way = torch.autograd.grad(layer(x, x, x)[0].square().sum(), x)[0]
    monkeypatch.setattr(attention, "_forward", nn.MultiheadAttention.forward)  # it knows of no B
    found = torch.autograd.grad(layer(x, x, x)[0].square().sum(), x)[0]
    torch.testing.assert_close(found, by_short_way)
    path.retie()
    assert not torch.allclose(torch.autograd.grad(layer(x, x, x)[0].square().sum(), x)[0], found)


def test_without_the_part_that_projects_attention_is_watched(monkeypatch):
    layer, x = make(), torch.randn(3, 5, WIDTH, requires_grad=True)
    fp.untie(layer, "fa")
    expected = torch.autograd.grad(layer(x, x, x)[0].sum(), x)[0]
    monkeypatch.setattr(attention, "PROJECTING", "another_name")
    torch.testing.assert_close(torch.autograd.grad(layer(x, x, x)[0].sum(), x)[0], expected)


def test_an_error_leaves_nothing_behind():
    layer = make()
    fp.untie(layer, "kp")
    x = torch.randn(3, 5, WIDTH + 1, requires_grad=True)
    with pytest.raises(Exception, match="embedding dimension"):
        layer(x, x, x)
    assert not attention._RUNNING.unmet


def test_gradients_of_gradients_go_to_w():
    layer = make().double()
    fp.untie(layer, "fa")
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    (at_x,) = torch.autograd.grad(layer(x, x, x)[0].square().sum(), x, create_graph=True)
    at_x.square().sum().backward()
    assert layer.in_proj_weight.grad.abs().sum() > 0
