"""The gain that mirror mode tells from its own signals, and its warning where that leaves [0.5, 2]."""

import re
import warnings

import pytest
import torch
from leaks import Task
from problems import CONVNET, make_convolution
from torch import nn

import feedbackpath as fp
from feedbackpath.mirror import MirrorMode, readings
from feedbackpath.mirror.mode import fire
from feedbackpath.mirror.readings import estimate_gain

PRINTED = fp.Mirror.paper(reading="printed")
LAYERS = {
    "linear": lambda: nn.Linear(30, 40),
    "conv": lambda: make_convolution(nn.Conv2d, {"groups": 2, "stride": 2, "out_channels": 32}),
    "transposed": lambda: make_convolution(nn.ConvTranspose2d, {"stride": 2, "out_channels": 32}),
}
ACTIVATIONS = [nn.ReLU(), nn.Tanh(), nn.Identity()]


def untie_one(layer, activation, settings):
    torch.manual_seed(0)
    path = fp.untie(nn.Sequential(layer(), activation).double(), fp.WeightMirror(settings))
    return path, path.weights[0]


def pass_over(path, settings):
    path.context.part(MirrorMode).find_activations(path.weights)
    with torch.no_grad():
        return fire(path.context.part(MirrorMode), path.weights[0], settings)


def warned(call):
    """Return what a call warns of."""
    with warnings.catch_warnings(record=True, action="always") as said:
        call()
    assert all(warning.category is fp.MirrorWarning for warning in said)
    return [str(warning.message) for warning in said]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("noise", ["gaussian", "uniform", "signs", "orthogonal"])
def test_gain_is_told_without_the_weights(noise, layer, activation):
    settings = fp.Mirror(
        noise=noise, sigma=0.5, block_bias=activation is not ACTIVATIONS[1], reading="printed"
    )
    path, weight = untie_one(LAYERS[layer], activation, settings)
    weight.feedback.mul_(0.5).add_(weight.weight.detach(), alpha=3.0)  # a B with a part of its own
    gain = path.gains()["0"]
    found = pass_over(path, settings)
    with torch.no_grad():
        weight.weight.fill_(float("nan"))  # from here on nobody can look at W
    # tanh is odd: to codes of finite strength it is not quite linear
    is_exact = noise == "orthogonal" and activation is not ACTIVATIONS[1]
    assert estimate_gain(found) == pytest.approx(gain, rel=1e-9 if is_exact else 0.08)


def test_neurons_that_do_not_answer_are_left_out():
    path, weight = untie_one(LAYERS["linear"], nn.ReLU(), fp.Mirror.exact(block_bias=False))
    with torch.no_grad():
        weight.layer.bias.fill_(1.0)
        weight.layer.bias[:10] = -5.0
        weight.feedback.copy_(0.7 * weight.weight)
        weight.feedback[:10] = 100.0
    gain = estimate_gain(pass_over(path, fp.Mirror.exact(block_bias=False)))
    assert gain == pytest.approx(0.7, rel=1e-6)
    with torch.no_grad():
        weight.layer.bias.fill_(-5.0)
    gain = estimate_gain(pass_over(path, fp.Mirror.exact(block_bias=False)))
    assert gain != gain  # no neuron tells anything


def test_the_printed_reading_warns_of_every_layer_once_with_its_gain():
    path = fp.untie(CONVNET.build(), fp.WeightMirror(PRINTED))
    said = warned(path.mirror)
    pattern = re.compile(r"the gain of '(\w+)' is ([\d.]+), outside \[0.5, 2\]")
    found = [pattern.search(text).groups() for text in said]
    assert [name for name, _ in found] == ["0", "3", "6"]
    for name, told in found:
        assert float(told) == pytest.approx(0.2 if name == "6" else 0.1, rel=0.2)  # the output is linear
        assert float(told) == pytest.approx(path.gains()[name], rel=0.2)
    assert warned(path.mirror) == []


def test_the_papers_settings_do_not_warn():
    """Not behind ReLUs, where they settle at 1, nor in linear layers, at exactly 2."""
    for seed in range(5):
        model = nn.Sequential(nn.Linear(100, 8), nn.ReLU(), nn.Linear(8, 2), nn.Linear(2, 1))
        path = fp.untie(model, fp.WeightMirror(fp.Mirror.paper(samples=512)), seed=seed)
        path.mirror(steps=6 * 139)  # six times its memory
        assert path.gains()["2"] == pytest.approx(2.0, rel=0.15)


@pytest.mark.parametrize(("times", "warns"), [(0.1, True), (1.0, False), (10.0, True)])
def test_scaling_keeps_the_size_that_feedback_began_with(times, warns):
    path, weight = untie_one(LAYERS["linear"], nn.ReLU(), fp.Mirror(samples=512, reading="scaled"))
    weight.feedback.mul_(times * weight.weight.detach().norm() / weight.feedback.norm())
    said = warned(lambda: path.mirror(steps=4 * 139))
    assert len(said) == warns
    assert not warns or re.search(r"a B that begins [\d.]+ times as large", said[0])


@pytest.mark.parametrize("reading", ["printed", "inside"])
def test_what_the_warning_says_to_set_brings_the_gain_to_one(reading):
    settings = fp.Mirror(reading=reading, rate=0.1, decay=0.8 if reading == "printed" else 3.0)
    path, _ = untie_one(LAYERS["conv"], nn.ReLU(), settings)
    (said,) = warned(path.mirror)
    advised = float(re.search(r"lambda = ([\d.]+)", said).group(1))
    if reading == "printed":
        settings = fp.Mirror(reading=reading, rate=0.5 * advised, decay=0.5)
    else:
        settings = fp.Mirror(reading=reading, decay=advised)
    path, _ = untie_one(LAYERS["conv"], nn.ReLU(), settings)
    path.mirror()
    assert path.gains()["0"] == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "steps", "expected"),
    [(PRINTED, 9, 0), (PRINTED, 10, 1), (PRINTED, 29, 2), (fp.Mirror(), 30, 0)],
    ids=["filling", "full", "renewed twice", "calibrated"],
)
def test_gains_are_looked_at_once_a_memory(settings, steps, expected, monkeypatch):
    looked = []
    monkeypatch.setattr(readings, "estimate_gain", lambda found: looked.append(found) or 1.0)
    path, _ = untie_one(LAYERS["linear"], nn.ReLU(), settings)
    path.mirror(steps=steps)
    assert len(looked) == expected


@pytest.mark.usefixtures("forking")
@pytest.mark.filterwarnings("ignore:mirror mode")
def test_looking_at_gains_transports_no_weight():
    task = Task(fp.WeightMirror(PRINTED))
    task.path.mirror(steps=7)
    report = task.audit(steps=3)
    assert (report.transport_free, report.notes) == (True, ()), str(report)
