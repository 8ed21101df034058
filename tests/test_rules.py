"""Each rule's closed form: what B is at the start, and what becomes of it."""

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import reference
import torch
import torch.nn.functional as F
from problems import CONVNET, MLP, make_mlp
from torch import nn

import feedbackpath as fp
from feedbackpath.mirror import MirrorMode
from feedbackpath.rules import looks_of_rules, resolve_rule

LEARNED = ["kp", "mirror-kp"]


def train(model, path, optimizer, steps):
    """Train on random data of a fixed seed; yield after each step."""
    generator = torch.Generator().manual_seed(5)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(5, 6, generator=generator, dtype=torch.float64).to(dtype)
        target = torch.randint(0, 3, (5,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
        path.step()
        yield


def test_feedback_alignment_never_changes_feedback():
    model = MLP.build()
    path = fp.untie(model, "fa")
    before = [(w.detach().clone(), b.detach().clone()) for _, w, b in path.pairs()]
    for _ in train(model, path, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1), steps=5):
        for (w_before, b_before), (_, w, b) in zip(before, path.pairs(), strict=True):
            assert torch.equal(b, b_before)
            assert not torch.equal(w, w_before)


@pytest.mark.parametrize("problem", [MLP, CONVNET], ids=["mlp", "convnet"])
def test_random_feedback_has_its_size_from_the_fans_and_nothing_from_the_weights(problem):
    drawn = {}
    for seed, scale in ((0, 1.0), (0, 3.0), (1, 1.0)):
        model = problem.build()
        for parameter in model.parameters():
            parameter.data.mul_(scale)
        path = fp.untie(model, "fa", seed=seed)
        drawn[seed, scale] = [b for _, _, b in path.pairs()]
    for weight, same, other_seed in zip(path.weights, drawn[0, 3.0], drawn[1, 1.0], strict=True):
        position = path.weights.index(weight)
        assert torch.equal(drawn[0, 1.0][position], same)
        assert not torch.equal(same, other_seed)
        spread = same.square().mean().sqrt().item() / math.sqrt(2 / (weight.fan_in + weight.fan_out))
        assert abs(spread - 1) < 4 / math.sqrt(2 * same.numel())


@pytest.mark.parametrize("rule", [fp.FeedbackAlignment, fp.KolenPollack])
@pytest.mark.parametrize("scale", ["xavier", "he", "zero", 0.1, 3])
def test_the_first_feedback_weights_have_the_scale_that_is_asked_for(rule, scale):
    model = nn.Sequential(nn.Linear(300, 100), nn.ReLU(), nn.Unflatten(1, (4, 5, 5)), nn.Conv2d(4, 200, 3))
    path = fp.untie(model, rule(scale=scale))
    for weight in path.weights:
        xavier = math.sqrt(2 / (weight.fan_in + weight.fan_out))
        sizes = {
            "xavier": xavier,
            "he": math.sqrt(2 / weight.fan_out),
            "zero": 0.0,
            0.1: 0.1 * xavier,
            3: 3 * xavier,
        }
        b = weight.feedback.detach()
        assert float(b.std()) == pytest.approx(sizes[scale], rel=0.05)
        assert abs(float(b.mean())) < 0.1 * xavier


@pytest.mark.parametrize("rule", [fp.FeedbackAlignment, fp.KolenPollack])
@pytest.mark.parametrize("scale", [0, -0.5, 1e20, math.inf, True, "small"])
def test_a_scale_that_is_none_is_refused(rule, scale):
    with pytest.raises(fp.RuleError, match="scale"):
        fp.untie(nn.Linear(3, 2), rule(scale=scale))


def test_with_feedback_weights_of_zero_only_the_last_layer_learns():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    fp.untie(model, fp.FeedbackAlignment(scale="zero"))
    model(torch.randn(8, 6)).square().sum().backward()
    assert not model[0].weight.grad.any()
    assert model[2].weight.grad.any()


def test_a_product_of_two_matrices_has_scales_of_its_own():
    with pytest.raises(fp.RuleError, match="pfa: scale has no effect"):
        fp.ProductFeedbackAlignment(scale="he")


@pytest.mark.parametrize("scale", ["he", "xavier"])
@pytest.mark.parametrize("magnitude", ["uniform", "fixed", "batchwise"])
def test_sign_symmetry_takes_signs_after_every_step(magnitude, scale):
    model = MLP.build()
    path = fp.untie(model, fp.SignSymmetry(magnitude, scale))
    sizes = [b.abs().clone() for _, _, b in path.pairs()]
    signs = [w.sign() for _, w, _ in path.pairs()]
    assert all(torch.equal(b.sign(), sign) for (_, _, b), sign in zip(path.pairs(), signs, strict=True))
    for _ in train(model, path, torch.optim.SGD(model.parameters(), lr=2.0), steps=5):
        for weight, size in zip(path.weights, sizes, strict=True):
            assert torch.equal(weight.feedback.sign(), weight.weight.sign())
            expected = math.sqrt(2 / (weight.fan_out + (weight.fan_in if scale == "xavier" else 0)))
            if magnitude == "uniform":
                torch.testing.assert_close(size, torch.full_like(size, expected))
            else:
                assert 0.5 < size.norm() / math.sqrt(size.numel()) / expected < 1.5
            assert torch.equal(weight.feedback.abs(), size) == (magnitude != "batchwise")
    assert any(not torch.equal(w.sign(), old) for (_, w, _), old in zip(path.pairs(), signs, strict=True))


@pytest.mark.parametrize("magnitude", ["uniform", "fixed"])
def test_a_weight_that_passes_through_zero_keeps_its_magnitude(magnitude):
    layer = nn.Linear(4, 3)
    path = fp.untie(layer, fp.SignSymmetry(magnitude))
    sizes = layer.feedback.abs().clone()
    for weight in (0.0, -1.0):
        layer.weight.data.fill_(weight)
        path.step()
        assert torch.equal(layer.feedback, sizes if weight == 0.0 else -sizes)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.3),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.3, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.3, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_kolen_pollack_gap_shrinks_at_its_own_rate(name):
    model = MLP.build()
    path = fp.untie(model, "kp")
    gaps = [(w - b).detach() for _, w, b in path.pairs()]
    for step, _ in enumerate(train(model, path, OPTIMIZERS[name](model.parameters()), steps=12), start=1):
        left = reference.gap_sizes(name, step, lr=0.1, decay=0.3)
        if name in ("sgd", "adamw"):
            assert left == pytest.approx((1 - 0.1 * 0.3) ** step, rel=1e-12)
        for (_, w, b), gap in zip(path.pairs(), gaps, strict=True):
            torch.testing.assert_close(w - b, left * gap, rtol=1e-9, atol=1e-9)


