"""Memory: a step keeps no activity, and a model that nobody holds is freed, with its feedback weights.

Hooks of PyTorch that hold the tensor they are on, or what holds it, keep it for ever: the garbage collector
does not see them.
"""

import gc
import weakref
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import feedbackpath as fp

SETTINGS = {
    **{rule: {"rule": rule} for rule in fp.RULES},
    "update-first": {"rule": fp.KolenPollack(order="update-first")},
    "push-pull": {"rule": fp.WeightMirror(fp.Mirror(rates="push-pull"))},
    "shared moments": {"rule": "kp", "make_optimizer": torch.optim.AdamW},
    "chip": {"rule": "kp", "chip": lambda: fp.Chip(fp.devices.SoftBounds(step=1e-3, noise=0.3))},
    "chip that reads": {"rule": "wm", "chip": lambda: fp.Chip(fp.devices.Ideal(), read=fp.Read(bits=8))},
}


def train(rule, make_optimizer=torch.optim.SGD, chip=None):
    """Train a few steps; return weak references to what there was, by kind."""
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    chips = {} if chip is None else {"chip": chip()}
    path = fp.untie(model, rule, **chips)
    x, labels = torch.randn(8, 6), torch.arange(8) % 3
    model(x)  # rules that broadcast make their matrices
    optimizer = make_optimizer(model.parameters(), lr=0.01)
    if make_optimizer is torch.optim.AdamW:
        fp.share_moments(path, optimizer)
    if chip is not None:
        chips["chip"].attach(optimizer)
    path.check_optimizer(optimizer)
    references = []

    def note(layer, inputs, output):
        references.extend([("activity", weakref.ref(inputs[0])), ("activity", weakref.ref(output))])

    for layer in (model[0], model[2]):
        layer.register_forward_hook(note)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x.clone()), labels).backward()
        optimizer.step()
        path.step()
    parameters = [("parameter", weakref.ref(parameter)) for parameter in model.parameters()]
    return [*references, *parameters, ("model", weakref.ref(model)), ("path", weakref.ref(path))]


@pytest.mark.filterwarnings("ignore::feedbackpath.errors.KolenPollackWarning")
def test_no_activity_outlives_its_step_and_no_model_its_last_user():
    references = {name: train(**settings) for name, settings in SETTINGS.items()}
    gc.collect()
    kept = {
        name: dict(Counter(kind for kind, reference in found if reference() is not None))
        for name, found in references.items()
    }
    assert {name: kinds for name, kinds in kept.items() if kinds} == {}
