"""Mirror mode: what noise tells of W, where B settles, and what stays untouched."""

import contextlib
import copy
import math
import subprocess
import sys

import pytest
import reference
import torch
from problems import (
    ATTENTIONS,
    CONVNET,
    ENCODER,
    KINDS,
    MLP,
    PLAIN_LAYERS,
    by_id,
)
from torch import nn

import feedbackpath as fp
from feedbackpath.measure.angles import angle_deg
from feedbackpath.mirror import designs, fields
from feedbackpath.mirror.codes import estimate_with_codes
from feedbackpath.mirror.noise import estimate_with_noise
from feedbackpath.mirror.rates import RATES, Signed

ACTIVATIONS = {
    "relu": nn.ReLU(),
    "leaky": nn.LeakyReLU(0.3),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "gelu": nn.GELU(),
    "identity": nn.Identity(),
}

GAUSSIAN = fp.Mirror(noise="gaussian")


def untie_alone(layer, activation, **settings):
    path = fp.untie(nn.Sequential(layer, activation), fp.WeightMirror(fp.Mirror(**settings)))
    return path, path.weights[0]


def fire(weight, activation, seed=0, num_samples=64, sigma=1.0, **settings):
    """Return what one pass of Gaussian noise finds."""
    settings = {"design": designs.DESIGNS["gaussian"], "field": "map", "block_bias": True} | settings
    with torch.no_grad():
        return estimate_with_noise(
            weight, activation, Signed(), num_samples=num_samples, sigma=sigma,
            generator=torch.Generator().manual_seed(seed), **settings,
        )  # fmt: skip


@pytest.fixture
def fired(monkeypatch):
    """Collect the noise that Gaussian designs draw."""
    drawn, draw = [], designs.DESIGNS["gaussian"].draw
    recording = designs.Design("gaussian", lambda *args: drawn.append(draw(*args)) or drawn[-1], 3.0)
    monkeypatch.setitem(designs.DESIGNS, "gaussian", recording)
    return drawn


@pytest.mark.parametrize("problem", KINDS, ids=by_id)
def test_covariance_matches_loops_over_samples_and_positions(problem, fired):
    _, weight = untie_alone(problem.build(), nn.ReLU())
    found = fire(weight, torch.relu, num_samples=160, design=designs.DESIGNS["gaussian"]).covariance
    w, (drawn,) = weight.weight.detach(), fired
    if w.dim() == 2:
        expected = reference.linear_covariance(drawn[0], w, torch.relu)
    else:
        geometry = fields.unpadded(weight.layer)
        shape = torch.convolution(drawn, w, None, *geometry).shape
        expected = reference.convolution_covariance(drawn, w, torch.relu, geometry, shape)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sigma", [0.5, 1.0])
@pytest.mark.parametrize("name", ["relu", "tanh", "identity", "sigmoid"])
@pytest.mark.parametrize("problem", [KINDS[0], KINDS[4]], ids=by_id)
def test_expected_covariance_is_proportional_to_the_weights(problem, name, sigma):
    """Equation 11, each neuron with the mean slope at which noise drives it."""
    _, weight = untie_alone(problem.build(), nn.ReLU())
    found = fire(weight, ACTIVATIONS[name], num_samples=50_000, sigma=sigma).covariance
    expected = reference.expected_covariance(weight.weight.detach(), ACTIVATIONS[name], sigma)
    scatter = 1.17 * math.sqrt(weight.fan_in / 50_000)
    assert (found - expected).norm() / expected.norm() < 1.5 * scatter


@pytest.mark.parametrize("problem", KINDS, ids=by_id)
def test_expected_covariance_of_every_kind_of_layer_behind_relus(problem):
    _, weight = untie_alone(problem.build(), nn.ReLU())
    passes = [fire(weight, torch.relu, seed, num_samples=2000).covariance for seed in range(10)]
    expected = 0.5 * weight.weight.detach()
    scatter = 1.17 * math.sqrt(weight.fan_in / 20_000)
    assert (sum(passes) / 10 - expected).norm() / expected.norm() < 1.5 * scatter


@pytest.mark.parametrize(
    ("reading", "name", "gain"),
    [
        ("printed", "relu", 0.1),
        ("printed", "identity", 0.2),
        ("inside", "relu", 1.0),
        ("inside", "identity", 2.0),
    ]
    + [("calibrated", name, 1.0) for name in ACTIVATIONS],
)
def test_gains_settle_where_each_reading_says(reading, name, gain):
    path, _ = untie_alone(
        nn.Linear(100, 80), ACTIVATIONS[name], noise="gaussian", reading=reading, samples=4000
    )
    nn.init.constant_(path.model[0].bias, 0.7)
    with pytest.warns(fp.MirrorWarning, match="gain") if gain < 0.5 else contextlib.nullcontext():
        path.mirror()
    assert path.gains()["0"] == pytest.approx(gain, rel=0.04)


