"""Models that others wrote: the shape of each thing that one of them does, in a small module."""

import copy
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from zoo import gradients, let_feedback_be_weights

import feedbackpath as fp
from feedbackpath.core.usage import is_only_added
from feedbackpath.mirror.layouts import view_of


class Conv1D(nn.Module):
    """A linear layer with its inputs first, as in GPT-2."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(inputs, outputs)),
            nn.Parameter(torch.randn(outputs)),
        )

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


class Experts(nn.Module):
    """Matrices of experts in one parameter, each taken out and used by itself, as in Mixtral."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 6)), nn.Parameter(torch.randn(3, 8, 5))

    def forward(self, x):
        parts = []
        for expert, part in enumerate(x.chunk(3)):
            hidden = torch.relu(F.linear(part, self.up[expert]))
            parts.append(hidden @ self.down[expert])
        return torch.cat(parts)


class AtOnce(nn.Module):
    """The same by one batched product, as in Llama 4."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 8))

    def forward(self, x):
        return torch.bmm(x.view(3, -1, x.shape[-1]), self.up).flatten(0, 1)


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x):
        return F.linear(x, self.weight.type_as(x))


class Turned(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x):
        return x.matmul(self.weight.t()) + torch.mm(x, self.weight.T)


LAYOUTS = {
    "Conv1D": (lambda: Conv1D(6, 5), {"weight": (1, 5, 6)}),
    "experts": (Experts, {"up": (3, 8, 6), "down": (3, 5, 8)}),
    "experts at once": (AtOnce, {"up": (3, 8, 6)}),
    "router": (Router, {"weight": (1, 4, 6)}),
    "turned": (Turned, {"weight": (1, 4, 6)}),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_mirror_mode_reads_from_the_code_which_dimension_counts_inputs(case):
    make, shapes = LAYOUTS[case]
    model = make()
    path = fp.untie(model, "wm", activations={"*": nn.Identity()})
    for weight in path.weights:
        assert view_of(weight)(model, weight.weight).shape == shapes[weight.weight_name]
    path.mirror(60)
    assert max(path.matrix_angles().values()) < 6
    assert all(abs(gain - 1) < 0.05 for gain in path.gains().values())
    path.mirror(1, fp.Mirror.exact())
    assert max(path.matrix_angles().values()) < 0.1


class BothWays(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.layer = nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(F.linear(x, self.weight) @ self.weight)


class Hidden(BothWays):
    def forward(self, x):
        w = self.weight
        return self.layer(x @ w)


@pytest.mark.parametrize("kind", [BothWays, Hidden])
def test_a_layout_that_the_code_does_not_tell_is_named(kind):
    with pytest.warns(fp.UnconvertedLayerWarning, match=rf"'' \(.*test_foreign\.{kind.__name__}, by wm\)"):
        fp.untie(kind(), "wm")


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return weight_norm(layer)


class Standardised(nn.Conv1d):
    """A convolution whose weight is normed in each forward pass, with a gain, as NF-nets have."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, 1)
        self.gain = nn.Parameter(torch.rand(outputs, 1, 1) + 0.5)

    def forward(self, x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        gain = (self.gain * 0.7).view(-1)
        weight = F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0).reshape_as(
            self.weight
        )
        return F.conv1d(x, weight, self.bias)


class Own(nn.Module):
    """A module with code that is not looked through."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x)) if float(x.detach().sum()) < 1e9 else x
        return x


class Scaled(nn.Linear):
    """A linear layer with a learned scale for each output, kept as a flat vector."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.gain = nn.Parameter(torch.rand(outputs) + 0.5)

    def forward(self, x):
        return F.linear(x, self.weight * (0.5 + self.gain * 2.0).unsqueeze(1), self.bias)


MADE = {
    "scaled": lambda: (Scaled(6, 6) for _ in range(2)),
    "weight_norm": lambda: (parametrizations.weight_norm(nn.Linear(6, 6)) for _ in range(2)),
    "weight_norm by a hook": lambda: (old_weight_norm(nn.Linear(6, 6)) for _ in range(2)),
    "convolution": lambda: (parametrizations.weight_norm(nn.Conv1d(6, 6, 3, padding=1), dim=2) for _ in "ab"),
    "standardised": lambda: (Standardised(6, 6) for _ in range(2)),
}


