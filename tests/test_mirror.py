"""Mirror mode: what noise tells of W, what it is sent through, and what stays untouched."""

import contextlib
import copy
import math
import subprocess
import sys

import pytest
import reference
import torch
from problems import ATTENTIONS, CONVNET, ENCODER, KINDS, MLP, PLAIN_LAYERS, by_id
from torch import nn

import feedbackpath as fp
from feedbackpath.measure.angles import angle_deg
from feedbackpath.mirror import MirrorMode, fields
from feedbackpath.mirror.mode import fire

ACTIVATIONS = {
    "relu": nn.ReLU(),
    "leaky": nn.LeakyReLU(0.3),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "gelu": nn.GELU(),
    "identity": nn.Identity(),
}
CODES = [fp.Mirror.exact(), fp.Mirror(noise="hadamard")]
over_codes = pytest.mark.parametrize("codes", CODES, ids=["orthogonal", "hadamard"])
RELU_SCATTER = math.sqrt(2.0 - 2.0 / math.pi)


def untie_alone(layer, activation, seed=0, **settings):
    path = fp.untie(nn.Sequential(layer, activation), fp.WeightMirror(fp.Mirror(**settings)), seed=seed)
    return path, path.weights[0]


def fire_once(path, settings):
    """Return what one pass finds; B stays as it is."""
    path.context.part(MirrorMode).find_activations(path.weights)
    return fire(path.context.part(MirrorMode), path.weights[0], settings)


@contextlib.contextmanager
def noise_of(layer):
    """Collect what a layer is called with."""
    seen = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    yield seen
    hook.remove()


# What is fired, and what it is sent through.


@pytest.mark.parametrize("problem", KINDS, ids=by_id)
def test_covariance_matches_loops_over_examples_and_positions(problem):
    path, weight = untie_alone(problem.build(), nn.ReLU())
    with noise_of(weight.layer) as seen:
        found = fire_once(path, fp.Mirror(samples=7)).covariance
    w, (noise,) = weight.weight.detach(), seen
    if w.dim() == 2:
        expected = reference.linear_covariance(noise, w, torch.relu)
    else:
        geometry = fields.geometry_of(weight.layer, weight.layer.padding)
        shape = torch.convolution(noise, w, None, *geometry).shape
        expected = reference.convolution_covariance(noise, w, torch.relu, geometry, shape)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["gaussian", "uniform", "signs", "orthogonal", "hadamard"])
@pytest.mark.parametrize("problem", KINDS, ids=by_id)
def test_all_neurons_of_a_layer_fire_in_every_sample(problem, name):
    path, weight = untie_alone(problem.build(), nn.ReLU())
    settings = fp.Mirror(noise=name)
    with noise_of(weight.layer) as seen:
        fire_once(path, settings)
    assert all((x != 0).all() for x in seen)
    sizes = torch.cat([x.flatten() for x in seen]).abs()
    deviation = 0.01 if name == "orthogonal" else 1.0
    assert sizes.square().mean() == pytest.approx(deviation**2, rel=0.05)


@pytest.mark.parametrize("rule", ["wm", fp.WeightMirror(CODES[1]), "wm-exact", "mirror-kp", "mirror-fa"])
@pytest.mark.parametrize("problem", [KINDS[0], KINDS[4], KINDS[-3]], ids=by_id)
def test_a_layer_that_a_hook_silences_teaches_nothing(problem, rule):
    path = fp.untie(nn.Sequential(problem.build(), nn.ReLU()), rule)
    weight = path.weights[0]
    before = weight.feedback.detach().clone()
    hook = weight.layer.register_forward_hook(lambda *args: torch.zeros_like(args[2]))
    with pytest.warns(fp.MirrorWarning, match="neurons of '0' do not answer to noise"):
        path.mirror()
    assert torch.equal(weight.feedback, before)
    hook.remove()
    path.mirror()
    assert path.matrix_angles()["0"] < 5


