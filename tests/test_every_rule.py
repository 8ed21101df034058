"""What every rule must hold: a new rule is tested by being listed in RULES."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from problems import CONVNET, MLP, by_id, make_mlp
from torch import nn

import feedbackpath as fp
from feedbackpath.rules.base import group_of

pytestmark = pytest.mark.parametrize("rule", fp.RULES)
NOISY = ("pal",)  # its noise rides on the activities of a model that trains, and on no other
CHANGES_W = ("kh",)  # in path.step(); the optimizer changes the W of all others
over_networks = pytest.mark.parametrize("problem", [MLP, CONVNET], ids=by_id)


def classify(output):
    """Return a cross entropy: the loss that every rule can learn from."""
    return F.cross_entropy(output, torch.arange(len(output)) % output.shape[-1])


@over_networks
def test_the_forward_pass_and_the_plain_model_stay_as_they_are(rule, problem):
    model, (x,) = problem.build().train(rule not in NOISY), problem.inputs()
    plain, keys = copy.deepcopy(model), list(model.state_dict())
    path = fp.untie(model, rule)
    for _ in range(2):
        assert torch.equal(model(x), plain(x))
        classify(model(x)).backward()
        path.step()
        if rule in CHANGES_W:
            plain.load_state_dict(model.state_dict(), strict=False)
    assert path.retie() is model
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), plain(x))


@over_networks
def test_errors_of_the_lower_layers_are_not_backprops(rule, problem):
    model, plain = (problem.build().train(rule not in NOISY) for _ in range(2))
    path = fp.untie(model, rule)
    for network in (model, plain):
        classify(network(*problem.inputs())).backward()
    first, last = list(path.layers)[0], list(path.layers)[-1]
    ours, theirs = (dict(network.named_parameters()) for network in (model, plain))
    torch.testing.assert_close(ours[f"{last}.weight"].grad, theirs[f"{last}.weight"].grad)
    difference = (ours[f"{first}.weight"].grad - theirs[f"{first}.weight"].grad).norm()
    assert (difference / theirs[f"{first}.weight"].grad.norm() > 0.1) == (rule != "bp")


@over_networks
def test_measuring_leaves_everything_as_it_was(rule, problem):
    model, (x,) = problem.build(), problem.inputs()
    path = fp.untie(model, rule)
    classify(model(x)).backward()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = copy.deepcopy(path.state_dict())
    angles = path.delta_angles(lambda: classify(model(x)))
    assert list(angles.values())[-1] < 1e-5
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    now = path.state_dict()
    assert now.pop("rule_names") == kept.pop("rule_names")  # of strings, that assert_close does not compare
    torch.testing.assert_close(now, kept, rtol=0, atol=0)


class Within(nn.Module):
    """A classifier of which the layer in the middle is of some kind."""

    def __init__(self, first, inner, last):
        super().__init__()
        self.first, self.inner, self.last = first, inner, last

    def forward(self, x):
        h = torch.tanh(self.first(x))
        if isinstance(self.inner, nn.LSTM):
            h = self.inner(h)[0][:, -1]
        elif isinstance(self.inner, nn.MultiheadAttention):
            h = self.inner(h, h, h, need_weights=False)[0].mean(1)
        else:
            h = self.inner(h, h) if isinstance(self.inner, nn.Bilinear) else self.inner(h)
        return self.last(torch.tanh(h).flatten(1))


ROWS, SEQUENCES, MAPS = (6, 6), (6, 4, 6), (6, 2, 6, 6)
KINDS = {
    "Linear": (lambda: Within(nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 3)), ROWS),
    "Conv2d": (lambda: Within(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 6, 3, groups=2), nn.Linear(24, 3)), MAPS),
    "ConvTranspose2d": (
        lambda: Within(nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 2, 2), nn.Linear(50, 3)),
        MAPS,
    ),
    "LSTM": (lambda: Within(nn.Linear(6, 8), nn.LSTM(8, 5, batch_first=True), nn.Linear(5, 3)), SEQUENCES),
    "MultiheadAttention": (
        lambda: Within(nn.Linear(6, 8), nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)),
        SEQUENCES,
    ),
    "Bilinear": (lambda: Within(nn.Linear(6, 8), nn.Bilinear(8, 8, 5), nn.Linear(5, 3)), ROWS),
    "LocallyConnected2d": (
        lambda: Within(nn.Conv2d(2, 4, 3), fp.LocallyConnected2d(4, 3, (4, 4), 3), nn.Linear(12, 3)),
        MAPS,
    ),
}
NOT_DENSE = {"ConvTranspose2d", "LSTM", "MultiheadAttention", "Bilinear", "LocallyConnected2d"}
LEAVES = {  # the kinds that a rule leaves to backprop, and says so; all other rules leave none
    **dict.fromkeys(("wm", "wm-exact", "mirror-kp", "mirror-fa"), {"Bilinear"}),
    **dict.fromkeys(("rdd", "stdwi"), {"Bilinear", "LSTM"}),
    **dict.fromkeys(("dfa", "drtp", "dkp"), {"Bilinear", "LSTM", "MultiheadAttention"}),
    **dict.fromkeys(("ia", "aa", "pal", "dtp", "kh"), NOT_DENSE),
    "pfa": {"LocallyConnected2d"},
}
QUICKLY = {rule: {"start": "exact"} for rule in ("mirror-kp", "mirror-fa")}
LR, DECAY = 0.1, 0.01


def is_as_documented(rule, w, b, w_before, b_before):
    """Say whether B is what docs/rules.md says, after a step of SGD and ``path.step()``."""
    if rule in ("bp", "wm-exact", *QUICKLY):
        return torch.allclose(b, w, atol=1e-4)
    if rule in ("ss", "sc"):
        return torch.equal(b.sign(), w.sign())
    if rule == "kp":
        return torch.allclose(w - b, (1 - LR * DECAY) * (w_before - b_before), atol=1e-6)
    if rule == "sa":
        return (w - b).norm() < (w - b_before).norm()
    is_fixed = rule in ("fa", "fa-lowrank", "fa-sparse", "dfa", "drtp", "kh")
    return torch.equal(b, b_before) == is_fixed and bool(b.any()) == (rule != "kh")


@pytest.mark.parametrize("kind", KINDS)
def test_a_rule_trains_each_kind_of_layer_or_says_that_it_does_not(rule, kind):
    make, shape = KINDS[kind]
    model, x, settings = make(), torch.randn(shape), fp.RULES[rule](**QUICKLY.get(rule, {}))
    if kind in LEAVES.get(rule, ()):
        with pytest.raises(
            fp.UntieError, match=rf"^no untied form exists for 'inner' \(.*{kind}, by {rule}\)"
        ):
            fp.untie(model, settings, strict=True)
        return
    path = fp.untie(model, settings, strict=True)
    model(x)  # a rule that broadcasts errors makes its feedback weights
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=DECAY)
    path.check_optimizer(optimizer)
    before = {name: (w.detach().clone(), b.detach().clone()) for name, w, b in path.pairs()}
    classify(model(x)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    optimizer.step()
    path.step()
    inner = [(w.detach(), b.detach(), *before[name]) for name, w, b in path.pairs() if "inner" in name]
    assert inner
    assert all(tensor.isfinite().all() for pair in inner for tensor in pair)
    assert all(is_as_documented(rule, *pair) for pair in inner)


def train(model, path, optimizer, steps):
    """Train; a step's data depends on the number of steps taken alone."""
    for _ in range(steps):
        generator = torch.Generator().manual_seed(path.state_dict()["steps"])
        x, target = torch.randn(5, 6, generator=generator), torch.arange(5) % 3
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
        path.step()


