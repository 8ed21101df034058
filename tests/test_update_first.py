"""Kolen-Pollack in Algorithm 2's order: B is updated, and then the error passes through it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import feedbackpath as fp
from feedbackpath.train.rules import make_rule

RULE = fp.KolenPollack(order="update-first")
LR, DECAY, TARGET = 0.1, 0.2, torch.arange(5) % 3


def make_mlp():
    layers = [nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3)]
    return nn.Sequential(*layers).double()


def make_convnet():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 6, 3, stride=2, groups=2), nn.Tanh(),
        nn.Flatten(1), nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 3),
    ).double()  # fmt: skip


def prepare(model, rule=RULE, make=torch.optim.SGD, **settings):
    path = fp.untie(model, rule, seed=3)
    optimizer = make(model.parameters(), **{"lr": LR, "weight_decay": DECAY} | settings)
    path.check_optimizer(optimizer)
    return path, optimizer


def take_step(path, optimizer, x):
    optimizer.zero_grad()
    F.cross_entropy(path.model(x), TARGET).backward()
    optimizer.step()
    path.step()


class Pace:
    """SGD by NumPy, as torch's documentation has it."""

    def __init__(self, momentum=0.0, nesterov=False):
        self.momentum, self.nesterov, self.velocity = momentum, nesterov, None

    def __call__(self, value, gradient):
        gradient = gradient + DECAY * value
        before = 0.0 if self.velocity is None else self.momentum * self.velocity
        self.velocity = before + gradient
        return value - LR * (gradient + self.momentum * self.velocity if self.nesterov else self.velocity)


