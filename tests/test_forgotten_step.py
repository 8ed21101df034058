"""Training without ``path.step()``: said once, when the path is next asked something."""

import copy
import warnings

import pytest
import torch
from torch import nn

import feedbackpath as fp


def train(rule, steps, *, calls_step=False, optimizer=torch.optim.SGD):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    path = fp.untie(model, rule)
    optimizer = optimizer(model.parameters(), lr=0.01, weight_decay=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        if calls_step:
            path.step()
    return path


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("rule", ["wm", "ss", "mirror-fa", "sa"])
def test_a_forgotten_step_is_told_once_when_the_path_is_asked(rule, optimizer):
    path = train(rule, 11, optimizer=optimizer)
    with pytest.warns(fp.ForgottenStepWarning, match=rf"changed many times.*'{rule}'.*after each"):
        path.matrix_angles()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path.gains()


def test_clipping_tells_it_in_the_loop():
    path = train("wm", 11)
    with pytest.warns(fp.ForgottenStepWarning):
        path.clip_grad_norm_(1.0)


@pytest.mark.parametrize("rule", ["bp", "fa", "kp", "pfa"])
def test_rules_that_do_nothing_after_an_update_say_nothing(rule):
    train(rule, 11).matrix_angles()


def test_who_steps_or_mirrors_by_hand_or_has_only_begun_hears_nothing():
    train("ss", 11, calls_step=True).matrix_angles()
    train("wm", 3).matrix_angles()
    path = train("wm", 11)
    path.mirror(steps=1)
    path.matrix_angles()


def test_a_copy_counts_from_its_own_start():
    trained = train("ss", 11)
    model, path = copy.deepcopy((trained.model, trained))
    path.matrix_angles()
    assert not any(weight.weight._version for weight in path.weights)
    assert model is path.model


def test_weights_that_are_filled_and_not_trained_are_no_updates():
    model = nn.Sequential(nn.Linear(6, 8))
    path, state = fp.untie(model, "wm"), {"weight": torch.randn(8, 6), "bias": torch.randn(8)}
    for _ in range(20):
        model[0].load_state_dict(state, strict=False)
    path.matrix_angles()
