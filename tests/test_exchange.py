"""Errors go through B, whatever reads the weight and however the model is run: never in silence through W."""

import copy
import gc
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from zoo import Zoo, ZooWithoutRecurrence, difference, gradients, let_feedback_be_weights, make_zoo, zoo_input

import feedbackpath as fp

ABOVE_ALL = {"embedding.weight"}  # the tied head: the last layer's own gradient takes no weight
compiled = pytest.mark.filterwarnings(
    "ignore:.*Function'> should not be instantiated:DeprecationWarning",
    "ignore:.*torch.jit.script_method.*:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",  # a graph break
)


def destroy(path):
    """Write NaN into every forward weight, unseen by autograd."""

    def between():
        for _, weight, _ in path.pairs():
            weight.data.fill_(float("nan"))

    return between


def check(make, x, run=lambda model: None, *, exact=True, tolerance=1e-12, recomputes=False):
    """Hold one way of running a model to the three facts: B=W, random B, W destroyed.

    Args:
        make: Makes the model, the same each time.
        x: Its input.
        run: Given the model, returns what to call on the input; None: the model itself.
        exact: Whether B=W gives autograd's gradients to the last bit.
        tolerance: Relative difference that is allowed where it does not.
        recomputes: Whether the forward pass runs again in the backward pass, so that it needs W then.
    """
    plain = make()
    output, expected = gradients(plain, x, run(plain))
    model = make()
    path = fp.untie(model, "fa")
    random_output, random = gradients(model, x, run(model))
    assert torch.equal(random_output, output) or not exact
    assert random.keys() == expected.keys()
    for name, found in random.items():
        if name in ABOVE_ALL or name in getattr(model, "last", ()):
            assert difference(found, expected[name]) <= max(tolerance, 1e-12)
        else:
            assert difference(found, expected[name]) > 0.05, name
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    if not recomputes:
        _, destroyed = gradients(model, x, run(model), destroy(path))
        for name in random:  # a compiler may choose other kernels the second time
            limit = 0.0 if exact else tolerance
            assert difference(destroyed[name], random[name]) <= limit, name
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(kept[name])
    let_feedback_be_weights(path)
    _, ours = gradients(model, x, run(model))
    for name in expected:
        if exact:
            assert torch.equal(ours[name], expected[name]), name
        else:
            assert difference(ours[name], expected[name]) <= tolerance, name


def test_everything_that_reads_a_weight():
    check(make_zoo, zoo_input())


def test_everything_in_float32():
    check(lambda: make_zoo(dtype=torch.float32), zoo_input(torch.float32), tolerance=1e-6)


IN_211 = pytest.mark.skipif(
    torch.__version__.startswith("2.11"), reason="Inductor of PyTorch 2.11 fails at attention in float64"
)


@compiled
@pytest.mark.parametrize(
    "backend", ["eager", "aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, IN_211])]
)
@pytest.mark.parametrize("kind", [Zoo, ZooWithoutRecurrence])
def test_compiled(backend, kind):
    torch._dynamo.reset()
    is_whole = kind is ZooWithoutRecurrence

    def run(model):
        return torch.compile(model, backend=backend, fullgraph=is_whole)

    check(lambda: make_zoo(kind), zoo_input(), run, exact=False, tolerance=1e-10)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_checkpointed_inside_the_model(kind):
    def make():
        model = make_zoo()
        model.checkpointing = kind
        return model

    check(make, zoo_input(), recomputes=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_as_a_whole(reentrant):
    check(
        make_zoo,
        zoo_input(),
        lambda model: lambda x: checkpoint(model, x, use_reentrant=reentrant),
        recomputes=True,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype):
    """W is cast in the open: with B=W gradients are autocast's own, bit for bit."""

    def run(model):
        def call(x):
            with torch.autocast("cpu", dtype):
                return model(x)

        return call

    check(lambda: make_zoo(dtype=torch.float32), zoo_input(torch.float32), run, tolerance=0.02)


def test_with_accumulation():
    plain, model = make_zoo(), make_zoo()
    let_feedback_be_weights(fp.untie(model, "kp", overrides={"head": "fa"}))
    for network in (plain, model):
        for part in zoo_input().split(1):
            network(part).square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), forward_parameters(model), strict=True):
        assert torch.equal(p.grad, q.grad), name


def forward_parameters(model):
    return [p for name, p in model.named_parameters() if not name.endswith("feedback")]


