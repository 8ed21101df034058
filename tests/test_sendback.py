"""Who carries the error: broadcast and target rules against slow readings of their equations."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import feedbackpath as fp


@dataclass(frozen=True)
class Broadcasting(fp.Rule):
    name: ClassVar[str] = "broadcasting"
    send_back: ClassVar[fp.SendBack] = fp.Broadcast()

    def start(self, weights, context):
        with torch.no_grad():
            for weight in weights:
                std = 1.0 / math.sqrt(len(weight.feedback))
                weight.feedback.normal_(0.0, std, generator=context.generator(weight, self.name))


@dataclass(frozen=True)
class LearnedBroadcasting(Broadcasting):
    name: ClassVar[str] = "learned-broadcasting"
    learns: ClassVar[bool] = True


def numbers(tensor):
    return tensor.detach().numpy()


def output_error(logits, target):
    """Return dL/d(logits) of the mean cross entropy."""
    e = np.exp(logits - logits.max(1, keepdims=True))
    e /= e.sum(1, keepdims=True)
    e[np.arange(len(e)), target] -= 1.0
    return e / len(e)


def make_mlp():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3)
    ).double()  # fmt: skip


def make_convnet():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3), nn.Tanh(), nn.Flatten(),
        nn.Linear(48, 3),
    ).double()  # fmt: skip


X, TARGET = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).double(), torch.arange(5) % 3
IMAGES = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(1)).double()


def test_broadcast_errors_of_an_mlp_are_numpys():
    model = make_mlp()
    path = fp.untie(model, Broadcasting())
    assert list(path.pairs()) == []
    F.cross_entropy(model(X), TARGET).backward()
    feedback = {name: numbers(b) for name, _, b in path.pairs()}
    assert {name: b.shape for name, b in feedback.items()} == {"2": (3, 9), "4": (3, 8)}
    (W1, b1), (W2, b2), (W3, b3) = [(numbers(model[i].weight), numbers(model[i].bias)) for i in (0, 2, 4)]
    h1 = np.tanh(X.numpy() @ W1.T + b1)
    h2 = np.tanh(h1 @ W2.T + b2)
    e = output_error(h2 @ W3.T + b3, TARGET.numpy())
    delta2 = e @ feedback["4"] * (1 - h2**2)
    delta1 = e @ feedback["2"] * (1 - h1**2)
    for layer, expected in ((4, e.T @ h2), (2, delta2.T @ h1), (0, delta1.T @ X.numpy())):
        assert np.abs(numbers(model[layer].weight.grad) - expected).max() < 1e-10


def correlate(image, kernel):
    """Slide a kernel ``[O, C, k, k]`` over images ``[N, C, H, W]``, loop by loop."""
    n, _, height, width = image.shape
    size = kernel.shape[2]
    out = np.zeros((n, len(kernel), height - size + 1, width - size + 1))
    for i in range(out.shape[2]):
        for j in range(out.shape[3]):
            out[:, :, i, j] = np.einsum("ncab,ocab->no", image[:, :, i : i + size, j : j + size], kernel)
    return out


def kernel_gradient(image, delta, size):
    """Sum delta times the receptive fields that it came from."""
    found = np.zeros((delta.shape[1], image.shape[1], size, size))
    for i in range(delta.shape[2]):
        for j in range(delta.shape[3]):
            found += np.einsum("no,ncab->ocab", delta[:, :, i, j], image[:, :, i : i + size, j : j + size])
    return found


def test_broadcast_errors_of_a_convolutional_net_are_numpys():
    model = make_convnet()
    path = fp.untie(model, Broadcasting())
    F.cross_entropy(model(IMAGES), TARGET).backward()
    feedback = {name: numbers(b) for name, _, b in path.pairs()}
    assert {name: b.shape for name, b in feedback.items()} == {"2": (3, 4, 6, 6), "5": (3, 48)}
    padded = np.pad(IMAGES.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    h1 = np.tanh(correlate(padded, numbers(model[0].weight)) + numbers(model[0].bias)[:, None, None])
    h2 = np.tanh(correlate(h1, numbers(model[2].weight)) + numbers(model[2].bias)[:, None, None])
    logits = h2.reshape(5, -1) @ numbers(model[5].weight).T + numbers(model[5].bias)
    e = output_error(logits, TARGET.numpy())
    delta2 = (e @ feedback["5"]).reshape(h2.shape) * (1 - h2**2)
    delta1 = np.einsum("no,ochw->nchw", e, feedback["2"]) * (1 - h1**2)
    expected = {
        "0": kernel_gradient(padded, delta1, 3),
        "2": kernel_gradient(h1, delta2, 3),
        "5": e.T @ h2.reshape(5, -1),
    }
    for name, gradient in expected.items():
        found = numbers(path.layers[name].weight.grad)
        assert np.abs(found - gradient).max() < 1e-10, name
    assert np.abs(numbers(model[0].bias.grad) - delta1.sum((0, 2, 3))).max() < 1e-10


def test_a_broadcast_feedback_weight_that_learns_gets_its_own_outer_product():
    model = make_mlp()
    path = fp.untie(model, LearnedBroadcasting())
    model(X)
    inputs = {}
    for name in ("2", "4"):
        path.layers[name].register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args[0]}))
    logits = model(X)
    F.cross_entropy(logits, TARGET).backward()
    e = torch.from_numpy(output_error(numbers(logits), TARGET.numpy()))
    for name, _, feedback in path.pairs():
        torch.testing.assert_close(feedback.grad, e.t() @ inputs[name].detach())


def gradients_of(model, x, run=None):
    model.zero_grad()
    F.cross_entropy((run or model)(x), TARGET).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_equal(ours, expected):
    assert len(ours) == len(expected)
    assert all(torch.equal(*pair) for pair in zip(ours, expected, strict=True))


@pytest.mark.parametrize(("make", "x"), [(make_mlp, X), (make_convnet, IMAGES)])
def test_broadcasting_does_not_ask_for_forward_weights(make, x):
    model = make()
    path = fp.untie(model, Broadcasting())
    expected = gradients_of(model, x)
    model.zero_grad()
    loss = F.cross_entropy(model(x), TARGET)
    for _, weight, _ in path.pairs():
        weight.data.fill_(float("nan"))
    loss.backward()
    assert_equal([p.grad for p in model.parameters() if p.grad is not None], expected)


def test_the_forward_pass_of_other_carriers_is_bit_identical():
    plain = make_convnet()
    for rule in (Broadcasting(), MEAN_TARGETS):
        model = make_convnet()
        fp.untie(model, rule)
        assert torch.equal(model(IMAGES), plain(IMAGES))


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_broadcasting_when_compiled_checkpointed_and_copied():
    import copy

    model = make_convnet()
    fp.untie(model, Broadcasting())
    expected = gradients_of(model, IMAGES)
    torch._dynamo.reset()
    compiled = gradients_of(model, IMAGES, torch.compile(model, backend="aot_eager"))
    torch.testing.assert_close(compiled, expected)
    torch._dynamo.reset()
    assert_equal(gradients_of(copy.deepcopy(model), IMAGES), expected)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = make_convnet()

        def forward(self, x):
            return self.layers[5](checkpoint(self.layers[:5], x, use_reentrant=False))

    inside = Checkpointed()
    path = fp.untie(inside, Broadcasting(), seed=3)
    inside(IMAGES)
    with torch.no_grad():
        for name, _, feedback in path.pairs():
            feedback.copy_(model[int(name.rpartition(".")[2])].feedback)
    assert_equal(gradients_of(inside, IMAGES), expected)


def test_broadcast_feedback_is_saved_and_loaded():
    model, other = make_convnet(), make_convnet()
    path = fp.untie(model, Broadcasting())
    model(IMAGES)
    again = fp.untie(other, Broadcasting(), seed=5)
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(a[2], b[2]) for a, b in zip(path.pairs(), again.pairs(), strict=True))
    assert path.matrix_angles() == {}
    assert path.retie() is model
    assert "2.feedback" not in model.state_dict()


def test_delta_angles_of_a_broadcast_rule_compare_with_backprop():
    model = make_mlp()
    path = fp.untie(model, Broadcasting())
    angles = path.delta_angles(lambda: F.cross_entropy(model(X), TARGET))
    assert angles.keys() == {"0", "2", "4"}
    assert angles["4"] == 0.0
    assert all(30 < angles[name] < 150 for name in ("0", "2"))


def test_what_broadcasting_cannot_do_is_said():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.second(torch.relu(self.first(x)).repeat(2, 1)).view(2, -1, 6).mean(0))

    model = Pooled().double()
    fp.untie(model, Broadcasting())
    with pytest.raises(fp.RuleError, match=r"the input of 'second' has shape \[10, 6\] .* the same samples"):
        model(X)

    class Pair(nn.Sequential):
        def forward(self, x):
            return super().forward(x), x

    pair = Pair(nn.Linear(6, 6), nn.Linear(6, 3))
    fp.untie(pair, Broadcasting())
    with pytest.raises(fp.RuleError, match="a model that returns one tensor, not a tuple"):
        pair(torch.randn(2, 6))
    with pytest.warns(fp.UnconvertedLayerWarning, match=r"'1' \(LSTM, by broadcasting\)"):
        fp.untie(nn.Sequential(nn.Linear(6, 6), nn.LSTM(6, 6)), Broadcasting())


def linear_inverse(weight, y):
    return y @ weight.feedback


def bounded_inverse(weight, y):
    return torch.tanh(y.flatten(1) @ weight.feedback.flatten(1)[:, : 1 if y.dim() > 2 else None])


@dataclass(frozen=True)
class LinearTargets(fp.Rule):
    name: ClassVar[str] = "linear-targets"
    send_back: ClassVar[fp.SendBack] = fp.Target(linear_inverse)


@dataclass(frozen=True)
class BoundedTargets(fp.Rule):
    name: ClassVar[str] = "bounded-targets"
    send_back: ClassVar[fp.SendBack] = fp.Target(bounded_inverse)


@dataclass(frozen=True)
class MeanTargets(fp.Rule):
    name: ClassVar[str] = "mean-targets"
    send_back: ClassVar[fp.SendBack] = fp.Target(lambda weight, y: y)


MEAN_TARGETS = MeanTargets()


def test_linear_targets_are_feedback_alignment():
    model, other = make_mlp(), make_mlp()
    fp.untie(model, LinearTargets())
    fp.untie(other, "fa")
    torch.testing.assert_close(gradients_of(model, X), gradients_of(other, X))


def test_targets_are_those_of_difference_target_propagation():
    """The error at x is g(y) - g(y - delta): x - (x - g(y) + g(target of y))."""
    model = make_mlp()
    fp.untie(model, BoundedTargets())
    found = gradients_of(model, X)
    (W1, b1), (W2, b2), (W3, b3) = [(numbers(model[i].weight), numbers(model[i].bias)) for i in (0, 2, 4)]
    B2, B3 = numbers(model[2].feedback), numbers(model[4].feedback)
    h1 = np.tanh(X.numpy() @ W1.T + b1)
    z2 = h1 @ W2.T + b2
    h2 = np.tanh(z2)
    z3 = h2 @ W3.T + b3
    e = output_error(z3, TARGET.numpy())
    delta2 = (np.tanh(z3 @ B3) - np.tanh((z3 - e) @ B3)) * (1 - h2**2)
    delta1 = (np.tanh(z2 @ B2) - np.tanh((z2 - delta2) @ B2)) * (1 - h1**2)
    for gradient, expected in zip(found[::2], (delta1.T @ X.numpy(), delta2.T @ h1, e.T @ h2), strict=True):
        assert np.abs(gradient.numpy() - expected).max() < 1e-10
