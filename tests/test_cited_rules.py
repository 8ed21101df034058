"""The alternatives that the paper cites, against slow readings of their equations and closed forms."""

import copy
import json
import math
import re

import competing_units
import estimating_w
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_sendback import IMAGES, TARGET, X, make_convnet, make_mlp, numbers, output_error
from torch import nn

import feedbackpath as fp
from feedbackpath.mirror.spikes import Cells
from feedbackpath.train.rules import make_rule


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
        path.step()
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
    with pytest.raises(
        fp.RuleError, match="pfa: the weight of '' meets activity in parts, or in another shape"
    ):
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
    path = fp.untie(layer, fp.DifferenceTargetPropagation(rate=1.8, sigma=1e-6))
    for _ in range(1000):
        layer(X).sum().backward()
        path.step()
    w, c = numbers(layer.weight), (X.T @ X).numpy()
    expected = np.linalg.solve(w @ c @ w.T, w @ c)
    assert np.abs(numbers(layer.feedback) - expected).max() < 1e-2 * np.abs(expected).max()


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
        ({"loss": "mse"}, "DifferenceTargetPropagation: loss='mse' is not one of reconstruction, difference"),
        ({"inverse": "relu"}, "DifferenceTargetPropagation: inverse='relu' is not one of linear, tanh"),
        ({"sigma": 0.0}, "dtp: sigma must be above 0"),
    ):
        with pytest.raises(fp.RuleError, match=message):
            fp.DifferenceTargetPropagation(**settings)
    with pytest.warns(fp.UnconvertedLayerWarning, match=r"MultiheadAttention, by dtp.*out_proj"):
        fp.untie(nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2)), "dtp")


def test_cells_leak_and_spike_as_is_written():
    cells = Cells(runs=64, steps=8, time_constant=4.0, threshold=0.5, common=0.3)
    like, seed = torch.zeros(1, dtype=torch.float64), torch.Generator().manual_seed(3)
    spikes, peak = cells.fire((2,), like, seed)
    seed = torch.Generator().manual_seed(3)
    u, v, top = np.zeros((64, 2)), np.zeros((64, 2)), np.full((64, 2), -np.inf)
    for step in range(8):
        own = np.zeros((64, 2)) + torch.zeros(64, 2, dtype=torch.float64).normal_(generator=seed).numpy()
        shared = torch.zeros(64, 1, dtype=torch.float64).normal_(generator=seed).numpy()
        for run in range(64):
            for cell in range(2):
                current = 0.7**0.5 * own[run, cell] + 0.3**0.5 * shared[run, 0]
                current *= (1 - 0.75**2) ** 0.5
                u[run, cell] = 0.75 * u[run, cell] + current
                v[run, cell] = 0.75 * v[run, cell] + current
                spiked = v[run, cell] >= 0.5
                assert spikes[step, run, cell] == spiked
                v[run, cell] = 0 if spiked else v[run, cell]
                top[run, cell] = max(top[run, cell], u[run, cell])
    assert np.abs(peak.numpy() - top).max() < 1e-12
    assert torch.equal(spikes.sum(0) > 0, peak >= 0.5)
    just_reached = (peak >= 0.5) & (peak < 0.55)
    assert just_reached.any() and (spikes.sum(0)[just_reached] == 1).all()  # noqa: PT018


def look(rule, make=lambda: nn.Linear(20, 10), steps=1):
    """Return W, and what each of some steps tells of it."""
    torch.manual_seed(0)
    path = fp.untie(make().double(), rule)
    (weight,), told = path.weights, []
    for path.context.steps in range(1, steps + 1):
        told.append(rule.look(weight, path.context).at_gain_one())
    return weight, path.context, torch.stack(told)