def test_kolen_pollack_feedback_gets_the_gradient_of_its_weight_everywhere():
    model = make_zoo()
    path = fp.untie(model, "kp", overrides={"head": "fa"})  # its weight is an embedding too
    model(zoo_input()).square().sum().backward()
    for name, weight, feedback in path.pairs():
        assert name == "head" or torch.equal(weight.grad, feedback.grad), name


@compiled
@pytest.mark.parametrize("rule", ["fa", "kp"])
def test_a_compiled_model_is_compiled_once(rule):
    """A new input is no reason to compile anew, nor is a new forward pass round a compiled part."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    whole, outer = Twice(), Twice()
    outer.second = nn.Sequential(nn.Linear(12, 5))
    for model in (whole, outer):
        fp.untie(model, rule)
    for run in (torch.compile(whole, backend=counter, fullgraph=True), outer):
        if run is outer:
            outer.second.compile(backend=counter, fullgraph=True)
        frames = counter.frame_count
        for _ in range(3):
            run(torch.randn(3, 6)).sum().backward()
        assert counter.frame_count == frames + 1
    torch._dynamo.reset()


class Twice(nn.Module):
    """Two layers, the second called by itself or not at all."""

    last = ("second.weight", "second.bias")

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize("make", [Twice, lambda: nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 5))])
def test_a_submodule_called_by_itself(make):
    def build():
        torch.manual_seed(1)
        return make().double()

    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    plain, model = build(), build()
    path = fp.untie(model, "fa")
    first, plain_first = next(model.children()), next(plain.children())
    (expected,) = torch.autograd.grad(plain_first(x).sum(), x)
    (random,) = torch.autograd.grad(first(x).sum(), x)
    assert difference(random, expected) > 0.3
    output = first(x).sum()
    destroy(path)()
    assert torch.equal(torch.autograd.grad(output, x)[0], random)
    path.model.load_state_dict(plain.state_dict())
    let_feedback_be_weights(path)
    assert torch.equal(torch.autograd.grad(first(x).sum(), x)[0], expected)


def test_functional_call_with_other_weights():
    def run(model):
        others = {name: 0.7 * p for name, p in model.named_parameters() if not name.endswith("feedback")}
        return lambda x: functional_call(model, others, (x,))

    plain, model = make_zoo(ZooWithoutRecurrence), make_zoo(ZooWithoutRecurrence)
    x = zoo_input()
    _, expected = gradients(plain, x, run(plain))
    path = fp.untie(model, "fa")
    _, random = gradients(model, x, run(model))
    assert all(difference(random[name], expected[name]) > 0.05 for name in expected.keys() - ABOVE_ALL)
    with torch.no_grad():
        for _, weight, feedback in path.pairs():
            feedback.copy_(0.7 * weight)
    _, ours = gradients(model, x, run(model))
    assert all(difference(ours[name], expected[name]) < 1e-12 for name in expected)


class Penalised(nn.Module):
    """Penalties on its weights inside the forward pass, in the forms that people write."""

    def __init__(self, penalty):
        super().__init__()
        self.matrix, self.head = nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 5)
        self.penalty = penalty

    def forward(self, x):
        return self.head(x @ self.matrix).sum() + self.penalty(self.matrix) + self.penalty(self.head.weight)


PENALTIES = {
    "square": lambda w: w.pow(2).sum(),
    "product": lambda w: (w * w).sum(),
    "norm": lambda w: w.norm(),
    "absolute": lambda w: w.abs().sum(),
    "orthogonal": lambda w: (w @ w.t() - torch.eye(len(w), dtype=w.dtype)).square().sum(),
    "of its data": lambda w: (w - w.data.mean()).square().mean().sqrt(),
}


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("rule", ["fa", "kp"])
def test_a_penalty_inside_the_forward_pass_belongs_to_the_weight_alone(penalty, rule):
    torch.manual_seed(1)
    model = Penalised(PENALTIES[penalty]).double()
    fp.untie(model, rule)
    x = torch.zeros(3, 6, dtype=torch.float64, requires_grad=True)
    model(x).backward()
    for name, weight in (("matrix", model.matrix), ("head.weight", model.head.weight)):
        alone = weight.detach().clone().requires_grad_()
        PENALTIES[penalty](alone).backward()
        extra = torch.zeros_like(alone) if name == "matrix" else torch.zeros_like(alone)
        torch.testing.assert_close(weight.grad, alone.grad + extra, rtol=1e-12, atol=1e-12)
    if rule == "kp":
        assert not model.matrix_feedback.grad.any()
        assert not model.head.feedback.grad.any()


MAKERS = {
    "cast": lambda w: w.to(torch.float32).to(torch.float64),
    "summed": lambda w: w + 0.5 * w.flip(0).flip(0),
    "standardised": lambda w: (w - w.mean(1, keepdim=True)) / (w.var(1, keepdim=True) + 1e-5).sqrt(),
    "normalised": lambda w: F.normalize(w, dim=1),
    "sign": lambda w: w + (w.sign() * w.abs().mean() - w).detach(),
    "masked": lambda w: w * (torch.arange(w.numel()).view_as(w) % 3 > 0),
    "transposed and stacked": lambda w: torch.stack([w, w])[1].t().contiguous().t(),
    "with noise": lambda w: w + 0.01 * torch.randn(w.shape, dtype=w.dtype),
    "with noise like it": lambda w: w + 0.01 * torch.randn_like(w),
    "dropped out": lambda w: F.dropout(w, 0.5),
    "changed in place": lambda w: w.clone().mul_(2.0),
    "looked up": lambda w: w[torch.arange(len(w))],
}  # fmt: skip


class Made(nn.Module):
    """A layer whose weight is made of a parameter before it is used."""

    last = ("head.weight", "head.bias")

    def __init__(self, maker, use):
        super().__init__()
        self.kernel, self.head = nn.Parameter(torch.randn(7, 6)), nn.Linear(7, 5)
        self.maker, self.use = maker, use

    def forward(self, x):
        torch.manual_seed(3)
        return self.head(self.use(x, self.maker(self.kernel)))


USES = {
    "linear": F.linear,
    "matmul": lambda x, w: x @ w.t(),
    "einsum": lambda x, w: torch.einsum("oi,ni->no", w, x),
    "mul and sum": lambda x, w: (x[:, None, :] * w).sum(-1),
    "copied inside": lambda x, w: torch.matmul(w, x[..., None].expand(2, *x.shape, 1))[0, ..., 0],
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("maker", MAKERS)
def test_a_weight_that_is_made_of_a_parameter(maker, use):
    def make():
        torch.manual_seed(1)
        return Made(MAKERS[maker], USES[use]).double()

    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    plain = make()
    output, expected = gradients(plain, x)
    model = make()
    path = fp.untie(model, "fa")
    found_output, random = gradients(model, x)
    assert torch.equal(found_output, output)
    assert difference(random["x"], expected["x"]) > 0.05
    assert difference(random["kernel"], expected["kernel"]) > 0.05
    kept = model.kernel.detach().clone()
    (destroyed,) = [gradients(model, x, None, lambda: model.kernel.data.fill_(float("nan")))[1]["x"]]
    assert torch.equal(destroyed, random["x"])
    model.kernel.data.copy_(kept)
    let_feedback_be_weights(path)
    _, ours = gradients(model, x)
    assert all(difference(ours[name], expected[name]) < 1e-12 for name in expected)


def test_weights_that_are_multiplied_with_each_other_are_named():
    class LowRank(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 6))

        def forward(self, x):
            return x @ (self.up @ self.down)

    model = LowRank()
    fp.untie(model, "fa")
    with pytest.warns(fp.UnconvertedLayerWarning, match="'up', 'down' are multiplied with each other"):
        model(torch.randn(3, 6, requires_grad=True))


@pytest.mark.parametrize("rule", ["fa", "kp"])
def test_feedback_that_changed_since_the_forward_pass_is_refused(rule):
    model = Twice()
    fp.untie(model, rule)
    loss = model(torch.randn(3, 6)).sum()
    with torch.no_grad():
        model.second.feedback.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_activity_that_changed_since_the_forward_pass_is_refused():
    model = Twice()
    fp.untie(model, "fa")
    x = torch.randn(3, 6)
    loss = model(x).sum()
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_outer_hooks_see_what_autograd_would_show_them():
    def count(model, x):
        shapes = []

        def pack(saved):
            rows = saved.reshape(-1, saved.shape[-1])  # attention's x is saved in rows, or as it is
            shapes.append(sorted(rows.shape))  # a linear layer's B is saved as it is, W transposed
            return saved.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
            model(x).square().sum().backward()
        return sorted(shapes)

    plain, model = make_zoo(ZooWithoutRecurrence), make_zoo(ZooWithoutRecurrence)
    expected = count(plain, zoo_input())
    fp.untie(model, "fa")
    assert count(model, zoo_input()) == expected


@pytest.mark.parametrize("rule", ["fa", "kp"])
def test_saved_tensors_can_go_to_another_device(rule):
    model = make_zoo()
    fp.untie(model, rule, overrides={"head": "fa"})
    _, expected = gradients(model, zoo_input())

    def run(x):
        with torch.autograd.graph.save_on_cpu():
            return model(x)

    _, found = gradients(model, zoo_input(), run)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.filterwarnings("ignore:the weights of 'head' are shared")
@pytest.mark.parametrize("make", [lambda: make_zoo(ZooWithoutRecurrence), lambda: Twice().double()])
@pytest.mark.parametrize("rule", ["fa", "kp"])
def test_torch_func(make, rule):
    model = make()
    fp.untie(model, rule)
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    _, expected = gradients(model, x)
    loss = lambda x: model(x).square().sum()  # noqa: E731
    torch.testing.assert_close(grad(loss)(x), expected["x"])
    torch.testing.assert_close(vmap(grad(lambda one: loss(one[None])))(x), expected["x"])
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    others = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    found = grad(lambda w: functional_call(model, {**w, **others}, (x,)).square().sum())(weights)
    for name, gradient in expected.items():
        if name in found:
            torch.testing.assert_close(found[name], gradient)


def test_torch_func_refuses_recurrent_layers():
    model = nn.Sequential(nn.Linear(6, 6), nn.LSTM(6, 6))
    fp.untie(model, "fa")
    with pytest.raises(fp.UntieError, match=r"the weight of '1\.weight_ih_l0'.* goes into lstm"):
        grad(lambda x: model(x)[0].sum())(torch.randn(3, 6))


@pytest.mark.parametrize("rule", ["fa", "kp", "bp"])
def test_copies_and_pickles_stand_on_their_own(rule):
    model = make_zoo()
    fp.untie(model, rule, overrides={"head": "fa"})
    _, expected = gradients(model, zoo_input())
    for double in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        places = {p.data_ptr() for p in model.parameters()}
        assert places.isdisjoint(p.data_ptr() for p in double.parameters())
        _, found = gradients(double, zoo_input())
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_gradient_penalty_trains_the_weight_and_its_feedback_alike():
    """The second derivative goes where the first one went: to W, and to B where it learns."""
    model = nn.Linear(3, 1, bias=False)
    fp.untie(model, "kp")
    x = torch.randn(5, 3, requires_grad=True)
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    ((g.norm(dim=1) - 1) ** 2).mean().backward()
    assert model.weight.grad.any()
    assert torch.equal(model.weight.grad, model.feedback.grad)


def test_in_place_work_on_an_output_is_as_free_as_in_torch():
    for rule in ("fa", "kp"):
        model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True))
        fp.untie(model, rule)
        model(torch.randn(2, 3, 6)).sum().backward()


def test_no_gradients_mean_no_watching():
    """Without gradients a model runs as it was, on PyTorch's fast paths too."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        expected = layer(x)
        fp.untie(layer, "fa")
        assert torch.equal(layer(x), expected)


