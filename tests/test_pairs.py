"""Noise in pairs, a pattern and its negative, and many pairs that are drawn as a whole."""

import copy
import dataclasses
import math
import warnings

import pytest
import torch
from torch import nn

import feedbackpath as fp
from feedbackpath.mirror import MirrorMode, noise
from feedbackpath.mirror.mode import fire
from feedbackpath.mirror.noise import NOISES, fire_noise, spread_of
from feedbackpath.mirror.wishart import draw_pairs

PAIRS = fp.Mirror(pairs=True, draw="whole", samples=16)
PLAIN = {"linear": nn.Identity(), "relu": nn.ReLU(), "leaky": nn.LeakyReLU(0.2), "gelu": nn.GELU()}


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn as a whole: for how many pairs each time."""
    asked = []

    def note(pairs, *rest):
        asked.append(pairs)
        return draw_pairs(pairs, *rest)

    monkeypatch.setattr("feedbackpath.mirror.estimate.draw_pairs", note)
    return asked


def estimates(settings, activation, passes, inputs=5):
    """Return W, and what each pass tells of it."""
    torch.manual_seed(0)
    path = fp.untie(nn.Sequential(nn.Linear(inputs, 3), activation).double(), fp.WeightMirror(settings))
    weight, mode = path.weights[0], path.context.part(MirrorMode)
    mode.find_activations([weight])
    told = []
    for number in range(passes):
        mode.passes["0"] = number
        told.append(fire(mode, weight, settings).at_gain_one())
    return weight.weight.detach(), torch.stack(told)


@pytest.mark.parametrize("behind", PLAIN)
@pytest.mark.parametrize("draw", ["each", "whole"])
def test_pairs_have_the_mean_and_the_covariances_of_the_closed_form(draw, behind, drawn):
    """Of rows b of B: ``E[(b_k - w_k) (b_l - w_l)^T] = ((w_k . w_l) I + w_l w_k^T) / N``, N pairs."""
    passes, num_pairs = 3000, PAIRS.samples // 2
    w, told = estimates(dataclasses.replace(PAIRS, draw=draw), PLAIN[behind], passes)
    assert drawn == [num_pairs] * (passes if draw == "whole" else 0)
    expected = torch.einsum("kj,lj,ab->kalb", w, w, torch.eye(5)) + torch.einsum("la,kb->kalb", w, w)
    products = torch.einsum("pka,plb->pkalb", told - w, told - w)
    for found, wanted in ((told, w), (products, expected / num_pairs)):
        assert ((found.mean(0) - wanted).abs() <= 5 * found.std(0) / math.sqrt(passes)).all()


@pytest.mark.parametrize("behind", ["linear", "gelu"])
@pytest.mark.parametrize("samples", [12, 40])
def test_a_whole_follows_the_law_of_each(samples, behind):
    """Few pairs, so that the law is far from a Gaussian one; compared as Kolmogorov and Smirnov do."""
    passes = 2000
    both = []
    for draw in ("each", "whole"):
        settings = dataclasses.replace(PAIRS, draw=draw, samples=samples)
        w, told = estimates(settings, PLAIN[behind], passes)
        sizes, along = (told - w).flatten(1).norm(dim=1), (told * w).flatten(1).sum(1)
        both.append([sizes, along, told[:, 0, 0], told[:, 2, 4]])
    for one, other in zip(*both, strict=True):
        values = torch.cat([one, other]).sort().values
        shares = [torch.searchsorted(x.sort().values, values, right=True) / passes for x in (one, other)]
        assert (shares[0] - shares[1]).abs().max() < 1.95 * math.sqrt(2 / passes)  # by chance in 1 of 1,000


def test_a_pattern_and_its_negative_follow_each_other():
    (noise,) = fire_noise(
        "gaussian", 10, (4, 3), torch.empty(0), torch.Generator().manual_seed(0), pairs=True
    )
    assert noise.shape == (10, 4, 3)
    assert torch.equal(noise[:5], -noise[5:])


@pytest.mark.parametrize("behind", ["linear", "relu", "tanh"])
@pytest.mark.parametrize("name", NOISES)
def test_pairs_scatter_as_the_closed_form_says(name, behind):
    activation = nn.Tanh() if behind == "tanh" else PLAIN[behind]
    settings, passes = fp.Mirror(noise=name, pairs=True, samples=400), 100
    w, told = estimates(settings, activation, passes, inputs=60)
    relative = (told - w).flatten(1).square().sum(1) / w.square().sum()
    drive = w.norm() / math.sqrt(len(w))
    expected = settings.relative_variance(60, 400, spread_of(activation, float(drive), pairs=True))
    assert abs(relative.mean() - expected) <= 4 * relative.std() / math.sqrt(passes) + 0.03 * expected


def hook(layer):
    return layer.register_forward_hook(lambda *args: args[2] + 0.0)


def keep_bias(net):
    bias = net[0].bias.data
    del net[0].bias
    net[0].register_buffer("bias", bias + 1.0)


CHANGES = {
    "a nonlinearity that stays": lambda net: net.append(nn.Tanh()),
    "a hook on the layer": lambda net: hook(net[0]),
    "a hook on what follows": lambda net: hook(net.append(nn.ReLU())[1]),
    "an activation with a forward of its own": lambda net: setattr(net.append(nn.ReLU())[1], "forward", abs),
    "a bias that is kept as a buffer": keep_bias,
    "half precision": lambda net: net.bfloat16(),
    "few pairs": lambda net: net.__setitem__(0, nn.Linear(8, 3)),
    "maps": lambda net: net.__setitem__(0, nn.Conv2d(2, 3, 2)),
}


SAYS = {
    **dict.fromkeys(CHANGES, "'0', and perhaps other layers, fires each pattern .* more than W tells"),
    "maps": "it has a map",
    "half precision": "its precision is below float32",
}


@pytest.mark.parametrize("why", CHANGES)
def test_each_pattern_is_fired_where_a_layer_does_more_than_w(why, drawn):
    net = nn.Sequential(nn.Linear(6, 3))
    CHANGES[why](net)
    path = fp.untie(net, fp.WeightMirror(PAIRS))
    with warnings.catch_warnings() if why == "few pairs" else pytest.warns(fp.MirrorWarning, match=SAYS[why]):
        path.mirror(steps=1)
    assert not drawn
    fp.untie(nn.Sequential(nn.Linear(6, 3)), fp.WeightMirror(PAIRS)).mirror(steps=1)
    assert drawn == [8]


def test_open_biases_autocast_and_what_watches_operations_fire_each_pattern(drawn):
    def mirror(**changes):
        settings = dataclasses.replace(PAIRS, **changes)
        fp.untie(nn.Sequential(nn.Linear(6, 3)), fp.WeightMirror(settings)).mirror(steps=1)

    with pytest.warns(fp.MirrorWarning, match="fires each pattern"):
        mirror(block_bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.warns(fp.MirrorWarning, match="autocast"):
        mirror()
    with torch.overrides.BaseTorchFunctionMode(), pytest.warns(fp.MirrorWarning, match="watches"):
        mirror()
    assert not drawn
    mirror()
    assert drawn == [8]


def test_the_projections_of_attention_are_drawn_as_a_whole(drawn):
    torch.manual_seed(0)
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)}).double()
    path = fp.untie(net, fp.WeightMirror(dataclasses.replace(PAIRS, samples=200_000, forgetting=1.0)))
    path.mirror(steps=1)
    assert len(drawn) == len(path.weights) == 2
    assert max(path.matrix_angles().values()) < 1.0


def test_a_whole_counts_as_all_of_its_samples_for_a_network_and_as_few_for_the_simulation():
    net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    each, whole = (dataclasses.replace(PAIRS, samples=1000, draw=draw) for draw in ("each", "whole"))
    plans = [
        fp.untie(copy.deepcopy(net), fp.WeightMirror(settings)).plan(lambda: net(torch.ones(1, 20)).sum())
        for settings in (each, whole)
    ]
    for one, other in zip(*plans, strict=True):
        assert (one.dues, one.samples, one.angle_deg) == (other.dues, other.samples, other.angle_deg)
        assert one.flops == other.flops * 1000 / (2 * one.inputs)


def test_wide_layers_draw_in_parts_what_they_draw_at_once(monkeypatch):
    def moments(pairs=200, inputs=30):
        fired = list(draw_pairs(pairs, inputs, torch.empty(0, dtype=torch.float64), torch.Generator()))
        patterns = torch.cat(fired)
        assert patterns.shape == (2 * inputs, inputs)
        assert not torch.cat([part[: len(part) // 2] + part[len(part) // 2 :] for part in fired]).any()
        return len(fired), patterns.T @ patterns / (2 * pairs)

    monkeypatch.setattr(noise, "CHUNK_VALUES", 60 * 7)
    parts, found = moments()
    assert parts == 5
    assert (found - torch.eye(30)).abs().max() < 5 / math.sqrt(200)
    monkeypatch.setattr(noise, "CHUNK_VALUES", 2**23)
    assert moments()[0] == 1
