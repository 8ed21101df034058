"""Updates that leave out B or W are told by values; clipping that counts B is named; so are bad settings."""

import copy
import math

import pytest
import torch
from torch import nn

import feedbackpath as fp


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))


def run_backward(model):
    model(torch.randn(8, 6)).square().sum().backward()


# --- Writes that no version counter sees --------------------------------------------------------------------


def add_to_data(parameters):
    for p in parameters:
        p.data.add_(p.grad, alpha=-0.01)


def replace_data(parameters):
    for p in parameters:
        p.data = p.data - 0.01 * p.grad


def write_through_numpy(parameters):
    for p in parameters:
        p.detach().numpy()[...] -= 0.01 * p.grad.numpy()


def copy_flat(parameters):
    """As optimizers that keep one flat vector do."""
    parameters = list(parameters)
    flat = nn.utils.parameters_to_vector(parameters) - 0.01 * nn.utils.parameters_to_vector(
        [p.grad for p in parameters]
    )
    nn.utils.vector_to_parameters(flat.detach(), parameters)


def step_with_torch(parameters):
    torch.optim.SGD(parameters, lr=0.01).step()


WRITERS = [add_to_data, replace_data, write_through_numpy, copy_flat, step_with_torch]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
@pytest.mark.parametrize("zeroes_first", [False, True])
def test_an_update_without_feedback_weights_is_found_however_it_is_written(write, zeroes_first):
    model = make_net()
    old = list(model.parameters())
    path = fp.untie(model, "kp")
    run_backward(model)
    write(old)
    if zeroes_first:
        model.zero_grad()
    with pytest.raises(fp.RuleError, match="forward weights but not the feedback weights of '0', '2'"):
        path.step()


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
@pytest.mark.parametrize("rule", ["kp", "mirror-kp", "dkp"])
def test_an_update_of_all_parameters_is_let_be_however_it_is_written(write, rule):
    model = make_net()
    path = fp.untie(model, rule)
    model(torch.randn(2, 6))
    for _ in range(3):
        model.zero_grad()
        run_backward(model)
        write([p for p in model.parameters() if p.grad is not None])
        path.step()


def test_a_feedback_weight_that_is_larger_than_the_forward_weight_is_watched_as_well():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 40))
    path = fp.untie(model, "dkp")
    model(torch.randn(8, 2)).square().sum().backward()
    assert model[2].feedback.numel() == 10 * model[2].weight.numel()
    step_with_torch([p for p in model.parameters() if p is not model[2].weight])
    with pytest.raises(fp.RuleError, match="feedback weights but not the forward weights of '2'"):
        path.step()


def test_feedback_weights_that_are_updated_without_forward_weights_are_found():
    """Plain weights were assigned: the optimizer still has the old ones, and B."""
    model = make_net()
    path = fp.untie(model, "kp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        run_backward(model)
        optimizer.step()
        path.step()
    model.load_state_dict(make_net().state_dict(), assign=True)
    run_backward(model)
    optimizer.step()
    with pytest.raises(fp.RuleError, match="feedback weights but not the forward weights of '0', '2'"):
        path.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("large", "small"), [("weight", "feedback"), ("feedback", "weight")])
def test_an_update_that_rounding_loses_in_one_of_both_is_let_be(large, small, dtype):
    """Errors of a deep network may be so small that they change a B of 0, and no value of W."""
    model = make_net().to(dtype)
    path = fp.untie(model, "kp")
    last = model[2]
    nn.init.constant_(last.get_parameter(large), 1e3)
    nn.init.zeros_(last.get_parameter(small))
    inputs = torch.ones(8, 6, dtype=dtype)
    model(inputs).sum().backward()
    torch.optim.SGD(last.parameters(), lr=1e-8).step()
    path.step()
    assert (last.get_parameter(large) == 1e3).all()
    assert last.get_parameter(small).any()
    model(inputs).sum().backward()
    torch.optim.SGD([last.get_parameter(small)], lr=1e3).step()  # that is not lost
    with pytest.raises(fp.RuleError, match="the optimizer updates the .* weights of '2'"):
        path.step()


def test_each_weight_is_watched_until_its_own_first_update():
    model = make_net()
    path = fp.untie(model, "kp", overrides={"2": fp.KolenPollack(feedback_rate=0.5)})
    run_backward(model)
    torch.optim.SGD([model[0].weight, model[0].feedback, model[2].weight], lr=0.01).step()
    with pytest.raises(fp.RuleError, match="but not the feedback weights of '2'"):
        path.step()


def test_a_copy_of_a_path_is_watched_and_a_copy_of_a_model_holds_nothing():
    path = copy.deepcopy(fp.untie(make_net(), "kp"))
    run_backward(path.model)
    step_with_torch([p for name, p in path.model.named_parameters() if not name.endswith("feedback")])
    with pytest.raises(fp.RuleError, match="but not the feedback weights"):
        path.step()
    model = make_net()
    fp.untie(model, "kp")
    double = copy.deepcopy(model)
    run_backward(double)
    from feedbackpath.rules.update_watch import UpdateWatch

    assert double[0].untied.context.part(UpdateWatch)._noted == {}


def test_steps_that_change_nothing_tell_nothing():
    model = make_net()
    path = fp.untie(model, "kp")
    still = torch.optim.SGD(model.parameters(), lr=0.0)  # the first step of a warm-up
    run_backward(model)
    still.step()
    path.step()
    run_backward(model)
    step_with_torch([model[0].weight, model[2].weight])
    with pytest.raises(fp.RuleError, match="but not the feedback weights"):
        path.step()


# --- Clipping that counts B ---------------------------------------------------------------------------------


