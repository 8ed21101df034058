"""The feedback path: which layer gets which rule, and how it meets optimizers, clipping and checkpoints."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from problems import COVERING_RULES, MLP, make_mlp, make_nested, make_shared, make_tied
from torch import nn

import feedbackpath as fp
from feedbackpath.core.modules import tapped

LEARNED = ["kp", "mirror-kp"]


def rules_of(path):
    return {name: rule.name for name, rule in path.rules.items()}


def take_step(model, path, optimizer):
    F.cross_entropy(model(torch.randn(5, 6)), torch.arange(5) % 3).backward()
    optimizer.step()
    path.step()


def test_overrides_choose_rules_by_pattern_and_the_last_match_counts():
    path = fp.untie(make_nested(), "fa", overrides={"0.*": "ss", "*.1": fp.KolenPollack(), "2": "bp"})
    assert rules_of(path) == {"0.0": "ss", "0.1.1": "kp", "2": "bp"}
    assert [weight.name for weight in path.weights if weight.is_tied] == ["2"]
    assert [weight.name for weight in path.weights if weight.feedback.requires_grad] == ["0.1.1", "2"]


@pytest.mark.parametrize("rule", [rule for rule in COVERING_RULES if rule != "bp"])
def test_training_does_not_depend_on_the_first_layers_rule(rule):
    def train(overrides):
        torch.manual_seed(0)
        model = make_mlp()
        path = fp.untie(model, rule, overrides=overrides)
        optimizer = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9, weight_decay=0.01
        )
        for _ in range(5):
            optimizer.zero_grad()
            take_step(model, path, optimizer)
        return [weight.weight for weight in path.weights]

    for weight, other in zip(train(None), train({"0": "bp"}), strict=True):
        torch.testing.assert_close(weight, other)


def test_an_override_that_matches_nothing_is_refused():
    model = make_mlp()
    with pytest.raises(fp.UntieError, match=r"the override 'fc\*' matches no layer; layers are 0, 2, 4"):
        fp.untie(model, "fa", overrides={"fc*": "bp"})
    assert type(model[0]) is nn.Linear


def test_one_weight_cannot_have_two_rules():
    model = make_tied()
    with pytest.raises(fp.UntieError, match=r"'2' shares its weight .* \(fa, bp\); give both the same rule"):
        fp.untie(model, "fa", overrides={"2": "bp"})
    assert type(model[0]) is nn.Linear


def test_shared_layers_and_tied_weights_have_one_feedback_weight():
    tied = fp.untie(make_tied(), "fa")
    assert tied.model[0].feedback is tied.model[2].feedback
    assert len(list(tied.pairs())) == 3
    shared = fp.untie(make_shared(), "fa")
    assert list(shared.layers) == ["0", "4"]
    assert shared.model[0].feedback is shared.model[2].feedback


def test_a_tied_weight_is_stepped_once():
    """Each rule meets each parameter once, however many layers share it."""
    met = []

    class Counting(fp.FeedbackAlignment):
        def step(self, weights, context):
            met.extend(weight.name for weight in weights)

    fp.untie(make_tied(), Counting()).step()
    assert met == ["0", "4"]


@pytest.mark.parametrize("mirror_first", [False, True])
@pytest.mark.parametrize("rule", LEARNED)
def test_an_optimizer_made_before_untie_is_refused_at_the_first_step(rule, mirror_first):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    path = fp.untie(model, rule)
    if mirror_first:
        path.mirror(steps=1)
    with pytest.raises(fp.RuleError, match=r"not the feedback weights of '0', '2', '4'; make it after untie"):
        take_step(model, path, optimizer)


@pytest.mark.parametrize("rule", COVERING_RULES)
def test_a_step_without_an_update_is_nothing_to_complain_about(rule):
    """A skipped update (a gradient scaler's first step) after weights were loaded is not a mistake."""
    model = make_mlp()
    path = fp.untie(model, rule)
    model.load_state_dict(make_mlp().state_dict())
    model(torch.randn(5, 6)).sum().backward()
    path.step()


@pytest.mark.parametrize("rule", LEARNED)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")
def test_check_optimizer_accepts_one_group_or_equal_groups(rule):
    model = make_mlp()
    path = fp.untie(model, rule)
    weights = [p for p in model.parameters() if p.dim() > 1]
    biases = [p for p in model.parameters() if p.dim() == 1]
    for groups in (
        model.parameters(),
        [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}],
        [{"params": [p], "weight_decay": 0.1} for p in model.parameters()],
    ):
        optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=0.1)
        torch.optim.lr_scheduler.StepLR(optimizer, 1).step()
        path.check_optimizer(optimizer)


