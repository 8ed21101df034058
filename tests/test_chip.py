"""W and B in arrays of their own: what is written, what is read, and what stays as it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import feedbackpath as fp
from feedbackpath.hardware import theory
from feedbackpath.hardware.readout import product

SOFT = fp.devices.SoftBounds(step=1e-3, noise=0.3, spread=0.1)
READS = {
    "forward": fp.Read(bits=8, noise=0.02),
    "backward": fp.Read(bits=7, noise=0.05, gain=0.05, offset=0.02),
}


class Run:
    """A small network that learns, on a chip or not."""

    def __init__(
        self, rule="kp", chip=None, model=None, lr=0.1, weight_decay=1e-2, momentum=0.0, overrides=None
    ):
        torch.manual_seed(0)
        self.model = model or nn.Sequential(
            nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)
        )
        self.path = fp.untie(self.model, rule, chip=chip, overrides=overrides)
        with torch.enable_grad():
            self.model(torch.zeros(2, *self.shape))
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=lr, weight_decay=weight_decay, momentum=momentum
        )
        if chip is not None:
            chip.attach(self.optimizer)
        self.number = 0
        self.losses = []

    @property
    def shape(self):
        return (12,)

    def step(self):
        data = torch.Generator().manual_seed(self.number)
        x = torch.randn(32, *self.shape, generator=data)
        loss = F.cross_entropy(self.model(x), x.flatten(1)[:, :4].argmax(1))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.path.step()
        self.number += 1
        self.losses.append(loss.item())

    def go(self, steps):
        for _ in range(steps):
            self.step()
        return self

    def values(self):
        return [p.detach().clone() for p in self.model.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True))


@pytest.mark.parametrize("rule", list(fp.RULES))
def test_an_ideal_chip_changes_no_bit(rule):
    assert same(Run(rule).go(3), Run(rule, fp.Chip()).go(3))


@pytest.mark.parametrize("rule", list(fp.RULES))
def test_every_rule_runs_on_a_chip(rule):
    run = Run(rule, fp.Chip(SOFT, READS), lr=0.02).go(3)
    assert all(p.isfinite().all() for p in run.values())
    assert not same(Run(rule, lr=0.02).go(3), run)


def test_arrays_are_written_independently():
    first, second = (Run("kp", fp.Chip(SOFT, seed=seed)).go(2) for seed in (0, 1))
    ideal = Run("kp").go(2)
    for run in (first, second):
        for (_, w, b), (_, w0, b0) in zip(run.path.pairs(), ideal.path.pairs(), strict=True):
            one, other = (w - w0).detach(), (b - b0).detach()
            assert 0 < one.abs().max() < 0.05
            assert abs(float(F.cosine_similarity(one.flatten(), other.flatten(), 0))) < 0.3
    assert not same(first, second)


def test_a_constant_step_stays_within_it_of_what_the_optimizer_asks():
    run = Run("kp", fp.Chip(fp.devices.LinearStep(step=0.01)), momentum=0.9).go(1)
    ideal = Run("kp", momentum=0.9).go(1)
    for (_, *ours), (_, *asked) in zip(run.path.pairs(), ideal.path.pairs(), strict=True):
        for one, other in zip(ours, asked, strict=True):
            assert 0 < (one - other).abs().max() <= 0.01 + 1e-6
    assert torch.equal(run.model[0].bias, ideal.model[0].bias)  # digital


def test_a_write_that_is_verified_comes_nearer():
    def left(verify):
        device = fp.devices.SoftBounds(step=1e-3, spread=0.4)
        run, ideal = Run("kp", fp.Chip(device, verify=verify), lr=1.0).go(1), Run("kp", lr=1.0).go(1)
        return float((run.model[0].weight - ideal.model[0].weight).detach().norm())

    assert left(5) < 0.5 * left(0)


def test_rules_that_write_b_write_it_through_devices():
    run, ideal = Run("ss", fp.Chip(fp.devices.LinearStep(step=0.02))), Run("ss")
    run.go(5), ideal.go(5)
    moved = [(b - c).abs() for (_, _, b), (_, _, c) in zip(run.path.pairs(), ideal.path.pairs(), strict=True)]
    assert max(float(m.max()) for m in moved) > 0.001


@pytest.mark.parametrize("rule", ["kp", "wm", "dfa"])
def test_a_run_that_is_resumed_is_the_run_that_was_not_broken(rule):
    def chip():
        return fp.Chip(fp.devices.PCM() if rule == "kp" else SOFT, READS,
                       wiring=fp.Wiring(delay=2, arrives=0.7) if rule == "kp" else None)  # fmt: skip

    whole, first, resumed = (Run(rule, chip(), lr=0.01) for _ in range(3))
    whole.go(6), first.go(3)
    state = copy.deepcopy((first.model.state_dict(), first.path.state_dict(), first.optimizer.state_dict()))
    resumed.model.load_state_dict(state[0])
    resumed.path.load_state_dict(state[1])
    resumed.optimizer.load_state_dict(state[2])
    resumed.number = 3
    assert same(whole, resumed.go(3))


@pytest.mark.parametrize("rule", ["kp", "dfa"])
def test_a_copy_of_a_path_goes_on_alike_and_by_itself(rule):
    run = Run(rule, fp.Chip(SOFT, READS)).go(2)
    path, x = copy.deepcopy(run.path), torch.ones(3, 12)
    assert path.chip is not run.path.chip
    sent = []
    for one in (run.path, path):
        one.model.zero_grad()
        one.model(x).square().sum().backward()
        sent.append(one.model[0].weight.grad)
    assert torch.equal(*sent)
    optimizer = torch.optim.SGD(path.model.parameters(), lr=0.1)
    path.chip.attach(optimizer)
    before = run.values()
    optimizer.step()
    path.step()
    assert all(torch.equal(a, b) for a, b in zip(before, run.values(), strict=True))
    assert not torch.equal(path.model[0].weight, run.model[0].weight)


def test_a_copy_of_the_model_alone_is_read_ideally():
    run, x = Run("kp", fp.Chip(SOFT, READS)), torch.randn(3, 12)
    model = copy.deepcopy(run.model)
    assert torch.equal(model(x), model(x))
    assert not torch.equal(run.model(x), run.model(x))


def test_activations_may_work_in_place():
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(inplace=True), nn.Linear(8, 4))
    Run("kp", fp.Chip(SOFT, {"backward": fp.Read(bits=8)}), model=model).go(1)


def test_retie_takes_the_converters_off():
    run = Run("kp", fp.Chip(SOFT, READS))
    run.path.retie()
    x = torch.randn(4, 12)
    plain = nn.Sequential(*[copy.deepcopy(layer) for layer in run.model])
    assert torch.equal(run.model(x), plain(x))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in run.model.modules())


# Read-out


def test_converters_round_and_noise_has_its_size():
    x = torch.linspace(-1, 1, 1001)
    for bits in (2, 4, 8):
        assert len(fp.Read(bits=bits).enter(x).unique()) == 2**bits - 1
    signal = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    read = fp.Read(noise=0.1, multiplicative=0.2).leave(signal, None, torch.Generator().manual_seed(1))
    assert float((read - signal).std()) == pytest.approx((0.1**2 + 0.2**2) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 5), nn.Conv2d(3, 5, 3, padding=1), nn.ConvTranspose2d(3, 5, 3, stride=2)]
)
def test_the_product_of_two_signals_is_the_weights_gradient(layer):
    layer = layer.double()
    path = fp.untie(layer, "fa")
    x = torch.randn(4, 6) if isinstance(layer, nn.Linear) else torch.randn(4, 3, 5, 5)
    y = layer(x.double())
    delta = torch.randn_like(y)
    y.backward(delta)
    assert torch.allclose(product(path.weights[0], x.double(), delta), layer.weight.grad, atol=1e-12)


def test_errors_go_back_through_b_and_its_converters():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5)).double()
    chip = fp.Chip(read={"backward": fp.Read(bits=3)})
    path = fp.untie(model, "fa", chip=chip)
    x, delta = torch.randn(7, 6).double(), torch.randn(7, 5).double()
    model(x).backward(delta)
    read = fp.Read(bits=3)
    b = path.weights[1].feedback
    sent = read.enter(read.leave(read.enter(delta) @ b, None, None))
    assert torch.allclose(model[0].weight.grad, sent.t() @ x, atol=1e-12)
    assert torch.equal(model(x), nn.Sequential(*path.retie())(x))  # the forward pass has none


@pytest.mark.parametrize("rule", ["bp", "kp", fp.KolenPollack(feedback_rate=0.5)])
def test_each_array_takes_up_the_signals_of_updates_by_itself(rule):
    clean, noisy = Run(rule), Run(rule, fp.Chip(read={"update": fp.Read(noise=0.1)}))
    for run in (clean, noisy):
        run.step()
    weights = [one.path.weights[1] for one in (clean, noisy)]
    sides = ["weight"] if rule == "bp" else ["weight", "feedback"]
    errors = []
    for side in sides:
        exact, found = (getattr(weight, side).grad for weight in weights)
        errors.append((found - exact).flatten() / exact.norm())
        assert 0.05 < float(errors[-1].norm()) < 0.5
    if len(errors) == 2:
        assert abs(float(F.cosine_similarity(*errors, 0))) < 0.3


def test_mirror_noise_is_read_as_the_mirror_is():
    def left(noise):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32))
        path = fp.untie(model, "wm", chip=fp.Chip(read={"mirror": fp.Read(noise=noise)}))
        path.mirror(steps=1)
        return path.matrix_angles()["0"]

    assert left(0.0) < left(1.0)
    samples = 2048
    assert left(1.0) == pytest.approx(theory.mirror_angle_deg(64, samples, 1.0), rel=0.15)


def test_measuring_reads_ideally_and_draws_nothing():
    run = Run("kp", fp.Chip(SOFT, READS)).go(1)
    state = copy.deepcopy(run.path.state_dict()["chip"]["generators"])
    x = torch.randn(8, 12)
    run.path.delta_angles(lambda: run.model(x).square().mean())
    assert all(torch.equal(run.path.state_dict()["chip"]["generators"][key], state[key]) for key in state)


# Wiring, samples


def test_wiring_brings_updates_late_in_part_and_to_others():
    wiring = fp.Wiring(swapped=1.0, delay=1)
    run, ideal = Run("kp", fp.Chip(wiring=wiring), weight_decay=0.0), Run("kp", weight_decay=0.0)
    start = run.path.weights[1].feedback.detach().clone()
    run.step()
    assert torch.equal(run.path.weights[1].feedback, start)
    ideal.step(), run.step()
    partners = wiring.partners(24, run.path.chip.fixed("partners of 2", torch.device("cpu")))
    assert (partners != torch.arange(24)).all()
    expected = (ideal.path.weights[1].feedback - start)[:, partners]
    assert torch.allclose(run.path.weights[1].feedback - start, expected, atol=1e-6)


def test_a_decay_of_its_own_is_written():
    run, ideal = (
        Run("kp", chip, lr=0.1, weight_decay=0.1) for chip in (fp.Chip(wiring=fp.Wiring(decay=0.5)), None)
    )
    before = run.path.weights[1].feedback.detach().clone()
    run.step(), ideal.step()
    extra = run.path.weights[1].feedback - ideal.path.weights[1].feedback
    assert torch.allclose(extra, 0.5 * 0.1 * 0.1 * before, atol=1e-6)


def test_samples_in_mean_field_are_samples_one_by_one_in_mean_and_variance():
    device = fp.devices.SoftBounds(step=2e-3, noise=0.2, bound=1.0)

    def written(update, seed):
        torch.manual_seed(0)
        model = nn.Linear(5, 4)
        path = fp.untie(model, "bp", chip=fp.Chip(device, update=update, seed=seed))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        path.chip.attach(optimizer)
        F.cross_entropy(model(torch.randn(24, 5)), torch.arange(24) % 4).backward()
        before = model.weight.detach().clone()
        optimizer.step()
        return (model.weight - before).detach()

    mean, exact = (
        torch.stack([written(kind, s) for s in range(120)]) for kind in ("samples", "samples-exact")
    )
    error = (exact.var(0) / 120 + mean.var(0) / 120).sqrt()
    assert ((mean.mean(0) - exact.mean(0)).abs() < 4.5 * error).all()
    assert float(mean.var(0).mean() / exact.var(0).mean()) == pytest.approx(1.0, abs=0.15)


# What is refused


def test_what_does_not_fit_is_refused_in_one_line():
    with pytest.raises(fp.ChipError, match="Read: bits"):
        fp.Read(bits=1)
    with pytest.raises(fp.ChipError, match="Chip: update='gross' is not one of net, samples"):
        fp.Chip(update="gross")
    with pytest.raises(fp.ChipError, match="Chip: device must be a Device, not 'reram'"):
        fp.Chip("reram")
    with pytest.raises(fp.ChipError, match="Chip: verify must be a whole number of corrections, not -1"):
        fp.Chip(verify=-1)
    with pytest.raises(fp.ChipError, match="the signals are"):
        fp.Chip(read={"onward": fp.Read()})
    with pytest.raises(fp.ChipError, match="call untie.* first"):
        fp.Chip().attach(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    model = nn.Sequential(nn.LSTM(4, 4))
    with pytest.raises(fp.ChipError, match="read-out of '0"):
        fp.untie(model, "fa", chip=fp.Chip(read=fp.Read(noise=0.1)))
    assert type(model[0]) is nn.LSTM
    with pytest.raises(fp.ChipError, match="wiring= has no effect"):
        fp.untie(nn.Linear(3, 3), "fa", chip=fp.Chip(wiring=fp.Wiring(delay=1)))
    chip = fp.Chip(SOFT)
    path = fp.untie(nn.Linear(3, 3), "fa", chip=chip)
    with pytest.raises(fp.ChipError, match=r"chip\.attach"):
        path.step()
    with pytest.raises(fp.ChipError, match="another model"):
        fp.untie(nn.Linear(3, 3), "fa", chip=chip)
    with pytest.raises(fp.ChipError, match="no weight of this chip"):
        chip.attach(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    samples = fp.Chip(SOFT, update="samples")
    model = nn.Linear(3, 3)
    fp.untie(model, "fa", chip=samples)
    with pytest.raises(fp.ChipError, match="without momentum"):
        samples.attach(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


# Theory


def test_the_gap_under_independent_noise_settles_where_theory_says():
    lr, decay, noise = 0.1, 0.05, 0.02
    w = torch.zeros(200, 200)
    random = torch.Generator().manual_seed(0)
    gap = w.clone()
    for _ in range(1500):
        both = torch.empty(2, 200, 200).normal_(0.0, noise, generator=random)
        gap = gap * (1 - lr * decay) + both[0] - both[1]
    expected = theory.gap_variance(noise, lr, decay)
    assert float(gap.var()) == pytest.approx(expected, rel=0.03)
    assert theory.gap_variance(noise, lr, decay, sides=1) == expected / 2
    assert theory.gap_variance(noise, lr, decay, momentum=0.9) == pytest.approx(expected / 10)


def test_soft_bounds_bring_w_and_b_together_without_weight_decay():
    device = fp.devices.SoftBounds(step=1e-3)
    random = torch.Generator().manual_seed(0)
    w = torch.empty(2, 4000).normal_(0.0, 0.2, generator=random)
    cells, start = device.draw(w, random), (w[0] - w[1]).norm()
    total = 0.0
    for _ in range(200):
        asked = torch.empty(4000).normal_(0.0, 0.01, generator=random).expand(2, -1)
        w = device.write(w, asked, cells, random)
        total += float(asked[0].abs().mean())
    assert float((w[0] - w[1]).norm() / start) == pytest.approx(theory.soft_contraction(total, 1.0), rel=0.03)


# The audit


FAST = {"bp", "kp", "dfa"}


@pytest.mark.parametrize(
    "rule", [rule if rule in FAST else pytest.param(rule, marks=pytest.mark.slow) for rule in fp.RULES]
)
def test_every_rule_keeps_its_verdict_on_a_chip(rule):
    def verdict(chip):
        run = Run(rule, chip, lr=0.02)
        run.number = 3
        return fp.audit(run.step, run.path).transport_free

    assert verdict(fp.Chip(SOFT, READS)) == verdict(None)
