"""Firing rates: about a baseline or in push-pull, B finds W's direction and no rate is ever negative."""

import pytest
import torch
from problems import make_convolution
from torch import nn

import feedbackpath as fp
from feedbackpath.mirror import MirrorMode, fields, rates

LAYERS = {
    "dense": (lambda: nn.Linear(40, 50), "map"),
    "conv": (lambda: make_convolution(nn.Conv2d, {"stride": 2, "out_channels": 40}), "map"),
    "transposed": (lambda: make_convolution(nn.ConvTranspose2d, {"in_channels": 20}), "receptive"),
}
HOW = {
    "baseline-known": {"rates": "baseline", "baseline": 0.5},
    "baseline-estimated": {"rates": "baseline", "baseline": 0.5, "baseline_known": False},
    "push-pull": {"rates": "push-pull"},
}


@pytest.fixture
def transmitted(monkeypatch):
    """Collect all that neurons send to each other, noise and answers."""
    sent, transmit = [], rates.transmit
    monkeypatch.setattr(rates, "transmit", lambda *args: sent.append(args[0].clone()) or transmit(*args))
    return sent


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Sigmoid(), nn.Softplus()], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("noise", ["orthogonal", "gaussian", "uniform-pairs"])
@pytest.mark.parametrize("how", HOW)
def test_rates_recover_the_weights_direction_and_none_is_negative(how, noise, layer, activation, transmitted):
    torch.manual_seed(0)
    make, field = LAYERS[layer]
    settings = fp.Mirror(noise=noise, field=field, sigma=0.05, **HOW[how])
    path = fp.untie(nn.Sequential(make(), activation).double(), fp.WeightMirror(settings))
    path.mirror()
    # Answers about their resting point are all but linear to noise of this strength.
    inputs = fields.inputs_in_mirror_mode(path.weights[0], field)
    expected = settings.expected_angle_deg(inputs, spread=1.0)
    assert path.matrix_angles()["0"] == pytest.approx(expected, rel=0.15, abs=0.01)
    assert path.gains()["0"] == pytest.approx(1.0, abs=0.02)
    assert len(transmitted) >= 2 * path.context.part(MirrorMode).passes["0"]
    assert min(float(sent.min()) for sent in transmitted) >= 0.0


@pytest.mark.parametrize(
    ("settings", "activation", "message"),
    [
        ({"noise": "gaussian", "sigma": 1.0}, nn.ReLU(), "noise reaches below -baseline"),
        ({"noise": "one-sided-pairs", "sigma": 1.0}, nn.ReLU(), "noise reaches below -baseline"),
        ({"noise": "orthogonal", "sigma": 0.4}, nn.Tanh(), "answers below zero"),
        ({"noise": "orthogonal", "baseline": 2.0}, nn.Sigmoid(), "never answers at the baseline rate 2"),
    ],
)
def test_what_would_take_negative_rates_is_refused(settings, activation, message, monkeypatch):
    one_sided = fp.mirror.Design("", lambda out, generator: out.fill_(1.5), 5.0, is_paired=True)
    monkeypatch.setitem(fp.mirror.DESIGNS, "one-sided-pairs", one_sided)
    settings = fp.Mirror(**{"rates": "baseline", "baseline": 0.5} | settings)
    path = fp.untie(nn.Sequential(nn.Linear(40, 50), activation), fp.WeightMirror(settings))
    nn.init.constant_(path.model[0].weight, 0.5)
    with pytest.raises(fp.RuleError, match=message):
        path.mirror()
