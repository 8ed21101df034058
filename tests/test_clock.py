"""The e-folds of a run: what is counted is what W - B does, and short runs are named."""

import math

import pytest
import torch
from problems import make_mlp
from torch import nn

import feedbackpath as fp


def untied(rule="kp", **settings):
    torch.manual_seed(0)
    model = make_mlp()
    path = fp.untie(model, rule)
    kind = settings.pop("kind", torch.optim.SGD)
    return path, kind(model.parameters(), **({"lr": 0.1, "weight_decay": 1e-2} | settings))


def schedules(optimizer):
    lrs = torch.optim.lr_scheduler
    return {
        "none": None,
        "function": lambda step: 0.1 / (1 + step),
        "cosine": lrs.CosineAnnealingLR(optimizer, 40),
        "warm-up": lrs.SequentialLR(
            optimizer, [lrs.LinearLR(optimizer, 0.1, total_iters=10), lrs.ExponentialLR(optimizer, 0.9)], [10]
        ),
        "one cycle": lrs.OneCycleLR(optimizer, 0.2, total_steps=41),
    }


@pytest.mark.filterwarnings("ignore:Kolen-Pollack. in:feedbackpath.errors.KolenPollackWarning")
@pytest.mark.parametrize("name", ["none", "function", "cosine", "warm-up", "one cycle"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_it_counts_what_the_gap_between_w_and_b_does(name, kind):
    """Under no momentum each update shrinks the gap by 1 - lr wd, so that the product is known exactly."""
    path, optimizer = untied(kind=kind)
    schedule = schedules(optimizer)[name]
    for group in optimizer.param_groups:
        group.update({"momentum": 0.0} if kind is torch.optim.SGD else {})
    if name == "one cycle":
        schedule.use_beta1 = schedule.cycle_momentum = False
    told = path.check_optimizer(optimizer, steps=40, schedule=schedule)
    weight, feedback = path.model[0].weight, path.model[0].feedback
    before = (weight - feedback).detach().norm()
    for step in range(40):
        if name == "function":
            optimizer.param_groups[0]["lr"] = schedule(step)
        optimizer.zero_grad()
        path.model(torch.randn(5, 6)).square().mean().backward()
        optimizer.step()
        if name not in ("none", "function"):
            schedule.step()
    shrunk = math.log(before / (weight - feedback).detach().norm())
    assert told["0"] == pytest.approx(shrunk, rel=2e-3)
    assert set(told) == {"0", "2", "4"}


@pytest.mark.filterwarnings("ignore:Kolen-Pollack. in:feedbackpath.errors.KolenPollackWarning")
def test_momentum_dampening_and_groups_count():
    path, _ = untied()
    first, last = path.model[0], path.model[4]
    rest = [
        p
        for p in path.model.parameters()
        if all(p is not q for q in [*first.parameters(), *last.parameters()])
    ]
    settings = {"lr": 0.1, "weight_decay": 1e-3, "momentum": 0.9}
    optimizer = torch.optim.SGD(
        [
            {"params": list(first.parameters()), "dampening": 0.5},
            {"params": list(last.parameters()), "weight_decay": 2e-3},
            {"params": rest},
        ],
        **settings,
    )
    told = path.check_optimizer(optimizer, steps=100)
    assert told == pytest.approx({"0": 0.05, "2": 0.1, "4": 0.2})


def test_a_scheduler_and_its_optimizer_are_left_as_they_were():
    path, optimizer = untied(momentum=0.9)
    schedule = schedules(optimizer)["one cycle"]
    kept = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}, schedule.state_dict()
    with pytest.warns(fp.KolenPollackWarning):
        path.check_optimizer(optimizer, steps=40, schedule=schedule)
    assert kept == (
        {k: v for k, v in optimizer.param_groups[0].items() if k != "params"},
        schedule.state_dict(),
    )


def test_fewer_than_three_are_named_and_enough_are_not():
    path, optimizer = untied()
    with pytest.warns(
        fp.KolenPollackWarning, match=r"in 2900 steps W - B shrinks by 2.9 e-folds in '0', '2', '4'"
    ):
        path.check_optimizer(optimizer, steps=2900)
    assert path.check_optimizer(optimizer, steps=3001) == pytest.approx(dict.fromkeys("024", 3.001))


def test_a_b_that_was_mirrored_first_has_a_clock_and_needs_no_warning():
    path, optimizer = untied(fp.MirrorKolenPollack(start="exact"))
    assert path.check_optimizer(optimizer, steps=100) == pytest.approx(dict.fromkeys("024", 0.1))


@pytest.mark.parametrize("rule", ["bp", "fa", "wm"])
def test_rules_that_do_not_depend_on_decay_have_no_clock(rule):
    path, optimizer = untied(rule)
    assert path.check_optimizer(optimizer, steps=5) == {}


@pytest.mark.parametrize(
    ("kind", "steps", "message"),
    [
        (torch.optim.Adam, 5, "the e-folds of Adam cannot be computed"),
        (torch.optim.RMSprop, 5, "the e-folds of RMSprop cannot be computed"),
        (torch.optim.SGD, 0, "steps must be a whole number of at least 1, not 0"),
        (torch.optim.SGD, 2.5, "not 2.5"),
    ],
)
def test_what_cannot_be_told_is_said_in_one_line(kind, steps, message):
    path, optimizer = untied(kind=kind)
    with pytest.raises(fp.RuleError, match=message):
        path.check_optimizer(optimizer, steps=steps)


@pytest.mark.parametrize("case", ["plateau", "too long", "another's"])
def test_a_schedule_that_cannot_be_run_ahead_is_refused(case):
    path, optimizer = untied(momentum=0.9)
    lrs = torch.optim.lr_scheduler
    schedule = {
        "plateau": lambda: lrs.ReduceLROnPlateau(optimizer),
        "too long": lambda: lrs.OneCycleLR(optimizer, 0.2, total_steps=10),
        "another's": lambda: lrs.StepLR(torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1), 3),
    }[case]()
    rate = optimizer.param_groups[0]["lr"]
    with pytest.raises(
        fp.RuleError, match="belongs to another" if case == "another's" else "cannot be simulated"
    ):
        path.check_optimizer(optimizer, steps=50, schedule=schedule)
    assert optimizer.param_groups[0]["lr"] == rate