def test_kolen_pollack_without_decay_keeps_the_gap():
    model = MLP.build()
    path = fp.untie(model, "kp")
    gaps = [(w - b).detach() for _, w, b in path.pairs()]
    list(train(model, path, torch.optim.Adam(model.parameters(), lr=0.1), steps=10))
    for (_, w, b), gap in zip(path.pairs(), gaps, strict=True):
        torch.testing.assert_close(w - b, gap, rtol=1e-9, atol=1e-9)


def test_kolen_pollack_follows_equations_16_and_17():
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False)).double()
    path = fp.untie(model, "kp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=0.2)
    weights, feedbacks = ([pair[i].detach().clone() for pair in path.pairs()] for i in (1, 2))
    for _ in range(3):
        x, target = torch.randn(6, 4).double(), torch.randn(6, 3).double()
        weights, feedbacks = reference.kolen_pollack_step(x, target, weights, feedbacks, 0.05, 0.2)
        optimizer.zero_grad()
        (0.5 * (model(x) - target).square().sum()).backward()
        optimizer.step()
        path.step()
    for (_, w, b), weight, feedback in zip(path.pairs(), weights, feedbacks, strict=True):
        torch.testing.assert_close(w.detach(), weight, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(b.detach(), feedback, rtol=1e-10, atol=1e-10)


def test_mirroring_once_then_kolen_pollack_stays_aligned_without_decay():
    model, plain = MLP.build(), MLP.build()
    path = fp.untie(model, fp.MirrorKolenPollack(start="exact"))
    ruler = fp.untie(plain, "bp")
    path.mirror()
    runs = [
        train(m, p, torch.optim.SGD(m.parameters(), lr=0.5), 20) for m, p in ((model, path), (plain, ruler))
    ]
    for _ in zip(*runs, strict=True):
        assert max(path.matrix_angles().values()) < 1e-6
        assert path.gains() == pytest.approx(dict.fromkeys(path.gains(), 1.0), abs=1e-8)
    for ours, expected in zip(path.pairs(), ruler.pairs(), strict=True):
        torch.testing.assert_close(ours[1], expected[1], rtol=1e-6, atol=1e-6)


def test_mirror_kp_mirrors_at_the_first_step_if_nobody_has():
    model = MLP.build()
    path = fp.untie(model, fp.MirrorKolenPollack(start="exact"))
    steps = train(model, path, torch.optim.SGD(model.parameters(), lr=0.5), 2)
    assert min(path.matrix_angles().values()) > 30
    next(steps)
    assert max(path.matrix_angles().values()) < 1e-6


def test_mirroring_once_then_feedback_alignment_keeps_the_first_weights():
    model = MLP.build()
    path = fp.untie(model, fp.MirrorFeedbackAlignment(start="exact"))
    path.mirror()
    first = [w.detach().clone() for _, w, _ in path.pairs()]
    for _ in train(model, path, torch.optim.SGD(model.parameters(), lr=0.5), 5):
        pass
    for (_, w, b), began in zip(path.pairs(), first, strict=True):
        torch.testing.assert_close(b.detach(), began, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(w, began, rtol=1e-3)


def test_mirror_fa_mirrors_at_the_first_step_if_nobody_has_and_at_no_other():
    model = MLP.build()
    path = fp.untie(model, fp.MirrorFeedbackAlignment(start="exact"))
    for _ in train(model, path, torch.optim.SGD(model.parameters(), lr=0.5), 3):
        pass
    assert set(path.context.part(MirrorMode).passes.values()) == {1}


def test_mirroring_under_kolen_pollack_now_and_then_corrects_drift():
    path = fp.untie(MLP.build(), fp.MirrorKolenPollack(every=3, start="exact"))
    path.mirror()
    angles = []
    for _ in range(3):
        with torch.no_grad():
            for _, w, _ in path.pairs():
                w.add_(torch.randn_like(w), alpha=0.1)
        path.step()
        angles.append(max(path.matrix_angles().values()))
    assert min(angles[:2]) > 1
    assert angles[2] < 1e-5
    with pytest.raises(fp.RuleError, match="every must be at least 1"):
        fp.MirrorKolenPollack(every=0)


def test_mirror_kp_mirrors_beside_a_rule_that_mirrors_at_every_step():
    """Each rule counts its own passes."""
    path = fp.untie(MLP.build(), "wm", overrides={"4": "mirror-kp"})
    path.step()
    angle = path.matrix_angles()["4"]
    assert angle < 2.5
    path.step()
    assert path.matrix_angles()["4"] == angle


@pytest.mark.parametrize("rule", [fp.MirrorKolenPollack, fp.MirrorFeedbackAlignment])
@pytest.mark.parametrize("call", [fp.FeedbackPath.mirror, fp.FeedbackPath.step], ids=["by hand", "at a step"])
def test_rules_that_mirror_once_begin_with_noise_to_two_degrees(rule, call):
    model = nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(12 * 36, 30), nn.Tanh(), nn.Linear(30, 9),
    )  # fmt: skip
    path = fp.untie(model, rule())
    call(path)
    assert all(1.3 < angle < 2.3 for angle in path.matrix_angles().values())
    assert path.gains() == pytest.approx(dict.fromkeys(path.gains(), 1.0), abs=0.02)
    passes = path.context.part(MirrorMode).passes
    assert passes["3"] > 10 * passes["5"]  # as many as its size asks for


@pytest.mark.parametrize("rule", [fp.MirrorKolenPollack, fp.MirrorFeedbackAlignment])
def test_how_a_rule_that_mirrors_once_starts_is_a_setting(rule):
    assert rule() == rule(fp.Mirror(), start="faithful") != rule(start="exact")
    assert rule(start="exact") == rule(fp.Mirror.exact())
    assert hash(rule()) == hash(rule())
    path = fp.untie(MLP.build(), rule(start="exact"))
    path.mirror()
    assert max(path.matrix_angles().values()) < 1e-6
    for settings, message in [
        ({"start": "late"}, "start='late' is not one of faithful, exact"),
        ({"start": "exact", "mirror": fp.Mirror()}, "the mirror's noise is 'gaussian'"),
        ({"mirror": fp.Mirror.paper()}, "needs the 'calibrated' reading, not 'inside'"),
    ]:
        with pytest.raises(fp.RuleError, match=message):
            rule(**settings)


def test_kolen_pollack_heals_what_the_mirror_left():
    model = MLP.build()
    path = fp.untie(model, "mirror-kp")
    path.mirror()
    gaps = [(w - b).norm().item() for _, w, b in path.pairs()]
    for _ in train(model, path, torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.01), 300):
        pass
    for (_, w, b), gap in zip(path.pairs(), gaps, strict=True):
        assert (w - b).norm().item() == pytest.approx(gap * (1 - 0.005) ** 300, rel=1e-6)


@pytest.mark.parametrize("rule", LEARNED)
@pytest.mark.parametrize("frozen", [True, False])
def test_feedback_of_a_frozen_weight_is_frozen_as_well(rule, frozen):
    model = make_mlp()
    model[2].weight.requires_grad_(not frozen)
    fp.untie(model, rule)
    assert model[2].feedback.requires_grad == (not frozen)


def test_unknown_rules_are_refused_with_the_names_that_exist():
    with pytest.raises(fp.RuleError, match=r"unknown rule 'kolen'; known rules are bp, fa, ss, kp, wm"):
        resolve_rule("kolen")
    with pytest.raises(fp.RuleError, match=r"did you mean 'mirror-kp'\?"):
        fp.untie(make_mlp(), "mirror_kp")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"magnitude": "half"}, "'half' is not one of uniform"),
        ({"scale": "big"}, "'big' is not one of xavier, he"),
    ],
)
def test_sign_symmetry_refuses_settings_that_do_not_exist(settings, message):
    with pytest.raises(fp.RuleError, match=message):
        fp.SignSymmetry(**settings)