@pytest.mark.parametrize("rule", LEARNED)
def test_check_optimizer_refuses_what_treats_weight_and_feedback_differently(rule):
    model = make_mlp()
    early = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    path = fp.untie(model, rule)
    with pytest.raises(fp.RuleError, match=r"not its feedback weight; make it after untie"):
        path.check_optimizer(early)
    feedbacks = [b for _, _, b in path.pairs()]
    early.add_param_group({"params": feedbacks, "weight_decay": 0.0})
    with pytest.raises(fp.RuleError, match=r"the weights of '0' differently \(weight_decay\)"):
        path.check_optimizer(early)


def test_check_optimizer_warns_of_missing_decay_under_kolen_pollack():
    model = make_mlp()
    path = fp.untie(model, "kp", overrides={"4": "fa"})
    with warnings.catch_warnings(record=True, action="always", category=fp.KolenPollackWarning) as seen:
        path.check_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    text = " ".join(str(warning.message) for warning in seen)
    assert "without weight decay" in text
    assert ["'0'" in text, "'2'" in text, "'4'" in text] == [True, True, False]


def test_check_optimizer_does_not_ask_mirror_kp_for_decay():
    """The rule's docs: unlike plain KP, it does not need weight decay."""
    model = make_mlp()
    path = fp.untie(model, "mirror-kp")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path.check_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("rule", ["fa", "ss", "wm", "bp"])
def test_check_optimizer_has_nothing_to_say_to_other_rules(rule):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fp.untie(model, rule).check_optimizer(optimizer)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize("rule", COVERING_RULES)
def test_clipping_counts_forward_weights_alone_and_scales_all(rule, norm_type):
    model = MLP.build()
    path = fp.untie(model, rule)
    problem_loss = MLP.loss(model, MLP.inputs())
    problem_loss.backward()
    own = {id(b) for weight, (_, _, b) in zip(path.weights, path.pairs(), strict=True) if not weight.is_tied}
    before = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
    forward = torch.cat([grad.flatten() for p, grad in before.items() if id(p) not in own])
    expected = torch.linalg.vector_norm(forward, norm_type)
    norm = path.clip_grad_norm_(0.1, norm_type)
    torch.testing.assert_close(norm, expected)
    for parameter, gradient in before.items():
        torch.testing.assert_close(parameter.grad, gradient * 0.1 / (expected + 1e-6))


def test_clipping_a_tied_model_counts_its_feedback_once():
    model = make_tied()
    path = fp.untie(model, "kp")
    MLP.loss(model, MLP.inputs(torch.float32)).backward()
    forward = [p.grad for name, p in model.named_parameters() if not name.endswith("feedback")]
    expected = torch.nn.utils.get_total_norm(forward)
    torch.testing.assert_close(path.clip_grad_norm_(1e9), expected)


def test_mirroring_by_hand_works_under_any_rule_that_keeps_its_own_feedback():
    model = make_mlp()
    path = fp.untie(model, "fa", overrides={"4": "bp"})
    assert not path.mirrors
    path.mirror(settings=fp.Mirror(noise="orthogonal", sigma=0.01))
    assert max(path.matrix_angles().values()) < 0.01
    with pytest.raises(fp.UntieError, match="nothing to mirror: every B is W itself"):
        fp.untie(make_mlp(), "bp").mirror()


@pytest.mark.parametrize(
    ("rule", "mirrors"), [("wm", True), ("mirror-kp", True), ("kp", False), ("bp", False)]
)
def test_a_path_says_whether_it_mirrors(rule, mirrors):
    assert fp.untie(make_mlp(), rule, overrides={"0": "fa"}).mirrors == mirrors


def test_every_group_of_layers_gets_a_whole_first_mirroring():
    """Two settings in one path: the second group must forget its random beginning as the first does."""
    coarse, fine = (
        fp.WeightMirror(fp.Mirror(noise="gaussian", target_angle_deg=angle)) for angle in (6.0, 4.0)
    )
    model = nn.Sequential(nn.Linear(60, 50), nn.ReLU(), nn.Linear(50, 40), nn.ReLU())
    path = fp.untie(model, coarse, overrides={"2": fine})
    path.mirror()
    assert path.gains() == pytest.approx({"0": 1.0, "2": 1.0}, abs=0.05)
    assert path.matrix_angles() == pytest.approx({"0": 6.0, "2": 4.0}, rel=0.2)


def test_mirroring_layers_that_ask_for_it_leaves_the_others_alone():
    model = make_mlp()
    path = fp.untie(model, "fa", overrides={"4": "wm"})
    before = [b.clone() for _, _, b in path.pairs()]
    path.mirror()
    after = [b for _, _, b in path.pairs()]
    assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [True, True, False]


@pytest.mark.parametrize("rule", ["fa", "ss", "wm"])
def test_a_feedback_weight_switched_to_learning_is_refused(rule):
    model = make_mlp()
    path = fp.untie(model, rule)
    model.requires_grad_(False)
    model.requires_grad_(True)
    with pytest.raises(fp.RuleError, match=r"of '0' was changed.*\.feedback\.requires_grad_\(False\)"):
        path.step()


