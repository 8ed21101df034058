"""Schedules: what a step is seen to cost, and whose turn it is."""

import copy

import pytest
import torch
from torch import nn

import feedbackpath as fp
from feedbackpath.mirror import MirrorMode
from feedbackpath.mirror.cost import UseCounter, mirror_flops
from feedbackpath.mirror.plan import plan_turns
from feedbackpath.mirror.schedule import Schedule, Turns

NAMES = ["0", "2", "4"]
SHARE = fp.WeightMirror(fp.Mirror(when=fp.When(cost_share=0.2)))


def make_net():
    return nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 10))


def train(path, steps, batch_size=32):
    """Train, and return by step which layers were mirrored."""
    optimizer = torch.optim.SGD([p for p in path.model.parameters() if p.requires_grad], lr=0.05)
    mirror_mode, chosen = path.context.part(MirrorMode), []
    for _ in range(steps):
        generator = torch.Generator().manual_seed(path.context.steps)
        optimizer.zero_grad()
        path.model(torch.randn(batch_size, 40, generator=generator)).square().mean().backward()
        optimizer.step()
        before = dict(mirror_mode.passes)
        path.step()
        chosen.append([name for name, passes in mirror_mode.passes.items() if passes != before.get(name, 0)])
    return chosen


@pytest.mark.parametrize("rule", ["wm", "wm-exact"])
def test_every_layer_is_mirrored_after_every_step(rule):
    assert train(fp.untie(make_net(), rule), 5) == [NAMES] * 5


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        (fp.When(every=2), [[], NAMES, [], NAMES]),
        (fp.When("turn"), [["1"], ["2"], ["3"], ["1"]]),
        (fp.When("alternate"), [["1", "3"], ["2"], ["1", "3"], ["2"]]),
        (fp.When("turn", every=2), [[], ["1"], [], ["2"]]),
    ],
    ids=str,
)
def test_turns_are_those_of_the_settings(when, expected):
    names = NAMES if when.layers == "all" else ["1", "2", "3"]
    turns, schedule = Turns(names, when, [1.0] * 3, None), Schedule()
    chosen = [schedule.choose(turns, step) for step in range(1, 5)]
    assert [[names[position] for position in positions] for positions in chosen] == expected


def test_a_step_is_what_training_computes_and_not_what_is_measured():
    path = fp.untie(make_net(), "wm")
    x = torch.randn(256, 40)
    path.delta_angles(lambda: path.model(x).square().mean())
    path.plan(lambda: path.model(x).sum())
    train(path, 1)
    mode = path.context.part(MirrorMode)
    assert mode.uses == dict.fromkeys(NAMES, 32.0)
    assert mode.shapes == {"0": (32, 40), "2": (32, 60), "4": (32, 60)}


def test_measuring_one_path_does_not_keep_another_from_counting():
    """No flag is shared: a teacher is measured while its student trains."""
    teacher, student = fp.untie(make_net(), "fa"), fp.untie(make_net(), "wm")

    def distil():
        student.model(torch.randn(32, 40)).sum().backward()
        return teacher.model(torch.randn(9, 40)).sum()

    teacher.delta_angles(distil)
    student.step()
    assert student.context.part(MirrorMode).uses == dict.fromkeys(NAMES, 64.0)  # it was run twice


def test_a_measurement_that_fails_does_not_end_counting():
    path = fp.untie(make_net(), "wm")
    with pytest.raises(ZeroDivisionError):
        path.delta_angles(lambda: 1 / 0)
    assert not path.context.is_measuring
    train(path, 1)
    assert path.context.part(MirrorMode).uses == dict.fromkeys(NAMES, 32.0)


def test_every_rule_that_mirrors_knows_the_minibatch():
    other = fp.WeightMirror(fp.Mirror(noise="signs", samples=64))
    path = fp.untie(make_net(), "wm", overrides={"2": other})
    train(path, 1)
    assert path.context.part(MirrorMode).uses == dict.fromkeys(NAMES, 32.0)
    assert not any(layer._forward_hooks or layer.untied.taps for layer in path.layers.values())


@pytest.mark.parametrize(
    ("layer", "shape", "call", "uses"),
    [
        (nn.ConvTranspose2d(3, 4, 3), (2, 3, 5, 5), lambda layer, x: layer(input=x), 50.0),
        (nn.ConvTranspose1d(3, 4, 3, 2), (2, 3, 5), lambda layer, x: layer(output_size=[12], input=x), 10.0),
        (nn.ConvTranspose3d(3, 4, 2), (3, 2, 2, 2), lambda layer, x: layer(input=x), 8.0),
        (nn.Conv2d(3, 4, 3), (2, 3, 5, 5), lambda layer, x: layer(input=x), 18.0),
        (nn.Linear(5, 4), (2, 3, 5), lambda layer, x: layer(input=x), 6.0),
    ],
    ids=["transposed", "with a size", "unbatched", "forward", "dense"],
)  # fmt: skip
def test_uses_are_counted_however_a_layer_is_called(layer, shape, call, uses):
    path = fp.untie(layer, "wm", activations={"": nn.Identity()})
    call(layer, torch.randn(shape)).sum().backward()
    path.step()
    path.step()
    assert path.context.part(MirrorMode).uses == {"": uses}