@pytest.mark.parametrize("box", [nn.Sequential, Own])
@pytest.mark.parametrize("rule", ["fa", "kp"])
@pytest.mark.parametrize("case", MADE)
def test_weights_that_are_made_of_others_send_errors_through_what_is_made_of_b(case, rule, box):
    model = box(*MADE[case]()).double()
    x = torch.randn((4, 6, 6) if case in ("convolution", "standardised") else (4, 6), dtype=torch.float64)
    output, expected = gradients(model, x)
    path = fp.untie(model, rule, strict=case != "scaled")
    assert len(path.weights) == 2
    forward, random = gradients(model, x)
    assert torch.equal(forward, output)
    assert not torch.allclose(random["x"], expected["x"])
    let_feedback_be_weights(path)
    _, exact = gradients(model, x)
    for name, gradient in expected.items():
        torch.testing.assert_close(exact[name], gradient)
    path.retie()
    torch.testing.assert_close(model(x), output)


class Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).mT


def test_weights_that_b_cannot_follow_are_left_by_name():
    def make():
        return Own(
            nn.Linear(6, 6),
            spectral_norm(nn.Linear(6, 6)),
            parametrize.register_parametrization(nn.Linear(6, 6), "weight", Symmetric()),
        )

    left = r"'layers\.1' \(Linear\), 'layers\.2\.parametrizations\.weight' \(ParametrizationList\)"
    with pytest.warns(fp.UnconvertedLayerWarning, match=left):
        path = fp.untie(make(), "fa")
    assert list(path.layers) == ["layers.0"]
    path.model(torch.randn(3, 6)).sum().backward()  # and nothing more is said of them
    with pytest.raises(fp.UntieError, match=left):
        fp.untie(make(), "fa", strict=True)
    model = make()
    path = fp.untie(model, "fa", strict=True, overrides={"layers.[12]*": "bp"})
    model(torch.randn(3, 6)).sum().backward()
    path.step()


class Kernel(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        return F.linear(x, self.kernel)


@pytest.mark.parametrize(
    ("layer", "name"),
    [(Kernel(), "kernel"), (nn.LSTM(6, 6), "weight_hh_l0"), (nn.MultiheadAttention(6, 2), "in_proj_weight")],
    ids=["of one's own", "LSTM", "attention"],
)
@pytest.mark.parametrize(
    "wrap", [spectral_norm, partial(prune.l1_unstructured, amount=0.5)], ids=["norm", "pruned"]
)
def test_a_weight_that_a_hook_makes_is_left_whatever_its_name(layer, name, wrap):
    model = nn.Sequential(nn.Linear(6, 6), wrap(copy.deepcopy(layer), name))
    with pytest.warns(fp.UnconvertedLayerWarning, match=r"'1' "):
        path = fp.untie(model, "fa")
    assert "1" not in path.layers


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_weight_that_a_hook_of_the_model_itself_makes_is_refused():
    for layer, name in ((nn.Linear(6, 6), "weight"), (Kernel(), "kernel"), (nn.LSTM(6, 6), "weight_hh_l0")):
        with pytest.raises(fp.UntieError, match="nothing to untie"):
            fp.untie(weight_norm(layer, name), "fa")
        path = fp.untie(nn.Sequential(layer), "fa")  # inside another, all of it is seen
        assert list(path.layers) == ["0"]
    with pytest.warns(fp.UnconvertedLayerWarning, match=r"'' \(MultiheadAttention\)"):
        path = fp.untie(weight_norm(nn.MultiheadAttention(6, 2), "in_proj_weight"), "fa")
    assert list(path.layers) == ["out_proj"]


def test_layers_of_a_kind_are_named_together_with_the_path_of_their_class():
    class Linear(nn.Bilinear):
        """Not torch's, whatever it is called."""

    model = nn.ModuleList([nn.Linear(3, 3), *(Linear(3, 3, 3) for _ in range(4))])
    named = r"'\*' \(4 times .*test_foreign\..*Linear, by wm\)"
    with pytest.warns(fp.UnconvertedLayerWarning, match=named):
        fp.untie(model, "wm")


class Positions(nn.Module):
    """Position embeddings and class tokens, as vision transformers have."""

    def __init__(self):
        super().__init__()
        self.token, self.table = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.bias, self.projection = nn.Parameter(torch.randn(9, 5)), nn.Linear(8, 8)
        self.used, self.made = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))

    def resized(self, count):
        if count == 4:
            return self.table
        first, rest = self.table[:, :1], self.table[:, 1:]
        grid = rest.reshape(1, 2, 2, 8)
        grid = F.interpolate(grid.permute(0, 3, 1, 2), size=(3, 3), mode="bicubic")
        return torch.cat((first, grid.flatten(2).transpose(1, 2)), dim=1)

    def relative(self):
        bias = self.bias[torch.zeros(25, dtype=torch.long)]
        return bias.view(5, 5, -1).permute(2, 0, 1).contiguous()

    def matrix(self):
        return self.made

    def forward(self, x):
        x = torch.cat((self.token.expand(len(x), -1, -1), self.projection(x)), dim=1)
        x = x + self.resized(4)
        mask = self.relative()
        x = F.scaled_dot_product_attention(
            *[x.view(len(x), 5, 1, 8).mT.mT.transpose(1, 2)] * 3, attn_mask=mask[0]
        )
        square = self.used
        return x @ square @ self.matrix()