def test_a_layer_that_is_silenced_during_training_keeps_what_it_has_learnt():
    path, weight = untie_alone(nn.Linear(30, 20), nn.ReLU())
    path.mirror()
    before = weight.feedback.detach().clone()
    weight.layer.register_forward_hook(lambda *args: torch.zeros_like(args[2]))
    with pytest.warns(fp.MirrorWarning, match="20 of 20 neurons"):
        path.step()
    assert torch.equal(weight.feedback, before)


@pytest.mark.parametrize("where", ["layer", "activation"])
@pytest.mark.parametrize("size", [0.3, 1.0, 3.0])
def test_noise_that_a_hook_adds_raises_the_angle_as_theory_says(size, where):
    """``sum_j Var[B_j] = (|w|^2 (n + 1) + size^2 n) / (N - 1)`` for a linear neuron."""
    inputs, samples, passes = 40, 500, 20
    path, weight = untie_alone(nn.Linear(inputs, 300), nn.LeakyReLU(1.0), samples=samples)
    nn.init.normal_(weight.weight, std=inputs**-0.5)
    place = weight.layer if where == "layer" else path.model[1]
    place.register_forward_hook(lambda *args: args[2] + size * torch.randn_like(args[2]))
    variances = []
    for _ in range(passes):
        found = fire_once(path, fp.Mirror(samples=samples)).covariance
        w = weight.weight.detach()
        variances.append((found - w).square().sum() / w.square().sum())
        path.context.part(MirrorMode).passes["0"] = len(variances)
    square = float(w.square().sum()) / 300
    expected = (inputs + 1 + size**2 * inputs / square) / (samples - 1)
    assert torch.stack(variances).mean().item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("codes", [*CODES, fp.Mirror()], ids=["orthogonal", "hadamard", "gaussian"])
def test_hadamard_codes_average_over_noise_and_weak_ones_drown_in_it(codes):
    path, weight = untie_alone(nn.Linear(256, 100), nn.Identity(), noise=codes.noise)
    weight.layer.register_forward_hook(lambda *args: args[2] + 0.05 * torch.randn_like(args[2]))
    path.mirror(steps=1)
    angle = path.matrix_angles()["0"]
    if codes.noise == "orthogonal":
        assert angle > 60
    if codes.noise == "hadamard":  # 512 samples average over 0.05 / |w| with |w| about 0.58
        assert angle == pytest.approx(math.degrees(0.05 / 0.577 * math.sqrt(256 / 512)), rel=0.1)


@over_codes
def test_quantised_activities_and_autocast_are_felt(codes):
    path, weight = untie_alone(nn.Linear(64, 30), nn.ReLU(), noise=codes.noise)
    path.mirror()
    assert path.matrix_angles()["0"] < 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        path.mirror()
    assert 0.01 < path.matrix_angles()["0"] < 1
    weight.layer.register_forward_pre_hook(lambda _, args: torch.round(args[0] * 4) / 4)
    if codes.noise == "orthogonal":
        with pytest.warns(fp.MirrorWarning, match="do not answer"):  # 0.01 rounds to nothing
            path.mirror()
    else:
        path.mirror()
        assert path.matrix_angles()["0"] < 1e-3


def test_a_layer_of_ones_own_runs_its_own_forward_pass():
    class Clipped(nn.Linear):
        def forward(self, x):
            return super().forward(x.clamp(-0.5, 0.5))

    gains = {}
    for rule in ("wm", "wm-exact"):
        path = fp.untie(nn.Sequential(Clipped(40, 30), nn.Identity()), rule)
        path.mirror()
        gains[rule] = path.gains()["0"]
    # E[d clamp(x) / dx]: slopes are told at the layer's output, and what its input loses is felt.
    assert gains["wm"] == pytest.approx(math.erf(0.5 / math.sqrt(2)), rel=0.05)
    assert gains["wm-exact"] == pytest.approx(1.0, abs=1e-5)  # codes are weaker than that


