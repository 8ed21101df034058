"""Which activation follows a layer: found through what lies between, with its settings, or asked for."""

import pytest
import torch
import torch.nn.functional as F
from problems import make_encoder
from torch import nn

import feedbackpath as fp
from feedbackpath.mirror import MirrorMode, find_activations
from feedbackpath.mirror.activations import odd_slope

PROBE = torch.linspace(-3, 3, 13)


class Net(nn.Module):
    """One layer, and what happens to its output."""

    def __init__(self, follow):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)
        self.follow = follow

    def forward(self, x):
        return self.follow(self, self.layer(x), x)


def check(model, expected, name="layer"):
    found = find_activations(model, [name])
    torch.testing.assert_close(found[name](PROBE.clone()), expected(PROBE.clone()))


def activations_of(path):
    """Return what follows each layer, before any forward pass."""
    mode = path.context.part(MirrorMode)
    mode.find_activations(path.weights)
    return mode.activations


def identity(x):
    return x


FOLLOWED = {
    "F.relu": (lambda net, y, x: F.relu(y), torch.relu),
    "F.relu in place": (lambda net, y, x: F.relu(y, inplace=True), torch.relu),
    "torch.tanh": (lambda net, y, x: torch.tanh(y), torch.tanh),
    "method": (lambda net, y, x: y.sigmoid(), torch.sigmoid),
    "method in place": (lambda net, y, x: y.relu_(), torch.relu),
    "slope by name": (
        lambda net, y, x: F.leaky_relu(y, negative_slope=0.3), lambda y: F.leaky_relu(y, 0.3)
    ),
    "slope by position": (lambda net, y, x: F.leaky_relu(y, 0.3), lambda y: F.leaky_relu(y, 0.3)),
    "approximate gelu": (
        lambda net, y, x: F.gelu(y, approximate="tanh"), lambda y: F.gelu(y, approximate="tanh")
    ),
    "shortcut": (lambda net, y, x: torch.relu(y + x), torch.relu),
    "shortcut in place": (lambda net, y, x: torch.relu(y.add_(x)), torch.relu),
    "reshape": (lambda net, y, x: F.elu(y.view(-1, 2).flatten()), F.elu),
    "dropout": (lambda net, y, x: F.silu(F.dropout(y, training=net.training)), F.silu),
    "another layer": (lambda net, y, x: net.head(y), identity),
    "pooling": (lambda net, y, x: torch.relu(F.max_pool1d(y, 2)), identity),
    "output": (lambda net, y, x: y, identity),
    "two of a kind": (lambda net, y, x: torch.relu(y) + F.relu(y), torch.relu),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLLOWED)
def test_functions_and_methods_are_found(case):
    follow, expected = FOLLOWED[case]
    check(Net(follow), expected)


MODULES = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.3), nn.PReLU(init=0.1), nn.ELU(0.5), nn.GELU("tanh"),
    nn.Softplus(beta=2.0), nn.Hardtanh(-0.5, 0.5), nn.Tanh(), nn.Sigmoid(), nn.SiLU(),
]  # fmt: skip


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_modules_are_found_with_their_settings(module):
    probe = PROBE.clone()
    check(nn.Sequential(nn.Linear(4, 3), module), module, name="0")
    found = find_activations(nn.Sequential(nn.Linear(4, 3), module), ["0"])["0"]
    found(probe)
    assert torch.equal(probe, PROBE), "the activation must not work in place: noise is needed afterwards"


@pytest.mark.parametrize(
    "between",
    [nn.BatchNorm1d(3), nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.Dropout(0.5), nn.Identity(), nn.Flatten()],
    ids=str,
)
def test_norms_and_dropout_are_passed_over(between):
    check(nn.Sequential(nn.Linear(4, 3), between, nn.LeakyReLU(0.2)), nn.LeakyReLU(0.2), name="0")


def test_a_model_that_is_one_layer_has_a_linear_output():
    check(nn.Linear(4, 3), identity, name="")


