"""Closed forms: what a pass of noise expects and how it scatters, and where B settles in each reading."""

import math

import pytest
import torch
from problems import make_convolution
from torch import nn

import feedbackpath as fp
from feedbackpath.mirror import MirrorMode, fields
from feedbackpath.mirror.mode import fire, mirror_once
from feedbackpath.mirror.noise import NOISES, code_length, fire_codes, relative_variance, spread_of

SIGMA, SAMPLES, PASSES = 0.5, 400, 100
LAYERS = {
    "dense": lambda: nn.Linear(60, 50),
    "conv": lambda: make_convolution(nn.Conv2d, {"in_channels": 8, "out_channels": 40}),
    "padded": lambda: make_convolution(nn.Conv2d, {"in_channels": 8, "out_channels": 40, "padding": 1}),
    "grouped": lambda: make_convolution(
        nn.Conv2d, {"in_channels": 16, "out_channels": 40, "groups": 2, "stride": 2, "padding": 1}
    ),
    "circular": lambda: make_convolution(
        nn.Conv2d, {"in_channels": 8, "out_channels": 40, "padding": 1, "padding_mode": "circular"}
    ),
    "transposed": lambda: make_convolution(nn.ConvTranspose2d, {"in_channels": 60, "out_channels": 8}),
}
ACTIVATIONS = {"linear": (nn.Identity(), 1.0), "relu": (nn.ReLU(), 0.5)}  # and their mean slopes s


@pytest.mark.parametrize("behind", ["linear", pytest.param("relu", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "layer",
    [
        layer if layer in ("dense", "padded") else pytest.param(layer, marks=pytest.mark.slow)
        for layer in LAYERS
    ],
)
@pytest.mark.parametrize("name", NOISES)
def test_expectation_and_variance_are_those_of_the_closed_form(name, layer, behind):
    torch.manual_seed(0)
    activation, slope = ACTIVATIONS[behind]
    settings = fp.Mirror(noise=name, sigma=SIGMA, samples=SAMPLES)
    path = fp.untie(nn.Sequential(LAYERS[layer](), activation).double(), fp.WeightMirror(settings))
    weight, mode = path.weights[0], path.context.part(MirrorMode)
    w, passes = weight.weight.detach(), []
    for number in range(PASSES):
        mode.find_activations([weight])
        passes.append(fire(mode, weight, settings).covariance / (SIGMA**2 * slope))
        mode.passes["0"] = number + 1  # the noise of the next pass
    found = torch.stack(passes)
    effective = mode.field(weight, settings, None).positions * SAMPLES
    expected = relative_variance(name, fields.inputs_of(weight), effective, spread_of(activation))

    relative = (found - w).flatten(1).square().sum(1) / w.square().sum()
    standard_error = relative.std() / math.sqrt(PASSES)
    # The formula leaves out terms of 1 / N and, behind a ReLU and at a map's border, of 1 / n.
    assert abs(relative.mean() - expected) <= 4 * standard_error + 0.02 * expected

    mean = found.mean(0)
    gain = (mean * w).sum() / w.square().sum()
    assert abs(gain - 1.0) <= 4 * math.sqrt(3.0 * expected / PASSES / w.numel())
    left = (mean - w).square().sum() / w.square().sum()
    assert left <= 1.25 * expected / PASSES


@pytest.mark.parametrize("behind", ACTIVATIONS)
@pytest.mark.parametrize("reading", ["inside", "printed"])
def test_b_settles_and_scatters_as_both_decays_say(reading, behind):
    """With a the share that decays: ``E[B] = g W`` and ``Var[B] = eta^2 Var[cov] / (1 - (1 - a)^2)``."""
    torch.manual_seed(0)
    activation, slope = ACTIVATIONS[behind]
    eta, decay, samples = 0.2, 0.4, 100
    settings = fp.Mirror(reading=reading, rate=eta, decay=decay, samples=samples)
    path = fp.untie(nn.Sequential(nn.Linear(40, 200), activation).double(), fp.WeightMirror(settings))
    share = eta * decay if reading == "inside" else decay
    gain = slope * eta / share
    weight, mode = path.weights[0], path.context.part(MirrorMode)
    mode.find_activations([weight])
    mode._warned.add(("gain", "0"))
    w, errors, mean = weight.weight.detach(), [], torch.zeros_like(weight.weight)
    for number in range(300):
        mirror_once(mode, weight, settings)
        if number >= 10 / share:
            errors.append((weight.feedback - gain * w).square().sum() / w.square().sum())
            mean = mean + weight.feedback.detach()
    one_pass = slope**2 * relative_variance("gaussian", 40, samples, spread_of(activation))
    expected = eta**2 * one_pass / (1.0 - (1.0 - share) ** 2)
    assert torch.stack(errors).mean().item() == pytest.approx(expected, rel=0.1)
    mean = mean / len(errors)
    assert ((mean * w).sum() / w.square().sum()).item() == pytest.approx(gain, rel=0.01)


@pytest.mark.parametrize(("reading", "angle"), [("inside", 9.1), ("printed", 30.0)])
def test_figure_4a_decides_between_the_two_readings_of_the_decay(reading, angle):
    """2048 samples into 2048 inputs, W at rest: the paper has less than 12 degrees in every layer."""
    paper = fp.Mirror.paper(reading=reading)
    assert paper.expected_angle_deg(2048, 2048, spread=1.0) == pytest.approx(angle, abs=0.05)
    path = fp.untie(nn.Linear(256, 100), fp.WeightMirror(fp.Mirror.paper(reading=reading, samples=256)))
    path.context.part(MirrorMode)._warned.add(("gain", ""))
    path.mirror(steps=150)
    assert path.matrix_angles()[""] == pytest.approx(angle, rel=0.05)


@pytest.mark.parametrize("name", NOISES)
def test_noise_has_the_moments_that_its_table_says(name):
    draw, fourth_moment = NOISES[name]
    drawn = draw(torch.empty(400_000, dtype=torch.float64), torch.Generator().manual_seed(0))
    for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, fourth_moment)):
        values = drawn**power
        assert abs(values.mean() - moment) <= 4 * values.std() / math.sqrt(len(values)) + 1e-12


@pytest.mark.parametrize(("shape", "groups"), [((5,), 1), ((8, 3, 3), 2), ((64,), 1), ((65,), 1)])
def test_codes_are_signs_orthogonal_to_each_other_and_each_has_its_negative(shape, groups):
    parts = list(fire_codes(shape, groups, torch.empty(0), torch.Generator().manual_seed(0)))
    inputs = math.prod(shape) // groups
    codes = torch.cat([part.reshape(len(part), groups, inputs) for part in parts])
    assert len(codes) == 2 * code_length(inputs)
    assert inputs <= code_length(inputs) < 2 * inputs
    assert (codes.abs() == 1).all()
    for group in range(groups):
        own = codes[:, group]
        assert torch.equal(own.T @ own, len(own) * torch.eye(inputs))
        assert not own.sum(0).any()
