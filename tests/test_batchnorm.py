"""BatchNorm that sends back sigma alone: forward as torch's; backward by the formula of Appendix D.3."""

import copy

import pytest
import torch
from torch import nn

import feedbackpath as fp
from feedbackpath.errors import UntieError


def make_model(norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), norm, nn.Flatten(), nn.Linear(48, 4)).double()


def shake(norm: nn.Module) -> nn.Module:
    """Give a norm scales and shifts that are not 1 and 0."""
    if norm.affine:
        nn.init.normal_(norm.weight, 1.0, 0.3)
        nn.init.normal_(norm.bias, 0.0, 0.3)
    return norm


@pytest.mark.parametrize(
    ("plain", "shape"),
    [
        (nn.BatchNorm1d(3), (8, 3)),
        (nn.BatchNorm1d(3), (8, 3, 5)),
        (nn.BatchNorm2d(3), (8, 3, 5, 4)),
        (nn.BatchNorm2d(3, affine=False), (8, 3, 5, 4)),
        (nn.BatchNorm2d(3, track_running_stats=False), (8, 3, 5, 4)),
        (nn.BatchNorm3d(3), (4, 3, 2, 3, 2)),
    ],
)
def test_delta_goes_back_by_gamma_over_sigma_and_all_else_is_torchs(plain, shape):
    torch.manual_seed(1)
    plain = shake(plain).double()
    sigma = nn.Sequential(nn.Linear(1, 1), copy.deepcopy(plain))
    path = fp.untie(sigma, "fa", batchnorm_feedback="sigma")
    x, delta = torch.randn(shape, dtype=torch.float64) * 3 + 1, torch.randn(shape, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [norm(given) for norm, given in zip((plain, sigma[1]), inputs, strict=True)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.backward(delta)
    dims = [dim for dim in range(len(shape)) if dim != 1]
    scale = 1 / torch.sqrt(x.var(dims, unbiased=False) + plain.eps) * (plain.weight if plain.affine else 1.0)
    torch.testing.assert_close(inputs[1].grad, delta * scale.view(1, -1, *(1,) * (len(shape) - 2)))
    assert not torch.allclose(inputs[0].grad, inputs[1].grad)
    for ours, theirs in zip(sigma[1].parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    for ours, theirs in zip(sigma[1].buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    path.retie()
    assert type(sigma[1]) is type(plain)


def test_evaluation_is_torchs():
    plain = make_model(shake(nn.BatchNorm2d(3)))
    sigma = copy.deepcopy(plain)
    fp.untie(sigma, "bp", batchnorm_feedback="sigma")
    x = torch.randn(5, 2, 6, 6, dtype=torch.float64)
    gradients = []
    for model in (plain.eval(), sigma.eval()):
        given = x.clone().requires_grad_()
        model(given).sum().backward()
        gradients.append(given.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_b_equal_to_w_gives_the_gradients_of_backprop_with_sigma_alone():
    models = [make_model(nn.BatchNorm2d(3)) for _ in range(2)]
    paths = [
        fp.untie(m, rule, batchnorm_feedback="sigma") for m, rule in zip(models, ("bp", "fa"), strict=True)
    ]
    for _, w, b in paths[1].pairs():
        b.data.copy_(w)
    x = torch.randn(5, 2, 6, 6, dtype=torch.float64)
    for model in models:
        model(x).square().sum().backward()
    ours = dict(models[1].named_parameters())
    for name, parameter in models[0].named_parameters():
        torch.testing.assert_close(ours[name].grad, parameter.grad)


def test_a_model_without_batchnorm_is_refused_and_left_as_it_was():
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(UntieError, match="needs a BatchNorm layer"):
        fp.untie(model, "fa", batchnorm_feedback="sigma")
    assert type(model[0]) is nn.Linear