@dataclass(frozen=True)
class HalfWeights(fp.Rule):
    """A user's rule: B is half of what W is after each step."""

    name: ClassVar[str] = "half"

    def step(self, weights, context):
        for weight in weights:
            weight.feedback.data = 0.5 * weight.weight.data


@pytest.fixture
def registered():
    fp.register_rule(HalfWeights)
    yield HalfWeights
    del fp.RULES["half"]


def test_a_users_own_rule_works_by_name_and_as_an_object(registered):
    for rule in ("half", registered()):
        model = MLP.build()
        path = fp.untie(model, "kp", overrides={"[02]": rule})
        list(train(model, path, torch.optim.SGD(model.parameters(), lr=0.1), steps=2))
        assert path.gains() | {"4": None} == pytest.approx({"0": 0.5, "2": 0.5, "4": None})


class Duck:
    """What looks like a rule, and is none."""

    name = "duck"
    is_tied = learns = False

    def start(self, weights, context):
        fp.draw_feedback(weights, context)


def test_what_only_looks_like_a_rule_is_refused():
    for given in (Duck, Duck(), type("Nameless", (fp.Rule,), {})):
        with pytest.raises(fp.RuleError, match="derive a class from fp.Rule and give it a name"):
            fp.register_rule(given)
    with pytest.raises(
        fp.RuleError, match=r"Duck object .* is not a rule: .* an object of a subclass of Rule"
    ):
        fp.untie(make_mlp(), Duck())
    assert "duck" not in fp.RULES


