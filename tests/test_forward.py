"""An untied model takes what PyTorch takes and refuses what it refuses; second derivatives are defined."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import feedbackpath as fp


def plain_and_untied(make, rule="fa", ties=False, **settings):
    """Return a plain model and its untied twin; ``ties``: with B = W, so that gradients are the plain."""
    torch.manual_seed(0)
    plain = make().double()
    model = copy.deepcopy(plain)
    path = fp.untie(model, rule, **settings)
    if ties:
        with torch.no_grad():
            for _, w, b in path.pairs():
                b.copy_(w)
    return plain, model


def gradients(model, x):
    """Return the gradients of the input and of all forward parameters."""
    x = x.detach().clone().requires_grad_()
    output = model(x)
    (output[0] if isinstance(output, tuple) else output).square().sum().backward()
    return [x.grad, *[p.grad for name, p in model.named_parameters() if not name.endswith("feedback")]]


# --- Work in place on what a layer returns ------------------------------------------------------------------


class Residual(nn.Module):
    """As the blocks of Swin: in-place addition to what a linear layer of a 3-D input returns."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        h = self.first(x)
        h += x
        h = self.second(h)
        h[:, :1] *= 2.0
        return F.relu_(h)


class Target(fp.Rule):
    """Sends targets, through an autograd function of its own."""

    name = "target"
    send_back = fp.Target(lambda weight, y: y @ weight.feedback.to(y.dtype))


def relu_after(*layers):
    return lambda: nn.Sequential(*[make() for make in layers], nn.ReLU(inplace=True))


LAST = {
    "linear, 2-D": (relu_after(lambda: nn.Linear(6, 6)), (4, 6)),
    "linear, 3-D": (relu_after(lambda: nn.Linear(6, 6)), (2, 3, 6)),
    "linear, 4-D": (relu_after(lambda: nn.Linear(6, 6)), (2, 3, 2, 6)),
    "linear, 1-D": (relu_after(lambda: nn.Linear(6, 6)), (6,)),
    "convolution": (relu_after(lambda: nn.Conv1d(2, 3, 3)), (2, 2, 6)),
    "convolution, no batch": (relu_after(lambda: nn.Conv1d(2, 3, 3)), (2, 6)),
    "bilinear attention": (Residual, (2, 3, 6)),
    "dropout": (lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.0, inplace=True)), (2, 3, 6)),
}


@pytest.mark.parametrize("case", LAST)
@pytest.mark.parametrize("rule", ["fa", "kp", "ss"])
def test_an_output_can_be_worked_on_in_place(case, rule):
    make, shape = LAST[case]
    x = torch.randn(shape, dtype=torch.float64)
    plain, model = plain_and_untied(make, rule, ties=True)
    for ours, theirs in zip(gradients(model, x), gradients(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("rule", ["dfa", "dkp", Target()], ids=["dfa", "dkp", "target"])
def test_an_output_can_be_worked_on_in_place_where_other_paths_carry_errors(rule):
    def run(inplace):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=inplace), nn.Linear(6, 6)).double()
        fp.untie(model, rule)
        return gradients(model, torch.ones(2, 3, 6, dtype=torch.float64))

    for ours, theirs in zip(run(True), run(False), strict=True):
        assert torch.equal(ours, theirs)


def test_a_norm_that_sends_back_sigma_can_be_worked_on_in_place():
    def run(inplace):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=inplace)).double()
        fp.untie(model, "fa", batchnorm_feedback="sigma")
        return gradients(
            model, torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        )

    for ours, theirs in zip(run(True), run(False), strict=True):
        assert torch.equal(ours, theirs)


# --- What PyTorch refuses, and empty batches ----------------------------------------------------------------

WRONG = {
    "padding mask": {"key_padding_mask": torch.zeros(4, 6).bool()},
    "padding mask of another length": {"key_padding_mask": torch.zeros(6, 5).bool()},
    "attention mask": {"attn_mask": torch.zeros(4, 5)},
    "attention mask of three dimensions": {"attn_mask": torch.zeros(3, 4, 4)},
    "causal without a mask": {"is_causal": True},
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("rule", ["bp", "fa", "kp"])
def test_attention_refuses_what_torch_refuses_in_the_same_words(case, rule):
    plain, model = plain_and_untied(lambda: nn.MultiheadAttention(8, 2), rule)
    x = torch.randn(4, 6, 8, dtype=torch.float64)
    settings = {
        name: v.double() if getattr(v, "is_floating_point", bool)() else v for name, v in WRONG[case].items()
    }
    with pytest.raises((RuntimeError, AssertionError)) as theirs:
        plain(x, x, x, **settings)
    with pytest.raises(type(theirs.value)) as ours:
        model(x, x, x, **settings)
    assert str(ours.value) == str(theirs.value)


def test_attention_refuses_another_width():
    plain, model = plain_and_untied(lambda: nn.MultiheadAttention(8, 2))
    x = torch.randn(4, 6, 7, dtype=torch.float64)
    for net in (plain, model):
        with pytest.raises(AssertionError, match="embedding dimension of 8, but got 7"):
            net(x, x, x)


class SelfAttention(nn.MultiheadAttention):
    """Attention of a signal to itself."""

    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


EMPTY = {
    "attention": (lambda: SelfAttention(8, 2), (3, 0, 8)),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), (3, 0, 8)),
    "linear": (lambda: nn.Linear(8, 3), (0, 8)),
    "linear, 3-D": (lambda: nn.Linear(8, 3), (3, 0, 8)),
    "convolution": (lambda: nn.Conv2d(2, 3, 3), (0, 2, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose1d(2, 3, 3), (0, 2, 5)),
    "padded": (lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), (0, 2, 5)),
    "lstm": (lambda: nn.LSTM(8, 4), (3, 0, 8)),
}


