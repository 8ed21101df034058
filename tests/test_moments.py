"""Moments of W and B that are kept once: the same training, and a third of the memory."""

import copy
import io
from functools import partial

import pytest
import torch
from torch import nn

import feedbackpath as fp
from feedbackpath.models import build_model
from feedbackpath.tasks.text import byte_loss

FORMS = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def start(rule="kp", kind=torch.optim.AdamW, share=True, **settings):
    torch.manual_seed(0)
    model = build_model("gpt", sample_shape=(8,), num_classes=11)
    path = fp.untie(model, rule)
    chosen = {"lr": 0.01, "weight_decay": 0.1} | settings
    optimizer = kind([p for p in model.parameters() if p.requires_grad], **chosen)
    if share:
        fp.share_moments(path, optimizer)
    return path, optimizer


def train(path, optimizer, steps, clip=None, first=0, extra=0.0):
    for step in range(first, first + steps):
        tokens = torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = byte_loss(path.model(tokens), tokens)
        if extra and step >= 2:
            loss = loss + extra * path.model.head.weight.square().sum()
        loss.backward()
        if clip:
            path.clip_grad_norm_(clip)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + step)
        optimizer.step()
        path.step()


def assert_same(one, other):
    pairs = zip(one.model.state_dict().items(), other.model.state_dict().items(), strict=True)
    assert all(torch.equal(x, y) for (_, x), (_, y) in pairs)


def bytes_of(optimizer):
    """Return the memory of all that an optimizer remembers, each place once."""
    kept = [x for state in optimizer.state.values() for x in state.values()]
    return sum({torch._C._data_address(x): x.nbytes for x in kept}.values())


def size_of(path, which):
    return sum(pair[which].nbytes for pair in path.pairs())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("settings", [{}, {"amsgrad": True}, {"maximize": True}], ids=str)
def test_training_is_that_of_separate_moments(form, settings):
    plain, shared = (start(share=share, **FORMS[form], **settings) for share in (False, True))
    train(*plain, 5)
    train(*shared, 5)
    if form != "fused":
        assert_same(plain[0], shared[0])
    for (_, w, b), (_, w2, b2) in zip(plain[0].pairs(), shared[0].pairs(), strict=True):
        assert torch.equal(w, w2) or form == "fused"
        assert torch.allclose(b, b2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_moments_take_no_memory_beyond_plain_pytorchs(form):
    plain, shared, bp = start(share=False, **FORMS[form]), start(**FORMS[form]), start("fa", share=False)
    for run in (plain, shared, bp):
        train(*run, 2)
    sizes = [bytes_of(run[1]) for run in (plain, shared, bp)]
    b = size_of(plain[0], 2)
    assert sizes[0] - sizes[2] >= 2 * b
    assert sizes[1] - sizes[2] < 0.001 * b  # the numbers of steps alone


def test_clipped_gradients_are_shared_too():
    plain, shared = start(share=False), start()
    train(*plain, 4, clip=0.1)
    train(*shared, 4, clip=0.1)
    assert_same(plain[0], shared[0])
    assert bytes_of(shared[1]) < bytes_of(plain[1]) - 1.9 * size_of(plain[0], 2)


def test_a_weight_with_a_gradient_of_its_own_gets_moments_of_its_own():
    plain, shared = start(share=False), start()
    train(*plain, 5, extra=0.1)
    train(*shared, 5, extra=0.1)
    assert_same(plain[0], shared[0])
    apart = {id(w) for _, w, b in shared[0].pairs() if not is_shared(shared[1], w, b)}
    assert apart == {id(shared[0].model.head.weight)}


def is_shared(optimizer, w, b):
    places = [torch._C._data_address(optimizer.state[p]["exp_avg"]) for p in (w, b)]
    return places[0] == places[1]


@pytest.mark.parametrize("where", ["after loading", "before"])
@pytest.mark.parametrize("mmap", [False, True])
def test_what_was_loaded_can_be_saved_and_written_to_again(mmap, where, tmp_path):
    path, optimizer = start()
    train(path, optimizer, 3)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed = start(share=where == "before")
    resumed[1].load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True, mmap=mmap))
    if where == "after loading":
        fp.share_moments(*resumed)
    train(*resumed, 1)
    torch.save(resumed[1].state_dict(), tmp_path / "again.pt")
    again = torch.load(tmp_path / "again.pt", weights_only=True)["state"]
    for number, held in enumerate(resumed[1].param_groups[0]["params"]):
        assert torch.equal(again[number]["exp_avg"], resumed[1].state[held]["exp_avg"])
    w, b = next(iter(resumed[0].pairs()))[1:]
    kept = resumed[1].state[w]["exp_avg"].clone()
    resumed[1].state[b]["exp_avg"].add_(1)
    assert torch.equal(resumed[1].state[w]["exp_avg"], kept)


