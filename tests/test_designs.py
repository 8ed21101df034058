"""Each noise design against its closed form: what a pass expects, s W, and how it scatters about that."""

import math

import pytest
import torch
from problems import make_convolution
from torch import nn

import feedbackpath as fp
from feedbackpath.mirror import fields
from feedbackpath.mirror.codes import estimate_with_codes
from feedbackpath.mirror.designs import DESIGNS, Design, spread_of
from feedbackpath.mirror.noise import estimate_with_noise
from feedbackpath.mirror.rates import Signed

SIGMA, SAMPLES, PASSES = 0.5, 400, 150
LAYERS = {
    "dense": lambda: nn.Linear(60, 50),
    "conv": lambda: make_convolution(nn.Conv2d, {"in_channels": 8, "out_channels": 40}),
    "grouped": lambda: make_convolution(
        nn.Conv2d, {"in_channels": 16, "out_channels": 40, "groups": 2, "stride": 2, "padding": 1}
    ),
    "transposed": lambda: make_convolution(nn.ConvTranspose2d, {"in_channels": 60, "out_channels": 8}),
}
ACTIVATIONS = {"linear": (nn.Identity(), 1.0), "relu": (torch.relu, 0.5)}  # and their mean slopes s


def estimates_of_w(weight, activation, slope, design):
    """Return cov / (sigma^2 s) of each of many passes, in float64."""
    settings = {"sigma": SIGMA, "block_bias": True}
    with torch.no_grad():
        if not isinstance(design, Design):
            passes = [estimate_with_codes(weight, activation, Signed(), **settings)]
        else:
            passes = [
                estimate_with_noise(
                    weight, activation, Signed(), design=design, field="receptive", num_samples=SAMPLES,
                    generator=torch.Generator().manual_seed(seed), **settings,
                )
                for seed in range(PASSES)
            ]  # fmt: skip
    return torch.stack([found.covariance for found in passes]) / (SIGMA**2 * slope)


@pytest.mark.parametrize("behind", ACTIVATIONS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", DESIGNS)
def test_expectation_and_variance_are_those_of_the_closed_form(name, layer, behind):
    torch.manual_seed(0)
    weight = fp.untie(nn.Sequential(LAYERS[layer]().double()), "fa").weights[0]
    w, (activation, slope) = weight.weight.detach(), ACTIVATIONS[behind]
    found = estimates_of_w(weight, activation, slope, DESIGNS[name])
    inputs = fields.inputs_in_mirror_mode(weight, "receptive")
    expected = DESIGNS[name].relative_variance(inputs, SAMPLES, spread_of(activation))

    relative = (found - w).flatten(1).square().sum(1) / w.square().sum()
    standard_error = relative.std() / math.sqrt(PASSES) if len(relative) > 1 else 0.0
    # The formula leaves out terms of 1 / N and, behind a ReLU, of 1 / n.
    assert abs(relative.mean() - expected) <= 4 * standard_error + 0.01 * expected + 1e-20

    mean = found.mean(0)
    gain = (mean * w).sum() / w.square().sum()
    assert abs(gain - 1.0) <= 4 * math.sqrt(3.0 * expected / PASSES / w.numel()) + 1e-12
    left = (mean - w).square().sum() / w.square().sum()
    assert left <= 1.2 * expected / PASSES + 1e-20


@pytest.mark.parametrize("name", [name for name in DESIGNS if name != "orthogonal"])
def test_noise_has_the_moments_that_its_design_says(name):
    design = DESIGNS[name]
    drawn = design.draw(torch.empty(400_000, dtype=torch.float64), torch.Generator().manual_seed(0))
    for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, design.fourth_moment)):
        values = drawn**power
        assert abs(values.mean() - moment) <= 4 * values.std() / math.sqrt(len(values)) + 1e-12