def test_uses_are_counted_where_attention_is_called_by_keywords():
    attention = nn.MultiheadAttention(8, 2)
    path = fp.untie(attention, "wm")
    x = torch.randn(5, 2, 8)
    attention(query=x, key=x, value=x)[0].sum().backward()
    path.step()
    assert set(path.context.part(MirrorMode).uses.values()) == {10.0}


def test_local_connections_get_noise_of_the_shape_of_the_minibatch():
    layer = fp.LocallyConnected2d(4, 6, (7, 5), 3, stride=2, groups=2)
    path = fp.untie(nn.Sequential(nn.Conv2d(2, 4, 1), layer), "wm")
    path.model(torch.randn(9, 2, 7, 5)).sum().backward()
    path.step()
    mode = path.context.part(MirrorMode)
    assert (mode.uses["1"], mode.shapes["1"]) == (9, (9, 4, 7, 5))


def test_the_minibatch_is_that_of_all_devices_so_that_their_number_makes_no_difference(monkeypatch):
    path = fp.untie(make_net(), "fa")
    counter = UseCounter(path.weights)
    path.model(torch.randn(32, 40))

    def gather(told, own):
        uses, shapes = own
        more = {name: (3 * shape[0], *shape[1:]) for name, shape in shapes.items()}
        told[:] = [own, ({name: 3 * count for name, count in uses.items()}, more)]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    counter.share()
    assert counter.uses == dict.fromkeys(NAMES, 128.0)
    assert counter.shapes == {"0": (128, 40), "2": (128, 60), "4": (128, 60)}


def test_a_mirroring_takes_two_thirds_of_a_step_by_appendix_b():
    """A step takes 6 V u; a pass 4 V N, and N is u where noise has the minibatch's shape."""
    for model, x in (
        (make_net(), torch.randn(32, 40)),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2, 2)),
            torch.randn(5, 3, 8, 8),
        ),
    ):
        path = fp.untie(model, "wm")
        plan = path.plan(lambda model=model, x=x: model(x).sum())
        assert sum(layer.share for layer in plan) == pytest.approx(2 / 3)
        exact = path.plan(lambda model=model, x=x: model(x).sum(), fp.Mirror.exact())
        assert [layer.flops for layer in exact] == [mirror_flops(weight, 1) for weight in path.weights]


def test_what_a_layer_costs_is_the_same_on_every_kind_of_device():
    """No weight is looked at, and no clock: a layer without memory costs what it does on a CPU."""
    path = fp.untie(make_net(), "fa")
    mode = path.context.part(MirrorMode)
    mode.find_activations(path.weights)
    mode.uses = dict.fromkeys(NAMES, 7.0)
    here = plan_turns(mode, path.weights, SHARE.mirror)
    path.model.to("meta")
    assert path.weights[0].weight.device.type == "meta"
    assert plan_turns(mode, path.weights, SHARE.mirror) == here


def test_a_share_is_kept_to_and_a_turn_that_is_saved_for_comes():
    path = fp.untie(make_net(), SHARE)
    chosen = train(path, 200)
    assert {len(layers) for layers in chosen[1:]} >= {0, 1}  # there was something to choose
    mode = path.context.part(MirrorMode)
    turns = plan_turns(mode, path.weights, SHARE.mirror)
    spent = sum((mode.passes[name] - 1) * cost for name, cost in zip(turns.names, turns.flops, strict=True))
    assert spent == pytest.approx(200 * turns.budget, rel=0.1)
    assert max(mode.passes.values()) - min(mode.passes.values()) <= 1
    assert turns.steps_between == pytest.approx(200 / mode.passes["2"], rel=0.1)


@pytest.mark.parametrize("stop", [1, 2, 17, 33])
@pytest.mark.parametrize("when", [fp.When(cost_share=0.1), fp.When("turn"), fp.When(every=3)], ids=str)
def test_a_run_that_is_resumed_goes_on_as_one_that_was_not_broken_off(when, stop):
    rule = fp.WeightMirror(fp.Mirror(when=when))
    torch.manual_seed(0)
    whole = fp.untie(make_net(), rule)
    start = copy.deepcopy(whole.model.state_dict())
    expected = train(whole, 40)
    first = fp.untie(make_net(), rule)
    first.model.load_state_dict(start)
    chosen = train(first, stop)
    resumed = fp.untie(make_net(), rule)
    resumed.model.load_state_dict(first.model.state_dict())
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    assert chosen + train(resumed, 40 - stop) == expected
    for (_, _, ours), (_, _, theirs) in zip(resumed.pairs(), whole.pairs(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_path_that_was_copied_before_its_first_step_sees_it():
    path = copy.deepcopy(fp.untie(make_net(), SHARE))
    chosen = train(path, 50)
    assert path.context.part(MirrorMode).uses == dict.fromkeys(NAMES, 32.0)
    assert sum(map(len, chosen)) < 100


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "drift"}, "layers='drift' is not one of all, turn, alternate"),
        ({"cost_share": 0.0}, "cost_share must be above 0"),
        ({"layers": "turn", "cost_share": 0.1}, "cost_share is for layers='all'"),
        ({"every": 0}, "every must be at least 1"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(fp.RuleError, match=message):
        fp.When(**settings)