@pytest.mark.parametrize("made_by", [torch.from_numpy, torch.as_tensor, torch.from_dlpack])
def test_moments_in_memory_of_others_are_kept_once_all_the_same(made_by):
    path, optimizer = start()
    train(path, optimizer, 2)
    for state in optimizer.state.values():
        state["exp_avg"] = made_by(state["exp_avg"].clone().numpy())
    train(path, optimizer, 2)
    assert all(is_shared(optimizer, w, b) for _, w, b in path.pairs())


@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True)])
def test_a_checkpoint_goes_on_bit_for_bit_with_and_without(before, after):
    whole, first, resumed = start(share=False), start(share=before), start(share=after)
    train(*whole, 6)
    train(*first, 3)
    file = io.BytesIO()
    torch.save([first[0].model.state_dict(), first[1].state_dict(), first[0].state_dict()], file)
    file.seek(0)
    for part, state in zip(
        (resumed[0].model, resumed[1], resumed[0]), torch.load(file, weights_only=True), strict=True
    ):
        part.load_state_dict(state)
    train(*resumed, 3, first=3)
    assert_same(whole[0], resumed[0])
    assert all(is_shared(resumed[1], w, b) == after for _, w, b in resumed[0].pairs())


def test_an_optimizer_that_was_copied_goes_on_without_the_original():
    path, optimizer = start()
    train(path, optimizer, 2)
    path2, optimizer2 = copy.deepcopy((path, optimizer))
    train(path, optimizer, 2, first=2)
    train(path2, optimizer2, 2, first=2)
    assert_same(path, path2)


def test_it_may_begin_in_the_middle_twice_and_with_a_closure():
    plain, shared = start(share=False), start(share=False)
    for run in (plain, shared):
        train(*run, 2)
    fp.share_moments(*shared)
    fp.share_moments(*shared)
    train(*plain, 2, first=2)
    train(*shared, 2, first=2)
    assert_same(plain[0], shared[0])
    for path, optimizer in (plain, shared):
        tokens = torch.arange(8)[None]

        def closure(path=path, optimizer=optimizer, tokens=tokens):
            optimizer.zero_grad()
            loss = byte_loss(path.model(tokens), tokens)
            loss.backward()
            return loss

        assert optimizer.step(closure) > 0
    assert_same(plain[0], shared[0])
    assert all(is_shared(shared[1], w, b) for _, w, b in shared[0].pairs())


def test_groups_of_their_own_settings():
    plain, shared = start(share=False), start(share=False)
    for path, optimizer in (plain, shared):
        head = {id(path.model.head.weight), id(path.model.head.feedback)}
        everything = optimizer.param_groups[0]["params"]
        optimizer.param_groups[0]["params"] = [p for p in everything if id(p) not in head]
        optimizer.add_param_group(
            {"params": [p for p in everything if id(p) in head], "weight_decay": 0.5, "eps": 1e-3}
        )
    fp.share_moments(*shared)
    train(*plain, 3)
    train(*shared, 3)
    assert_same(plain[0], shared[0])


