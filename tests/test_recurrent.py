"""Recurrent layers: every step of backprop through time goes through B, under every rule that serves them."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import feedbackpath as fp
from feedbackpath.mirror.activations import Gates, find_activations

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
LAYERS = {
    "rnn": lambda **given: nn.RNN(4, 3, **given),
    "rnn-relu": lambda **given: nn.RNN(4, 3, nonlinearity="relu", **given),
    "lstm": lambda **given: nn.LSTM(4, 3, **given),
    "lstm-projected": lambda **given: nn.LSTM(4, 5, proj_size=3, **given),
    "gru": lambda **given: nn.GRU(4, 3, **given),
}
SETTINGS = {
    "plain": {},
    "two layers": {"num_layers": 2},
    "both directions": {"num_layers": 2, "bidirectional": True},
    "dropout": {"num_layers": 2, "dropout": 0.5},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "packed": {"bidirectional": True},
}
CELLS = {
    "rnn": lambda: nn.RNNCell(4, 3),
    "rnn-relu": lambda: nn.RNNCell(4, 3, nonlinearity="relu"),
    "lstm": lambda: nn.LSTMCell(4, 3),
    "gru": lambda: nn.GRUCell(4, 3),
}
over_layers = pytest.mark.parametrize("kind", LAYERS)
over_settings = pytest.mark.parametrize("setting", SETTINGS)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
over_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
over_cells = pytest.mark.parametrize("kind", CELLS)


class Through(torch.autograd.Function):
    """``x W^T`` forward; the error goes back through B: the slow reference."""

    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, b)
        return x @ w.t()

    @staticmethod
    def backward(ctx, delta):
        x, b = ctx.saved_tensors
        return delta @ b, delta.t() @ x, None


def run_steps(layer, x, feedback, which="l0"):
    """Run one layer of a recurrent net in plain loops ``[T, N, in]``, each product by itself."""

    def times(signal, name):
        w = getattr(layer, name)
        return Through.apply(signal, w, feedback.get(name, w))

    kind = type(layer).__name__.removeprefix("Feedback")
    n = layer.hidden_size
    h = x.new_zeros(x.shape[1], getattr(layer, "proj_size", 0) or n)
    c, outputs = x.new_zeros(x.shape[1], n), []
    end = f"_{which}" if which else ""
    b_ih, b_hh = getattr(layer, f"bias_ih{end}"), getattr(layer, f"bias_hh{end}")
    for x_t in x:
        from_x, from_h = times(x_t, f"weight_ih{end}") + b_ih, times(h, f"weight_hh{end}") + b_hh
        if kind.startswith("LSTM"):
            i, f, g, o = (from_x + from_h).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            if getattr(layer, "proj_size", 0):
                h = times(h, f"weight_hr{end}")
        elif kind.startswith("GRU"):
            (r, z, g), (r2, z2, g2) = from_x.chunk(3, 1), from_h.chunk(3, 1)
            r, z = (r + r2).sigmoid(), (z + z2).sigmoid()
            h = (1 - z) * (g + r * g2).tanh() + z * h
        else:
            h = getattr(torch, layer.nonlinearity)(from_x + from_h)
        outputs.append(h)
    return torch.stack(outputs)


def call(layer, x, setting="plain"):
    torch.manual_seed(2)  # dropout
    if setting == "packed":
        x = pack_padded_sequence(x, [5, 4, 2], enforce_sorted=True)
    output = layer(x)[0]
    return output.data if isinstance(output, PackedSequence) else output


def unroll(cell, x):
    state, outputs = None, []
    for x_t in x:
        state = cell(x_t, state)
        outputs.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(outputs)


def gradients(output, parameters):
    torch.manual_seed(3)
    return torch.autograd.grad((output * torch.randn_like(output)).sum(), parameters)


def randomise(path):
    with torch.no_grad():
        for _, _, b in path.pairs():
            b.normal_()


def as_w(path):
    with torch.no_grad():
        for _, w, b in path.pairs():
            b.copy_(w)


@over_devices
@over_layers
@over_settings
def test_b_equal_to_w_is_autograd_to_the_last_bit_and_beside_cudnn_to_rounding(kind, setting, device):
    if device == "cuda" and setting == "dropout":
        pytest.skip("cuDNN draws random numbers of its own")
    torch.manual_seed(0)
    like = {"device": device, "dtype": torch.float32 if device == "cpu" else torch.float64}
    tolerance = 0.0 if device == "cpu" else 1e-6
    assert_same = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    plain = LAYERS[kind](**SETTINGS[setting]).to(**like)
    x = torch.randn(5, 3, 4, requires_grad=True, **like)
    layer = copy.deepcopy(plain)
    layer.flatten_parameters()  # into the one buffer that cuDNN wants; nothing on a CPU
    path = fp.untie(layer, "fa")
    weights = [name for name, p in plain.named_parameters() if name.startswith("weight_")]
    assert [name for name, _, _ in path.pairs()] == weights
    expected = call(plain, x, setting)
    assert_same(call(layer, x, setting), expected)
    as_w(path)
    exact = gradients(expected, [x, *plain.parameters()])
    own = [x, *(dict(layer.named_parameters())[name] for name, _ in plain.named_parameters())]
    ours = gradients(call(layer, x, setting), own)
    for one, other in zip(ours, exact, strict=True):
        assert_same(one, other)
    randomise(path)
    random = gradients(call(layer, x, setting), own)
    assert not torch.allclose(random[0], exact[0])
    assert not torch.allclose(random[1], exact[1])  # errors of later steps reach it through B


@over_layers
def test_each_step_goes_through_b_as_plain_loops_have_it(kind):
    torch.manual_seed(0)
    layer = LAYERS[kind]().double()
    path = fp.untie(layer, "fa")
    randomise(path)
    x = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    feedback = {name: b for name, _, b in path.pairs()}
    parameters = [x, *(p for p in layer.parameters() if p.requires_grad)]
    expected = gradients(run_steps(layer, x, feedback), parameters)
    for ours, theirs in zip(gradients(layer(x)[0], parameters), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@over_cells
def test_cells_do_so_too(kind):
    torch.manual_seed(0)
    cell = CELLS[kind]().double()
    x = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    exact = gradients(unroll(cell, x), [x, *cell.parameters()])
    path = fp.untie(cell, "fa")
    parameters = [x, *(p for p in cell.parameters() if p.requires_grad)]
    as_w(path)
    ours = gradients(unroll(cell, x), parameters)
    assert all(torch.equal(one, other) for one, other in zip(ours, exact, strict=True))
    randomise(path)
    expected = gradients(run_steps(cell, x, {name: b for name, _, b in path.pairs()}, ""), parameters)
    for ours, theirs in zip(gradients(unroll(cell, x), parameters), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@over_layers
@pytest.mark.parametrize("setting", ["both directions", "packed"])
def test_kp_gives_b_the_gradient_of_w_and_ss_its_signs(kind, setting):
    torch.manual_seed(0)
    layer = LAYERS[kind](**SETTINGS[setting])
    path = fp.untie(layer, "kp")
    call(layer, torch.randn(5, 3, 4), setting).square().sum().backward()
    assert all(torch.equal(w.grad, b.grad) and w.grad.any() for _, w, b in path.pairs())
    signs = fp.untie(path.retie(), "ss")
    assert all(torch.equal(w.sign(), b.sign()) for _, w, b in signs.pairs())


def test_kp_brings_an_lstm_together():
    torch.manual_seed(0)
    layer = nn.LSTM(4, 3, num_layers=2)
    path = fp.untie(layer, "kp")
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01, weight_decay=10.0)
    fp.share_moments(path, optimizer)
    x, target = torch.randn(5, 3, 4), torch.randn(5, 3, 3)
    for _ in range(60):  # 0.9^60: six e-folds
        optimizer.zero_grad()
        (call(layer, x) - target).square().sum().backward()
        optimizer.step()
        path.step()
    assert all(angle < 5 for angle in path.matrix_angles().values())


@pytest.mark.parametrize("rule", ["wm", "wm-exact", "mirror-kp", "mirror-fa"])
@pytest.mark.parametrize("kind", ["rnn-relu", "lstm-projected", "gru"])
def test_mirrors_find_the_weights_of_recurrent_layers(kind, rule):
    torch.manual_seed(0)
    layer = LAYERS[kind](num_layers=2, bidirectional=True)
    path = fp.untie(layer, rule, strict=True)
    path.mirror()
    limit = 0.01 if rule == "wm-exact" else 4
    assert all(angle < limit for angle in path.matrix_angles().values())
    assert all(0.9 < gain < 1.1 for gain in path.gains().values())


@over_cells
def test_mirrors_find_the_weights_of_cells(kind):
    torch.manual_seed(0)
    path = fp.untie(CELLS[kind](), "wm", strict=True)
    path.mirror()
    assert all(angle < 4 for angle in path.matrix_angles().values())


def test_each_gate_answers_by_its_own_nonlinearity():
    nets = nn.ModuleDict({name: make() for name, make in LAYERS.items()})
    names = [f"{n}.weight_{w}_l0" for n in nets for w in ("ih", "hh")] + ["lstm-projected.weight_hr_l0"]
    found, z = find_activations(nets, names), torch.randn(2, 12)
    # Gate by gate: on some processors kernels round by the length of a row.
    i, f, g, o = z.chunk(4, 1)
    lstm = torch.cat([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], 1)
    assert torch.equal(found["lstm.weight_ih_l0"](z), lstm)
    assert torch.equal(found["lstm.weight_hh_l0"](z), lstm)
    gru = torch.cat([i.sigmoid(), f.sigmoid(), g.tanh()], 1)
    assert torch.equal(found["gru.weight_hh_l0"](z[:, :9]), gru)
    assert torch.equal(found["rnn.weight_ih_l0"](z), z.tanh())
    assert torch.equal(found["rnn-relu.weight_ih_l0"](z), z.relu())
    assert torch.equal(found["lstm-projected.weight_hr_l0"](z), z)
    with pytest.raises(RuntimeError):
        Gates(torch.sigmoid, torch.tanh)(torch.zeros(1, 3))


def test_a_mirror_in_training_fires_as_much_as_the_minibatch_has():
    """The state's size is not the input's, and no rule may run short of noise for it."""
    torch.manual_seed(0)
    model = nn.LSTM(4, 3, batch_first=True)
    path = fp.untie(model, "wm")
    path.mirror()
    plan = path.plan(lambda: model(torch.randn(8, 5, 4))[0].square().sum())
    assert {(layer.samples, layer.positions) for layer in plan} == {(8, 5)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 5, 4))[0].square().sum().backward()
        optimizer.step()
        path.step()
    assert all(angle < 25 for angle in path.matrix_angles().values())


@pytest.mark.parametrize("rule", ["kp", "wm", "mirror-kp"])
def test_the_audit_passes_recurrent_layers(rule):
    torch.manual_seed(0)
    model = nn.LSTM(4, 3)
    path = fp.untie(model, rule)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.1)
    x = torch.randn(5, 3, 4)

    def step():
        optimizer.zero_grad()
        model(x)[0].square().sum().backward()
        optimizer.step()
        path.step()

    if rule == "mirror-kp":
        path.mirror()
    assert fp.audit(step, path).transport_free


class WithState(nn.Module):
    """A recurrent layer, or a cell, that begins with a state that is learned."""

    def __init__(self, kind, bidirectional, of_cell):
        super().__init__()
        self.is_lstm, self.of_cell = kind == "LSTM", of_cell
        self.first, self.head = nn.Linear(6, 4), nn.Linear(3 * (1 + bidirectional), 2)
        if of_cell:
            self.net = getattr(nn, f"{kind}Cell")(4, 3)
            self.state = nn.Parameter(torch.randn(5, 3))
        else:
            self.net = getattr(nn, kind)(4, 3, num_layers=2, bidirectional=bidirectional, batch_first=True)
            self.state = nn.Parameter(torch.randn(2 * (1 + bidirectional), 1, 3))

    def begin(self, batch):
        return self.state.expand(-1, batch, -1).contiguous() if not self.of_cell else self.state

    def forward(self, x):
        state = self.begin(len(x))
        x = self.first(x)
        state = (state, torch.zeros_like(state)) if self.is_lstm else state
        if not self.of_cell:
            return self.head(self.net(x, state)[0])
        for step in x.unbind(1):
            state = self.net(step, state)
        return self.head(state[0] if self.is_lstm else state)


class Curved(WithState):
    """The same, by a way that cannot be read off the code: the state has a B, which nothing uses."""

    def begin(self, batch):
        state = 2 * self.state
        return state.expand(-1, batch, -1).contiguous() if not self.of_cell else state


@pytest.mark.parametrize("rule", ["fa", "kp"])
@pytest.mark.parametrize("of_cell", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("model", [WithState, Curved])
def test_a_learned_first_state_is_activity(model, kind, bidirectional, of_cell, rule):
    torch.manual_seed(0)
    plain = model(kind, bidirectional and not of_cell, of_cell).double()
    untied = copy.deepcopy(plain)
    path = fp.untie(untied, rule)
    with torch.no_grad():
        for name, w, b in path.pairs():
            b.copy_(w if name else torch.randn_like(w))
    x = torch.randn(5, 7, 6, dtype=torch.float64)
    for net in (plain, untied):
        net(x).square().sum().backward()
    assert all(torch.equal(p.grad, untied.get_parameter(name).grad) for name, p in plain.named_parameters())
    assert model is Curved or all(name for name, _, _ in path.pairs())


class Dropped(nn.Module):
    """A recurrent weight that is made of another one in each forward pass, as weight drop does."""

    def __init__(self):
        super().__init__()
        self.net = nn.LSTM(4, 3)
        self.raw = nn.Parameter(self.net.weight_hh_l0.detach().clone())

    def forward(self, x):
        self.net._parameters["weight_hh_l0"] = nn.functional.dropout(self.raw, 0.5, self.training)
        return self.net(x)[0]


@pytest.mark.filterwarnings("ignore:no untied form")
@pytest.mark.parametrize("rule", ["kp", "mirror-kp"])
def test_a_weight_that_a_forward_pass_has_made_is_refused_where_b_learns(rule):
    model = Dropped()
    model(torch.randn(5, 2, 4))
    with pytest.raises(
        fp.RuleError, match="'net.weight_hh_l0' is made of other parameters in each forward pass"
    ):
        fp.untie(model, rule)
    assert type(model.net) is nn.LSTM
    assert "weight_hh_l0_feedback" not in dict(model.net.named_parameters())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_gain_of_the_older_weight_norm_is_shared_with_w():
    layer = nn.utils.weight_norm(nn.LSTM(4, 3), "weight_hh_l0")
    path = fp.untie(nn.Sequential(nn.Linear(4, 4), layer), "fa")
    assert [name for name, _, _ in path.pairs()] == ["0", "1.weight_ih_l0", "1.weight_hh_l0_v"]
