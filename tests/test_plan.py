"""A plan of mirror mode foretells what mirroring gives."""

import math
import re

import numpy
import pytest
import torch
from torch import nn

import feedbackpath as fp
from feedbackpath import cli
from feedbackpath.mirror import MirrorMode, fields
from feedbackpath.mirror.cost import Dues
from feedbackpath.mirror.noise import NOISES


def make_dense():
    return nn.Sequential(nn.Linear(200, 300), nn.ReLU(), nn.Linear(300, 100), nn.Tanh(), nn.Linear(100, 20))


def make_convolutional():
    return nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, stride=2), nn.ReLU(),
    )  # fmt: skip


def plan_and_measure(make, **settings):
    torch.manual_seed(0)
    mirror = fp.Mirror(**settings)
    model = make()
    path = fp.untie(model, fp.WeightMirror(mirror))
    x = torch.randn(4, 200) if make is make_dense else torch.randn(4, 16, 12, 12)
    plan = {layer.name: layer for layer in path.plan(lambda: model(x).sum())}
    path.mirror()
    return plan, path


@pytest.mark.parametrize("make", [make_dense, make_convolutional])
@pytest.mark.parametrize("noise", NOISES)
def test_predicted_angles_are_measured_within_15_percent(noise, make):
    torch.manual_seed(0)
    model = make()
    path = fp.untie(model, fp.WeightMirror(fp.Mirror(noise=noise)))
    x = torch.randn(60, 200) if make is make_dense else torch.randn(6, 16, 12, 12)
    model(x).sum().backward()
    path.step()
    plan = {layer.name: layer for layer in path.plan(lambda: model(x).sum())}
    for _ in range(200):
        path.step()
    for name, angle in path.matrix_angles().items():
        assert angle == pytest.approx(plan[name].angle_deg, rel=0.15), name


def test_codes_leave_nothing_to_chance():
    plan, path = plan_and_measure(make_convolutional, noise="orthogonal")
    assert {layer.angle_deg for layer in plan.values()} == {0.0}
    assert max(path.matrix_angles().values()) < 0.05


def test_flops_are_appendix_bs():
    plan, _ = plan_and_measure(make_dense, samples=1000)
    # Two products, noise through W and the covariance, of 1000 samples, each of two FLOPs a weight.
    assert plan["0"].flops == 2 * 2 * 1000 * 200 * 300
    step = 3 * 2 * 4 * (200 * 300 + 300 * 100 + 100 * 20)
    assert plan["0"].share == pytest.approx(plan["0"].flops / step)


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        (fp.When(), 1.0),
        (fp.When(every=5), 5.0),
        (fp.When("turn"), 3.0),
        (fp.When("alternate"), 2.0),
    ],
)
def test_how_often_follows_from_the_schedule(when, expected):
    plan, _ = plan_and_measure(make_dense, when=when)
    assert {layer.steps_between for layer in plan.values()} == {expected}


def test_a_smaller_budget_mirrors_less_often():
    often, rarely = (
        plan_and_measure(make_dense, samples=64, when=fp.When(cost_share=share))[0]["0"].steps_between
        for share in (0.05, 0.01)
    )
    assert rarely == pytest.approx(5 * often)


def test_activations_that_learn_can_be_planned_for():
    model = nn.Sequential(nn.Linear(60, 50), nn.PReLU(), nn.Linear(50, 40), nn.PReLU(40))
    path = fp.untie(model, fp.WeightMirror(fp.Mirror()))
    plan = {layer.name: layer.angle_deg for layer in path.plan(lambda: model(torch.randn(512, 60)).sum())}
    assert all(0 < angle < 10 for angle in plan.values())


def test_planning_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 2))
    path = fp.untie(model, "wm")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    path.plan(lambda: model(torch.randn(4, 6)).sum())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_costs_are_told_twice():
    plan, _ = plan_and_measure(make_convolutional, samples=10)
    first = plan["0"]  # 16 channels to 32, in maps of 12 x 12: a pass of 10 examples
    assert first.dues == Dues(10, reads=10 * 144, writes=10 * 144, spikes=10 * 144 * (16 + 32))
    assert first.flops == 4 * (16 * 32 * 9) * 10 * 144
    codes, _ = plan_and_measure(make_dense, noise="hadamard")
    assert codes["0"].dues == Dues(512, reads=512, writes=512, spikes=512 * (200 + 300))
    exact, _ = plan_and_measure(make_dense, noise="orthogonal")
    assert exact["0"].dues == codes["0"].dues  # a chip pays what the simulation's shortcut does not
    assert exact["0"].flops < codes["0"].flops / 100


