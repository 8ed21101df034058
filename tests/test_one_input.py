"""One noisy input drives the whole model: where B goes, what stays untouched, and what is refused."""

import pytest
import reference
import torch
import torch.nn.functional as F
from one_input_mirror import look, mirror_from_input, seed_devices
from problems import ATTENTIONS, CONVNET, ENCODER, PLAIN_LAYERS, by_id, make_mlp
from torch import nn

import feedbackpath as fp
from feedbackpath.measure.angles import angle_deg
from feedbackpath.mirror import MirrorMode
from feedbackpath.mirror.fields import ConvGeometry, pad_input

# Torch says so once in a process, whichever test is the first to come to it.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
REPLACE = fp.Mirror(forgetting=1)
LINEAR = {"*": nn.Identity()}
CONVOLUTIONS = [p for p in PLAIN_LAYERS if "Conv" in p.id and "unbatched" not in p.id]
FORWARD_CONVOLUTIONS = [p for p in CONVOLUTIONS if "Transpose" not in p.id]


def see(problem, activations=None, with_inputs=False, steps=1):
    """Return a problem's model untied, and what its layers saw of one minibatch of its own inputs."""
    model = problem.build()
    path = fp.untie(model, "fa", activations=activations)
    inputs = problem.inputs(requires_grad=False)
    run = lambda: problem.call(model, *inputs)  # noqa: E731
    return path, look(path.context.part(MirrorMode), path.weights, run, steps=steps, with_inputs=with_inputs)


def mirror(path, run, settings=fp.Mirror(), **options):  # noqa: B008 (frozen)
    mirror_from_input(path.context, path.weights, run, settings, **options)


def noise(*shape):
    return lambda: torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("name", ["plain", "decorrelated"])
def test_one_layer_driven_by_white_noise_is_mirrored_as_ever(name):
    """The angle falls as 1 / sqrt(samples), to the ordinary mirror's: 1.17 sqrt(n / N) behind a ReLU."""
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU()).double()
    path = fp.untie(model, "fa")
    for samples in (500, 4000):
        draw = noise(samples, 40)
        mirror(path, lambda draw=draw: model(draw()), settings=REPLACE, decorrelate=name != "plain")
        expected = torch.tensor(1.17 * (40 / samples) ** 0.5).rad2deg().item()
        assert path.matrix_angles()["0"] < 1.3 * expected
    assert path.gains()["0"] == pytest.approx(1.0, rel=0.02)


def test_feedback_goes_to_the_weights_times_the_covariance_of_the_inputs():
    """B_2 -> W_2 C / v with C = W_1 W_1^T, where the first layer's answer is linear."""
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 6)).double()
    path = fp.untie(model, "fa")
    draw = noise(5000, 8)
    mirror(path, lambda: model(draw()), steps=40, settings=REPLACE)
    w1, w2 = (layer.weight.detach() for layer in model)
    covariance = w1 @ w1.T
    expected = w2 @ covariance / covariance.diagonal().mean()
    assert (path.weights[1].feedback - expected).norm() / expected.norm() < 0.02
    assert angle_deg(w2, path.weights[1].feedback) > 20


def test_decorrelated_feedback_of_linear_networks_is_the_weights():
    model = nn.Sequential(nn.Linear(12, 10), nn.BatchNorm1d(10), nn.Linear(10, 8), nn.Linear(8, 6)).double()
    path = fp.untie(model, "fa")
    mirror(path, lambda: model(torch.randn(50, 12).double()), settings=REPLACE, decorrelate=True)
    assert max(path.matrix_angles().values()) < 1
    assert path.gains() == pytest.approx(dict.fromkeys(path.gains(), 1.0), rel=0.01)


