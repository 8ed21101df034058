"""Schedules: what a step is taken to cost, and whose turn it is."""

import pytest
import torch
from torch import nn

import feedbackpath as fp
from feedbackpath.mirror import MirrorMode
from feedbackpath.mirror.cost import UseCounter
from feedbackpath.mirror.schedule import Schedule


def make_net():
    return nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 10))


def train(path, steps, batch_size=32):
    optimizer = torch.optim.SGD([p for p in path.model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        path.model(torch.randn(batch_size, 40)).square().mean().backward()
        optimizer.step()
        path.step()
    return path.context.part(MirrorMode)


def test_a_step_costs_what_training_computes_and_not_what_is_measured():
    path = fp.untie(make_net(), "wm")
    x = torch.randn(256, 40)
    path.delta_angles(lambda: path.model(x).square().mean())
    path.plan(lambda: path.model(x).sum())
    path.mirror_from_input(lambda: path.model(x))
    assert train(path, 1).uses == {"0": 32.0, "2": 32.0, "4": 32.0}


def test_every_rule_that_mirrors_knows_what_a_step_costs():
    other = fp.WeightMirror(fp.Mirror(noise="signs", samples=64))
    path = fp.untie(make_net(), "wm", overrides={"2": other})
    assert train(path, 1).uses == {"0": 32.0, "2": 32.0, "4": 32.0}
    assert not any(layer._forward_hooks for layer in path.layers.values())


def test_the_share_is_of_all_devices_step_so_that_their_number_makes_no_difference(monkeypatch):
    path = fp.untie(make_net(), "fa")
    counter = UseCounter(path.weights)
    path.model(torch.randn(32, 40))

    def gather(counts, own):
        counts[:] = [own, {name: 3 * count for name, count in own.items()}]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert counter.share() == {"0": 128.0, "2": 128.0, "4": 128.0}


def test_a_layer_of_zeros_does_not_hold_up_the_others():
    """The angle by which a B of zeros turns is no number."""
    mirrored = []
    for is_zero in (False, True):
        torch.manual_seed(0)
        net = make_net()
        if is_zero:
            nn.init.zeros_(net[2].weight)
            net[2].weight.requires_grad_(False)
        mirrored.append(train(fp.untie(net, "wm"), 120).passes)
    control, beside_zeros = mirrored
    assert 1 < control["4"] < 120  # it has to wait for its turn
    assert beside_zeros["4"] > control["4"] / 2


def test_a_turn_that_is_saved_for_comes():
    path = fp.untie(make_net(), "wm")
    mode = train(path, 200)
    (schedule,) = mode.schedules.values()
    turns = mode._turns_of(path.weights, fp.Mirror())
    spent = sum((mode.passes[w.name] - 1) * cost for w, cost in zip(path.weights, turns.work, strict=True))
    assert spent == pytest.approx(200 * turns.budget, rel=0.1)
    assert min(schedule.last.values()) > 100


@pytest.mark.parametrize(("within_deg", "expected"), [(None, []), (5.0, []), (2.0, [1]), (0.5, [0, 1])])
def test_what_lags_too_far_is_mirrored_whatever_it_costs(within_deg, expected):
    schedule = Schedule()
    schedule.pace, schedule.last = {"a": 0.3, "b": 1.0}, {"a": 7, "b": 7}
    when = fp.When(within_deg=within_deg)
    assert schedule.choose(["a", "b"], 10, when, work=[100.0, 100.0], budget=1.0) == expected
    assert 0.0 <= schedule.credit <= 1.0


def test_independent_noise_keeps_to_its_share():
    """It moves B at every pass by more than W has moved."""
    noise = fp.Mirror(noise="gaussian", samples=64)
    path = fp.untie(make_net(), fp.WeightMirror(noise))
    mode = train(path, 100)
    turns = mode._turns_of(path.weights, path.rules["0"].mirror)
    spent = sum((mode.passes[w.name] - 1) * cost for w, cost in zip(path.weights, turns.work, strict=True))
    assert spent <= 100 * turns.budget