@pytest.mark.parametrize("problem", KINDS, ids=by_id)
def test_gain_settles_at_one_in_every_kind_of_layer(problem):
    path, _ = untie_alone(problem.build(), nn.ReLU(), noise="gaussian", samples=2000)
    path.mirror()
    assert path.gains()["0"] == pytest.approx(1.0, rel=0.06)


def test_gain_is_one_when_biases_are_not_blocked_either():
    path, _ = untie_alone(nn.Linear(100, 80), nn.ReLU(), noise="gaussian", samples=4000, block_bias=False)
    path.mirror()
    assert path.gains()["0"] == pytest.approx(1.0, rel=0.04)


def test_sigma_does_not_change_the_calibrated_gain():
    path, _ = untie_alone(nn.Linear(100, 80), nn.ReLU(), noise="gaussian", samples=4000, sigma=3.0)
    path.mirror()
    assert path.gains()["0"] == pytest.approx(1.0, rel=0.04)


@pytest.mark.parametrize("angle", [4.0, 8.0, 11.0])
def test_sampling_noise_leaves_the_angle_that_was_asked_for(angle):
    path, _ = untie_alone(nn.Linear(300, 200), nn.ReLU(), noise="gaussian", target_angle_deg=angle)
    path.mirror(steps=40)
    assert path.matrix_angles()["0"] == pytest.approx(angle, rel=0.15)


@pytest.mark.parametrize("problem", PLAIN_LAYERS, ids=by_id)
def test_orthogonal_noise_is_exact_behind_relus(problem):
    for dtype, limit in ((torch.float32, 1e-3), (torch.float64, 1e-6)):
        path, weight = untie_alone(problem.build(dtype), nn.ReLU(), noise="orthogonal")
        path.mirror()
        assert angle_deg(weight.feedback, weight.weight) < limit
        assert path.gains()["0"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose2d(6, 8, 3).to(memory_format=torch.channels_last),
        nn.Conv2d(6, 8, 3).to(memory_format=torch.channels_last),
        nn.Conv2d(6, 8, 1).to(memory_format=torch.channels_last),
    ],
    ids=["transposed", "forward", "one-by-one"],
)
def test_an_exact_mirror_stays_exact_whatever_the_order_in_memory(layer):
    path, weight = untie_alone(layer, nn.ReLU())
    for _ in range(3):
        path.mirror()
        assert angle_deg(weight.feedback, weight.weight) < 1e-3


def test_an_exact_mirror_stays_exact_where_a_matrix_lies_in_memory_by_columns():
    layer = nn.Linear(24, 10)
    layer.weight = nn.Parameter(torch.randn(24, 10).t())
    path, weight = untie_alone(layer, nn.ReLU())
    for _ in range(3):
        path.mirror()
        assert angle_deg(weight.feedback, weight.weight) < 1e-3


@pytest.mark.parametrize("noise", ["orthogonal", "gaussian"])
def test_a_given_activation_may_work_in_place(noise):
    net = nn.Sequential(nn.Linear(40, 30))
    path = fp.untie(net, fp.WeightMirror(fp.Mirror(noise=noise)), activations={"0": lambda x: torch.relu_(x)})
    path.mirror()
    assert path.matrix_angles()["0"] < 15
    assert path.gains()["0"] == pytest.approx(1.0, abs=0.1)


def test_neurons_that_do_not_answer_are_named_once():
    net = nn.Sequential(nn.Linear(6, 5))
    nn.init.constant_(net[0].bias, -100.0)
    path = fp.untie(net, fp.WeightMirror(fp.Mirror(block_bias=False)), activations={"0": nn.ReLU()})
    with pytest.warns(fp.MirrorWarning, match="5 of 5 neurons"):
        path.mirror()
    path.mirror()  # warnings are errors


@pytest.mark.parametrize("settings", [{"block_bias": False}, {"rates": "push-pull"}], ids=str)
def test_answers_are_worked_out_where_biases_or_rates_change_them(settings):
    layer = nn.Linear(30, 20)
    nn.init.constant_(layer.bias, 0.003)
    path, weight = untie_alone(layer, nn.LeakyReLU(0.3), **settings)
    path.mirror()
    with torch.no_grad():
        found = estimate_with_codes(
            weight, nn.LeakyReLU(0.3), RATES[settings.get("rates", "signed")](1.0, False), sigma=0.01,
            block_bias=settings.get("block_bias", True),
        ).at_gain_one()  # fmt: skip
    torch.testing.assert_close(weight.feedback.detach(), found)