@pytest.mark.parametrize("rate", [1.0, 0.5], ids=["one rate", "two rates"])
@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str)
def test_three_layers_follow_algorithm_2_line_by_line(settings, rate):
    """Lines 6 to 11 by NumPy: W, b and B of a layer change, and then the error goes down through B."""
    model = make_mlp()
    path, optimizer = prepare(model, fp.KolenPollack(order="update-first", feedback_rate=rate), **settings)
    ws = [w.detach().numpy().copy() for _, w, _ in path.pairs()]
    bs = [b.detach().numpy().copy() for _, _, b in path.pairs()]
    biases = [model[at].bias.detach().numpy().copy() for at in (0, 2, 4)]
    paces = [[Pace(**settings) for _ in range(3)] for _ in range(3)]
    for _ in range(5):
        x = torch.randn(5, 6).double()
        take_step(path, optimizer, x)
        ys = [x.numpy()]
        for layer in range(3):
            z = ys[-1] @ ws[layer].T + biases[layer]
            ys.append(np.tanh(z) if layer < 2 else z)
        p = np.exp(ys[3])
        delta = (p / p.sum(1, keepdims=True) - np.eye(3)[TARGET.numpy()]) / 5
        for layer in (2, 1, 0):
            outer = delta.T @ ys[layer]
            of_w, of_bias, of_b = paces[layer]
            ws[layer], biases[layer] = of_w(ws[layer], outer), of_bias(biases[layer], delta.sum(0))
            bs[layer] = of_b(bs[layer], rate * outer)
            delta = (delta @ bs[layer]) * (1 - ys[layer] ** 2)
        for number, (_, w, b) in enumerate(path.pairs()):
            assert np.abs(w.detach().numpy() - ws[number]).max() < 1e-10
            assert np.abs(b.detach().numpy() - bs[number]).max() < 1e-10


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1, "maximize": True}),
    "adamw": (torch.optim.AdamW, {"amsgrad": True}),
    "rmsprop": (torch.optim.RMSprop, {}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_errors_are_those_of_the_b_that_the_step_leaves(name):
    """Whatever updates B: gradients are those of plain kp in whose layers that B is put beforehand."""
    make, settings = OPTIMIZERS[name]
    model, twin = make_convnet(), make_convnet()
    path, optimizer = prepare(model, RULE, make, **settings)
    ruler = fp.untie(twin, "kp")
    for _ in range(3):
        x = torch.randn(5, 2, 6, 6).double()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        take_step(path, optimizer, x)
        after = {key: value for key, value in model.state_dict().items() if key.endswith("feedback")}
        twin.load_state_dict(before | after)
        twin.zero_grad()
        F.cross_entropy(twin(x), TARGET).backward()
        for (_, ours, b), (_, theirs, _) in zip(path.pairs(), ruler.pairs(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(b.grad, ours.grad, rtol=0, atol=0)
    assert not all(torch.equal(before[key], after[key]) for key in after)


def test_training_resumes_bit_for_bit():
    def start():
        torch.manual_seed(1)
        return prepare(make_mlp(), momentum=0.9)

    xs = torch.randn(6, 5, 6).double()
    whole, resumed = start(), start()
    for x in xs:
        take_step(*whole, x)
    first = start()
    for x in xs[:3]:
        take_step(*first, x)
    resumed[0].model.load_state_dict(first[0].model.state_dict())
    resumed[0].load_state_dict(first[0].state_dict())
    resumed[1].load_state_dict(first[1].state_dict())
    for x in xs[3:]:
        take_step(*resumed, x)
    pairs = zip(whole[0].model.parameters(), resumed[0].model.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_the_audit_finds_no_transport_and_that_b_learns_from_its_own_signals():
    path, optimizer = prepare(make_mlp().float(), momentum=0.9)
    x = torch.randn(5, 6)
    report = fp.audit(lambda: take_step(path, optimizer, x), path)
    assert report.transport_free is True, report.verdict


def test_measuring_takes_b_as_it_is_and_mirroring_finds_it():
    path, optimizer = prepare(make_mlp())
    x = torch.randn(5, 6).double()
    path.mirror(steps=200)
    assert max(path.matrix_angles().values()) < 10
    assert max(path.delta_angles(lambda: F.cross_entropy(path.model(x), TARGET)).values()) < 20
    take_step(path, optimizer, x)


def test_autocast_gives_the_same_gradients_to_its_rounding():
    x, found = torch.randn(5, 6), []
    for is_on in (False, True):
        torch.manual_seed(1)
        path, optimizer = prepare(make_mlp().float(), lr=1.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
            loss = F.cross_entropy(path.model(x).float(), TARGET)
        loss.backward()
        optimizer.step()
        path.step()
        found.append(path.model[0].weight.grad)
    assert (found[1] - found[0]).norm() < 0.02 * found[0].norm()


def tied():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3)).double()
    model[2].weight = model[0].weight
    return model


def clip(path, optimizer, x):
    F.cross_entropy(path.model(x), TARGET).backward()
    path.clip_grad_norm_(1e-3)
    optimizer.step()
    path.step()


def accumulate(path, optimizer, x):
    for part in (x, 2 * x):
        F.cross_entropy(path.model(part), TARGET).backward()
    optimizer.step()
    path.step()


@pytest.mark.parametrize(
    ("make", "run"),
    [(make_mlp, clip), (make_mlp, accumulate), (tied, take_step)],
    ids=["clip", "twice", "tied"],
)
def test_a_b_of_which_something_else_was_made_is_refused(make, run):
    path, optimizer = prepare(make())
    with pytest.raises(fp.RuleError, match="went through predicted feedback weights .* one backward pass"):
        run(path, optimizer, torch.randn(5, 6).double())


def test_what_it_cannot_know_or_do_is_said():
    model = make_mlp()
    path = fp.untie(model, RULE)
    with pytest.raises(fp.RuleError, match=r"which optimizer updates .* '4': call path.check_optimizer"):
        F.cross_entropy(model(torch.randn(5, 6).double()), TARGET).backward()
    loaded, _ = prepare(make_mlp())
    loaded.model.load_state_dict(model.state_dict(), assign=True)
    with pytest.raises(fp.RuleError, match=r"and after load_state_dict\(assign=True\)"):
        F.cross_entropy(loaded.model(torch.randn(5, 6).double()), TARGET).backward()
    wrapper = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    wrapper.inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(fp.RuleError, match="SGD wraps another"):
        path.check_optimizer(wrapper)
    with pytest.raises(fp.RuleError, match="order"):
        fp.KolenPollack(order="updates-first")
    with pytest.warns(fp.UnconvertedLayerWarning, match="LSTM"):
        fp.untie(nn.ModuleList([nn.LSTM(4, 3), nn.Linear(3, 2)]), RULE)


def test_a_config_file_can_choose_the_order():
    assert make_rule("kp", {"order": "update-first"}) == RULE
    assert fp.KolenPollack() != RULE
