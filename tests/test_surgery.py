"""What untie converts, what it refuses and how it says so, and what survives it."""

import warnings

import pytest
import torch
from problems import MLP, make_convnet, make_encoder, make_mlp, make_nested
from torch import nn

import feedbackpath as fp
from feedbackpath.core.modules import FeedbackModule


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


class NamedLinear(nn.Linear):
    """A subclass that computes what its base does."""


class ScaledLinear(nn.Linear):
    """A subclass with a forward pass of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


class Functional(nn.Module):
    """A module with a matrix of its own beside its layers."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(x @ self.matrix)


def make_compiled_in_place():
    model = make_mlp()
    model.compile(backend="eager")
    return model


def make_distributed(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        return nn.parallel.DistributedDataParallel(make_mlp())
    finally:
        torch.distributed.destroy_process_group()


REFUSED = {
    "data parallel": (lambda: nn.DataParallel(make_mlp()), r"wrapped in DataParallel: untie model\.module"),
    "compiled": (lambda: torch.compile(make_mlp(), backend="eager"), "compiled: untie the plain model first"),
    "compiled in place": (make_compiled_in_place, "compiled: untie the plain model first"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), r"'0' \(LazyLinear\) is lazy .* run one forward pass"),
    "nothing but weights that B could not follow": (
        lambda: nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(6, 3))),
        r"nothing to untie in Sequential: .* has an untied form: '0' \(Linear\)",
    ),
    "nothing to convert": (
        lambda: nn.Sequential(nn.ReLU(), nn.Embedding(3, 4), nn.LayerNorm(4)),
        "nothing to untie in Sequential: no module in it owns a matrix that a signal passes through",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_cannot_be_untied_are_refused_with_the_remedy(case):
    make, message = REFUSED[case]
    with pytest.raises(fp.UntieError, match=message):
        fp.untie(make(), "fa")


def test_a_distributed_model_is_refused_with_the_remedy(tmp_path):
    model = make_distributed(tmp_path)
    with pytest.raises(fp.UntieError, match=r"wrapped in DistributedDataParallel: untie model\.module first"):
        fp.untie(model, "fa")


def test_torchscript_is_refused_with_the_remedy():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)  # from torch 2.14 on
        model = torch.jit.script(make_mlp())
    with pytest.raises(fp.UntieError, match="TorchScript .* untie the Python model"):
        fp.untie(model, "fa")


def test_a_model_is_untied_once():
    model = make_mlp()
    path = fp.untie(model, "fa")
    with pytest.raises(fp.UntieError, match=r"'0' \(FeedbackLinear\) is untied already: call path\.retie"):
        fp.untie(model, "kp")
    path.retie()
    with pytest.raises(fp.UntieError, match="already retied"):
        path.retie()
    assert fp.untie(model, "kp").layers.keys() == path.layers.keys()


def test_all_faults_are_named_at_once():
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3, device="meta"), nn.LazyLinear(2))
    with pytest.raises(fp.UntieError, match=r"'0' .*; '1' .*; '2' "):
        fp.untie(model, "fa")
    assert isinstance(model[0], nn.LazyLinear)


class WithBilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.two, self.one = nn.Bilinear(6, 6, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.one(self.two(x, x))


# Layers that are more than one product of an input and a weight.
MORE = {
    "recurrent": (Recurrent, "lstm", "LSTM"),
    "own forward": (lambda: nn.Sequential(ScaledLinear(6, 6), nn.Linear(6, 3)), "0", "ScaledLinear"),
    "own matrix": (Functional, "", "Functional"),
    "bilinear": (WithBilinear, "two", "Bilinear"),
}


@pytest.mark.parametrize("case", MORE)
@pytest.mark.parametrize("rule", ["fa", "ss", "kp"])
def test_every_module_with_a_matrix_is_converted_whatever_it_computes(case, rule):
    make, name, kind = MORE[case]
    plain, model = make().double(), make().double()
    model.load_state_dict(plain.state_dict())
    path = fp.untie(model, rule, strict=True)
    assert name in path.layers
    assert len(path.layers) == 2
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    expected, random = (torch.autograd.grad(m(x).square().sum(), x)[0] for m in (plain, model))
    assert (random - expected).norm() / expected.norm() > 0.3
    for _, weight, feedback in path.pairs():
        feedback.data.copy_(weight)
    assert torch.equal(torch.autograd.grad(model(x).square().sum(), x)[0], expected)
    path.retie()
    assert type(model.get_submodule(name)).__name__ == kind


@pytest.mark.parametrize("case", ["bilinear"])
@pytest.mark.parametrize("rule", ["wm", "mirror-kp", "mirror-fa"])
def test_layers_that_a_rule_does_not_serve_are_named(case, rule):
    make, name, kind = MORE[case]
    named = rf"'{name}' \({kind}, by {rule}\)"
    with pytest.warns(
        fp.UnconvertedLayerWarning, match=f"no untied form exists for {named}: errors still go back"
    ):
        path = fp.untie(make(), rule, activations={"*": lambda y: y})
    assert len(path.layers) == 1
    assert name not in path.layers
    model = make()
    with pytest.raises(fp.UntieError, match=f"{named}.* replace these layers"):
        fp.untie(model, rule, strict=True, activations={"*": lambda y: y})
    assert not any(isinstance(module, FeedbackModule) for module in model.modules())


def test_a_model_that_its_rule_serves_nowhere_is_refused():
    model = nn.Bilinear(6, 6, 4)
    with pytest.raises(fp.UntieError, match=r"'' \(Bilinear, by wm\).* give them another rule by overrides="):
        fp.untie(model, "wm")
    assert type(model) is nn.Bilinear


def test_a_layer_whose_forward_was_replaced_is_named():
    """Such a layer would go on running the replacement, and backprop, in silence."""
    model = make_mlp()
    model[0].forward = lambda x: torch.nn.functional.linear(x, model[0].weight)
    with pytest.warns(fp.UnconvertedLayerWarning, match=r"'0' \(Linear\)"):
        path = fp.untie(model, "fa")
    assert list(path.layers) == ["2", "4"]
    with pytest.raises(fp.UntieError, match=r"'0' \(Linear\).* replace these layers"):
        fp.untie(path.retie(), "fa", strict=True)


def test_subclasses_that_keep_the_forward_pass_are_converted_and_restored():
    model = nn.Sequential(NamedLinear(6, 3))
    path = fp.untie(model, "fa", strict=True)
    assert isinstance(model[0], FeedbackModule)
    assert isinstance(model[0], NamedLinear)
    path.retie()
    assert type(model[0]) is NamedLinear


def test_norms_and_embeddings_need_no_feedback_weight():
    model = nn.Sequential(
        nn.Embedding(9, 6), nn.Linear(6, 6), nn.LayerNorm((4, 6)), nn.PReLU(), nn.Linear(6, 3)
    )
    assert list(fp.untie(model, "fa", strict=True).layers) == ["1", "4"]


def test_lazy_layers_are_converted_after_a_forward_pass():
    model = nn.Sequential(nn.LazyLinear(3))
    model(torch.randn(2, 6))
    fp.untie(model, "fa")
    assert model[0].feedback.shape == (3, 6)


def test_hooks_and_buffers_survive():
    model, calls = make_mlp(), []
    model[0].register_buffer("marker", torch.tensor(7.0))
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[0].register_full_backward_hook(lambda *_: calls.append("backward"))
    path = fp.untie(model, "fa")
    model(torch.randn(2, 6, requires_grad=True)).sum().backward()
    path.retie()
    model(torch.randn(2, 6, requires_grad=True)).sum().backward()
    assert calls == ["forward", "backward"] * 2
    assert model[0].marker == 7.0


@pytest.mark.parametrize("make", [make_mlp, make_nested, make_convnet, make_encoder])
def test_every_layer_with_weights_is_converted(make):
    model = make()
    path = fp.untie(model, "fa", strict=True)
    modules = [module for module in model.modules() if isinstance(module, FeedbackModule)]
    untied = {id(module) for module in modules if module.untied.weights}  # containers are watched alone
    assert untied == {id(layer) for layer in path.layers.values()}
    assert all(model.get_submodule(name) is layer for name, layer in path.layers.items())


def test_a_model_stays_plain_when_its_rule_fails():
    class Failing(fp.FeedbackAlignment):
        def start(self, weights, context):
            super().start(weights, context)
            raise fp.RuleError("no")

    model = nn.Sequential(nn.Linear(6, 6))
    keys = list(model.state_dict())
    with pytest.raises(fp.RuleError, match="no"):
        fp.untie(model, Failing())
    assert type(model[0]) is nn.Linear
    assert list(model.state_dict()) == keys


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_a_compiled_part_of_a_model_does_not_fall_back_to_backprop():
    """A layer compiled by itself is either refused or gives the gradient that goes through B."""
    model = nn.Sequential(torch.compile(nn.Linear(6, 6), backend="eager"), nn.ReLU(), nn.Linear(6, 3))
    x = MLP.inputs(torch.float32)[0]
    (backprop,) = torch.autograd.grad(model(x).sum(), x)
    fp.untie(model, "fa")
    (ours,) = torch.autograd.grad(model(x).sum(), x)
    assert not torch.allclose(ours, backprop)
    torch._dynamo.reset()
