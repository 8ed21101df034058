"""Small nets train as they did when ``golden_losses.json`` was recorded, before the core was redrawn.

Weights, B that are random, and samples come from numpy, so that the losses hold for every version of torch.
Record them anew, from the package that PYTHONPATH names: ``python tests/test_golden_losses.py --write``.
"""

import inspect
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import feedbackpath as fp

GOLDEN = Path(__file__).with_name("golden_losses.json")
STEPS, BATCH, CLASSES = 30, 8, 5
RULES = ("bp", "fa", "ss", "kp", "mirror-kp")
RANDOM = ("fa", "kp")  # their B begins as random numbers
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1),
}


def make_mlp():
    return nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, CLASSES))


def make_convnet():
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=3),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 6 * 6, CLASSES),
    )


class AttentionNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1))


NETS = {"mlp": (make_mlp, (20,)), "convnet": (make_convnet, (2, 6, 6)), "attention": (AttentionNet, (4, 6))}
CELLS = list(itertools.product(NETS, RULES, OPTIMIZERS))


@torch.no_grad()
def draw(parameters, seed):
    """Fill parameters with numbers of a size that suits weights; biases are small."""
    random = np.random.default_rng(seed)
    for parameter in parameters:
        fan = parameter[0].numel() if parameter.dim() > 1 else 100
        parameter.copy_(torch.from_numpy(random.normal(0.0, fan**-0.5, parameter.shape)))


def make_rule(name):
    """Return the rule; mirror-kp with its exact read-out, so that B starts as W whatever the noise."""
    if name == "mirror-kp" and "start" in inspect.signature(fp.MirrorKolenPollack).parameters:
        return fp.MirrorKolenPollack(start="exact")
    return name


def train(net, rule, optimizer):
    """Return the losses of the first steps."""
    make, sample_shape = NETS[net]
    model = make().double()
    drawn = (module for module in model.modules() if not isinstance(module, nn.BatchNorm2d))
    draw((parameter for module in drawn for parameter in module.parameters(recurse=False)), 0)
    path = fp.untie(model, make_rule(rule))
    if rule in RANDOM:
        draw((feedback for _, _, feedback in path.pairs()), 1)
    if rule == "mirror-kp":
        path.mirror()
    update = OPTIMIZERS[optimizer](model.parameters())
    random = np.random.default_rng(2)
    losses = []
    for _ in range(STEPS):
        x = torch.from_numpy(random.normal(size=(BATCH, *sample_shape)))
        labels = torch.from_numpy(random.integers(CLASSES, size=BATCH))
        loss = nn.functional.cross_entropy(model(x), labels)
        update.zero_grad()
        loss.backward()
        update.step()
        path.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


@pytest.mark.parametrize(("net", "rule", "optimizer"), CELLS)
def test_losses_are_those_that_were_recorded(net, rule, optimizer, golden):
    assert train(net, rule, optimizer) == pytest.approx(golden[f"{net} {rule} {optimizer}"], rel=1e-9, abs=0)


def test_rules_differ(golden):
    """Losses that did not depend on the rule would hold nothing."""
    for net, optimizer in itertools.product(NETS, OPTIMIZERS):
        ends = {rule: golden[f"{net} {rule} {optimizer}"][-1] for rule in RULES}
        assert ends.pop("mirror-kp") == pytest.approx(ends["bp"], rel=1e-6)
        assert all(abs(a - b) > 1e-4 for a, b in itertools.combinations(ends.values(), 2))


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    torch.set_num_threads(1)
    recorded = {" ".join(cell): train(*cell) for cell in CELLS}
    GOLDEN.write_text(json.dumps(recorded, indent=1) + "\n")