def test_noise_is_fresh_in_each_pass_layer_and_step():
    """The errors of two estimates go together no more than chance explains."""
    model = nn.Sequential(nn.Linear(50, 50, bias=False), nn.Identity(), nn.Linear(50, 50, bias=False))
    model[2].weight.data = model[0].weight.data.clone()
    path = fp.untie(model, fp.WeightMirror(fp.Mirror(samples=100, forgetting=1.0)))
    errors = []
    for call in (path.mirror, path.step, path.step):
        call()
        errors += [(w.feedback - w.weight).detach().flatten() for w in path.weights]
    correlations = torch.corrcoef(torch.stack(errors)) - torch.eye(len(errors))
    assert correlations.abs().max() < 5 / math.sqrt(2500)


@pytest.mark.parametrize("call", [fp.FeedbackPath.step, fp.FeedbackPath.mirror], ids=["step", "mirror"])
def test_what_a_hook_draws_is_fresh_and_leaves_trainings_random_numbers_alone(call):
    path, weight = untie_alone(nn.Linear(20, 10), nn.ReLU(), samples=16)
    drawn = []
    weight.layer.register_forward_hook(lambda *args: drawn.append(torch.randn(3)))
    state = torch.get_rng_state()
    for _ in range(3):
        call(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tuple(values.tolist()) for values in drawn}) == len(drawn) >= 3


# How much is fired.


def test_noise_takes_the_shape_of_the_minibatch_and_2048_examples_before_there_was_one():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(400, 5))
    path = fp.untie(model, "wm")
    with noise_of(model[0]) as maps, noise_of(model[3]) as vectors:
        path.mirror(steps=1)
        assert sum(map(len, maps)) == sum(map(len, vectors)) == 2048
        maps.clear()
        vectors.clear()
        model(torch.randn(6, 3, 10, 10)).sum().backward()
        assert len(maps.pop()) == len(vectors.pop()) == 6
        path.step()
    assert [tuple(x.shape) for x in maps] == [(6, 3, 10, 10)]
    assert [tuple(x.shape) for x in vectors] == [(6, 400)]


def test_a_layer_that_has_never_been_mirrored_begins_with_2048_examples():
    model = nn.Sequential(nn.Linear(30, 20), nn.ReLU())
    path = fp.untie(model, "wm")
    model(torch.randn(4, 30)).sum().backward()
    with noise_of(model[0]) as seen:
        path.step()
        path.step()
    assert [len(x) for x in seen] == [2048, 4]
    assert path.matrix_angles()["0"] < 30


def test_the_papers_samples_are_2048_examples_at_every_position():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 49, 5))
    path = fp.untie(model, fp.WeightMirror(fp.Mirror.paper()))
    path.mirror(steps=1)
    model(torch.randn(6, 3, 7, 7)).sum().backward()
    path.step()
    mode = path.context.part(MirrorMode)
    found = [fire(mode, weight, fp.Mirror.paper()) for weight in path.weights]
    assert [one.num_samples for one in found] == [2048 * 49, 2048]
    plan = path.plan(lambda: model(torch.randn(6, 3, 7, 7)).sum())
    assert [(layer.samples, layer.positions) for layer in plan] == [(2048, 49), (2048, 1)]


def test_wide_layers_fire_in_parts(monkeypatch):
    from feedbackpath.mirror import noise

    monkeypatch.setattr(noise, "CHUNK_VALUES", 3000)
    for settings in (fp.Mirror(samples=100), fp.Mirror(samples=100, pairs=True), fp.Mirror(noise="hadamard")):
        path, weight = untie_alone(nn.Linear(100, 20), nn.ReLU())
        with noise_of(weight.layer) as seen:
            found = fire_once(path, settings)
        assert len(seen) > 1
        assert max(x.numel() for x in seen) <= 3200
        assert sum(map(len, seen)) == found.num_samples == (256 if settings.fires_codes else 100)
        if settings.fires_codes:
            torch.testing.assert_close(found.at_gain_one(), weight.weight.detach())


# What it tells.