def test_freezing_a_weight_without_its_feedback_is_refused_under_kolen_pollack():
    model = make_mlp()
    path = fp.untie(model, "kp")
    path.weights[1].weight.requires_grad_(False)
    with pytest.raises(fp.RuleError, match=r"of '2' was changed"):
        path.step()


def test_a_forgotten_optimizer_is_found_after_a_step_without_an_update():
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    path = fp.untie(model, "kp")
    path.step()
    with pytest.raises(fp.RuleError, match="not the feedback weights"):
        take_step(model, path, optimizer)


def test_a_retied_path_says_so():
    path = fp.untie(make_mlp(), "fa")
    path.retie()
    for use in (path.step, path.matrix_angles, path.gains, path.mirror, lambda: list(path.pairs())):
        with pytest.raises(fp.UntieError, match="already retied"):
            use()


@pytest.mark.parametrize(
    ("rule", "message"), [(fp.KolenPollack, r"pass KolenPollack\(\)"), (None, "None is not a rule")]
)
def test_what_is_no_rule_is_named(rule, message):
    with pytest.raises(fp.RuleError, match=message):
        fp.untie(make_mlp(), rule)


def test_an_activation_pattern_that_matches_nothing_is_refused():
    with pytest.raises(fp.UntieError, match="'nope' matches no layer"):
        fp.untie(make_mlp(), "wm", activations={"nope": torch.tanh})


@pytest.mark.parametrize("steps", [0, -1, 1.5, "3", True])
def test_steps_of_mirroring_are_counted_in_whole_numbers(steps):
    path = fp.untie(make_mlp(), "wm")
    before = [b.detach().clone() for _, _, b in path.pairs()]
    with pytest.raises(fp.RuleError, match=f"mirror: steps must be .*, not {steps!r}"):
        path.mirror(steps=steps)
    with pytest.raises(fp.RuleError, match=f"mirror: most_steps must be .*, not {steps!r}"):
        path.mirror(until_angle_deg=5, most_steps=steps)
    assert all(torch.equal(b, old) for (_, _, b), old in zip(path.pairs(), before, strict=True))


def test_the_state_of_a_path_has_five_parts():
    path = fp.untie(make_mlp(), "wm", seed=3)
    path.mirror(steps=2)
    path.step()
    state = path.state_dict()
    assert state.keys() == {"seed", "steps", "parts", "rules", "rule_names"}
    assert state["rule_names"] == {"0": "wm", "2": "wm", "4": "wm"}
    assert (state["seed"], state["steps"], state["rules"]) == (3, 1, {})
    assert state["parts"].keys() == {"MirrorMode"}
    assert fp.untie(make_mlp(), "fa").state_dict()["parts"] == {}


def test_taps_are_shown_the_signals_of_each_weight():
    """Weight, input, output, and which rows of W met activity there."""
    path = fp.untie(nn.MultiheadAttention(8, 2), "fa")
    x, y, seen = torch.randn(5, 3, 8), torch.randn(4, 3, 8), []
    with tapped(path.layers.values(), lambda *shown: seen.append(shown)):
        path.model(x, y, y)
    packed = [one for one in seen if one[0].name == "in_proj_weight" or one[0] is path.weights[0]]
    assert sorted((rows.start, rows.stop) for *_, rows in packed) == [(0, 8), (8, 24)]
    for weight, given, output, rows in seen:
        part = weight.weight[rows]
        bias = weight.layer.in_proj_bias[rows] if weight is path.weights[0] else weight.layer.bias
        torch.testing.assert_close(output.flatten(0, -2), given.flatten(0, -2) @ part.t() + bias)
    assert all(layer.untied.taps == () for layer in path.layers.values())


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"rule": "wm"}, "there '0' has the rule 'kp', here the rule 'wm'"),
        ({"rule": "kp", "overrides": {"2": "bp"}}, "there '2' has the rule 'kp', here the rule 'bp'"),
    ],
)
def test_the_state_of_a_path_with_other_rules_is_refused(other, said):
    state = fp.untie(make_mlp(), "kp").state_dict()
    path = fp.untie(make_mlp(), **other)
    before = path.state_dict()
    with pytest.raises(fp.UntieError, match=said):
        path.load_state_dict(state)
    assert path.state_dict() == before


def test_the_state_of_a_path_with_other_layers_is_refused():
    small = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
    with pytest.raises(fp.UntieError, match="there '2' has the rule 'kp', here no rule"):
        fp.untie(small, "kp").load_state_dict(fp.untie(make_mlp(), "kp").state_dict())


def test_a_state_of_before_it_named_its_rules_is_taken():
    state = fp.untie(make_mlp(), "kp").state_dict()
    del state["rule_names"]
    fp.untie(make_mlp(), "kp").load_state_dict(state)