@pytest.mark.parametrize(
    ("look", "message"),
    [
        ({"colour": "red"}, "colour of the rule 'odd' is 'red'; give it as '#RRGGBB'"),
        ({"label": 3}, "label .* is 3"),
    ],
)
def test_a_look_that_is_none_is_refused(look, message):
    with pytest.raises(fp.RuleError, match=message):
        fp.register_rule(type("Odd", (fp.Rule,), {"name": "odd", **look}))
    assert "odd" not in fp.RULES


def test_looks_are_those_that_users_set(registered, monkeypatch):
    monkeypatch.setattr(registered, "__doc__", "HalfWeights()")  # as a dataclass without one has it
    assert looks_of_rules() == {}
    monkeypatch.setattr(registered, "colour", "#12AB34")
    monkeypatch.setattr(registered, "__doc__", "Do :class:`half` of **this**.\n\n    And more.")
    looks = {"label": None, "colour": "#12AB34", "what": "Do half of this."}
    assert looks_of_rules() == {registered.name: looks}


def test_two_rules_cannot_have_one_name(registered):
    assert fp.register_rule(registered) is registered
    with pytest.raises(fp.RuleError, match=r"a rule named 'fa' exists already \(FeedbackAlignment\)"):
        fp.register_rule(type("Other", (HalfWeights,), {"name": "fa"}))
    assert fp.RULES["fa"] is fp.FeedbackAlignment


