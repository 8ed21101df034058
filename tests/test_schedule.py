"""Schedules: what a step is taken to cost, and whose turn it is."""

import copy

import pytest
import torch
from torch import nn

import feedbackpath as fp
from feedbackpath.mirror import MirrorMode, mode
from feedbackpath.mirror.cost import UseCounter, mirror_flops
from feedbackpath.mirror.schedule import Schedule, Turns, plan_turns

FEW = 4  # samples of a step that cannot pay for all layers
SLOPES = {"0": 0.5, "2": 0.5, "4": 1.0}


def make_net():
    return nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 10))


def train(path, steps, batch_size=32, seed=0):
    """Train, and return by step which layers were mirrored."""
    optimizer = torch.optim.SGD([p for p in path.model.parameters() if p.requires_grad], lr=0.05)
    mirror_mode, chosen = path.context.part(MirrorMode), []
    for _ in range(steps):
        generator = torch.Generator().manual_seed(100 * seed + path.context.steps)
        optimizer.zero_grad()
        path.model(torch.randn(batch_size, 40, generator=generator)).square().mean().backward()
        optimizer.step()
        before = dict(mirror_mode.passes)
        path.step()
        chosen.append([name for name, passes in mirror_mode.passes.items() if passes != before.get(name, 0)])
    return chosen


def spend(path):
    """Return the FLOPs that mirrors have taken since the first step, and what a step may spend."""
    mirror_mode = path.context.part(MirrorMode)
    turns = mirror_mode._turns_of(path.weights, path.rules["0"].mirror)
    spent = sum(
        (mirror_mode.passes[name] - 1) * cost for name, cost in zip(turns.names, turns.flops, strict=True)
    )
    return spent, turns.budget


def test_a_step_costs_what_training_computes_and_not_what_is_measured():
    path = fp.untie(make_net(), "wm")
    x = torch.randn(256, 40)
    path.delta_angles(lambda: path.model(x).square().mean())
    path.plan(lambda: path.model(x).sum())
    train(path, 1)
    assert path.context.part(MirrorMode).uses == {"0": 32.0, "2": 32.0, "4": 32.0}


def test_measuring_one_path_does_not_keep_another_from_counting():
    """No flag is shared: a teacher is measured while its student trains."""
    teacher, student = fp.untie(make_net(), "fa"), fp.untie(make_net(), "wm")

    def distil():
        student.model(torch.randn(32, 40)).sum().backward()
        return teacher.model(torch.randn(9, 40)).sum()

    teacher.delta_angles(distil)
    student.step()
    assert student.context.part(MirrorMode).uses == {"0": 64.0, "2": 64.0, "4": 64.0}  # it was run twice


def test_a_measurement_that_fails_does_not_end_counting():
    path = fp.untie(make_net(), "wm")
    with pytest.raises(ZeroDivisionError):
        path.delta_angles(lambda: 1 / 0)
    assert not path.context.is_measuring
    train(path, 1)
    assert path.context.part(MirrorMode).uses == {"0": 32.0, "2": 32.0, "4": 32.0}


def test_every_rule_that_mirrors_knows_what_a_step_costs():
    other = fp.WeightMirror(fp.Mirror(noise="signs", samples=64))
    path = fp.untie(make_net(), "wm", overrides={"2": other})
    train(path, 1)
    assert path.context.part(MirrorMode).uses == {"0": 32.0, "2": 32.0, "4": 32.0}
    assert not any(layer._forward_hooks for layer in path.layers.values())


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
    assert path.context.part(MirrorMode).uses == {"": uses}


def test_uses_are_counted_where_attention_is_called_by_keywords():
    attention = nn.MultiheadAttention(8, 2)
    path = fp.untie(attention, "wm")
    x = torch.randn(5, 2, 8)
    attention(query=x, key=x, value=x)[0].sum().backward()
    path.step()
    assert set(path.context.part(MirrorMode).uses.values()) == {10.0}


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


def test_a_share_is_one_of_appendix_bs_flops():
    """A step takes 6 V u; a pass 4 V N, where N is 2 with codes by pairs, 16 with others, or the samples."""
    path = fp.untie(make_net(), "fa")
    values = [2400, 3600, 600]
    uses = {"0": 32.0, "2": 32.0, "4": 8.0}
    turns = plan_turns(path.weights, fp.Mirror(when=fp.When(cost_share=0.1)), SLOPES, uses)
    assert turns.flops == [8 * v for v in values]
    assert turns.budget == pytest.approx(0.1 * 6 * (32 * 2400 + 32 * 3600 + 8 * 600))
    weight = path.weights[0]
    assert mirror_flops(weight, fp.Mirror(), None) == 4 * 16 * 2400
    assert mirror_flops(weight, fp.Mirror(noise="gaussian", samples=100), 0.5) == 4 * 100 * 2400


@pytest.mark.parametrize("settings", [fp.Mirror(), fp.Mirror(noise="gaussian")], ids=["codes", "noise"])
def test_what_a_layer_costs_is_the_same_on_every_kind_of_device(settings):
    """No weight is looked at, and no clock: a layer without memory costs what it does on a CPU."""
    uses = dict.fromkeys(SLOPES, 7.0)
    path = fp.untie(make_net(), "fa")
    here = plan_turns(path.weights, settings, SLOPES, uses)
    path.model.to("meta")
    assert path.weights[0].weight.device.type == "meta"
    assert plan_turns(path.weights, settings, SLOPES, uses) == here


