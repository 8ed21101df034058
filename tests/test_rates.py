"""Firing rates about a baseline and push-pull pairs: what settles, and that no rate is ever negative."""

import pytest
import torch
from torch import nn

import feedbackpath as fp
from feedbackpath.mirror import rates

CHANNELS = {"baseline": {"rates": "baseline"}, "estimated": {"rates": "baseline", "baseline_known": False},
            "push-pull": {"rates": "push-pull"}}  # fmt: skip


@pytest.fixture
def transmitted(monkeypatch):
    """Collect all rates that are sent."""
    sent = []
    monkeypatch.setattr(
        rates, "transmit", lambda values, send=rates.transmit: sent.append(values) or send(values)
    )
    return sent


@pytest.mark.parametrize("way", CHANNELS)
@pytest.mark.parametrize("layer", [lambda: nn.Linear(60, 50), lambda: nn.Conv2d(6, 40, 3, padding=1)])
@pytest.mark.parametrize(
    ("settings", "activation"),
    [
        ({}, nn.ReLU()),
        ({"baseline": 4.0}, nn.ReLU()),
        ({"noise": "signs"}, nn.ReLU()),
        ({"noise": "uniform", "baseline": 2.0}, nn.Softplus()),
        ({"noise": "uniform", "sigma": 0.2, "baseline": 0.5}, nn.Sigmoid()),
        ({}, nn.Identity()),
        ({"baseline": 0.5}, nn.Tanh()),
        ({"noise": "hadamard", "baseline": 1.0}, nn.ReLU()),
        ({"noise": "orthogonal", "baseline": 1.0}, nn.ReLU()),
    ],
    ids=str,
)
def test_mirrors_settle_at_the_weights_and_send_no_rate_below_zero(
    settings, activation, layer, way, transmitted
):
    torch.manual_seed(0)
    rule = fp.WeightMirror(fp.Mirror(**{**settings, **CHANNELS[way]}))
    path = fp.untie(nn.Sequential(layer(), activation), rule)
    nn.init.normal_(path.model[0].bias)  # rates about a baseline replace it; push-pull blocks it
    path.mirror(steps=12)
    assert path.matrix_angles()["0"] < 8
    assert path.gains()["0"] == pytest.approx(1.0, abs=0.03)
    assert len(transmitted) >= 2
    assert min(float(sent.min()) for sent in transmitted) >= 0.0


@pytest.mark.parametrize("way", ["baseline", "estimated"])
def test_weak_codes_about_a_baseline_tell_all(way):
    path = fp.untie(
        nn.Sequential(nn.Linear(60, 50), nn.ReLU()), fp.ExactMirror(fp.Mirror.exact(**CHANNELS[way]))
    )
    path.mirror()
    assert path.matrix_angles()["0"] < 0.01
    assert path.gains()["0"] == pytest.approx(1.0, abs=1e-3)


def test_a_baseline_that_an_activation_never_reaches_is_refused():
    rule = fp.WeightMirror(fp.Mirror(rates="baseline", baseline=2.0))
    path = fp.untie(nn.Sequential(nn.Linear(40, 50), nn.Sigmoid()), rule)
    with pytest.raises(fp.RuleError, match="gives no output at the baseline rate 2"):
        path.mirror()
