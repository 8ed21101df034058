"""The alternatives that the paper cites, against slow readings of their equations and closed forms."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_sendback import IMAGES, TARGET, X, make_convnet, make_mlp, numbers, output_error
from torch import nn

import feedbackpath as fp


def as_rows(tensor):
    return numbers(tensor).reshape(len(tensor), -1)


@pytest.mark.parametrize(("make", "x"), [(make_mlp, X), (make_convnet, IMAGES)], ids=["mlp", "convnet"])
def test_product_feedback_alignment_keeps_the_product_of_two_matrices(make, x):
    """Five steps of SGD on R, by NumPy, with momentum and weight decay: B^T R stays ``feedback``."""
    model, rule = make(), fp.ProductFeedbackAlignment(expansion=3)
    path = fp.untie(model, rule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.2)
    path.check_optimizer(optimizer)
    pairs = {
        weight.name: [numbers(part[0]) for part in rule._draw(weight, path.context)]
        for weight in path.weights
    }
    pace = {name: np.zeros_like(r) for name, (_, r) in pairs.items()}
    for _ in range(5):
        for name, _, feedback in path.pairs():
            b, r = pairs[name]
            assert np.abs(as_rows(feedback) - b.T @ r).max() < 1e-10
        optimizer.zero_grad()
        F.cross_entropy(model(x), TARGET).backward()
        for name, weight, _ in path.pairs():
            b, r = pairs[name]
            pace[name] = 0.9 * pace[name] + b @ as_rows(weight.grad) + 0.2 * r  # (B delta) x^T + lambda R
            pairs[name][1] = r - 0.1 * pace[name]
        optimizer.step()
        path.step()


@pytest.mark.parametrize("expansion", [1, 10, 100])
def test_product_feedback_alignment_comes_to_the_angle_of_its_expansion(expansion):
    torch.manual_seed(0)
    model = nn.Linear(60, 40).double()
    rule = fp.ProductFeedbackAlignment(expansion=expansion)
    path = fp.untie(model, rule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=1.0)
    mixing = rule._mixing(path.weights[0], path.context)[0]
    gap = (model.feedback - mixing @ model.weight).detach()
    for step in range(1, 31):
        optimizer.zero_grad()
        (model(torch.randn(20, 60).double()) * torch.randn(20, 40)).mean().backward()  # W stays large
        optimizer.step()
        left = (model.feedback - mixing @ model.weight).detach()
        torch.testing.assert_close(left, 0.5**step * gap, rtol=1e-6, atol=1e-9)
    expected = math.degrees(math.atan(math.sqrt(41 / (40 * expansion))))
    assert path.matrix_angles()[""] == pytest.approx(expected, rel=0.1)


def test_product_feedback_alignment_says_what_it_cannot_do():
    model = nn.Linear(6, 4)
    path = fp.untie(model, "pfa")
    with pytest.warns(fp.KolenPollackWarning, match="pfa: AdamW updates the product of the two matrices"):
        path.check_optimizer(torch.optim.AdamW(model.parameters(), weight_decay=0.1))
    with pytest.raises(fp.RuleError, match="pfa: expansion must be above 0, not 0"):
        fp.ProductFeedbackAlignment(expansion=0)

    class Halves(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight[:2])

    half = Halves(6, 4)
    fp.untie(half, "pfa")
    with pytest.raises(fp.RuleError, match="pfa: a part of the weight of '' meets activity by itself"):
        half(torch.randn(3, 6)).sum().backward()


LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (40, 6)),
    "sequences": (lambda: nn.Linear(6, 4, bias=False), (10, 5, 6)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (10, 2, 7, 6)),
    "grouped": (lambda: nn.Conv1d(4, 6, 3, groups=2, padding="same"), (10, 4, 5)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_phaseless_alignment_moves_b_towards_w_on_average(kind):
    """E[dB] = rate (W - B): the mean over many steps of noise, for one activity that is far from white."""
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    model = make().double()
    rule = fp.PhaselessAlignment(rate=0.5, sigma=2.0)
    path = fp.untie(model, rule)
    x = torch.randn(shape).double().cumsum(-1) / 3 + 1
    begun, moves = model.feedback.detach().clone(), []
    for _ in range(400):
        model(x).sum().backward()
        path.step()
        moves.append(model.feedback.detach() - begun)
        with torch.no_grad():
            model.feedback.copy_(begun)
    moves = torch.stack(moves)
    off = (moves.mean(0) - 0.5 * (model.weight.detach() - begun)) / (moves.std(0) / 400**0.5)
    assert off.abs().max() < 4.5  # in standard errors, of up to 54 values
    assert (moves.mean(0) / (moves.std(0) / 400**0.5)).abs().max() > 9  # so far from 0


def test_phaseless_alignments_scatter_is_what_theory_says():
    torch.manual_seed(0)
    model = nn.Linear(50, 30)
    path = fp.untie(model, fp.PhaselessAlignment(rate=0.02, sigma=0.5))
    ratios = []
    for step in range(500):
        model(2 + torch.randn(64, 50)).sum().backward()  # the mean of x makes no difference
        path.step()
        if step >= 300:
            ratios.append(((model.feedback - model.weight).norm() / model.weight.norm()).square().item())
    expected = 50 * (1 / 0.5**2 + 1) / (64 * 1.98 / 0.02)
    assert np.mean(ratios) == pytest.approx(expected, rel=0.15)


def test_phaseless_noise_rides_on_training_alone():
    model, plain = make_mlp(), make_mlp()
    path = fp.untie(model, "pal")
    assert not torch.equal(model(X), plain(X))
    assert torch.equal(model(X), model(X))  # the same all through a step
    with torch.no_grad():
        assert torch.equal(model(X), plain(X))
    first = model(X)
    path.step()
    assert not torch.equal(model(X), first)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(X), model(X))
    assert torch.equal(model.eval()(X), plain(X))
    assert torch.equal(path.retie().train()(X), plain(X))


def test_phaseless_alignment_refuses_what_it_cannot_tell_apart():
    tied = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    tied[2].weight = tied[0].weight
    with pytest.raises(fp.RuleError, match="pal: '0', '2' share a weight"):
        fp.untie(tied, "pal")
    assert type(tied[0]) is nn.Linear
    with pytest.raises(fp.RuleError, match="pal: sigma must be above 0"):
        fp.PhaselessAlignment(sigma=0.0)
    layers = [nn.Linear(6, 6), nn.ConvTranspose1d(6, 6, 3)]
    with pytest.warns(fp.UnconvertedLayerWarning, match=r"'1' \(ConvTranspose1d, by pal\)"):
        fp.untie(nn.Sequential(*layers), "pal")


@pytest.mark.parametrize("inverse", ["linear", "tanh"])
def test_targets_go_down_through_the_inverses(inverse):
    model = make_mlp()
    fp.untie(model, fp.DifferenceTargetPropagation(inverse=inverse))
    F.cross_entropy(model(X), TARGET).backward()
    (W1, b1), (W2, b2), (W3, b3) = [(numbers(model[i].weight), numbers(model[i].bias)) for i in (0, 2, 4)]
    psi = np.tanh if inverse == "tanh" else lambda u: u
    h1 = np.tanh(X.numpy() @ W1.T + b1)
    h2 = np.tanh(h1 @ W2.T + b2)
    e = output_error(h2 @ W3.T + b3, TARGET.numpy())

    def error_below(name, h, w, delta):
        b, y, n = numbers(model[name].feedback), h @ w.T, len(h)
        return (psi(y @ b) - psi((y - n * delta) @ b)) / n

    delta2 = error_below(4, h2, W3, e) * (1 - h2**2)
    delta1 = error_below(2, h1, W2, delta2) * (1 - h1**2)
    for layer, expected in ((4, e.T @ h2), (2, delta2.T @ h1), (0, delta1.T @ X.numpy())):
        assert np.abs(numbers(model[layer].weight.grad) - expected).max() < 1e-10


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("inverse", ["linear", "tanh"])
@pytest.mark.parametrize("loss", ["reconstruction", "difference"])
def test_inverses_go_down_the_slope_of_their_loss(loss, inverse, kind):
    """R is written down as in the papers, with the noise of the step; autograd gives its slope."""
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(shape).double()
    rule = fp.DifferenceTargetPropagation(rate=0.5, loss=loss, inverse=inverse, sigma=0.3)
    path = fp.untie(model, rule)
    b = model.feedback.detach().clone().requires_grad_()
    given = (
        () if isinstance(model, nn.Linear) else (model.stride, model.padding, model.dilation, model.groups)
    )
    op = F.linear if isinstance(model, nn.Linear) else getattr(F, f"conv{x.dim() - 2}d")
    run = lambda x: op(x, model.weight.detach(), None, *given)  # noqa: E731
    path.context.steps = 1  # of the step that will be taken
    generator = path.context.generator(path.weights[0], "dtp")
    path.context.steps = 0
    eps = torch.empty_like(x).normal_(0, 0.3, generator=generator)
    eta = torch.empty_like(run(x)).normal_(0, 0.3, generator=generator)

    def g(y):
        source = torch.zeros_like(x, requires_grad=True)
        (u,) = torch.autograd.grad(op(source, b, None, *given), source, y, create_graph=True)
        return torch.tanh(u) if inverse == "tanh" else u

    if loss == "reconstruction":
        r, power = 0.5 * (g(run(x + eps)) - x - eps).square().sum(), run(x + eps).square().sum()
    else:
        told = eps * (g(run(x + eps)) - g(run(x)))
        r = (0.5 * (g(run(x) + eta) - g(run(x))).square().sum() - told.sum()) / 0.3**2
        power = eta.square().sum() / 0.3**2
    (slope,) = torch.autograd.grad(r, b)
    model(x).sum().backward()
    path.step(), path.step()  # the second has seen nothing
    torch.testing.assert_close(model.feedback, b - 0.5 * slope / (power * b[0, 0].numel()))


def test_inverses_settle_at_the_regression_of_inputs_on_outputs():
    torch.manual_seed(0)
    layer = nn.Linear(6, 4).double()
    path = fp.untie(layer, fp.DifferenceTargetPropagation(rate=1.0, sigma=1e-6))
    for _ in range(3000):
        layer(X).sum().backward()
        path.step()
    w, c = numbers(layer.weight), (X.T @ X).numpy()
    expected = np.linalg.solve(w @ c @ w.T, w @ c)
    assert np.abs(numbers(layer.feedback) - expected).max() < 1e-4 * np.abs(expected).max()


def test_difference_reconstruction_brings_b_to_w_at_its_rate_and_errors_to_backprops():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8))
    path = fp.untie(model, fp.DifferenceTargetPropagation(loss="difference"))
    x, target = torch.randn(2000, 12), torch.randint(0, 8, (2000,))
    compute_loss = lambda: F.cross_entropy(model(x), target)  # noqa: E731
    gap, angles = (model[2].weight - model[2].feedback).norm().item(), []
    for step in range(1, 41):
        compute_loss().backward()
        path.step()
        left = (model[2].weight - model[2].feedback).norm().item()
        if step in (5, 10):
            assert left / gap == pytest.approx((1 - 1 / 8) ** step, rel=0.1)
        angles += [path.delta_angles(compute_loss)["0"]] if step in (1, 10, 40) else []
    assert angles[0] > 50 > angles[1] > 4 * angles[2]
    assert angles[2] < 4


def test_inverses_that_make_no_sense_are_refused():
    for settings, message in (
        ({"loss": "mse"}, "dtp: loss='mse' is not one of reconstruction, difference"),
        ({"inverse": "relu"}, "dtp: inverse='relu' is not one of linear, tanh"),
        ({"sigma": 0.0}, "dtp: sigma must be above 0"),
    ):
        with pytest.raises(fp.RuleError, match=message):
            fp.DifferenceTargetPropagation(**settings)
    with pytest.warns(fp.UnconvertedLayerWarning, match=r"MultiheadAttention, by dtp.*out_proj"):
        fp.untie(nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2)), "dtp")


def audit(rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    path = fp.untie(model, rule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(X[:4].float()), torch.arange(4) % 3).backward()
        optimizer.step()
        path.step()

    return fp.audit(step, path)


@pytest.mark.parametrize("rule", ["pfa", "pal", "dtp", fp.DifferenceTargetPropagation(loss="difference")])
def test_the_audit_finds_no_transport(rule):
    report = audit(rule)
    assert report.transport_free is True, report.verdict
