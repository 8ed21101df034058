"""What follows a layer, seen in a forward pass: through whatever lies between, whoever wrote it."""

import copy
import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import feedbackpath as fp
from feedbackpath.mirror import MirrorMode
from feedbackpath.mirror.activations import identity, odd_slope

PROBE = torch.linspace(-3, 3, 13)


class Net(nn.Module):
    """One layer, what happens to its output, and a head."""

    def __init__(self, follow, width=4, *parts):
        super().__init__()
        self.layer, self.head = nn.Linear(4, width), nn.Linear(4, 4)
        self.gain, self.scale = nn.Parameter(torch.rand(width) + 0.5), nn.Parameter(torch.tensor(0.7))
        self.parts = nn.ModuleList(parts)
        self.follow = follow

    def forward(self, x):
        return self.head(self.follow(self, self.layer(x), x))


class QuickGelu(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class NormAct(nn.BatchNorm1d):
    """A norm with an activation inside, as timm has."""

    def __init__(self, features, act):
        super().__init__(features)
        self.act = act

    def forward(self, x):
        return self.act(F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True))


class RootMeanSquare(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def gelu_by_hand(x):
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608 * (x + 0.044715 * torch.pow(x, 3.0))))


def drop_path(x):
    return x.div(0.9) * x.new_empty(len(x), 1).bernoulli_(0.9)


FOLLOWED = {
    "module of one's own": (lambda net, y, x: net.parts[0](y), [QuickGelu()], QuickGelu()),
    "inside a norm": (lambda net, y, x: net.parts[0](y), [NormAct(4, nn.SiLU())], F.silu),
    "by hand": (lambda net, y, x: gelu_by_hand(y), [], gelu_by_hand),
    "squared": (lambda net, y, x: torch.relu(y).square(), [], lambda z: torch.relu(z).square()),
    "two at once": (
        lambda net, y, x: torch.relu(y) + torch.tanh(y), [], lambda z: torch.relu(z) + torch.tanh(z)
    ),
    "clamped": (lambda net, y, x: y.clamp(min=0.1, max=0.9), [], lambda z: z.clamp(0.1, 0.9)),
    "hidden by control flow": (lambda net, y, x: torch.relu(y) if x.sum() < 1e9 else y, [], torch.relu),
    "behind a scale": (lambda net, y, x: torch.relu(net.gain * y + x), [], torch.relu),
    "behind a scale of its own": (
        lambda net, y, x: torch.tanh(y * net.scale), [], lambda z: torch.tanh(0.7 * z)
    ),
    "behind a dropped path": (lambda net, y, x: torch.relu(x + drop_path(y)), [], torch.relu),
    "behind a root mean square": (lambda net, y, x: F.silu(net.parts[0](y)), [RootMeanSquare()], F.silu),
    "before a root mean square": (lambda net, y, x: net.parts[0](x + y), [RootMeanSquare()], identity),
    "a gate": (lambda net, y, x: x * torch.sigmoid(y), [], torch.sigmoid),
    "what is gated": (lambda net, y, x: y * torch.sigmoid(x), [], identity),
    "affine": (lambda net, y, x: 3.0 * y - 1.0, [], identity),
    "in place": (lambda net, y, x: F.relu_(y.add_(x)), [], torch.relu),
    "pooled": (lambda net, y, x: torch.relu(y).mean(0, keepdim=True), [], torch.relu),
    "joined": (lambda net, y, x: F.elu(torch.cat([y, x], 0)), [], F.elu),
    "cut": (lambda net, y, x: F.elu(y[:, :2].repeat(1, 2)), [], F.elu),
    "attention": (
        lambda net, y, x: F.scaled_dot_product_attention(y[None], x[None], x[None])[0], [], identity
    ),
}  # fmt: skip


