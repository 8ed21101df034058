"""What is read off a module's code: whether a matrix is only added, and whether any weight is taken up.

A module that counts as quiet is not watched. If its code took up a weight all the same, errors would go back
through that weight in silence. So each way to get at one that anybody thought of stands here.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from problems import PAPER_RULES, rule_that_starts_at_once
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import feedbackpath as fp
from feedbackpath.core.usage import quiet_modules
from feedbackpath.models import build_model

SIZE = 6
TABLE = nn.Parameter(torch.randn(SIZE, SIZE))
KEPT = []


class Net(nn.Module):
    """Two layers and what stands between them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.scale, self.is_deep, self.act = 0.5, True, F.relu
        self.layers = nn.ModuleList([nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)])
        self.parts = nn.ModuleDict({"a": nn.Linear(SIZE, SIZE)})
        self.gain = nn.Parameter(torch.ones(SIZE))
        self.table = nn.Embedding(SIZE, SIZE)
        self.register_buffer("mask", torch.ones(SIZE, SIZE, dtype=torch.bool))
        self.register_buffer("fixed", torch.ones(SIZE, SIZE))


def scaled(x, layer, by=2.0):
    return by * layer(x) / math.sqrt(SIZE)


def read_from(x, layer):
    return x @ layer.weight.t()


class Calls(Net):
    def forward(self, x):
        return self.second(self.act(self.first(x)) * self.scale)


class Loops(Net):
    def forward(self, x):
        outputs = []
        for number, layer in enumerate(self.layers):
            x = torch.tanh(layer(x)) if self.is_deep else x
            outputs.append(x * (number + 1))
        return torch.cat(outputs, dim=-1).view(len(x), 2, -1).mean(1) + self.parts["a"](x)


class Helpers(Net):
    def forward(self, x):
        return checkpoint(lambda y: scaled(y, self.second), self._middle(x), use_reentrant=False)

    def _middle(self, x):
        with torch.autocast("cpu", enabled=False):
            return x.masked_fill(self.mask[: len(x)], 0.0) + self.first(x) * self.gain


class Positions(Net):
    def forward(self, x):
        return self.second(self.first(x) + self.table.weight)


class HandsAMask(Net):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(SIZE, 2, SIZE, dropout=0.0)

    def forward(self, x):
        return self.encoder(self.second(x).unsqueeze(1), src_mask=self.fixed).squeeze(1)


class HandsAWeight(HandsAMask):
    def forward(self, x):
        return self.encoder(self.second(x).unsqueeze(1), self.first.weight).squeeze(1)


class PrunedKernel(Net):
    def __init__(self):
        super().__init__()
        self.kernel = Kernel()
        prune.l1_unstructured(self.kernel, "kernel", 0.3)

    def forward(self, x):
        return self.kernel(self.first(x))


class Kernel(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(SIZE, SIZE))

    def forward(self, x):
        return x @ self.kernel


class Reads(Net):
    def forward(self, x):
        return x @ self.first.weight.t() + self.second(x)


class ReadsInAHelper(Net):
    def forward(self, x):
        return read_from(x, self.first) + self.second(x)


class ReadsInALoop(Net):
    def forward(self, x):
        for layer in self.layers:
            x = x @ layer.weight
        return x


class ReadsByName(Net):
    def forward(self, x):
        return x @ getattr(self.first, "wei" + "ght")


class ReadsAll(Net):
    def forward(self, x):
        for parameter in self.parameters():
            x = x @ parameter if parameter.dim() == 2 else x
        return x


class ReadsState(Net):
    def forward(self, x):
        return x @ self.first.state_dict(keep_vars=True)["weight"]


class ReadsInside(Net):
    def forward(self, x):
        return x @ self.first._parameters["weight"]


class ReadsVars(Net):
    def forward(self, x):
        return x @ vars(self.first)["_parameters"]["weight"]


class ReadsGlobal(Net):
    def forward(self, x):
        return self.first(x @ TABLE)


class ReadsGlobalList(Net):
    def forward(self, x):
        return self.first(x) @ KEPT[-1]


class ReadsTable(Net):
    def forward(self, x):
        return self.first(x) @ self.table.weight.t()


class SumsWeights(Net):
    def forward(self, x):
        return x @ (self.first.weight + self.second.weight)