def clip_by_torch(model, path):
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def clip_in_two_calls(model, path):
    """As Lightning and accelerate do with the parameters of an optimizer."""
    parameters = list(model.parameters())
    norm = nn.utils.get_total_norm([p.grad for p in parameters], 2.0, foreach=True)
    nn.utils.clip_grads_with_norm_(parameters, 0.1, norm)


def clip_by_hand(model, path):
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    for p in model.parameters():
        p.grad.mul_(0.3 / norm)


def clip_in_vain(model, path):
    nn.utils.clip_grad_norm_(model.parameters(), 1e9)


@pytest.mark.parametrize(
    "clip", [clip_by_torch, clip_in_two_calls, clip_by_hand, clip_in_vain], ids=lambda clip: clip.__name__
)
@pytest.mark.parametrize("zeroes_first", [False, True])
def test_clipping_to_a_norm_that_counts_feedback_weights_is_named_once(clip, zeroes_first):
    model = make_net()
    path = fp.untie(model, "kp")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    run_backward(model)
    clip(model, path)
    optimizer.step()
    if zeroes_first:
        model.zero_grad()
    with pytest.warns(fp.KolenPollackWarning, match="counts feedback weights too") as caught:
        path.step()
    assert caught[0].filename == __file__
    run_backward(model)
    clip(model, path)
    optimizer.step()
    path.step()


def scale_back(model, path):
    """As ``GradScaler.unscale_`` does."""
    for p in model.parameters():
        p.grad.mul_(1 / 65536)


UNNAMED = {
    "none": lambda model, path: None,
    "by the path": lambda model, path: path.clip_grad_norm_(0.1),
    "unscaled": scale_back,
    "unscaled, then by the path": lambda model, path: (scale_back(model, path), path.clip_grad_norm_(1e-6)),
    "by value": lambda model, path: nn.utils.clip_grad_value_(model.parameters(), 0.1),
    "thrown away": lambda model, path: model.zero_grad(set_to_none=False),
}


@pytest.mark.parametrize("change", UNNAMED)
@pytest.mark.parametrize("foreach", [False, True])
def test_what_treats_both_alike_is_not_named(change, foreach):
    model = make_net()
    path = fp.untie(model, "kp")
    settings = {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "foreach": foreach}
    optimizer = torch.optim.SGD(model.parameters(), **settings)
    for _ in range(2):
        run_backward(model)
        run_backward(model)  # accumulated
        UNNAMED[change](model, path)
        optimizer.step()
        path.step()


def test_clipping_by_the_path_is_backprops():
    """The norm of what has a forward weight alone; a B that learns is scaled as W is."""
    model, plain = make_net(), make_net()
    path = fp.untie(model, "kp")
    with torch.no_grad():
        for _, w, b in path.pairs():
            b.copy_(w)
    x = torch.randn(8, 6)
    for net in (model, plain):
        net(x).square().sum().backward()
    norm, expected = path.clip_grad_norm_(0.1), nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    torch.testing.assert_close(norm, expected)
    for (_, w, b), p in zip(path.pairs(), (plain[0].weight, plain[2].weight), strict=True):
        torch.testing.assert_close(w.grad, p.grad)
        assert torch.equal(b.grad, w.grad)


# --- Settings that would be taken for something else, and NaN -----------------------------------------------


@pytest.mark.parametrize("value", ["Sigma", "SIGMA", "", None, True, "none"])
def test_a_batchnorm_feedback_that_does_not_exist_is_refused(value):
    model = make_net()
    with pytest.raises(fp.UntieError, match="batchnorm_feedback=.* is not one of autograd, sigma"):
        fp.untie(model, "fa", batchnorm_feedback=value)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("model", [None, "model", [nn.Linear(3, 3)], nn.Linear])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(fp.UntieError, match="untie: model must be a Module, not"):
        fp.untie(model, "fa")


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 0.0, -1.0, 1e300, 1e-300, "1", True])
@pytest.mark.parametrize(
    "make",
    [
        lambda value: fp.Mirror(sigma=value),
        lambda value: fp.Mirror(rate=value, reading="inside"),
        lambda value: fp.Mirror(baseline=value, rates="baseline"),
        lambda value: fp.When(cost_share=value),
        lambda value: fp.KolenPollack(feedback_rate=value),
    ],
    ids=["sigma", "rate", "baseline", "cost_share", "feedback_rate"],
)
def test_a_size_that_is_none_is_refused(make, value):
    with pytest.raises(fp.RuleError, match="must be (above 0|a finite number|between 1e-12 and 1e12), not"):
        make(value)


@pytest.mark.parametrize("sigma", [1e-12, 1e12])
def test_the_smallest_and_largest_noise_still_tell_the_weights(sigma):
    path = fp.untie(make_net(), fp.WeightMirror(fp.Mirror(sigma=sigma)))
    path.mirror()
    assert max(path.matrix_angles().values()) < 3


BROKEN = {
    "nan": lambda z: z * math.nan,
    "log": torch.log,
    "infinite": lambda z: z / 0.0,
    "root": lambda z: z.sqrt(),
}


@pytest.mark.parametrize("activation", BROKEN)
@pytest.mark.parametrize("rule", ["wm", "mirror-kp", fp.WeightMirror(fp.Mirror.paper()), "wm-exact"])
def test_an_activation_that_is_not_finite_is_refused_and_nothing_changes(activation, rule):
    net = make_net()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(fp.RuleError, match="the activation given for '0' does not return a finite") as raised:
        fp.untie(net, rule, activations={"0": BROKEN[activation]}).mirror(steps=2)
    assert "\n" not in str(raised.value)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