def feedbacks(rule, problem=MLP, seed=3):
    return [b.detach() for _, _, b in fp.untie(problem.build(), rule, seed=seed).pairs()]


over_shapes = pytest.mark.parametrize("problem", [MLP, CONVNET], ids=["mlp", "convnet"])


@over_shapes
def test_low_rank_and_sparse_feedback_are_feedback_alignments_at_full_rank_and_share(problem):
    whole = feedbacks("fa", problem)
    for rule in (fp.LowRankFeedbackAlignment(rank=1000), fp.SparseFeedbackAlignment(share=1.0)):
        ours = feedbacks(rule, problem)
        assert all(torch.equal(b, expected) for b, expected in zip(ours, whole, strict=True))


@over_shapes
def test_low_rank_feedback_has_its_rank_and_is_a_projection_of_feedback_alignments(problem):
    whole = fp.untie(problem.build(), "fa", seed=3)
    low = fp.untie(problem.build(), fp.LowRankFeedbackAlignment(rank=2), seed=3)
    for weight, plain in zip(low.weights, whole.weights, strict=True):
        view = weight.kind.as_matrix
        for b, full in zip(
            view(weight.layer, weight.feedback), view(plain.layer, plain.feedback), strict=True
        ):
            m = min(b.shape)
            rank = min(2, m)
            assert torch.linalg.matrix_rank(b) == rank
            # With P = Q Q^T, the projection: <B_r, B> = sqrt(m / r) |P B|^2 and |B_r|^2 = m / r |P B|^2.
            torch.testing.assert_close(
                b.square().sum(), math.sqrt(m / rank) * (b * full).sum(), rtol=1e-6, atol=1e-6
            )