def run_command(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(["mirror", "plan", *arguments])
    return stop.value.code


def test_the_command_prints_a_row_a_layer(capsys):
    assert not run_command("--model", "lenet")
    printed = " ".join(capsys.readouterr().out.split())
    assert all(name in printed for name in ("conv1", "conv2", "fc1", "fc2", "of a training step's FLOPs"))
    assert "all layers once takes 67% of a training step's FLOPs" in printed
    assert "reads of an array of W" in printed


def test_the_command_plans_within_a_share_of_the_cost(capsys):
    waits = []
    for share in ("0.04", "0.01"):
        run_command("--model", "lenet", "--cost-share", share)
        waits.append(
            float(re.search(r"every ([\d.]+) steps", " ".join(capsys.readouterr().out.split())).group(1))
        )
    assert waits[1] == pytest.approx(4 * waits[0], rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mirror", "plan", "--model", "vgg"], "no model 'vgg'"),
        (["mirror", "plan", "--noise", "pink"], '"pink" for --noise'),
        (["mirror", "plan", "--cost-share", "0"], "cost_share must be above 0, not 0"),
        (["mirror", "plan", "--batch-size", "0"], "--batch-size is 0"),
    ],
)
def test_bad_input_gives_one_line_and_exit_code_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.splitlines()) == 1


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("make", [make_dense, make_convolutional])
def test_mirroring_until_an_angle_stops_where_it_is_reached(make, noise):
    torch.manual_seed(0)
    path = fp.untie(make(), fp.WeightMirror(fp.Mirror(noise=noise, samples=128)))
    path.mirror(until_angle_deg=5)
    passes = path.context.part(MirrorMode).passes
    assert all(
        3.5 < angle < 6 or (passes[name] == 2 and angle < 6) for name, angle in path.matrix_angles().items()
    ), path.matrix_angles()
    assert len(set(passes.values())) > 1  # each layer takes as many as it needs


def run_until(path, angle_deg, most_passes=50):
    rule = path.groups[0][0]
    return path.context.part(MirrorMode).run_until(path.weights, rule.mirror, angle_deg, most_passes)


@pytest.mark.parametrize("samples", [40, 400])
def test_the_angle_is_told_by_the_passes_own_agreement_and_never_by_the_weights(samples):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(100, 80), nn.ReLU(), nn.Linear(80, 60))
    path = fp.untie(net, fp.WeightMirror(fp.Mirror(samples=samples)))
    told = run_until(path, 8, 500)
    assert told == pytest.approx(path.matrix_angles(), rel=0.1)
    assert all(4 < angle <= 8 for angle in told.values()) or samples == 400


@pytest.mark.parametrize("noise", ["orthogonal", "hadamard"])
def test_codes_that_agree_have_an_angle_of_rounding_or_none_that_can_be_told(noise):
    path = fp.untie(make_convolutional(), fp.ExactMirror(fp.Mirror(noise=noise)))
    told = run_until(path, 1)
    assert all(0 < angle < 0.01 for angle in told.values())


def test_codes_in_noise_are_told_by_how_they_differ():
    path = fp.untie(nn.Sequential(nn.Linear(128, 60), nn.ReLU()), "wm-exact")
    path.weights[0].layer.register_forward_hook(lambda *args: args[2] + 0.01 * torch.randn_like(args[2]))
    with pytest.warns(fp.MirrorWarning, match="3 passes leave more than 5 degrees in '0'"):
        told = run_until(path, 5, 3)["0"]
    assert told == pytest.approx(path.matrix_angles()["0"], rel=0.1)


@pytest.mark.parametrize("rule", ["wm", "wm-exact"])
def test_an_angle_that_cannot_be_told_is_said_to_be_so_and_is_never_zero(rule):
    path = fp.untie(nn.Sequential(nn.Linear(20, 10), nn.ReLU()), rule)
    path.weights[0].layer.register_forward_hook(lambda *args: torch.zeros_like(args[2]))
    with pytest.warns(fp.MirrorWarning) as said:
        told = run_until(path, 5)["0"]
    assert told != told
    assert any("the angle of '0' cannot be estimated" in str(warning.message) for warning in said)
    once = fp.untie(nn.Sequential(nn.Linear(20, 10), nn.ReLU()), rule)
    with pytest.warns(fp.MirrorWarning, match="the angle of '0' cannot be estimated"):
        told = run_until(once, 5, 1)["0"]  # one pass agrees with nothing
    assert told != told


