"""dfa, drtp and dkp against NumPy readings of their equations, on the networks of ``test_sendback``."""

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from problems import ENCODER
from test_sendback import (
    IMAGES,
    TARGET,
    X,
    correlate,
    kernel_gradient,
    make_convnet,
    make_mlp,
    numbers,
    output_error,
)
from torch import nn

import feedbackpath as fp


def expected_of_mlp(model, feedback, send):
    """Return the gradients of the three layers, with ``send(e)`` in place of the error e; and what B gets."""
    (W1, b1), (W2, b2), (W3, b3) = [(numbers(model[i].weight), numbers(model[i].bias)) for i in (0, 2, 4)]
    h1 = np.tanh(X.numpy() @ W1.T + b1)
    h2 = np.tanh(h1 @ W2.T + b2)
    e = output_error(h2 @ W3.T + b3, TARGET.numpy())
    delta2 = send(e) @ feedback["4"] * (1 - h2**2)
    delta1 = send(e) @ feedback["2"] * (1 - h1**2)
    return {"0": delta1.T @ X.numpy(), "2": delta2.T @ h1, "4": e.T @ h2}, {"2": e.T @ h1, "4": e.T @ h2}


def expected_of_convnet(model, feedback, send):
    padded = np.pad(IMAGES.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    h1 = np.tanh(correlate(padded, numbers(model[0].weight)) + numbers(model[0].bias)[:, None, None])
    h2 = np.tanh(correlate(h1, numbers(model[2].weight)) + numbers(model[2].bias)[:, None, None])
    flat = h2.reshape(5, -1)
    e = output_error(flat @ numbers(model[5].weight).T + numbers(model[5].bias), TARGET.numpy())
    delta2 = (send(e) @ feedback["5"]).reshape(h2.shape) * (1 - h2**2)
    delta1 = np.einsum("no,ochw->nchw", send(e), feedback["2"]) * (1 - h1**2)
    gradients = {
        "0": kernel_gradient(padded, delta1, 3),
        "2": kernel_gradient(h1, delta2, 3),
        "5": e.T @ flat,
    }
    return gradients, {"2": np.einsum("no,nchw->ochw", e, h1), "5": e.T @ flat}


CASES = [(make_mlp, X, expected_of_mlp), (make_convnet, IMAGES, expected_of_convnet)]
over_cases = pytest.mark.parametrize(("make", "x", "expect"), CASES, ids=["mlp", "convnet"])
SENT = {"dfa": lambda e: e, "dkp": lambda e: e, "drtp": lambda e: -np.eye(3)[TARGET.numpy()] / len(e)}


@over_cases
@pytest.mark.parametrize("rule", SENT)
def test_gradients_are_numpys(rule, make, x, expect):
    model = make()
    path = fp.untie(model, rule)
    F.cross_entropy(model(x), TARGET).backward()
    feedback = {name: numbers(b) for name, _, b in path.pairs()}
    gradients, of_feedback = expect(model, feedback, SENT[rule])
    for name, expected in gradients.items():
        assert np.abs(numbers(path.layers[name].weight.grad) - expected).max() < 1e-10, name
    for name, _, b in path.pairs():
        if rule == "dkp":
            assert np.abs(numbers(b.grad) - of_feedback[name]).max() < 1e-10, name
        else:
            assert b.grad is None


@over_cases
def test_direct_kolen_pollack_follows_equations_16_and_17(make, x, expect):
    """Five steps of NumPy: B forgets its start at the rate of the decay and holds the sum of all e x^T."""
    model = make()
    path = fp.untie(model, "dkp")
    model(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.2)
    path.check_optimizer(optimizer)
    expected = {name: numbers(b).copy() for name, _, b in path.pairs()}
    for _ in range(5):
        _, products = expect(model, {name: numbers(b) for name, _, b in path.pairs()}, lambda e: e)
        expected = {name: (1 - 0.1 * 0.2) * b - 0.1 * products[name] for name, b in expected.items()}
        optimizer.zero_grad()
        F.cross_entropy(model(x), TARGET).backward()
        optimizer.step()
        path.step()
    for name, _, b in path.pairs():
        assert np.abs(numbers(b) - expected[name]).max() < 1e-10


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw"])
def test_the_last_layers_gap_shrinks_at_the_rate_of_the_decay_under_direct_kolen_pollack(name):
    model = make_mlp()
    path = fp.untie(model, "dkp")
    model(X)
    if name == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.3)
    else:
        momentum = 0.9 if name == "momentum" else 0.0
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.3, momentum=momentum)
    first = (model[4].weight - model[4].feedback).detach()
    for step in range(1, 9):
        optimizer.zero_grad()
        F.cross_entropy(model(X), TARGET).backward()
        optimizer.step()
        path.step()
        left = reference.gap_sizes(name, step, lr=0.1, decay=0.3)
        torch.testing.assert_close(model[4].weight - model[4].feedback, left * first, rtol=1e-9, atol=1e-9)