@pytest.mark.parametrize("sigma", [0.5, 1.0])
@pytest.mark.parametrize("name", ["relu", "tanh", "identity", "sigmoid"])
@pytest.mark.parametrize("problem", [KINDS[0], KINDS[4]], ids=by_id)
def test_expected_covariance_is_proportional_to_the_weights(problem, name, sigma):
    """Equation 11, each neuron with the mean slope at which noise drives it."""
    layer = problem.build()
    if not isinstance(layer, nn.Linear):
        layer.padding = (0,) * len(layer.kernel_size)  # at a border drives are weaker
    path, weight = untie_alone(layer, ACTIVATIONS[name])
    found = fire_once(path, fp.Mirror(samples=50_000, sigma=sigma)).covariance
    expected = reference.expected_covariance(weight.weight.detach(), ACTIVATIONS[name], sigma)
    scatter = 1.17 * math.sqrt(weight.fan_in / 50_000)
    assert (found - expected).norm() / expected.norm() < 1.5 * scatter


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("problem", [*KINDS, *PLAIN_LAYERS], ids=by_id)
def test_every_kind_of_layer_is_mirrored_to_within_sampling_noise(problem):
    """The predicted angle is that of all passes together; small layers scatter about it."""
    path, weight = untie_alone(problem.build(), nn.ReLU())
    field = path.context.part(MirrorMode).field(weight, fp.Mirror(), None)
    path.mirror(steps=8)
    variance = RELU_SCATTER**2 * (fields.inputs_of(weight) + 1) / (8 * 2048 * field.positions)
    predicted = math.degrees(math.atan(math.sqrt(variance)))
    chance = 4 / math.sqrt(2 * weight.weight.numel())
    assert path.matrix_angles()["0"] < predicted * (1.15 + chance)
    assert path.matrix_angles()["0"] > predicted * (0.7 - chance)
    assert path.gains()["0"] == pytest.approx(1.0, abs=0.03)


@over_codes
@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("problem", [*KINDS, *PLAIN_LAYERS], ids=by_id)
def test_codes_tell_every_kind_of_layer_to_rounding_through_its_own_call(problem, codes):
    for dtype, limit in ((torch.float32, 2e-4), (torch.float64, 1e-10)):
        path, weight = untie_alone(problem.build(dtype), nn.ReLU())
        found = fire_once(path, codes).at_gain_one()
        assert (found - weight.weight).norm() / weight.weight.norm() < limit


@over_codes
@pytest.mark.parametrize("problem", ATTENTIONS, ids=by_id)
def test_codes_tell_attention(problem, codes):
    path = fp.untie(problem.build(), fp.ExactMirror(codes))
    path.mirror()
    assert max(path.matrix_angles().values()) < 1e-6
    assert path.gains() == pytest.approx(dict.fromkeys(path.gains(), 1.0), abs=1e-8)


def test_noise_mirrors_attention_projections():
    path = fp.untie(ENCODER.build(), "wm")
    path.mirror(steps=5)
    assert max(path.matrix_angles().values()) < 4
    assert path.gains() == pytest.approx(dict.fromkeys(path.gains(), 1.0), abs=0.03)
    model, x = path.model, ENCODER.inputs()[0]
    model(x).sum().backward()
    path.step()
    assert max(path.matrix_angles().values()) < 20


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_the_order_of_memory_makes_no_difference(kind, order):
    path, weight = untie_alone(kind(6, 8, 3).to(memory_format=order), nn.ReLU())
    with noise_of(weight.layer) as seen:
        path.mirror(steps=20)
    assert seen[0].is_contiguous(memory_format=order)
    assert path.matrix_angles()["0"] < 3
    for codes in CODES:
        found = fire_once(path, codes).at_gain_one()
        torch.testing.assert_close(found, weight.weight.detach(), rtol=1e-3, atol=1e-5)


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
    path, _ = untie_alone(nn.Linear(100, 80), ACTIVATIONS[name], reading=reading, samples=4000)
    nn.init.constant_(path.model[0].bias, 0.7)
    with pytest.warns(fp.MirrorWarning, match="gain") if gain < 0.5 else contextlib.nullcontext():
        path.mirror()
    assert path.gains()["0"] == pytest.approx(gain, rel=0.04)


