"""The alternatives that the paper cites, against slow readings of their equations and closed forms."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_sendback import IMAGES, TARGET, X, make_convnet, make_mlp, numbers
from torch import nn

import feedbackpath as fp


def as_rows(tensor):
    return numbers(tensor).reshape(len(tensor), -1)


@pytest.mark.parametrize(("make", "x"), [(make_mlp, X), (make_convnet, IMAGES)], ids=["mlp", "convnet"])
def test_product_feedback_alignment_keeps_the_product_of_two_matrices(make, x):
    """Five steps of SGD on R, by NumPy, with momentum and weight decay: B^T R stays ``feedback``."""
    model, rule = make(), fp.ProductFeedbackAlignment(expansion=3)
    path = fp.untie(model, rule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.2)
    path.check_optimizer(optimizer)
    pairs = {
        weight.name: [numbers(part[0]) for part in rule._draw(weight, path.context)]
        for weight in path.weights
    }
    pace = {name: np.zeros_like(r) for name, (_, r) in pairs.items()}
    for _ in range(5):
        for name, _, feedback in path.pairs():
            b, r = pairs[name]
            assert np.abs(as_rows(feedback) - b.T @ r).max() < 1e-10
        optimizer.zero_grad()
        F.cross_entropy(model(x), TARGET).backward()
        for name, weight, _ in path.pairs():
            b, r = pairs[name]
            pace[name] = 0.9 * pace[name] + b @ as_rows(weight.grad) + 0.2 * r  # (B delta) x^T + lambda R
            pairs[name][1] = r - 0.1 * pace[name]
        optimizer.step()
        path.step()


@pytest.mark.parametrize("expansion", [1, 10, 100])
def test_product_feedback_alignment_comes_to_the_angle_of_its_expansion(expansion):
    torch.manual_seed(0)
    model = nn.Linear(60, 40).double()
    rule = fp.ProductFeedbackAlignment(expansion=expansion)
    path = fp.untie(model, rule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=1.0)
    mixing = rule._mixing(path.weights[0], path.context)[0]
    gap = (model.feedback - mixing @ model.weight).detach()
    for step in range(1, 31):
        optimizer.zero_grad()
        (model(torch.randn(20, 60).double()) * torch.randn(20, 40)).mean().backward()  # W stays large
        optimizer.step()
        left = (model.feedback - mixing @ model.weight).detach()
        torch.testing.assert_close(left, 0.5**step * gap, rtol=1e-6, atol=1e-9)
    expected = math.degrees(math.atan(math.sqrt(41 / (40 * expansion))))
    assert path.matrix_angles()[""] == pytest.approx(expected, rel=0.1)


def test_product_feedback_alignment_says_what_it_cannot_do():
    model = nn.Linear(6, 4)
    path = fp.untie(model, "pfa")
    with pytest.warns(fp.KolenPollackWarning, match="pfa: AdamW updates the product of the two matrices"):
        path.check_optimizer(torch.optim.AdamW(model.parameters(), weight_decay=0.1))
    with pytest.raises(fp.RuleError, match="pfa: expansion must be above 0, not 0"):
        fp.ProductFeedbackAlignment(expansion=0)

    class Halves(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight[:2])

    half = Halves(6, 4)
    fp.untie(half, "pfa")
    with pytest.raises(fp.RuleError, match="pfa: a part of the weight of '' meets activity by itself"):
        half(torch.randn(3, 6)).sum().backward()


def audit(rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    path = fp.untie(model, rule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(X[:4].float()), torch.arange(4) % 3).backward()
        optimizer.step()
        path.step()

    return fp.audit(step, path)


@pytest.mark.parametrize("rule", ["pfa"])
def test_the_audit_finds_no_transport(rule):
    report = audit(rule)
    assert report.transport_free is True, report.verdict