def test_regression_discontinuity_is_the_jump_between_two_fitted_lines():
    rule = fp.RegressionDiscontinuity(margin=0.4)
    weight, context, (told,) = look(rule)
    context.steps = 1
    spikes, peak = rule.cells.fire((20,), weight.weight, context.generator(weight, "rdd"))
    z = numbers(spikes.sum(0) @ weight.weight.t() + weight.layer.bias)
    for i in range(20):
        u = peak[:, i].numpy()
        for j in range(10):
            above, below = (u >= 1) & (u < 1.4), (u < 1) & (u >= 0.6)
            values = [np.polyval(np.polyfit(u[side], z[side, j], 1), 1.0) for side in (above, below)]
            assert told[j, i].item() == pytest.approx(values[0] - values[1], abs=1e-9)


@pytest.mark.parametrize("common", [0.0, 0.5])
def test_regression_discontinuity_is_unbiased_even_if_inputs_have_something_in_common(common):
    rule = fp.RegressionDiscontinuity(margin=0.3, cells=Cells(runs=2000, steps=10, common=common))
    weight, _, told = look(rule, lambda: nn.Linear(8, 5), steps=100)
    off = (told.mean(0) - weight.weight) / (told.std(0) / 10)
    assert off.abs().max() < 4.0  # in standard errors, of 40 values
    assert (told.mean(0) / (told.std(0) / 10)).abs().median() > 8


def test_the_angle_of_regression_discontinuity_falls_with_spikes_as_theory_says():
    rule = fp.RegressionDiscontinuity()
    weight, context, told = look(rule, lambda: nn.Linear(60, 40), steps=30)
    w = weight.weight.detach()
    measured = ((told - w).square().sum((1, 2)) / w.square().sum()).mean().item()
    spikes, peak = rule.cells.fire((60,), w, context.generator(weight, "rdd"))
    off, counts = peak - 1.0, spikes.sum(0).var().item()
    sides = [
        side.sum(0).double().mean().item() for side in ((off >= 0) & (off < 0.5), (off < 0) & (off >= -0.5))
    ]
    assert measured == pytest.approx(4 * 60 * counts * (1 / sides[0] + 1 / sides[1]), rel=0.1)
    averaged = [(told[:k].mean(0) - w).norm() / w.norm() for k in (5, 30)]  # six times the spikes
    assert (averaged[0] / averaged[1]).item() == pytest.approx(6**0.5, rel=0.15)


def test_spike_timing_inference_sums_up_what_the_paper_says_at_each_spike_above():
    rule = fp.SpikeTimingWeightInference(cells=Cells(runs=64, steps=12, threshold=0.3), slow=6.0)
    weight, context, (told,) = look(rule, lambda: nn.Linear(5, 3))
    context.steps, w = 1, numbers(weight.weight)
    spikes, _ = rule.cells.fire((5,), weight.weight, context.generator(weight, "stdwi"))
    spikes = spikes.numpy()
    drive = numbers(weight.layer(torch.from_numpy(spikes)))
    scaled = (drive - drive.mean((0, 1))) / drive.std((0, 1), ddof=1)

    def averaged(signal, constant):
        average, kept = signal.mean(0), []
        for now in signal:
            average = average + (now - average) / constant
            kept.append(average)
        return np.array(kept)

    v, above = np.zeros((64, 3)), np.zeros((12, 64, 3))
    for t in range(12):
        v = 0.8 * v + 0.6 * scaled[t]
        above[t] = v >= 0.3
        v[above[t] > 0] = 0
    e, h = (averaged(signal, 3.0) - averaged(signal, 6.0) for signal in (spikes, drive))
    above, e, h = (signal - signal.mean(1, keepdims=True) for signal in (above, e, h))
    found = np.zeros((3, 5))
    for t in range(12):
        for run in range(64):
            found += np.outer(
                above[t, run], e[t, run]
            )  # the mean of e is 0, so that this is its share at spikes
    slope = (above * h).sum((0, 1)) / (h**2).sum((0, 1))
    expected = found / slope[:, None] / ((e**2).sum() / 5)
    assert np.abs(told.numpy() - expected).max() < 1e-9
    assert np.abs(h - e @ w.T).max() < 1e-9  # a neuron above knows its h from its own drive