@pytest.mark.parametrize("settings", [{"block_bias": False}, {"sigma": 3.0}, {"noise": "signs"}], ids=str)
def test_the_calibrated_gain_is_one_whatever_is_fired(settings):
    path, _ = untie_alone(nn.Linear(100, 80), nn.ReLU(), samples=4000, **settings)
    path.mirror()
    assert path.gains()["0"] == pytest.approx(1.0, rel=0.04)


@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_a_small_minibatch_does_not_spoil_the_gain(bias):
    """Slopes are remembered as long as B: four samples tell little of one."""
    model = nn.Sequential(nn.Linear(40, 60), nn.ReLU())
    nn.init.constant_(model[0].bias, bias)
    path = fp.untie(model, fp.WeightMirror(fp.Mirror(block_bias=False)))
    path.mirror()
    model(torch.randn(4, 40)).sum().backward()
    gains = []
    for _ in range(200):
        path.step()
        gains.append(path.gains()["0"])
    assert sum(gains) / 200 == pytest.approx(1.0, abs=0.1)
    assert max(gains) < 1.5


@pytest.mark.parametrize("angle", [4.0, 8.0, 11.0])
def test_sampling_noise_leaves_the_angle_that_was_asked_for(angle):
    path, _ = untie_alone(nn.Linear(300, 200), nn.ReLU(), target_angle_deg=angle)
    path.mirror(steps=40)
    assert path.matrix_angles()["0"] == pytest.approx(angle, rel=0.1)


def test_a_given_activation_may_work_in_place():
    for rule in ("wm", "wm-exact"):
        for activation in (lambda x: torch.relu_(x), nn.ReLU(inplace=True)):
            path = fp.untie(nn.Sequential(nn.Linear(40, 30)), rule, activations={"0": activation})
            path.mirror()
            assert path.matrix_angles()["0"] < 5
            assert path.gains()["0"] == pytest.approx(1.0, abs=0.02)


# Neurons that do not answer.


@pytest.mark.parametrize(
    ("activation", "bias", "block_bias"), [(nn.ReLU(), -100.0, False), (lambda x: 0.0 * x, 0.0, True)]
)
def test_a_layer_that_never_answers_is_named_once_and_keeps_its_feedback(activation, bias, block_bias):
    model = nn.Sequential(nn.Linear(6, 5))
    nn.init.constant_(model[0].bias, bias)
    rule = fp.WeightMirror(fp.Mirror(block_bias=block_bias))
    path = fp.untie(model, rule, activations={"0": activation})
    before = model[0].feedback.clone()
    with pytest.warns(fp.MirrorWarning, match="5 of 5 neurons of '0' do not answer to noise") as said:
        path.mirror()
    assert len(said) == 1
    assert torch.equal(model[0].feedback, before)
    path.mirror()  # warnings are errors


@pytest.mark.parametrize("noise", ["orthogonal", "gaussian"])
@pytest.mark.parametrize("problem", [KINDS[0], KINDS[4], KINDS[-3]], ids=by_id)
def test_dead_units_are_counted_and_the_others_learn(problem, noise):
    path, weight = untie_alone(problem.build(), nn.ReLU(), noise=noise, block_bias=False, sigma=0.1)
    nn.init.constant_(path.model[0].bias, 2.0)
    nn.init.constant_(path.model[0].bias[:2], -100.0)
    channels = 1 if weight.transposed else 0
    dead, alive = torch.arange(2), torch.arange(2, len(path.model[0].bias))
    before = weight.feedback.detach().index_select(channels, dead)
    with pytest.warns(fp.MirrorWarning, match="2 of .* neurons of '0' do not answer") as said:
        path.mirror(until_angle_deg=4)
    assert len(said) == 1
    assert torch.equal(weight.feedback.index_select(channels, dead), before)
    learnt, w = (x.detach().index_select(channels, alive) for x in (weight.feedback, weight.weight))
    assert angle_deg(learnt, w) < 6
    assert (learnt * w).sum() / w.square().sum() == pytest.approx(1.0, abs=0.06)