def test_an_optimizer_without_the_matrices_of_direct_kolen_pollack_is_refused():
    model = make_mlp()
    path = fp.untie(model, "dkp")
    early = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    with pytest.raises(fp.RuleError, match="lacks the feedback weights of all layers; .* run it once"):
        path.check_optimizer(early)
    F.cross_entropy(model(X), TARGET).backward()
    with pytest.raises(fp.RuleError, match="lacks the feedback weights of '2', '4'; .* run it once"):
        path.check_optimizer(early)
    early.step()
    with pytest.raises(fp.RuleError, match="not the feedback weights of '2', '4'; .* has run once"):
        path.step()
    with pytest.warns(fp.KolenPollackWarning, match="the random start of '2', '4' will not decay"):
        path.check_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))


def test_random_target_projection_refuses_errors_that_tell_no_class():
    model = make_mlp()
    fp.untie(model, "drtp")
    with pytest.raises(fp.RuleError, match="one negative entry; this error has several: use that loss, or"):
        (model(X) - 5).square().mean().backward()


def test_random_target_projection_sends_nothing_for_a_label_that_the_loss_ignores():
    gradients = []
    for target in (TARGET, torch.cat([TARGET, torch.tensor([-100])])):
        model = make_mlp()
        fp.untie(model, "drtp")
        x = X if len(target) == 5 else torch.cat([X, X[:1]])
        F.cross_entropy(model(x), target, reduction="sum").backward()
        gradients.append(model[0].weight.grad * len(target))
    torch.testing.assert_close(*gradients)


def test_feedback_has_the_size_that_is_said_and_nothing_from_the_weights():
    drawn = []
    for scale in (1.0, 3.0):
        model = nn.Sequential(nn.Linear(6, 400), nn.Tanh(), nn.Linear(400, 25))
        for parameter in model.parameters():
            parameter.data.mul_(scale)
        path = fp.untie(model, "dfa")
        model(torch.randn(2, 6))
        drawn += [b for _, _, b in path.pairs()]
    assert torch.equal(*drawn)
    assert abs(drawn[0].std().item() / (2 / 425) ** 0.5 - 1) < 0.03


def test_layers_that_take_their_input_apart_are_named():
    with pytest.warns(fp.UnconvertedLayerWarning, match=r"MultiheadAttention, by dfa\).*out_proj"):
        path = fp.untie(ENCODER.build(), "dfa")
    assert path.layers
    with pytest.raises(fp.UntieError, match=r"Bilinear, by dfa"):
        fp.untie(nn.Bilinear(3, 4, 5), "dfa")


def test_rules_may_differ_in_what_they_broadcast():
    model, other = make_mlp(), make_mlp()
    path, single = fp.untie(model, "dfa", overrides={"2": "drtp"}), fp.untie(other, "drtp")
    for network in (model, other):
        F.cross_entropy(network(X), TARGET).backward()
    assert [rule.name for rule in path.rules.values()] == ["dfa", "drtp", "dfa"]
    assert torch.equal(model[2].feedback, other[2].feedback)
    assert torch.equal(model[0].weight.grad, other[0].weight.grad)
    assert not torch.equal(model[2].weight.grad, other[2].weight.grad)
    assert len(list(single.pairs())) == 2