def test_positions_and_tokens_are_no_weights_and_nothing_is_said_of_them():
    added = {name: is_only_added(Positions(), name) for name in ("token", "table", "bias", "used", "made")}
    assert added == {"token": True, "table": True, "bias": True, "used": False, "made": False}
    model = Positions()
    path = fp.untie(model, "fa", strict=True)
    assert [weight.weight_name for weight in path.weights] == ["used", "made", "weight"]
    model(torch.randn(2, 4, 8)).sum().backward()


class Tied(nn.Module):
    """A head that shares its weight with the table that tokens are looked up in."""

    def __init__(self):
        super().__init__()
        self.table, self.middle = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.middle(self.table(tokens))))


def update(model, optimizer, path, count):
    for _ in range(count):
        tokens = torch.randint(11, (4, 5))
        optimizer.zero_grad()
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten()).backward()
        optimizer.step()
        path.step()


@pytest.mark.parametrize("rule", ["kp", "mirror-kp"])
def test_a_tied_head_learns_in_b_what_w_learns_as_a_table_too(rule):
    """W - B decays by weight decay alone, and at its rate."""
    model = Tied().double()
    path = fp.untie(model, rule, strict=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    path.check_optimizer(optimizer)
    update(model, optimizer, path, 1)
    before = (model.head.weight - model.head.feedback).detach()
    update(model, optimizer, path, 20)
    torch.testing.assert_close(model.head.weight - model.head.feedback, before * 0.999**20)
    assert torch.equal(model.head.weight.grad, model.head.feedback.grad)
    assert fp.audit(lambda: update(model, optimizer, path, 1), path, steps=2).transport_free


@pytest.mark.parametrize("rule", [fp.KolenPollack(feedback_rate=0.5), "kp"])
def test_a_table_whose_gradient_b_cannot_take_over_is_named(rule):
    model = Tied()
    if rule == "kp":
        model.table.sparse = True
    with pytest.warns(fp.KolenPollackWarning, match="'head' are shared with layers that cannot be untied"):
        fp.untie(model, rule)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("rule", ["fa", "kp"])
def test_a_layer_without_neurons_is_no_matter(rule):
    model = nn.ModuleDict({"nothing": nn.Linear(4, 0), "something": nn.Linear(4, 3)})
    path = fp.untie(model, rule)
    assert model.nothing.feedback.shape == (0, 4)
    path.retie()


def test_a_model_and_its_path_are_saved_together(tmp_path):
    model = Tied()
    path = fp.untie(model, "kp")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    update(model, optimizer, path, 2)
    torch.save((model, path), tmp_path / "both")
    other, its_path = torch.load(tmp_path / "both", weights_only=False)
    its_optimizer = torch.optim.AdamW(other.parameters(), lr=0.01)
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one in ((model, optimizer, path), (other, its_optimizer, its_path)):
        torch.manual_seed(2)
        update(*one, 2)
    state = other.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