@pytest.mark.parametrize("problem", CONVOLUTIONS, ids=by_id)
def test_products_of_convolutions_match_loops_over_samples_and_positions(problem):
    """Each weight's covariance over its own pairs, each position about its own mean."""
    path, (seen,) = see(problem, {"*": torch.tanh})
    (x,), layer, weight = problem.inputs(requires_grad=False), path.model, path.weights[0]
    z = problem.call(layer, x).detach()
    centred, y = x - x.mean(0), torch.tanh(z) - torch.tanh(z).mean(0)
    if layer.transposed:
        padding = layer.padding
    else:
        if layer.padding_mode != "zeros":  # the layer does that before its operation
            centred = F.pad(centred, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        centred, padding = pad_input(layer, centred)
    geometry = ConvGeometry(
        layer.stride, padding, layer.dilation, layer.transposed, layer.output_padding, layer.groups
    )
    _, _, products = reference.convolution(centred, weight.weight, weight.weight, y, geometry)
    ones = torch.ones_like(centred[:1]), torch.ones_like(y[:1])
    _, _, pairs = reference.convolution(ones[0], weight.weight, weight.weight, ones[1], geometry)
    found = seen.correlate()
    expected = (products / (pairs * (len(x) - 1))).nan_to_num()  # 0 where a place meets padding alone
    torch.testing.assert_close(found.covariance, expected)
    drive = z - z.mean(0)
    others = [dim for dim in range(z.dim()) if dim != 1]
    torch.testing.assert_close(found.drive_answer, (drive * y).sum(others))
    torch.testing.assert_close(found.drive_power, (drive * drive).sum(others))


@pytest.mark.parametrize("problem", FORWARD_CONVOLUTIONS, ids=by_id)
def test_covariance_of_fields_turns_weights_into_what_is_correlated(problem):
    """Of a linear answer, cov = W C exactly, whatever the samples, for the drive is W times the fields."""
    _, (seen,) = see(problem, LINEAR, with_inputs=True)
    weight = seen.weight.weight.detach()
    (covariance,) = seen.input_covariances()
    by_group = weight.reshape(len(covariance), -1, covariance.shape[-1])
    expected = (by_group @ covariance).reshape(weight.shape)
    torch.testing.assert_close(seen.correlate().covariance, expected)


@pytest.mark.parametrize("problem", FORWARD_CONVOLUTIONS, ids=by_id)
def test_decorrelated_convolutions_with_linear_answers_are_exact(problem):
    model = problem.build()
    path = fp.untie(model, "fa", activations=LINEAR)
    shape = (100, *problem.shapes[0][1:])
    mirror(path, lambda: problem.call(model, torch.randn(shape).double()), settings=REPLACE, decorrelate=True)
    assert path.matrix_angles()[""] < 0.1  # what the ridge leaves


@pytest.mark.parametrize("problem", ATTENTIONS, ids=by_id)
def test_projections_of_attention_are_mirrored_each_from_its_own_input(problem):
    model = problem.build()
    path = fp.untie(model, "fa", activations=LINEAR)
    mirror(
        path, lambda: problem.call(model, *(torch.randn(shape).double() for shape in problem.shapes)),
        steps=20, settings=REPLACE, decorrelate=True,
    )  # fmt: skip
    assert max(path.matrix_angles().values()) < 0.1  # what the ridge leaves


@pytest.mark.parametrize("decorrelate", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_it_changes_feedback_and_nothing_else(training, decorrelate):
    model = CONVNET.build().train(training)
    path = fp.untie(model, "fa")
    model(CONVNET.inputs()[0]).sum().backward()
    own = {id(feedback) for _, _, feedback in path.pairs()}
    rest = [*model.buffers(), *(p for p in model.parameters() if id(p) not in own)]
    before = [tensor.detach().clone() for tensor in rest]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    feedbacks = [feedback.clone() for _, _, feedback in path.pairs()]
    modes = [module.training for module in model.modules()]
    random_state = torch.random.get_rng_state()
    draw = noise(64, 3, 6, 6)
    mirror(path, lambda: model(draw()), decorrelate=decorrelate)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert all(torch.equal(tensor, old) for tensor, old in zip(rest, before, strict=True))
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is None if gradient is None else torch.equal(parameter.grad, gradient)
    assert not any(torch.equal(b, old) for (_, _, b), old in zip(path.pairs(), feedbacks, strict=True))
    assert [module.training for module in model.modules()] == modes
    assert all(layer.untied.taps == () for layer in path.layers.values())


def test_batchnorm_uses_the_statistics_of_the_noise_in_evaluation_too():
    """Running statistics of other data would drive the second layer otherwise."""

    def feedback_after(training):
        model = CONVNET.build()
        model[1].running_var.fill_(100.0)
        path = fp.untie(model.train(training), "fa")
        draw = noise(64, 3, 6, 6)
        mirror(path, lambda: model(draw()))
        return model[3].feedback

    torch.testing.assert_close(feedback_after(False), feedback_after(True))


def test_noise_is_a_function_of_seed_and_call_alone():
    def draws(seed, calls):
        model, drawn = nn.Linear(6, 3), []
        path = fp.untie(model, "fa", seed=seed)
        for _ in range(calls):
            torch.rand(3)  # whatever else draws random numbers
            path.load_state_dict(path.state_dict())
            mirror(path, lambda: model(drawn.append(torch.randn(9, 6)) or drawn[-1]))
        return drawn

    first, second = draws(0, 2)
    assert not torch.equal(first, second)
    assert torch.equal(draws(0, 1)[0], first)
    assert not torch.equal(draws(1, 1)[0], first)


def test_first_calls_are_averaged_and_later_ones_forget():
    model = nn.Linear(4, 3).double()
    path = fp.untie(model, "fa")
    draw, found = noise(10, 4), []
    for call in range(4):
        before = model.feedback.detach().clone()
        with torch.random.fork_rng():
            (seen,) = look(
                path.context.part(MirrorMode), path.weights, lambda: model(draw()), steps=1, with_inputs=False
            )
        found.append(seen.correlate().at_gain_one())
        mirror(path, lambda: model(draw()), settings=fp.Mirror(forgetting=0.4))
        share = max(0.4, 1 / (call + 1))
        torch.testing.assert_close(model.feedback, (1 - share) * before + share * found[-1])


@pytest.mark.parametrize("decorrelate", [False, True])
def test_scaled_feedback_turns_towards_the_weights_and_keeps_its_norm(decorrelate):
    model = nn.Linear(12, 10)
    path = fp.untie(model, "fa")
    norm = model.feedback.norm().item()
    for _ in range(80):
        mirror(
            path,
            lambda: model(torch.randn(500, 12)),
            settings=fp.Mirror(reading="scaled"),
            decorrelate=decorrelate,
        )
    assert path.matrix_angles()[""] < 5
    assert model.feedback.norm().item() == pytest.approx(norm)


def test_a_layer_that_is_used_twice_learns_from_both_uses():
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, layer).double()
    path = fp.untie(model, "fa")
    x = torch.randn(20, 6).double()
    run = lambda: model(x)  # noqa: E731
    (seen,) = look(path.context.part(MirrorMode), path.weights, run, steps=1, with_inputs=False)
    uses = [signal - signal.mean(0) for signal in (x, layer(x).detach())]
    expected = sum(layer.weight.detach() @ use.T @ use for use in uses) / (2 * 19)
    torch.testing.assert_close(seen.correlate().covariance, expected)


def test_every_b_that_can_be_mirrored_learns_under_every_rule():
    for rule in ("fa", "kp", "wm", "mirror-kp"):
        model = ENCODER.build().float()
        path = fp.untie(model, rule)
        before = [b.clone() for _, _, b in path.pairs()]
        mirror(path, lambda model=model: model(torch.randn(30, 5, 8)))
        assert not any(torch.equal(b, old) for (_, _, b), old in zip(path.pairs(), before, strict=True))
        assert max(abs(gain - 1) for gain in path.gains().values()) < 1


def test_neurons_that_do_not_answer_are_named_and_keep_their_feedback_each_time():
    """No bias is blocked: a neuron may fall silent at any time."""
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU())
    path = fp.untie(model, "fa")
    mirror(path, lambda: model(torch.randn(99, 6)))
    nn.init.constant_(model[0].bias, -100.0)
    before = model[0].feedback.clone()
    with pytest.warns(fp.MirrorWarning, match="9 of 9 neurons of '0' do not answer"):
        mirror(path, lambda: model(torch.randn(99, 6)))
    torch.testing.assert_close(model[0].feedback, before)