class SumsAndReads(Net):
    def forward(self, x):
        zero = torch.zeros(SIZE, SIZE)
        return x @ (self.first.weight + zero)


class JoinsWeights(Net):
    def forward(self, x):
        return x @ torch.cat([self.first.weight, self.second.weight]).t()


class UsesBuffer(Net):
    def forward(self, x):
        return self.first(x) @ self.fixed


class Stores(Net):
    def forward(self, x):
        self.seen = x
        return self.first(self.seen)


class RenamesItself(Net):
    def forward(self, x):
        self = self.first
        return F.linear(x, self.weight)


class TakesAWeight(Net):
    def forward(self, x, w=TABLE):
        return self.first(x) @ w


class ShadowsAGlobal(Net):
    def forward(self, x):
        inner = [TABLE + 1 for TABLE in ()]
        return self.first(x) @ (inner or TABLE)


class Super(Calls):
    def forward(self, x):
        return super().forward(x)


class Property(Net):
    @property
    def w(self):
        return self.first.weight

    def forward(self, x):
        return x @ self.w


class ClassAttribute(Net):
    w = TABLE

    def forward(self, x):
        return self.first(x @ self.w)


class Decorated(Net):
    @torch.enable_grad()
    def forward(self, x):
        return self.first(x)


class Imports(Net):
    def forward(self, x):
        from operator import attrgetter

        return x @ attrgetter("first.weight")(self)


class UsesNN(Net):
    def forward(self, x):
        return x @ nn.Module.__getattr__(self.first, "weight")


class Bank(nn.Module):
    """A module that hands a weight of its own out."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(SIZE, SIZE))

    def forward(self):
        return self.kernel


class UsesABank(Net):
    def __init__(self):
        super().__init__()
        self.bank = Bank()

    def forward(self, x):
        return self.first(x) @ self.bank()


class Teller(nn.Module):
    """A module with a method that is named as one of a tensor's."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(SIZE, SIZE)

    def forward(self, x):
        return self.inner(x)

    def view(self):
        return self.inner.weight


class AsksATeller(Net):
    def __init__(self):
        super().__init__()
        self.tellers = nn.ModuleList([Teller()])

    def forward(self, x):
        for teller in self.tellers:
            x = x @ teller.view()
        return x


class Iterates(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(SIZE, SIZE)

    def __iter__(self):
        yield self.inner.weight

    def forward(self, x):
        return self.inner(x)


class UsesAnIterator(Net):
    def __init__(self):
        super().__init__()
        self.inner = Iterates()

    def forward(self, x):
        for w in self.inner:
            x = x @ w
        return x


class UsesAList(Net):
    def __init__(self):
        super().__init__()
        self.ws = nn.ParameterList([torch.randn(SIZE, SIZE)])

    def forward(self, x):
        for w in self.ws:
            x = self.first(x) @ w
        return x


class HidesAList(Net):
    def __init__(self):
        super().__init__()
        self.hidden = [self.first.weight]

    def forward(self, x):
        return x @ self.hidden[0]


QUIET = [Calls, Loops, Helpers, Positions, HandsAMask]
NOT_QUIET = [
    Reads, ReadsInAHelper, ReadsInALoop, ReadsByName, ReadsAll, ReadsState, ReadsInside, ReadsVars,
    ReadsGlobal, ReadsGlobalList, ReadsTable, SumsWeights, SumsAndReads, JoinsWeights, UsesBuffer, Stores,
    RenamesItself, TakesAWeight, ShadowsAGlobal, Super, Property, ClassAttribute, Decorated, Imports, UsesNN,
    HandsAWeight, PrunedKernel, UsesABank, AsksATeller, UsesAnIterator, UsesAList, HidesAList,
]  # fmt: skip


@pytest.mark.parametrize("kind", QUIET, ids=lambda kind: kind.__name__)
def test_code_that_only_calls_layers_is_quiet(kind):
    model = kind()
    assert id(model) in quiet_modules(model)
    path = fp.untie(model, "fa")
    assert not model.untied.is_watched
    x = torch.randn(SIZE, SIZE, requires_grad=True)
    model(x).square().sum().backward()
    through_feedback, x.grad = x.grad, None
    path.retie()
    model(x).square().sum().backward()
    assert not torch.allclose(x.grad, through_feedback)


@pytest.mark.parametrize("kind", NOT_QUIET, ids=lambda kind: kind.__name__)
def test_code_that_may_take_up_a_weight_is_not_quiet(kind):
    model = kind()
    assert id(model) not in quiet_modules(model)


@pytest.mark.parametrize("change", ["forward", "lambda"])
def test_code_that_cannot_be_read_is_not_quiet(change):
    model = Calls()
    if change == "forward":
        model.forward = lambda x: x @ model.first.weight
    else:
        model.act = eval("lambda x: x")
    assert id(model) not in quiet_modules(model)


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "resnet50", "transformer", "lenet", "mlp"])
def test_the_networks_of_the_library_are_quiet(name):
    model = build_model(name, sample_shape=(3, 32, 32), num_classes=10)
    assert id(model) in quiet_modules(model)