def test_neurons_that_are_silent_by_chance_are_not_named():
    model = nn.Sequential(nn.Linear(6, 50), nn.ReLU())
    path = fp.untie(model, "wm")
    path.mirror(steps=1)
    model(torch.randn(2, 6)).sum().backward()
    for _ in range(30):
        path.step()  # warnings are errors
    assert path.gains()["0"] > 0.5


@pytest.mark.parametrize("rule", ["mirror-kp", "wm", "wm-exact"])
def test_neurons_without_weights_do_not_change_the_gain(rule):
    net = nn.Sequential(nn.Linear(20, 30), nn.ReLU())
    with torch.no_grad():
        net[0].weight[:15] = 0
    path = fp.untie(net, rule)
    path.mirror()
    assert path.gains()["0"] == pytest.approx(1, abs=0.05)
    assert not net[0].feedback[:15].any()


# What stays as it was.


@pytest.mark.filterwarnings("ignore:.* fires each pattern:feedbackpath.MirrorWarning")
@pytest.mark.parametrize("rule", [fp.WeightMirror, fp.MirrorKolenPollack])
@pytest.mark.parametrize(
    "settings",
    [{}, {"noise": "orthogonal"}, {"noise": "hadamard"}, {"pairs": True, "draw": "whole", "samples": 2000}],
    ids=str,
)
@pytest.mark.parametrize("call", [fp.FeedbackPath.step, fp.FeedbackPath.mirror], ids=["step", "mirror"])
@pytest.mark.parametrize("is_hooked", [False, True], ids=["plain", "hooked"])
def test_mirror_mode_changes_feedback_and_nothing_else(is_hooked, call, settings, rule):
    model = CONVNET.build()
    path = fp.untie(model, rule(fp.Mirror(**settings)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    if is_hooked:
        model[3].register_forward_hook(lambda *args: args[2] + 0.01 * torch.randn_like(args[2]))
    model(CONVNET.inputs()[0]).sum().backward()
    optimizer.step()
    optimizer_state = copy.deepcopy(optimizer.state_dict())
    own = {id(feedback) for _, _, feedback in path.pairs()}
    rest = [*model.buffers(), *(p for p in model.parameters() if id(p) not in own)]
    before = [tensor.detach().clone() for tensor in rest]
    names = [name for name, _ in model.named_parameters()]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    feedbacks = [feedback.clone() for _, _, feedback in path.pairs()]
    versions = [tensor._version for tensor in rest]
    random_state = torch.random.get_rng_state()
    call(path)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert all(torch.equal(tensor, old) for tensor, old in zip(rest, before, strict=True))
    assert [tensor._version for tensor in rest] == versions
    assert [name for name, _ in model.named_parameters()] == names
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is None if gradient is None else torch.equal(parameter.grad, gradient)
    assert optimizer_state["state"]
    torch.testing.assert_close(optimizer.state_dict(), optimizer_state, rtol=0.0, atol=0.0)
    assert not any(torch.equal(b, old) for (_, _, b), old in zip(path.pairs(), feedbacks, strict=True))
    assert all(module.training for module in model.modules())


def test_a_bias_is_open_again_whatever_happens():
    path, weight = untie_alone(nn.Linear(6, 5), nn.ReLU())
    bias = weight.layer.bias

    def stop(*_):
        assert weight.layer.bias is None
        raise KeyboardInterrupt

    hook = weight.layer.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        path.mirror()
    hook.remove()
    assert weight.layer.bias is bias


@pytest.mark.parametrize(
    "settings", [fp.Mirror(), fp.Mirror(pairs=True, draw="whole")], ids=["each", "whole"]
)
def test_noise_is_a_function_of_seed_and_pass_alone(settings):
    def mirror(seed, *passes):
        path = fp.untie(MLP.build(), fp.WeightMirror(settings), seed=seed)
        for steps in passes:
            torch.rand(3)  # whatever else draws random numbers
            state = path.state_dict()
            path.load_state_dict(state)
            path.mirror(steps=steps)
        return [feedback.clone() for _, _, feedback in path.pairs()]

    whole, in_parts, other = mirror(0, 5), mirror(0, 2, 3), mirror(1, 5)
    assert all(torch.equal(a, b) for a, b in zip(whole, in_parts, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(whole, other, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reading": "aloud"}, "reading='aloud' is not one of calibrated, inside, printed, scaled"),
        ({"noise": "white"}, "noise='white' is not one of gaussian, uniform, signs, orthogonal, hadamard"),
        ({"sigma": 0.0}, r"sigma must be above 0, not 0\.0"),
        ({"rate": float("nan")}, "rate must be a finite number, not nan"),
        ({"noise": "signs", "samples": 1}, "samples must be at least 2, not 1"),
        ({"reading": "printed", "decay": 1.5}, r"would replace 1\.5 of B"),
        ({"target_angle_deg": 90.0}, "target_angle_deg must be below 90"),
        ({"target_angle_deg": 9.0, "samples": 9}, "give samples or target_angle_deg, not both"),
        ({"noise": "orthogonal", "samples": 100}, "samples is for independent noise"),
        ({"noise": "hadamard", "target_angle_deg": 5}, "target_angle_deg is for independent noise"),
        (
            {"noise": "orthogonal", "across_devices": "averaged"},
            "across_devices='averaged' is for independent",
        ),
        ({"pairs": True, "noise": "hadamard"}, "pairs is for independent noise of signed numbers"),
        ({"pairs": True, "rates": "push-pull"}, "pairs is for independent noise of signed numbers"),
        ({"pairs": True, "samples": 7}, "samples must be even with pairs=True, not 7"),
        ({"draw": "whole"}, "draw='whole' needs noise='gaussian' and pairs=True"),
        ({"draw": "whole", "pairs": True, "noise": "signs"}, "draw='whole' needs noise='gaussian'"),
        (
            {"draw": "whole", "pairs": True, "when": fp.When(cost_share=0.5)},
            "draw='whole' changes what a pass",
        ),
        ({"draw": "once"}, "draw='once' is not one of each, whole"),
        ({"across_devices": "mean"}, "across_devices='mean' is not one of same, averaged"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(fp.RuleError, match=message):
        fp.Mirror(**settings)


def test_more_inputs_and_smaller_angles_need_more_examples_and_positions_fewer():
    few, many, fine, maps = (
        fp.Mirror(target_angle_deg=angle).examples_for(inputs, positions)
        for angle, inputs, positions in ((8.0, 1000, 1), (8.0, 4000, 1), (4.0, 1000, 1), (8.0, 1000, 10))
    )
    assert many == pytest.approx(4 * few, rel=0.01)
    assert fine == pytest.approx(4 * few, rel=0.05)
    assert maps == pytest.approx(few / 10, abs=1)
    assert fp.Mirror(samples=7).examples_for(10_000) == 7
    assert fp.Mirror(pairs=True).examples_for(10_000, seen=7) == 8
    assert fp.Mirror().examples_for(10_000) == 2048
    assert fp.Mirror().examples_for(10_000, seen=96, devices=4) == 24


def rooms_after(statement):
    """Return what of this package a fresh interpreter has imported after a statement."""
    code = f"{statement}; import sys; sys.stdout.write(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = (name.split(".") for name in done.stdout.split())
    return {first[0] for package, *first in names if package == "feedbackpath" and first}


def test_mirror_mode_stands_on_the_core_alone():
    assert rooms_after("import feedbackpath.mirror") <= {"arguments", "core", "errors", "layers", "mirror"}