@pytest.mark.parametrize("problem", ATTENTIONS, ids=by_id)
def test_orthogonal_noise_is_exact_for_attention(problem):
    path = fp.untie(problem.build(), fp.WeightMirror(fp.Mirror(noise="orthogonal")))
    path.mirror()
    assert max(path.matrix_angles().values()) < 1e-6
    assert path.gains() == pytest.approx(dict.fromkeys(path.gains(), 1.0), abs=1e-8)


def test_gaussian_noise_mirrors_attention_projections():
    path = fp.untie(ENCODER.build(), fp.WeightMirror(fp.Mirror(noise="gaussian", target_angle_deg=4)))
    path.mirror()
    assert max(path.matrix_angles().values()) < 6
    assert path.gains() == pytest.approx(dict.fromkeys(path.gains(), 1.0), abs=0.1)


@pytest.mark.parametrize("rule", [fp.WeightMirror, fp.MirrorKolenPollack])
@pytest.mark.parametrize(
    "settings", [{}, {"noise": "gaussian"}, {"noise": "signs-pairs", "field": "receptive"}], ids=str
)
@pytest.mark.parametrize("call", [fp.FeedbackPath.step, fp.FeedbackPath.mirror], ids=["step", "mirror"])
def test_mirror_mode_changes_feedback_and_nothing_else(call, settings, rule):
    model = CONVNET.build()
    path = fp.untie(model, rule(fp.Mirror(**settings)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    model(CONVNET.inputs()[0]).sum().backward()
    optimizer.step()
    optimizer_state = copy.deepcopy(optimizer.state_dict())
    own = {id(feedback) for _, _, feedback in path.pairs()}
    rest = [*model.buffers(), *(p for p in model.parameters() if id(p) not in own)]
    before = [tensor.detach().clone() for tensor in rest]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    feedbacks = [feedback.clone() for _, _, feedback in path.pairs()]
    versions = [tensor._version for tensor in rest]
    random_state = torch.random.get_rng_state()
    call(path)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert all(torch.equal(tensor, old) for tensor, old in zip(rest, before, strict=True))
    assert [tensor._version for tensor in rest] == versions
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is None if gradient is None else torch.equal(parameter.grad, gradient)
    assert optimizer_state["state"]
    torch.testing.assert_close(optimizer.state_dict(), optimizer_state, rtol=0.0, atol=0.0)
    assert not any(torch.equal(b, old) for (_, _, b), old in zip(path.pairs(), feedbacks, strict=True))
    assert all(module.training for module in model.modules())


def test_noise_is_a_function_of_seed_and_pass_alone():
    def mirror(seed, *passes):
        path = fp.untie(MLP.build(), fp.WeightMirror(GAUSSIAN), seed=seed)
        for steps in passes:
            torch.rand(3)  # whatever else draws random numbers
            state = path.state_dict()
            path.load_state_dict(state)
            path.mirror(steps=steps)
        return [feedback.clone() for _, _, feedback in path.pairs()]

    whole, in_parts, other = mirror(0, 5), mirror(0, 2, 3), mirror(1, 5)
    assert all(torch.equal(a, b) for a, b in zip(whole, in_parts, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(whole, other, strict=True))


def test_no_two_layers_and_no_two_passes_fire_the_same_noise(fired):
    layers = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU())
    fp.untie(layers, fp.WeightMirror(GAUSSIAN)).mirror(steps=2)
    assert len({round(noise.sum().item(), 6) for noise in fired}) == 4


@pytest.mark.parametrize(
    ("activation", "bias", "block_bias"), [(nn.ReLU(), -100.0, False), (lambda x: 0.0 * x, 0.0, True)]
)
def test_a_layer_that_never_answers_is_named_and_keeps_its_feedback(activation, bias, block_bias):
    model = nn.Sequential(nn.Linear(6, 5))
    nn.init.constant_(model[0].bias, bias)
    rule = fp.WeightMirror(fp.Mirror(block_bias=block_bias))
    path = fp.untie(model, rule, activations={"0": activation})
    before = model[0].feedback.clone()
    with pytest.warns(fp.MirrorWarning, match="5 of 5 neurons of '0' do not answer to noise"):
        path.step()
    assert torch.equal(model[0].feedback, before)


@pytest.mark.parametrize("noise", ["orthogonal", "gaussian", "signs-pairs"])
@pytest.mark.parametrize("field", ["map", "receptive"])
@pytest.mark.parametrize("problem", [KINDS[0], KINDS[4], KINDS[-3]], ids=by_id)
def test_dead_units_are_counted_and_the_others_learn(problem, field, noise):
    settings = {"noise": noise, "field": field, "block_bias": False, "sigma": 0.1}
    path, weight = untie_alone(problem.build(), nn.ReLU(), **settings)
    nn.init.constant_(path.model[0].bias, 2.0)
    nn.init.constant_(path.model[0].bias[:2], -100.0)
    channels = 1 if weight.transposed else 0
    dead, alive = torch.arange(2), torch.arange(2, len(path.model[0].bias))
    before = weight.feedback.detach().index_select(channels, dead)
    num_channels = len(path.model[0].bias)
    with pytest.warns(fp.MirrorWarning, match=f"2 of {num_channels} neurons of '0' do not answer") as said:
        path.mirror(until_angle_deg=6)
    assert len(said) == 1
    assert weight.feedback.isfinite().all()
    assert torch.equal(weight.feedback.index_select(channels, dead), before)
    learnt, w = (x.detach().index_select(channels, alive) for x in (weight.feedback, weight.weight))
    assert angle_deg(learnt, w) < 10
    assert (learnt * w).sum() / w.square().sum() == pytest.approx(1.0, abs=0.06)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reading": "aloud"}, "reading='aloud' is not one of calibrated, inside, printed, scaled"),
        ({"noise": "white"}, "noise='white' is not one of orthogonal, gaussian"),
        ({"sigma": 0.0}, r"sigma must be above 0, not 0\.0"),
        ({"rate": float("nan")}, "rate must be above 0, not nan"),
        ({"noise": "signs", "samples": 1}, "samples must be at least 2, not 1"),
        ({"reading": "printed", "decay": 1.5}, r"would replace 1\.5 of B"),
        ({"target_angle_deg": 90.0}, "target_angle_deg"),
        ({"samples": 100}, "samples are for independent noise"),
        ({"across_devices": "averaged"}, "across_devices='averaged' is for independent noise"),
        ({"across_devices": "mean"}, "across_devices='mean' is not one of same, averaged"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(fp.RuleError, match=message):
        fp.Mirror(**settings)


def test_more_inputs_and_smaller_angles_need_more_samples():
    few, many, fine = (
        fp.Mirror(noise="gaussian", target_angle_deg=angle).samples_for(fan_in)
        for angle, fan_in in ((8.0, 1000), (8.0, 4000), (4.0, 1000))
    )
    assert many == pytest.approx(4 * few, rel=0.01)
    assert fine == pytest.approx(4 * few, rel=0.05)
    assert GAUSSIAN.samples_for(1) == 512
    assert fp.Mirror(noise="signs", samples=7).samples_for(10_000) == 7


def test_codes_are_orthogonal_signs():
    matrix = designs.orthogonal_codes(torch.device("cpu"), torch.float32)
    assert torch.equal(matrix.abs(), torch.ones_like(matrix))
    assert torch.equal(matrix @ matrix.T, len(matrix) * torch.eye(len(matrix)))


@pytest.mark.parametrize("rule", ["mirror-kp", "wm"])
def test_neurons_without_weights_do_not_change_the_gain(rule):
    net = nn.Sequential(nn.Linear(20, 30), nn.ReLU())
    with torch.no_grad():
        net[0].weight[:15] = 0
    path = fp.untie(net, rule)
    path.mirror()
    assert path.gains()["0"] == pytest.approx(1, abs=0.05)


def test_mirror_kp_refuses_readings_that_do_not_settle_at_the_weights():
    with pytest.raises(fp.RuleError, match="needs the 'calibrated' reading"):
        fp.MirrorKolenPollack(fp.Mirror(noise="orthogonal", reading="printed"))


def test_activations_that_work_in_place_can_be_given():
    net = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 4))
    path = fp.untie(net, "wm", activations={"0": nn.ReLU(inplace=True)})
    path.mirror()
    assert max(path.matrix_angles().values()) < 12


def rooms_after(statement):
    """Return what of this package a fresh interpreter has imported after a statement."""
    code = f"{statement}; import sys; sys.stdout.write(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = (name.split(".") for name in done.stdout.split())
    return {first[0] for package, *first in names if package == "feedbackpath" and first}


def test_mirror_mode_stands_on_the_core_alone():
    assert rooms_after("import feedbackpath.mirror") <= {
        "core", "errors", "layers", "mirror", "ops", "passage",
    }  # fmt: skip


@pytest.mark.parametrize("rule", ["base", "backprop", "feedback_alignment", "sign_symmetry", "kolen_pollack"])
def test_rules_that_do_not_mirror_do_not_import_mirror_mode(rule):
    alone = (  # the folder of rules without the table that imports them all
        "import sys, types, feedbackpath; rules = types.ModuleType('feedbackpath.rules'); "
        "rules.__path__ = [feedbackpath.__path__[0] + '/rules']; sys.modules['feedbackpath.rules'] = rules"
    )
    rooms = rooms_after(f"{alone}; import feedbackpath.rules.{rule}")
    assert "rules" in rooms
    assert "mirror" not in rooms