def test_a_shared_layer_with_one_kind_of_activation_is_found():
    layer = nn.Linear(4, 4)
    check(nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU()), torch.relu, name="0")


@pytest.mark.parametrize(
    "model",
    [
        Net(lambda net, y, x: torch.relu(y) + torch.tanh(y)),
        Net(lambda net, y, x: F.leaky_relu(y, 0.1) + F.leaky_relu(y, 0.2)),
        Net(lambda net, y, x: torch.relu(y) if y.sum() > 0 else y),
    ],
    ids=["two kinds", "two slopes", "control flow"],
)
def test_what_a_trace_cannot_tell_is_named_and_may_be_given(model):
    path = fp.untie(model, "wm")
    with pytest.warns(
        fp.MirrorWarning, match=r"the activation after 'layer'.* is unknown, and is taken as linear"
    ):
        path.mirror(1)
    path.retie()
    path = fp.untie(model, "wm", activations={"lay*": torch.tanh, "*": nn.Identity(), "layer": torch.relu})
    found = activations_of(path)
    assert found["layer"] is torch.relu
    torch.testing.assert_close(found["head"](PROBE), PROBE)


def test_what_is_given_goes_before_what_is_found():
    path = fp.untie(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), "wm", activations={"0": torch.tanh})
    assert activations_of(path)["0"] is torch.tanh


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_transformer_encoders_are_known(activation):
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=activation)
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    names = ["1.layers.0.linear1", "1.layers.1.linear2", "1.layers.0.self_attn.out_proj"]
    found = find_activations(model, names)
    for name, expected in zip(names, (getattr(F, activation), identity, identity), strict=True):
        torch.testing.assert_close(found[name](PROBE), expected(PROBE))


@pytest.mark.parametrize(
    "model", [make_encoder(), nn.TransformerDecoderLayer(8, 2, 16)], ids=["encoder", "decoder"]
)
def test_every_layer_of_a_transformer_is_known(model):
    path = fp.untie(model, "wm")
    assert {weight.name for weight in path.weights} <= activations_of(path).keys()


def test_separate_projections_of_attention_inside_a_model_are_known():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=5)
            self.head = nn.Linear(8, 3)

        def forward(self, query, key, value):
            return self.head(self.attention(query, key, value)[0])

    path = fp.untie(Attending(), "wm")
    assert len(path.weights) == 5


def test_functions_that_work_in_place_and_functions_that_cannot_be_told():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.two(F.relu_(self.one(x))).clamp(min=0)

    found = find_activations(Net(), ["one", "two"])
    assert found["one"](torch.tensor(-1.0)) == 0
    assert "two" not in found


@pytest.mark.parametrize(
    ("activation", "slope"),
    [
        (torch.relu, 0.5),
        (nn.ReLU(inplace=True), 0.5),
        (F.gelu, 0.5),
        (nn.GELU("tanh"), 0.5),
        (nn.SiLU().forward, 0.5),
        (nn.LeakyReLU(0.5), 0.75),
        (nn.Identity(), 1.0),
        (torch.tanh, None),
        (nn.ReLU6(), None),  # linear near 0 alone
        (nn.ELU(), None),
        (nn.PReLU(), None),  # learns
        (lambda x: torch.relu(x), None),  # nobody knows what else it does, some day
    ],
)
def test_the_answer_to_a_code_and_its_negative_is_known_for_some(activation, slope):
    assert odd_slope(activation) == (slope and pytest.approx(slope))


def test_slopes_of_activations_that_are_found_are_known():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            return self.three(F.relu(F.leaky_relu(self.one(x), 0.5), inplace=True)) + F.relu_(self.two(x))

    found = find_activations(Model(), ["one", "two", "three"])
    slopes = {name: odd_slope(activation) for name, activation in found.items()}
    assert slopes == {"one": pytest.approx(0.75), "two": 0.5, "three": 1.0}