def test_the_angle_of_spike_timing_inference_falls_with_spikes_as_theory_says():
    rule = fp.SpikeTimingWeightInference()
    weight, context, told = look(rule, lambda: nn.Linear(60, 40), steps=30)
    w = weight.weight.detach()
    scatter = (told.var(0).sum() / w.square().sum()).item()
    spikes, _ = rule.cells.fire((60,), w, context.generator(weight, "stdwi"))
    drive = (spikes @ w.t()).detach()
    above, e, h = rule.cells.answer(drive), rule._timed(spikes), rule._timed(drive)
    above, e, h = (signal - signal.mean(1, keepdim=True) for signal in (above, e, h))
    slope = (above * h).sum((0, 1)) / h.square().sum((0, 1))
    together = lambda x, lag: ((x[: 50 - lag] * x[lag:]).sum() / x.square().sum()).item()  # noqa: E731
    c = 1 + 2 * sum(together(above, lag) * together(e, lag) for lag in range(1, 50))
    once = (60 * above.square().mean((0, 1)) / (slope**2 * h.square().mean((0, 1)) * 50 * 64)).mean().item()
    assert scatter == pytest.approx(c * once, rel=0.1)
    bias = ((told.mean(0) - w).norm() / w.norm()).item()
    assert 0.05 < bias < 1.5 * math.sqrt(scatter / 30 + 0.2 / 60)  # a share of W^2, of 1 / sqrt(n)


@pytest.mark.parametrize(
    "rule",
    [
        fp.RegressionDiscontinuity(cells=Cells(runs=2048, steps=10)),
        fp.SpikeTimingWeightInference(cells=Cells(runs=64, steps=40, threshold=0.0)),
    ],
    ids=["rdd", "stdwi"],
)
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1),
        lambda: nn.Conv1d(8, 6, 5, groups=2),
        lambda: nn.ConvTranspose2d(16, 2, 2),
        lambda: nn.Conv1d(6, 4, 3, padding=1, padding_mode="circular"),
    ],
    ids=["conv2d", "grouped", "transposed", "circular"],
)
def test_spikes_tell_of_convolutions(rule, make):
    weight, _, told = look(rule, make, steps=20)
    w, told = weight.weight.detach(), told.mean(0)
    assert F.cosine_similarity(told.flatten(), w.flatten(), dim=0) > math.cos(math.radians(14))
    assert ((told * w).sum() / w.square().sum()).item() == pytest.approx(1, abs=0.12)


def test_what_spike_rules_cannot_do_is_said():
    for make, message in (
        (lambda: fp.RegressionDiscontinuity(rate=0.0), "rdd: rate must lie above 0"),
        (lambda: fp.RegressionDiscontinuity(margin=0.0), "rdd: margin must be above 0"),
        (lambda: fp.SpikeTimingWeightInference(fast=30.0), "stdwi: fast must be at least 1 and below slow"),
        (lambda: Cells(runs=8, steps=5), "Cells: runs must be at least 64, not 8"),
        (lambda: Cells(runs=64, steps=5, common=1.0), "Cells: common must be at least 0 and below 1"),
        (lambda: Cells(runs=64, steps=5, time_constant=0.5), "Cells: time_constant must be at least 1 step"),
    ):
        with pytest.raises(fp.RuleError, match=message):
            make()
    with pytest.warns(fp.UnconvertedLayerWarning, match=r"'1' \(LSTM, by rdd\)"):
        fp.untie(nn.Sequential(nn.Linear(6, 6), nn.LSTM(6, 6)), "rdd")


