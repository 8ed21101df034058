"""Layers whose input is sparse or nested: their backward pass goes through B as well."""

import copy

import pytest
import torch
from torch import nn

import feedbackpath as fp


def coo():
    return torch.randn(4, 6).relu().double().to_sparse()


def csr():
    return torch.randn(4, 6).relu().double().to_sparse_csr()


def jagged():
    return torch.nested.nested_tensor(
        [torch.randn(3, 6).double(), torch.randn(5, 6).double()], layout=torch.jagged
    )


def gradients(model, x):
    y = model(x)
    (y.values() if y.is_nested else y).square().sum().backward()
    return {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()


# PyTorch says once that CSR, and once that nested tensors are in beta.
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("make", [coo, csr, jagged])
@pytest.mark.parametrize("rule", ["fa", "kp"])
def test_sparse_and_nested_activity_goes_through_b(rule, make):
    model, plain, x = make_model(), make_model(), make()
    path = fp.untie(model, rule)
    expected = gradients(plain, x)
    random = copy.deepcopy(model)
    with torch.no_grad():
        for _, w, b in path.pairs():
            b.copy_(w)
    for name, gradient in gradients(model, x).items():
        of_w = name.replace("feedback", "weight")
        torch.testing.assert_close(gradient, expected[of_w], rtol=1e-12, atol=1e-12)
    others = gradients(random, x)
    assert (others["0.weight"] - expected["0.weight"]).norm() > 0.1 * expected["0.weight"].norm()
    torch.testing.assert_close(others["2.weight"], expected["2.weight"], rtol=1e-12, atol=1e-12)