def test_layers_are_chosen_by_sizes_settings_and_angles_alone(monkeypatch):
    """Other weights, other data and another precision: with the same angles the same layers are mirrored."""
    chosen = []
    for seed, dtype in ((0, torch.float32), (1, torch.float64)):
        torch.manual_seed(seed)
        angles = iter(torch.rand(1000, generator=torch.Generator().manual_seed(7)) / 50)
        monkeypatch.setattr(mode, "turn_of", lambda before, after, angles=angles: next(angles))
        torch.set_default_dtype(dtype)
        try:
            chosen.append(train(fp.untie(make_net(), "wm", seed=seed), 150, FEW, seed))
        finally:
            torch.set_default_dtype(torch.float32)
    assert chosen[0] == chosen[1]
    assert {len(layers) for layers in chosen[0]} >= {0, 1, 3}  # there was something to choose


def test_a_layer_of_zeros_does_not_hold_up_the_others():
    """The angle by which a B of zeros turns is no number."""
    mirrored = []
    for is_zero in (False, True):
        torch.manual_seed(0)
        net = make_net()
        if is_zero:
            nn.init.zeros_(net[2].weight)
            net[2].weight.requires_grad_(False)
        path = fp.untie(net, "wm")
        train(path, 120, FEW)
        mirrored.append(path.context.part(MirrorMode).passes)
    control, beside_zeros = mirrored
    assert 1 < control["4"] < 120  # it has to wait for its turn
    assert beside_zeros["4"] > control["4"] / 2


def test_a_turn_that_is_saved_for_comes():
    path = fp.untie(make_net(), fp.WeightMirror(fp.Mirror(when=fp.When(within_deg=None))))
    train(path, 200, FEW)
    spent, budget = spend(path)
    assert spent == pytest.approx(200 * budget, rel=0.1)
    (schedule,) = path.context.part(MirrorMode).schedules.values()
    assert min(schedule.last.values()) > 100


@pytest.mark.parametrize(("within_deg", "expected"), [(None, []), (5.0, []), (2.0, [1]), (0.5, [0, 1])])
def test_what_lags_too_far_is_mirrored_whatever_it_costs(within_deg, expected):
    schedule = Schedule()
    schedule.pace, schedule.last = {"a": 0.3, "b": 1.0}, {"a": 7, "b": 7}
    turns = Turns(["a", "b"], fp.When(within_deg=within_deg), flops=[100.0, 100.0], budget=1.0)
    assert schedule.choose(turns, 10) == expected
    assert 0.0 <= schedule.credit <= 1.0


def test_independent_noise_keeps_to_its_share():
    """It moves B at every pass by more than W has moved."""
    path = fp.untie(make_net(), fp.WeightMirror(fp.Mirror(noise="gaussian", samples=64)))
    train(path, 100)
    spent, budget = spend(path)
    assert spent <= 100 * budget


@pytest.mark.parametrize("stop", [1, 2, 17, 18, 19, 33, 60])
@pytest.mark.parametrize("when", [fp.When(), fp.When(within_deg=None), fp.When(every=3)], ids=str)
def test_a_run_that_is_resumed_chooses_as_one_that_was_not_broken_off(when, stop):
    """Angles are seen at a layer's second, eighteenth, ... mirroring, and read at the next choice."""
    rule = fp.WeightMirror(fp.Mirror(when=when))
    torch.manual_seed(0)
    whole = fp.untie(make_net(), rule)
    start = copy.deepcopy(whole.model.state_dict())
    expected = train(whole, 80, FEW)
    first = fp.untie(make_net(), rule)
    first.model.load_state_dict(start)
    chosen = train(first, stop, FEW)
    resumed = fp.untie(make_net(), rule)
    resumed.model.load_state_dict(first.model.state_dict())
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    assert chosen + train(resumed, 80 - stop, FEW) == expected


def test_angles_that_have_not_been_read_survive_a_resume_in_their_order():
    """Of two angles of one layer the later counts; a state holds plain numbers, whatever waits."""
    turns = Turns(["a", "b"], fp.When(), flops=[100.0, 100.0], budget=90.0)
    schedule = Schedule()
    for step, name, turn in ((1, "a", 0.5), (2, "b", 0.01), (3, "a", 0.001)):
        schedule.note(name, step, torch.tensor(turn))
    state = schedule.state_dict()
    assert [type(turn) for _, _, turn in state["unread"]] == [float] * 3
    resumed = Schedule()
    resumed.load_state_dict(state)
    for step in range(4, 40):
        assert resumed.choose(turns, step) == schedule.choose(turns, step)
    assert resumed.pace == schedule.pace
    assert resumed.pace["a"] < 0.1  # degrees a step


def test_a_path_that_was_copied_before_its_first_step_is_not_left_without_a_budget():
    path = copy.deepcopy(fp.untie(make_net(), "wm"))
    chosen = train(path, 100, FEW)
    assert path.context.part(MirrorMode).uses == {"0": FEW, "2": FEW, "4": FEW}
    assert sum(map(len, chosen)) < 250