@pytest.mark.parametrize(("p", "steps"), [(2.0, None), (3.0, None), (2.5, 3)])
def test_hidden_units_compete_as_is_written(p, steps):
    """Four steps of NumPy, unit by unit; the read-out gets backprop's gradient, nothing goes below it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    path = fp.untie(model, fp.CompetingUnits(rate=0.1, p=p, k=3, delta=0.3, steps=steps))
    w = numbers(model[0].weight / model[0].weight.std()).copy()
    for step in range(4):
        model.zero_grad()
        F.cross_entropy(model(X), TARGET).backward()
        h = F.relu(model[0](X)).detach().numpy()
        e = output_error(numbers(model[2](torch.from_numpy(h))), TARGET.numpy())
        assert np.abs(numbers(model[2].weight.grad) - e.T @ h).max() < 1e-12
        assert model[0].weight.grad.abs().max() == model[0].bias.grad.abs().max() == 0
        path.step()
        change = np.zeros_like(w)
        for v in X.numpy():
            drive = [
                sum(np.sign(a) * abs(a) ** (p - 1) * b for a, b in zip(row, v, strict=True)) for row in w
            ]
            order = np.argsort(drive)[::-1]
            for unit, g in ((order[0], 1.0), (order[2], -0.3)):
                change[unit] += g * (v - drive[unit] * w[unit])
        if step > 0:  # the first brings W to unit variance
            w += (0.1 if steps is None else 0.1 * (1 - step / steps)) * change / np.abs(change).max()
        assert np.abs(numbers(model[0].weight) - w).max() < 1e-12


def test_channels_compete_at_each_position():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)).double()
    path = fp.untie(model, "kh")
    w = numbers(model[0].weight / model[0].weight.std()).reshape(4, -1).copy()
    for _ in range(2):
        F.cross_entropy(model(IMAGES), TARGET).backward()
        path.step()
    patches = F.unfold(IMAGES, 3).transpose(1, 2).reshape(-1, 18).numpy()
    change = np.zeros_like(w)
    for v in patches:
        drive = w @ v
        for unit, g in zip(np.argsort(drive)[::-1][:2], (1.0, -0.4), strict=True):
            change[unit] += g * (v - drive[unit] * w[unit])
    w += 0.02 * change / np.abs(change).max()
    assert np.abs(numbers(model[0].weight).reshape(4, -1) - w).max() < 1e-12


@pytest.mark.parametrize("p", [2.0, 3.0])
def test_competing_units_come_to_length_one_and_share_the_inputs(p):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 6, bias=False), nn.ReLU(), nn.Linear(6, 2))
    path = fp.untie(model, fp.CompetingUnits(p=p, delta=0.0, rate=0.01))
    centres = torch.eye(10)[:6] + 0.1
    for _ in range(600):
        x = centres[torch.randint(0, 6, (60,))] + 0.05 * torch.randn(60, 10)
        model(x).sum().backward()
        path.step()
    winners = model[0](centres).argmax(1)
    lengths = model[0].weight.abs().pow(p).sum(1)[winners.unique()]
    assert (lengths - 1).abs().max() < 0.1
    assert len(winners.unique()) >= 3


def test_hidden_layers_stay_as_they_are_once_their_steps_are_over():
    """Saved in the midst of competition and loaded again, they come to the same, bit for bit."""

    def start():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
        return model, fp.untie(model, fp.CompetingUnits(steps=6))

    def train(model, path, steps):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(X), TARGET).backward()
            optimizer.step()
            path.step()
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    model, path = start()
    train(model, path, 3)
    resumed, resumed_path = start()
    resumed.load_state_dict(model.state_dict())
    resumed_path.load_state_dict(copy.deepcopy(path.state_dict()))
    before = train(model, path, 2)
    last = train(model, path, 1)
    after = train(model, path, 2)
    again = train(resumed, resumed_path, 5)
    assert all(torch.equal(again[name], after[name]) for name in after)
    changed = {name for name in after if not torch.equal(after[name], last[name])}
    assert changed == {"2.weight", "2.bias"}
    assert not torch.equal(last["0.weight"], before["0.weight"])


def test_competition_says_what_it_cannot_do():
    for settings, message in (
        ({"k": 1}, "kh: k must be at least 2, not 1"),
        ({"p": 1.5}, "kh: p must be at least 2 and delta at least 0"),
        ({"delta": -0.1}, "kh: p must be at least 2 and delta at least 0"),
        ({"rate": 2.0}, "kh: rate must lie between 0 and 2"),
        ({"steps": 0}, "kh: steps must be at least 2, not 0"),
        ({"steps": 1}, "kh: steps must be at least 2, not 1"),
        ({"steps": 2.5}, "steps must be a whole number"),
    ):
        with pytest.raises(fp.RuleError, match=message):
            fp.CompetingUnits(**settings)
    model = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    fp.untie(model, fp.CompetingUnits(k=4))
    with pytest.raises(fp.RuleError, match="kh: '0' has 3 units, and the one of rank k=4"):
        model(X).sum().backward()


FEW_SPIKES = [
    kind(cells=Cells(64, 5)) for kind in (fp.RegressionDiscontinuity, fp.SpikeTimingWeightInference)
]


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


@pytest.mark.parametrize(
    "rule",
    [
        "pal",
        "dtp",
        *(
            pytest.param(rule, marks=pytest.mark.slow)
            for rule in ("pfa", fp.DifferenceTargetPropagation(loss="difference"), *FEW_SPIKES, "kh")
        ),
    ],
)
def test_the_audit_finds_no_transport(rule):
    report = audit(rule)
    assert report.transport_free is True, report.verdict


def test_a_config_file_sets_the_cells_of_a_rule():
    rule = make_rule("rdd", {"margin": 0.2, "cells": {"runs": 100, "common": 0.3}})
    assert rule == fp.RegressionDiscontinuity(margin=0.2, cells=Cells(runs=100, steps=10, common=0.3))
    for settings, message in (
        ({"cells": 3}, "rdd: cells must map settings to values, not 3"),
        ({"cells": {"cell": 3}}, "cells has no setting 'cell'"),
        ({"cells": {"runs": "many"}}, "Cells: runs must be a whole number, not 'many'"),
    ):
        with pytest.raises(fp.UserError, match=message):
            make_rule("rdd", settings)
    with pytest.raises(fp.ConfigError, match="fa has no setting 'cells'"):
        make_rule("fa", {"cells": {}})


def test_the_page_on_estimating_w_is_that_of_its_result_file():
    found = json.loads(estimating_w.RESULTS.read_text())
    page = (estimating_w.FIGURES.parent / "estimating-w.md").read_text()
    assert estimating_w.make_table(found["points"]) in page
    for rule, run in found["digits"].items():
        assert re.search(rf"`{rule}`.*\D{np.mean(run['errors']):.1f}%", page, re.DOTALL)
    for method in ("wm", "pal", "rdd", "kp"):
        ends = [run[-1] for run in found["points"][method]]
        angle = np.mean([end["angle_deg"] for end in ends])
        assert angle == pytest.approx(estimating_w.theory(method, ends[0]["events"]), rel=0.05)


def test_the_page_on_competing_units_is_that_of_its_result_file():
    found, page = json.loads(competing_units.RESULTS.read_text()), competing_units.PAGE.read_text()
    assert competing_units.make_table(found) in page
    for kind, tried in found["tried"].items():
        best = min(tried, key=lambda run: run["validation"])
        assert found["chosen"][kind].items() <= best.items()
        assert found["runs"][kind][0]["train"] == best["train"]
    test = {kind: np.mean([run["test"] for run in runs]) for kind, runs in found["runs"].items()}
    assert f"{test['random'] - test['kh']:.1f} points" in page
    assert round(test["kh"] / float(competing_units.PUBLISHED["kh"])) == 2  # "twice the published one"
    by_power = {n: min(run["validation"] for run in found["tried"]["kh"] if run["n"] == n) for n in (1, 4.5)}
    assert f"{by_power[1]:.1f}% with $n = 1$, and {by_power[4.5]:.1f}% with $n = 4.5$" in page
    assert f"{found['epochs']['competition']} epochs" in page
    assert f"{found['runs']['kh'][0]['untrained']} of the 2,000 units" in page