def train(path, model, *x):
    """Train one step; return what is then taken to follow the layer, with the library's warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(*(x or [torch.randn(6, 4)])).square().mean().backward()
        path.step()
    return path.context.part(MirrorMode).activations, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("case", FOLLOWED)
def test_what_follows_is_seen_in_a_forward_pass(case):
    follow, parts, expected = FOLLOWED[case]
    model = Net(follow, 4, *parts)
    found, told = train(fp.untie(model, "wm"), model)
    torch.testing.assert_close(found["layer"](PROBE.clone()), expected(PROBE.clone()))
    assert found["head"] is identity
    assert not told


def test_a_setting_for_each_channel_is_kept():
    act = nn.PReLU(4)
    act.weight.data = torch.tensor([0.1, 0.2, 0.3, 0.4])
    model = Net(lambda net, y, x: act(y), 4, act)
    found, _ = train(fp.untie(model, "wm"), model)
    z = -torch.ones(2, 4)
    assert torch.equal(found["layer"](z), act(z))


def test_torchs_functions_are_known_as_such():
    model = Net(lambda net, y, x: F.leaky_relu(y, 0.5, True))
    found, _ = train(fp.untie(model, "wm"), model)
    assert odd_slope(found["layer"]) == pytest.approx(0.75)


class Opaque(torch.autograd.Function):
    """Code that nothing is seen of."""

    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(x.detach().numpy().clip(0))

    @staticmethod
    def backward(ctx, delta):
        return delta


@pytest.mark.parametrize(
    "follow",
    [
        lambda net, y, x: net.head(torch.relu(y)) + net.head(torch.tanh(y)),
        lambda net, y, x: torch.cat([F.leaky_relu(y, 0.1), F.leaky_relu(y, 0.2)], -1)[:, :4],
        lambda net, y, x: F.glu(torch.cat([y, y], -1)),
        lambda net, y, x: y.softmax(-1),
        lambda net, y, x: Opaque.apply(y) + x,
    ],
    ids=["two kinds", "two slopes", "glu", "softmax", "opaque"],
)
@pytest.mark.parametrize("rule", ["wm", "mirror-kp", "mirror-fa"])
def test_what_cannot_be_told_is_linear_and_named_once(follow, rule):
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.nets = nn.ModuleList(Net(follow) for _ in range(3))

        def forward(self, x):
            for net in self.nets:
                x = net(x)
            return x

    model = Chain()
    path = fp.untie(model, rule)
    found, told = train(path, model)
    assert found["nets.1.layer"] is identity
    named = [message for message in told if "is unknown" in message]
    assert len(named) == 1
    assert "'nets.*.layer' (3) is unknown, and is taken as linear; if it is not, give it" in named[0]
    assert not any("is unknown" in message for message in train(path, model)[1])


def test_what_is_given_goes_before_what_is_seen():
    model = Net(lambda net, y, x: torch.relu(y))
    found, told = train(fp.untie(model, "wm", activations={"layer": torch.tanh}), model)
    assert found["layer"] is torch.tanh
    assert not told


def test_what_is_seen_goes_before_what_a_trace_found():
    """Before the first step a trace has to do, which takes a norm of one's own for opaque."""
    model = Net(lambda net, y, x: net.parts[0](y), 4, NormAct(4, nn.SiLU()))
    path = fp.untie(model, "wm")
    with pytest.warns(fp.MirrorWarning, match=r"the activation after 'layer' is unknown.* take one first"):
        path.mirror(1)
    found, _ = train(path, model)
    torch.testing.assert_close(found["layer"](PROBE), F.silu(PROBE))


def test_outputs_of_any_form_leave_the_model():
    @dataclass
    class Output:
        value: Tensor

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return Output(self.one(x)), {"two": torch.sigmoid(self.two(x))}

    model = Model()
    path = fp.untie(model, "wm")
    one, two = model(torch.randn(3, 4))
    (one.value.sum() + two["two"].sum()).backward()
    path.step()
    found = path.context.part(MirrorMode).activations
    assert found["one"] is identity
    torch.testing.assert_close(found["two"](PROBE), PROBE.sigmoid())


def hooks_of(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("rule", ["wm", "mirror-kp", "mirror-fa"])
def test_nothing_is_left_on_the_model(rule):
    for end in ("step", "retie"):
        model = Net(lambda net, y, x: torch.relu(y))
        path = fp.untie(model, rule)
        assert hooks_of(model) > 0
        path.retie() if end == "retie" else train(path, model)
        assert hooks_of(model) == 0
        assert end == "retie" or not any(layer.untied.taps for layer in path.layers.values())


def test_a_copy_watches_nothing():
    model = Net(lambda net, y, x: torch.relu(y))
    path = fp.untie(model, "wm")
    other = copy.deepcopy(model)
    other(torch.randn(5, 4)).sum().backward()
    found, _ = train(path, model)
    torch.testing.assert_close(found["layer"](PROBE), torch.relu(PROBE))


def test_a_forward_pass_that_fails_leaves_no_watch_behind():
    model = Net(lambda net, y, x: 1 / 0)
    fp.untie(model, "wm")
    with pytest.raises(ZeroDivisionError):
        model(torch.randn(5, 4))
    assert torch.overrides._len_torch_function_stack() == 0


def test_a_plan_sees_what_follows():
    model = Net(lambda net, y, x: torch.relu(y) if x.sum() < 1e9 else y)
    path = fp.untie(model, "kp")
    x = torch.randn(8, 4)
    assert [layer.name for layer in path.plan(lambda: model(x).sum())] == ["layer", "head"]
    torch.testing.assert_close(path.context.part(MirrorMode).activations["layer"](PROBE), torch.relu(PROBE))
    assert hooks_of(model) == 0


def test_a_resumed_run_sees_the_same():
    def make():
        torch.manual_seed(5)
        model = Net(lambda net, y, x: net.parts[0](y), 4, NormAct(4, nn.SiLU()))
        return model, fp.untie(model, "wm")

    def steps(model, path, numbers):
        for number in numbers:
            torch.manual_seed(number)
            train(path, model)

    one, path = make()
    steps(one, path, [1, 2, 3, 4])
    model, path = make()
    steps(model, path, [1, 2])
    saved = copy.deepcopy((model.state_dict(), path.state_dict()))
    two, path = make()
    two.load_state_dict(saved[0])
    path.load_state_dict(saved[1])
    steps(two, path, [3, 4])
    assert all(
        torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    )