def test_resumed_training_is_bit_identical(rule, tmp_path):
    def start():
        torch.manual_seed(1)
        model = make_mlp()
        path = fp.untie(model, rule, seed=7)
        model(torch.zeros(1, 6))  # a rule that broadcasts errors makes its feedback weights
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        path.check_optimizer(optimizer)
        return model, path, optimizer

    whole = start()
    train(*whole, steps=3)
    saved = {
        part: holder.state_dict() for part, holder in zip(("model", "path", "optimizer"), whole, strict=True)
    }
    torch.save(saved, tmp_path / "state.pt")
    train(*whole, steps=3)
    resumed, loaded = start(), torch.load(tmp_path / "state.pt", weights_only=True)
    for part, holder in zip(("model", "path", "optimizer"), resumed, strict=True):
        holder.load_state_dict(loaded[part])
    torch.rand(3)
    train(*resumed, steps=3)
    ours, expected = (holder[0].state_dict() for holder in (resumed, whole))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in ours)


def test_every_rule_is_documented_and_named_as_it_is_listed(rule):
    assert fp.RULES[rule].name == rule
    assert fp.RULES[rule].__doc__
    assert fp.RULES[rule]() == fp.RULES[rule]()
    groups = ("ruler", "transports", "fixed", "learned", "broadcast", "targets", "mirrors")
    assert group_of(fp.RULES[rule]) in groups


def test_the_state_says_how_far_a_path_has_come(rule):
    path = fp.untie(make_mlp(), rule, seed=3)
    with contextlib.suppress(fp.UntieError):  # backprop has nothing to mirror
        path.mirror(steps=2)
    path.step()
    state = path.state_dict()
    assert (state["seed"], state["steps"]) == (3, 1)
    fresh = fp.untie(make_mlp(), rule)
    fresh.load_state_dict(state)
    torch.testing.assert_close(flat(fresh.state_dict()), flat(state), rtol=0, atol=0)


def flat(state, name=""):
    """Return a nested state as numbers and tensors by dotted name; texts are in the names."""
    if isinstance(state, dict):
        return {key: value for part, of in state.items() for key, value in flat(of, f"{name}.{part}").items()}
    if isinstance(state, list | tuple):
        return flat(dict(enumerate(state)), name)
    return {f"{name}={state}": 0} if (state is None or isinstance(state, str)) else {name: state}