@pytest.mark.parametrize("network", ["dense", "convolutional"])
def test_a_layer_too_wide_for_the_budget_is_named_with_the_samples_that_it_would_take(network):
    make = {"dense": make_dense, "convolutional": make_convolutional}[network]
    torch.manual_seed(0)
    path = fp.untie(make(), fp.WeightMirror(fp.Mirror(samples=4)))
    with pytest.warns(fp.MirrorWarning, match="3 passes leave more than 1 degrees") as said:
        path.mirror(until_angle_deg=1, most_steps=3)
    advised = re.findall(r"'(\d)' \([\d.]+ degrees, would take (\d+) samples\)", str(said[0].message))
    assert [name for name, _ in advised] == [weight.name for weight in path.weights]
    for weight, (_, samples) in zip(path.weights, advised, strict=True):
        assert math.degrees(math.atan(1.17 * math.sqrt(fields.inputs_of(weight) / int(samples)))) == (
            pytest.approx(1, rel=0.05)
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "mirror: steps must be at least 1, not 0"),
        ({"steps": -3}, "mirror: steps must be at least 1, not -3"),
        ({"steps": 2.0}, r"mirror: steps must be a whole number, not 2\.0"),
        ({"steps": True}, "mirror: steps must be a whole number, not True"),
        ({"steps": "3"}, "mirror: steps must be a whole number, not '3'"),
        ({"most_steps": 0, "until_angle_deg": 5}, "mirror: most_steps must be at least 1, not 0"),
        ({"most_steps": 1.5, "until_angle_deg": 5}, r"mirror: most_steps must be a whole number, not 1\.5"),
        ({"steps": 3, "until_angle_deg": 5}, "give steps or until_angle_deg"),
        ({"until_angle_deg": 90}, "between 0 and 90"),
        ({"until_angle_deg": 5, "settings": fp.Mirror.paper()}, "'calibrated' reading"),
    ],
)
def test_targets_that_make_no_sense_are_refused(options, message):
    path = fp.untie(make_dense(), "wm")
    before = [b.clone() for _, _, b in path.pairs()]
    with pytest.raises(fp.RuleError, match=message):
        path.mirror(**options)
    assert all(torch.equal(b, old) for (_, _, b), old in zip(path.pairs(), before, strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fp.When(every=2.5), r"When: every must be a whole number, not 2\.5"),
        (
            lambda: fp.MirrorKolenPollack(every=0.5),
            r"MirrorKolenPollack: every must be a whole number, not 0\.5",
        ),
        (lambda: fp.Mirror(noise="signs", samples=99.5), r"samples must be a whole number, not 99\.5"),
        (lambda: fp.untie(make_dense(), "wm").plan(print, scale=0), "plan: scale must be above 0"),
        (lambda: run_mode(passes=0), "mirror mode: passes must be at least 1, not 0"),
    ],
)
def test_other_counts_that_would_do_nothing_are_refused(make, message):
    with pytest.raises(fp.RuleError, match=message):
        make()


def run_mode(passes):
    path = fp.untie(make_dense(), "wm")
    path.context.part(MirrorMode).run(path.weights, fp.Mirror(), passes)


def test_whole_numbers_of_numpy_are_whole_numbers():
    path = fp.untie(make_dense(), "wm")
    path.mirror(steps=numpy.int64(2))
    assert set(path.context.part(MirrorMode).passes.values()) == {2}


def stop(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("measure", [
    lambda path, model: path.plan(stop),
    lambda path, model: path.plan(lambda: stop(model(torch.randn(4, 200)))),
    lambda path, model: path.delta_angles(lambda: stop(model(torch.randn(4, 200)))),
], ids=["plan", "plan after a pass", "delta angles"])  # fmt: skip
def test_a_measurement_that_is_broken_off_leaves_no_hook_behind(measure):
    model = make_dense()
    path = fp.untie(model, "fa")
    with pytest.raises(KeyboardInterrupt):
        measure(path, model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not path.context.is_measuring
    assert all(layer.untied.taps == () for layer in path.layers.values())