def test_a_step_that_fails_leaves_moments_behind():
    path, optimizer = start()
    train(path, optimizer, 2)
    handle = optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    handle.remove()
    train(path, optimizer, 1)
    assert all(is_shared(optimizer, w, b) for _, w, b in path.pairs())


def test_where_nothing_can_be_shared_it_is_said_why():
    model = nn.Linear(3, 2)
    path = fp.untie(model, "kp")
    parameters = list(model.parameters())
    for optimizer, why in (
        (torch.optim.Adam(parameters, weight_decay=0.1), "L2 penalty in the gradient.*use AdamW"),
        (torch.optim.SGD(parameters, weight_decay=0.1), "SGD is neither"),
        (torch.optim.AdamW(parameters, capturable=True), "capturable"),
        (torch.optim.AdamW(parameters, lr=torch.tensor(0.1)), "tensors for settings"),
        (torch.optim.AdamW([model.weight], weight_decay=0.1), "but not its feedback weight"),
    ):
        with pytest.raises(fp.RuleError, match=why):
            fp.share_moments(path, optimizer)
    fixed = fp.untie(nn.Linear(3, 2), "fa")
    with pytest.raises(fp.RuleError, match="no B gets W's gradient"):
        fp.share_moments(fixed, torch.optim.AdamW(fixed.model.parameters()))


def make_audited():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    path = fp.untie(model, "kp")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    fp.share_moments(path, optimizer)
    return partial(step_of, path, optimizer), path


def step_of(path, optimizer):
    optimizer.zero_grad()
    path.model(torch.ones(4, 6)).square().mean().backward()
    optimizer.step()
    path.step()


def test_the_audit_counts_them_as_bs_state():
    step, path = make_audited()
    assert fp.audit(step, path).transport_free
    optimizer, layer = step.args[1], path.model[2]
    step()
    assert all({"exp_avg", "exp_avg_sq"} <= optimizer.state[b].keys() for _, _, b in path.pairs())

    def leak():
        step()
        optimizer.state[layer.feedback]["exp_avg"].add_(layer.weight.detach())

    assert fp.audit(leak, path, steps=2).transport_free is False


def test_mirror_kp_without_decay_under_adam():
    both = []
    for share in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
        path = fp.untie(model, "mirror-kp")
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        if share:
            fp.share_moments(path, optimizer)
        path.mirror()
        for _ in range(3):
            step_of(path, optimizer)
        both.append(path)
    assert_same(*both)


def changes_gradients(optimizer, path):
    """Have a penalty on W, noise, and clipping come in by a hook of the optimizer."""
    w = path.model.head.weight

    def change(*called):
        w.grad.add_(w.detach(), alpha=0.1)
        nn.utils.clip_grad_norm_(path.model.parameters(), 0.5)

    optimizer.register_step_pre_hook(change)


def edits_moments(optimizer, path):
    train(path, optimizer, 1)
    _, w, b = next(iter(path.pairs()))
    optimizer.state[b]["exp_avg"].zero_()
    optimizer.state[path.model.head.weight]["exp_avg_sq"].mul_(2)


def averages_b(optimizer, path):
    path.model.register_buffer("mean", torch.zeros_like(path.model.head.weight))
    _, _, b = list(path.pairs())[-1]
    optimizer.register_step_post_hook(lambda *called: path.model.mean.add_(b.detach()))


def sets_groups(optimizer, path):
    train(path, optimizer, 1)
    optimizer.param_groups[0]["decoupled_weight_decay"] = False


def sets_betas(optimizer, path):
    train(path, optimizer, 1)
    rest = optimizer.param_groups[0]["params"]
    _, _, b = next(iter(path.pairs()))
    rest[:] = [p for p in rest if p is not b]
    optimizer.add_param_group({"params": [b], "betas": (0.5, 0.9)})


MEDDLERS = [(f, first) for f in (changes_gradients, edits_moments, averages_b) for first in (True, False)]