@pytest.mark.parametrize("rule", PAPER_RULES)
def test_no_rule_makes_a_quiet_network_watched(rule):
    model = build_model("mlp", sample_shape=(1, 4, 4), num_classes=3)
    path = fp.untie(model, rule_that_starts_at_once(rule))
    model(torch.randn(2, 1, 4, 4)).sum().backward()
    path.step()
    assert not model.untied.is_watched


def test_what_is_put_into_a_quiet_module_is_watched():
    model = Calls()
    fp.untie(model, "fa")
    model.train()
    model.scale = 0.25
    assert not model.untied.is_watched
    model.act = lambda x: x @ model.first.weight.t()
    assert model.untied.is_watched


def errors_at_input(model, x, *args):
    x = x.clone().requires_grad_()
    model(x, *args).square().sum().backward()
    return x.grad


class Given(Net):
    def forward(self, x, w):
        return self.first(x) @ w


def test_a_weight_that_is_given_as_an_argument_is_watched():
    model = Given()
    fp.untie(model, "fa", overrides={"first": "bp"})
    x = torch.randn(3, SIZE)
    ours = errors_at_input(model, x, model.second.weight)
    with torch.no_grad():
        backprop = 2 * model(x, model.second.weight) @ model.second.weight.t() @ model.first.weight
    assert not torch.allclose(ours, backprop)


@pytest.mark.parametrize("put", ["in a module", "in a Sequential"])
def test_a_layer_that_comes_after_untie_is_named_by_step(put):
    model = nn.Sequential(Calls(), nn.Linear(SIZE, SIZE))
    path = fp.untie(model, "fa")
    path.step()
    if put == "in a module":
        model[0].layers.append(nn.Linear(SIZE, SIZE))
    else:
        model.append(nn.Linear(SIZE, SIZE))
    with pytest.warns(fp.UnconvertedLayerWarning, match="came into the model after it was untied"):
        path.step()
    for _ in range(8):
        path.step()  # said once


class Adapter(nn.Module):
    """A weight, and a low-rank matrix that is added to it."""

    def __init__(self):
        super().__init__()
        self.base = nn.Parameter(torch.randn(SIZE, SIZE))
        self.down, self.up = nn.Parameter(torch.randn(2, SIZE)), nn.Parameter(torch.randn(SIZE, 2))

    def forward(self, x):
        return x @ (self.base + self.up @ self.down)


def test_a_weight_that_another_is_added_to_is_no_position_embedding():
    model = nn.Sequential(nn.Linear(SIZE, SIZE), Adapter())
    path = fp.untie(model, "fa")
    with pytest.warns(fp.UnconvertedLayerWarning, match="multiplied with each other"):
        model(torch.randn(2, SIZE))
    assert [name for name, _, _ in path.pairs()] == ["0", "1.base", "1.down", "1.up"]


@pytest.mark.parametrize("read", [lambda w: w.t(), lambda w: w.T, lambda w: w.to(torch.float32).mT])
def test_a_table_that_is_read_back_is_named(read):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.layer = nn.Embedding(9, SIZE), nn.Linear(SIZE, SIZE)

        def forward(self, ids):
            return self.layer(self.table(ids)) @ read(self.table.weight)

    model = Tied()
    fp.untie(model, "fa")
    with pytest.warns(fp.UnconvertedLayerWarning, match="has no feedback weight goes into matmul"):
        model(torch.arange(9))