def test_what_cannot_be_mirrored_so_is_refused_by_name():
    model = make_mlp()
    path = fp.untie(model, "fa")
    before = [b.clone() for _, _, b in path.pairs()]
    cases = {
        "run did not reach '2', '4'": (lambda: model[0](torch.randn(9, 6)), False),
        "'0' saw one sample": (lambda: model(torch.randn(1, 6)), False),
        "'0' saw 6 samples of 6 inputs": (lambda: model(torch.randn(6, 6)), True),
    }
    for message, (run, decorrelate) in cases.items():
        with pytest.raises(fp.RuleError, match=message):
            mirror(path, run, decorrelate=decorrelate)
        assert all(torch.equal(b, old) for (_, _, b), old in zip(path.pairs(), before, strict=True))
        assert all(layer.untied.taps == () for layer in path.layers.values())
    transposed = nn.Sequential(nn.ConvTranspose1d(2, 3, 3))
    with pytest.raises(fp.RuleError, match="transposed convolutions .*'0'.* cannot be decorrelated"):
        mirror(fp.untie(transposed, "fa"), lambda: transposed(torch.randn(9, 2, 5)), decorrelate=True)


def stop(*_):
    raise KeyboardInterrupt


def test_a_run_that_is_broken_off_leaves_no_hook_behind():
    model = make_mlp()
    path = fp.untie(model, "fa")
    with pytest.raises(KeyboardInterrupt):
        mirror(path, lambda: stop(model(torch.randn(9, 6))))
    assert not path.context.is_measuring
    assert all(layer.untied.taps == () for layer in path.layers.values())


@pytest.mark.parametrize("devices", [{"cpu"}, {"cpu", "meta"}, set()])
def test_a_model_on_the_cpu_leaves_the_random_numbers_of_gpus_alone(devices, monkeypatch):
    """``torch.manual_seed`` would seed every GPU, and nothing would take that back."""
    for name in ("manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, stop)
    seed_devices(7, {torch.device(kind) for kind in devices})
    first = torch.rand(3)
    torch.default_generator.manual_seed(7)
    assert torch.equal(first, torch.rand(3))


def audit_of_one_input(decorrelate):
    model = make_mlp()
    path = fp.untie(model, "fa")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(16, 6), torch.randint(3, (16,))

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        mirror(path, lambda: model(torch.randn(64, 6)), decorrelate=decorrelate)

    return fp.audit(step, path)


@pytest.mark.parametrize("decorrelate", [False, True])
def test_an_audit_finds_no_weight_transported(decorrelate):
    report = audit_of_one_input(decorrelate)
    assert report.transport_free, report