class Blocks(nn.Module):
    """Blocks that are checkpointed one by one, and note the memory of what they compute inside."""

    def __init__(self, kind):
        super().__init__()
        make = lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))  # noqa: E731
        self.blocks, self.kind, self.inside = nn.ModuleList(make() for _ in range(4)), kind, []
        for block in self.blocks:
            for layer in block[:2]:
                layer.register_forward_hook(self.note)

    def note(self, layer, args, output):
        self.inside.append(StorageWeakRef(output.untyped_storage()))

    def forward(self, x):
        for block in self.blocks:
            if self.kind == "plain":
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.kind == "reentrant")
        return x


@pytest.mark.parametrize(
    "rule", [None, "kp", *(pytest.param(rule, marks=pytest.mark.slow) for rule in ("fa", "bp"))]
)
@pytest.mark.parametrize("kind", ["plain", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("shape", [pytest.param((5, 8), marks=pytest.mark.slow), (2, 5, 8)])
def test_checkpointing_frees_what_it_is_meant_to_free(rule, kind, shape):
    """What a block computes inside is gone after the forward pass: in plain torch, and untied."""
    model = Blocks(kind)
    if rule is not None:
        fp.untie(model, rule)
    loss = model(torch.randn(*shape, requires_grad=True)).square().sum()
    gc.collect()
    alive = sum(not reference.expired() for reference in model.inside)
    assert alive == (len(model.inside) if kind == "plain" else 0)
    loss.backward()


def test_outer_no_grad_and_enabled_gradients_inside():
    """A layer that runs under gradients of its own sends errors through B, whatever is off outside."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                (found,) = torch.autograd.grad(self.layer(x).sum(), x)
            return found

    model = Inner()
    fp.untie(model, "fa")
    with torch.no_grad():
        found = model(torch.randn(3, 6))
    torch.testing.assert_close(found, torch.ones(3, 6) @ model.layer.feedback)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("settings", [{}, {"bidirectional": True}, {"num_layers": 2, "dropout": 0.3}])
def test_recurrent_layers(kind, settings):
    class Net(nn.Module):
        last = ("head.weight", "head.bias")

        def __init__(self):
            super().__init__()
            self.cells = kind(6, 5, batch_first=True, **settings)
            self.head = nn.Linear(5 * (2 if settings.get("bidirectional") else 1), 3)

        def forward(self, x):
            torch.manual_seed(3)
            return self.head(self.cells(x)[0])

    def make():
        torch.manual_seed(1)
        return Net().double()

    check(make, zoo_input())


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_cells_of_recurrent_layers(kind):
    class Net(nn.Module):
        last = ("head.weight", "head.bias")

        def __init__(self):
            super().__init__()
            self.cell, self.head = kind(6, 5), nn.Linear(5, 3)

        def forward(self, x):
            state = None
            for step in x.unbind(1):
                state = self.cell(step, state)
            return self.head(state[0] if isinstance(state, tuple) else state)

    def make():
        torch.manual_seed(1)
        return Net().double()

    check(make, zoo_input())


def test_parameters_that_are_only_added_get_no_feedback_weight():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions = nn.Parameter(torch.randn(5, 6))
            self.kind = nn.Parameter(torch.randn(2, 6))
            self.mix = nn.Parameter(torch.randn(6, 6))

        def forward(self, x):
            x = x + self.positions[: x.shape[1]].unsqueeze(0)
            return torch.cat([self.kind[:1].expand(len(x), -1, -1), x], 1) @ self.mix

    model = Tokens()
    path = fp.untie(model, "kp", strict=True)
    assert [name for name, _, _ in path.pairs()] == [""]
    assert set(model.state_dict()) == {"positions", "kind", "mix", "mix_feedback"}
    model(torch.randn(2, 5, 6)).sum().backward()
    assert model.positions.grad.any()


def test_a_layer_that_came_after_untie_is_named():
    model = Twice()
    fp.untie(model, "fa")
    model.second = nn.Linear(12, 4)
    with pytest.warns(fp.UnconvertedLayerWarning, match=r"of shape \[4, 12\] that has no feedback weight"):
        model(torch.randn(3, 6))


class Reader(nn.Module):
    """A module that reads matrices of its own in some way."""

    last = ()

    def __init__(self, parameters, run):
        super().__init__()
        for name, shape in parameters.items():
            is_list = isinstance(shape, list)
            made = [nn.Parameter(torch.randn(size)) for size in (shape if is_list else [shape])]
            setattr(self, name, nn.ParameterList(made) if is_list else made[0])
        self.run = run

    def forward(self, x):
        return self.run(self, x)


def mix_experts(m, x):
    chosen = x.argmax(-1) % 3
    return torch.bmm(x.unsqueeze(1), m.w[chosen]).squeeze(1)


def use_lists(m, x):
    for w in m.ws:
        x = torch.tanh(x @ w)
    with torch.device("cpu"):
        return x + torch.zeros(6, dtype=x.dtype)


READERS = {
    "experts": ({"w": (3, 6, 6)}, mix_experts),
    "a list": ({"ws": [(6, 6), (6, 6)]}, use_lists),
    "learned queries": (
        {"q": (4, 6), "k": (6, 6)},
        lambda m, x: (m.q @ F.linear(x, m.k).t()).softmax(-1) @ x,
    ),
    "a raw table": ({"t": (9, 6), "w": (6, 6)}, lambda m, x: (m.t[torch.arange(5)] + x) @ m.w @ m.t.t()),
    "a batch of maps": ({"w": (3, 6, 4)}, lambda m, x: x[:, None, None] @ m.w),
    "a map of three directions": ({"w": (2, 6, 4)}, lambda m, x: torch.tensordot(x, m.w, dims=([1], [1]))),
    "a long convolution": (
        {"w": (4, 6)},
        lambda m, x: torch.fft.irfft(torch.fft.rfft(x[:, None], 12) * torch.fft.rfft(m.w, 12), 12)[..., :6],
    ),
    "spectra": (
        {"w": (6, 4, 2)},
        lambda m, x: torch.view_as_real(torch.einsum("bi,io->bo", x + 0j, torch.view_as_complex(m.w))),
    ),
    "a basis with kernels of activity": ({"w": (4, 6)}, lambda m, x: F.conv1d(m.w[:, None], x[:, None, :3])),
    "a codebook that comes first": ({"w": (4, 6)}, lambda m, x: F.linear(m.w, x)),
    "sparse activity": ({"w": (6, 4)}, lambda m, x: torch.sparse.mm((x * (x > 0)).to_sparse(), m.w)),
    "distances": ({"w": (4, 6)}, lambda m, x: torch.cdist(x, m.w)),
    "divisors": ({"w": (4, 6)}, lambda m, x: x[:, None] / m.w),
    "a learned memory": (
        {"k": (1, 1, 7, 6), "v": (1, 1, 7, 6)},
        lambda m, x: F.scaled_dot_product_attention(x[None, None], m.k, m.v)[0, 0],
    ),
}


@pytest.mark.parametrize("rule", ["fa", "kp"])
@pytest.mark.parametrize("reader", READERS)
def test_modules_that_read_matrices_of_their_own(reader, rule):
    def make():
        torch.manual_seed(1)
        return Reader(*READERS[reader]).double()

    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    plain, model = make(), make()
    output, expected = gradients(plain, x)
    path = fp.untie(model, rule)
    found_output, random = gradients(model, x)
    assert torch.equal(found_output, output)
    assert difference(random["x"], expected["x"]) > 0.05
    kept = copy.deepcopy(model.state_dict())
    _, destroyed = gradients(model, x, None, destroy(path))
    assert torch.equal(destroyed["x"], random["x"])
    model.load_state_dict(kept)
    let_feedback_be_weights(path)
    _, ours = gradients(model, x)
    assert all(difference(ours[name], expected[name]) < 1e-12 for name in expected)


# Not linear in the weight: its own gradient needs W itself.
CURVED = {
    "cdist": lambda m, x: torch.cdist(x, m.w),
    "a divisor": lambda m, x: x[:, None] / m.w,
    "an exponent": lambda m, x: (x.abs()[:, None] + 1).pow(m.w),
    "atan2": lambda m, x: torch.atan2(x[:, None], m.w),
    "logaddexp": lambda m, x: torch.logaddexp(x[:, None], m.w),
    "cosine": lambda m, x: F.cosine_similarity(x[:, None], m.w[None], -1),
    "pairwise": lambda m, x: F.pairwise_distance(x[:, None], m.w[None]),
    "keys": lambda m, x: F.scaled_dot_product_attention(x[None], m.w[None], x[None, :4]),
    "a query": lambda m, x: F.scaled_dot_product_attention(m.w[None], x[None], x[None]),
}


@pytest.mark.parametrize("rule", ["fa", "kp"])
@pytest.mark.parametrize("run", CURVED.values(), ids=CURVED)
def test_an_operation_that_is_not_linear_in_w_is_that_of_b_for_its_input_alone(run, rule):
    torch.manual_seed(1)
    plain = Reader({"w": (4, 6)}, run).double()
    model, of_b = copy.deepcopy(plain), copy.deepcopy(plain)
    ((_, _, b),) = fp.untie(model, rule).pairs()
    of_b.w.data.copy_(b.data)
    x = torch.randn(5, 6, dtype=torch.float64)
    output, expected = gradients(plain, x)
    found_output, found = gradients(model, x)
    asked = x.clone().requires_grad_()
    for_x, for_b = torch.autograd.grad(of_b(asked), [asked, of_b.w], 2 * output)
    assert torch.equal(found_output, output)
    assert difference(found["w"], expected["w"]) < 1e-12
    assert difference(found["x"], for_x) < 1e-12
    assert difference(found["x"], expected["x"]) > 0.05
    if rule == "kp":  # B learns at B: W's gradient depends on W
        assert difference(model.w_feedback.grad, for_b) < 1e-12


class Chain(nn.Module):
    """A product of many factors, whose order the operation chooses by itself."""

    def __init__(self, run):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(5, 2))
        self.run = run

    def forward(self, x):
        return self.run(self, x)


CHAINS = {
    "multi_dot": lambda m, x: torch.linalg.multi_dot([x, m.a, m.b]),
    "einsum": lambda m, x: torch.einsum("bi,ij,jk->bk", x, m.a, m.b),
    "twice the input": lambda m, x: torch.einsum("bi,ij,bi->bj", x, m.a, x) @ m.b,
    "behind a constant": lambda m, x: torch.einsum("bi,ij,bj->bj", x, m.a, torch.ones(9, 5).double()) @ m.b,
}


@pytest.mark.parametrize("rule", ["fa", "kp"])
@pytest.mark.parametrize("run", CHAINS.values(), ids=CHAINS)
def test_no_error_passes_what_a_chain_of_products_made_of_w(run, rule):
    torch.manual_seed(1)
    plain = Chain(run).double()
    model, of_b = copy.deepcopy(plain), copy.deepcopy(plain)
    path = fp.untie(model, rule)
    of_b.a.data.copy_(model.a_feedback.data)
    of_b.b.data.copy_(model.b_feedback.data)
    x = torch.randn(9, 6, dtype=torch.float64)
    output, expected = gradients(plain, x)
    found_output, found = gradients(model, x)
    asked = x.clone().requires_grad_()
    (for_x,) = torch.autograd.grad(of_b(asked), asked, 2 * output)
    assert torch.equal(found_output, output)
    assert difference(found["x"], for_x) < 1e-12
    let_feedback_be_weights(path)
    _, ours = gradients(model, x)
    assert all(difference(ours[name], expected[name]) < 1e-12 for name in expected)


def test_dropout_behind_a_learned_memory_draws_once():
    torch.manual_seed(1)
    run = lambda m, x: F.scaled_dot_product_attention(x[None], m.w[None], m.w[None], dropout_p=0.5)  # noqa: E731
    plain = Reader({"w": (4, 6)}, run).double()
    model = copy.deepcopy(plain)
    let_feedback_be_weights(fp.untie(model, "fa"))
    x = torch.randn(5, 6, dtype=torch.float64)
    found = []
    for net in (plain, model):
        torch.manual_seed(2)
        found.append((*gradients(net, x), torch.rand(3)))
    (output, expected, after), (ours, grads, then) = found
    assert torch.equal(ours, output)
    assert torch.equal(then, after)
    assert all(difference(grads[name], expected[name]) < 1e-12 for name in expected)


@pytest.mark.parametrize("name", ["addcdiv_", "pow_", "atan2_"])
def test_a_curved_operation_in_place_is_refused(name):
    given = (torch.ones(5, 4, 6, dtype=torch.float64),) if name == "addcdiv_" else ()
    model = Reader(
        {"w": (4, 6)}, lambda m, x: getattr(x[:, None] + torch.ones(4, 1), name)(*given, m.w)
    ).double()
    fp.untie(model, "fa")
    with pytest.raises(fp.UntieError, match=f"goes into {name}, and errors cannot be sent"):
        model(torch.rand(5, 6, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: F.cosine_similarity(x[:, None], m.w[None], -1),
        lambda m, x: F.pairwise_distance(x[:, None], m.w[None]),
        lambda m, x: F.triplet_margin_loss(x, m.w, m.w.flip(0)),
    ],
)
def test_what_hides_a_copy_of_a_weight_is_refused_or_goes_through_feedback(run):
    torch.manual_seed(1)
    plain = Reader({"w": (5, 6)}, run).double()
    model = copy.deepcopy(plain)
    fp.untie(model, "fa")
    x = torch.randn(5, 6, dtype=torch.float64)
    _, expected = gradients(plain, x)
    try:
        _, found = gradients(model, x)
    except fp.UntieError as error:
        assert "errors cannot be sent through a feedback weight there" in str(error)  # noqa: PT017
    else:
        assert difference(found["x"], expected["x"]) > 0.05