@pytest.mark.filterwarnings("ignore:Kolen-Pollack. gradients were scaled")
@pytest.mark.parametrize(("meddles", "is_before"), [*MEDDLERS, (sets_groups, False), (sets_betas, False)])
def test_what_others_do_to_gradients_moments_and_groups_is_felt_as_without(meddles, is_before):
    runs = []
    for shares in (False, True):
        path, optimizer = start(share=False)
        steps = [lambda p=path, o=optimizer: fp.share_moments(p, o)] * shares
        steps.insert(0 if is_before else len(steps), lambda p=path, o=optimizer: meddles(o, p))
        for step in steps:
            step()
        train(path, optimizer, 4, first=1)
        runs.append(path)
    assert_same(*runs)


@pytest.mark.filterwarnings("ignore:Kolen-Pollack. gradients were scaled")
def test_a_hook_that_came_later_is_overtaken_after_one_step():
    path, optimizer = start()
    changes_gradients(optimizer, path)
    train(path, optimizer, 3)
    assert all(is_shared(optimizer, w, b) for name, w, b in path.pairs() if name != "head")


@pytest.mark.filterwarnings("ignore:Kolen-Pollack without weight decay")
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_penalty_that_comes_later_does_not_bring_w_into_b(decay):
    torch.manual_seed(0)
    model = nn.Linear(6, 5)
    path = fp.untie(model, "kp")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    fp.share_moments(path, optimizer)
    optimizer.param_groups[0]["weight_decay"] = decay
    before = model.feedback.detach().clone()
    model(torch.zeros(3, 6)).square().sum().backward()  # the gradient of W, and of B, is 0
    optimizer.step()
    moved = (model.feedback - before).detach()
    assert torch.equal(moved.sign(), -before.sign()) if decay else not moved.any()


@pytest.mark.parametrize("others", [torch.optim.SGD, torch.optim.AdamW, None])
@pytest.mark.parametrize("shares_both", [False, True])
def test_an_optimizer_of_a_part_leaves_the_others_alone(others, shares_both):
    def run(*, is_shared):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
        path = fp.untie(model, "kp")
        mine = [torch.optim.AdamW(model[0].parameters(), lr=0.01, weight_decay=0.1)]
        mine += [others(model[2].parameters(), lr=0.01, weight_decay=0.1)] if others else []
        for optimizer in mine[: 1 + (shares_both and others is torch.optim.AdamW)]:
            if is_shared:
                fp.share_moments(path, optimizer)
        for number in range(4):
            model.zero_grad()
            x = torch.randn(7, 6, generator=torch.Generator().manual_seed(number))
            model(x).square().sum().backward()
            for optimizer in mine if number % 2 else reversed(mine):
                optimizer.step()
        return path

    assert_same(run(is_shared=False), run(is_shared=True))


@pytest.mark.parametrize("chip_first", [False, True])
def test_devices_of_a_chip_write_b_whoever_came_first(chip_first):
    torch.manual_seed(0)
    exact = dict.fromkeys(("noise", "spread", "asymmetry", "asymmetry_spread", "bound_spread"), 0.0)
    device = fp.devices.SoftBounds(step=1e-2, bound=1e6, **exact)
    model = nn.Linear(6, 5)
    path = fp.untie(model, "kp", chip=fp.Chip(device=device, update="net", seed=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3.3e-3, weight_decay=0.1)
    calls = [lambda: path.chip.attach(optimizer), lambda: fp.share_moments(path, optimizer)]
    for call in calls if chip_first else reversed(calls):
        call()
    moved = {}
    for number in range(8):
        before = model.feedback.detach().clone()
        optimizer.zero_grad()
        model(torch.randn(7, 6)).square().sum().backward()
        optimizer.step()
        moved[number] = (model.feedback - before).detach() / 1e-2
    steps = torch.stack([*moved.values()])
    assert steps.any()
    assert torch.allclose(steps, steps.round(), atol=1e-3)