@pytest.mark.parametrize("case", EMPTY)
@pytest.mark.parametrize("rule", ["fa", "kp"])
def test_an_empty_batch_gives_what_torch_gives(case, rule):
    make, shape = EMPTY[case]
    plain, model = plain_and_untied(make, rule)
    x = torch.zeros(shape, dtype=torch.float64)
    for ours, theirs in zip(gradients(model, x), gradients(plain, x), strict=True):
        assert ours.shape == theirs.shape
        assert not ours.any()


# --- Second derivatives -------------------------------------------------------------------------------------


def penalise(model, x):
    """Leave the gradients of a gradient penalty, as of a Wasserstein critic."""
    x = x.detach().clone().requires_grad_()
    output = model(x)
    output = output[0] if isinstance(output, tuple) else output
    (slope,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


TWICE = {
    "linear": (lambda: nn.Linear(6, 3, bias=False), (5, 6)),
    "mlp, 3-D": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (4, 2, 6)),
    "convolution": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Conv1d(3, 2, 3)), (4, 2, 6)),
    "transposed": (lambda: nn.ConvTranspose1d(2, 3, 3), (4, 2, 6)),
    "padded": (lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), (4, 2, 6)),
    "lstm": (lambda: nn.LSTM(6, 4), (4, 3, 6)),
}


@pytest.mark.parametrize("case", TWICE)
@pytest.mark.parametrize("rule", ["fa", "kp"])
def test_a_gradient_penalty_trains_w_and_b_of_kolen_pollack_alike(case, rule):
    """With B = W it is autograd's. What a penalty gives B goes to W; a B that learns gets the same."""
    make, shape = TWICE[case]
    x = torch.randn(shape, dtype=torch.float64)
    plain, model = plain_and_untied(make, rule, ties=True)
    expected, found = penalise(plain, x), penalise(model, x)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
    _, model = plain_and_untied(make, rule)
    found = penalise(model, x)
    assert any(not torch.allclose(found[name], gradient) for name, gradient in expected.items())
    pairs = [
        (getattr(weight.layer, weight.weight_name).grad, getattr(weight.layer, weight.feedback_name).grad)
        for weight in model.untied.below
    ]
    for for_w, for_b in pairs:
        assert for_w.any()
        assert for_b is None if rule == "fa" else torch.equal(for_w, for_b)


def test_a_gradient_penalty_gives_a_broadcast_b_what_its_rule_says_and_no_more():
    """The product of the output's error and the layer's input: for the last layer the gradient of its W."""
    _, model = plain_and_untied(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), "dkp")
    found = penalise(model, torch.randn(4, 6, dtype=torch.float64))
    assert found["2.weight"].any()
    torch.testing.assert_close(found["2.feedback"], found["2.weight"])


class Labelled(nn.Module):
    """As models of transformers, whose Trainer chooses columns of the data by this signature."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Conv1d(4, 2, 1))
        self.act = type("Builtin", (nn.Module,), {"forward": torch.relu})()

    def forward(self, x, *, labels=None, scale: float = 1.0):
        return self.act(self.layers[0](x)) * scale


@pytest.mark.parametrize("rule", ["bp", "kp", "dfa"])
def test_forward_passes_keep_their_signatures(rule):
    plain = Labelled()
    model = copy.deepcopy(fp.untie(copy.deepcopy(plain), rule, batchnorm_feedback="sigma").model)
    assert str(inspect.signature(model.forward)) == "(x, *, labels=None, scale: float = 1.0)"
    for name, module in plain.named_modules():
        if name != "act":  # a builtin: it has none
            assert inspect.signature(model.get_submodule(name).forward) == inspect.signature(module.forward)
    assert torch.equal(model(torch.ones(2, 3), scale=2.0), plain(torch.ones(2, 3), scale=2.0))