def test_low_rank_and_sparse_feedback_keep_the_size_of_feedback_alignments():
    for rule in (fp.LowRankFeedbackAlignment(rank=30), fp.SparseFeedbackAlignment(share=0.2)):
        whole, ours = nn.Linear(300, 200), nn.Linear(300, 200)
        fp.untie(whole, "fa"), fp.untie(ours, rule)
        assert ours.feedback.norm() / whole.feedback.norm() == pytest.approx(1.0, abs=0.05)


@over_shapes
@pytest.mark.parametrize("share", [0.001, 0.25, 0.5])
def test_sparse_feedback_has_its_share_of_feedback_alignments_weights(problem, share):
    for b, full in zip(
        feedbacks(fp.SparseFeedbackAlignment(share), problem), feedbacks("fa", problem), strict=True
    ):
        kept = b != 0
        assert kept.sum() == max(1, round(share * b.numel()))
        torch.testing.assert_close(b[kept], full[kept] * math.sqrt(b.numel() / kept.sum().item()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fp.LowRankFeedbackAlignment(rank=0), "rank must be at least 1"),
        (lambda: fp.SparseFeedbackAlignment(share=0.0), "share must be above 0"),
        (lambda: fp.KolenPollack(feedback_rate=0.0), "feedback_rate must be above 0"),
    ],
)
def test_settings_that_make_no_feedback_are_refused(make, message):
    with pytest.raises(fp.RuleError, match=message):
        make()


@pytest.mark.parametrize("rule", ["fa-lowrank", "fa-sparse", "sc", "sa", "ia", "aa", "dfa"])
def test_rules_whose_feedback_has_a_form_are_not_mirrored(rule):
    with pytest.raises(fp.UntieError, match="nothing to mirror"):
        fp.untie(make_mlp(), rule).mirror()


def test_sign_concordance_is_the_fixed_form_of_sign_symmetry():
    ends = []
    for rule in ("sc", fp.SignSymmetry(magnitude="fixed")):
        model = MLP.build()
        path = fp.untie(model, rule, seed=3)
        list(train(model, path, torch.optim.SGD(model.parameters(), lr=2.0), steps=3))
        ends.append([b for _, _, b in path.pairs()])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov"])
def test_kolen_pollack_with_a_feedback_rate_settles_at_that_multiple_of_w(name):
    model = MLP.build()
    path = fp.untie(model, fp.KolenPollack(feedback_rate=0.5))
    gaps = [(0.5 * w - b).detach() for _, w, b in path.pairs()]
    for step, _ in enumerate(train(model, path, OPTIMIZERS[name](model.parameters()), steps=12), start=1):
        left = reference.gap_sizes(name, step, lr=0.1, decay=0.3)
        for (_, w, b), gap in zip(path.pairs(), gaps, strict=True):
            torch.testing.assert_close(0.5 * w - b, left * gap, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("hook", "said"),
    [
        (
            lambda self, weight, product, context: product,
            r"returned \[\d+, \d+\] for '4': return two tensors",
        ),
        (lambda self, weight, product, context: None, "returned no tensor for '4': return two tensors"),
        (lambda self, weight, product, context: (product, product.T), r"return two tensors of the product's"),
    ],
)
def test_a_hook_that_returns_no_two_gradients_is_named(hook, said):
    rule = type("Mine", (fp.KolenPollack,), {"name": "mine", "gradients": hook})()
    model = make_mlp()
    fp.untie(model, rule)
    with pytest.raises(fp.RuleError, match=f"the hook gradients of Mine .*{said}"):
        model(torch.randn(4, model[0].in_features)).sum().backward()


def test_a_negative_norm_to_clip_to_is_refused():
    model = make_mlp()
    path = fp.untie(model, "kp")
    model(torch.randn(4, model[0].in_features)).sum().backward()
    with pytest.raises(fp.RuleError, match="max_norm is -1"):
        path.clip_grad_norm_(-1)
