"""The parts of a more brain-like network (Section 6): what they compute, what goes back, and all together."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from problems import LOCALS, by_id
from reference import angle_deg
from torch import nn

import feedbackpath as fp
from feedbackpath.mirror import fields, rates
from feedbackpath.models import _USERS, MODELS, build_model, register_model
from feedbackpath.train.config import AuditConfig, CompareConfig, RunConfig
from feedbackpath.train.settings import merge_config

ALL_THREE = {"norm": "scaling", "activation": "rectified-tanh", "connections": "local"}


@torch.no_grad()
def connect(layer, x):
    """Return what local connections make of a map, synapse by synapse."""
    w, (height, width) = layer.weight, layer.output_size
    y = x.new_zeros(len(x), layer.out_channels, height, width)
    inputs, outputs = w.shape[3], layer.out_channels // layer.groups
    ranges = map(range, (height, width, layer.out_channels, inputs, *layer.kernel_size))
    for row, column, o, i, down, right in itertools.product(*ranges):
        r = row * layer.stride[0] - layer.padding[0] + down
        c = column * layer.stride[1] - layer.padding[1] + right
        if 0 <= r < x.shape[2] and 0 <= c < x.shape[3]:
            source = x[:, o // outputs * inputs + i, r, c]
            y[:, o, row, column] += w[row, column, o, i, down, right] * source
    return y if layer.bias is None else y + layer.bias


@pytest.mark.parametrize("problem", LOCALS, ids=by_id)
def test_local_connections_are_what_the_plain_loop_says(problem):
    layer, (x,) = problem.build(), problem.inputs(requires_grad=False)
    torch.testing.assert_close(layer(x), connect(layer, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("problem", LOCALS, ids=by_id)
def test_products_of_noise_and_answers_are_autograds_gradient(problem):
    layer, (x,) = problem.build(), problem.inputs(requires_grad=False)
    out = layer(x)
    answer = torch.randn_like(out)
    (expected,) = torch.autograd.grad(out, layer.weight, answer)
    by_group = answer.permute(2, 3, 1, 0).flatten(0, 2).mT
    found = fields.local_products(layer, x, by_group)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_same_kernel_everywhere_is_a_convolution(groups):
    settings = {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "groups": groups}
    conv = nn.Conv2d(4, 6, **settings).double()
    local = fp.LocallyConnected2d(4, 6, (7, 6), **settings).double()
    with torch.no_grad():
        local.weight.copy_(conv.weight.expand_as(local.weight))
        local.bias.copy_(conv.bias[:, None, None].expand_as(local.bias))
    x = torch.randn(3, 4, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(local(x), conv(x))


def test_synapses_in_the_padding_do_not_exist_and_never_come_to_be():
    torch.manual_seed(0)
    model = nn.Sequential(
        fp.LocallyConnected2d(2, 3, (4, 4), 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)
    )
    missing = model[0].weight == 0
    assert missing.sum() == 3 * 2 * (4 * 4 * 9 - (4 * 3 - 2) ** 2)  # of 12 places in a row, 10 are in the map
    path = fp.untie(model, "wm")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    for _ in range(2):
        F.cross_entropy(model(torch.randn(16, 2, 4, 4)), torch.arange(16) % 3).backward()
        optimizer.step()
        path.step()
    assert not model[0].weight[missing].any()
    assert not model[0].feedback[missing].any()
    assert path.matrix_angles()["0"] < 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": 3}, "4 and 6 channels cannot be split into 3 groups"),
        ({"groups": 0}, "cannot be split into 0 groups"),
        ({"kernel_size": 9}, r"a kernel of \(9, 9\) does not fit into a map of \(5, 4\)"),
        ({"kernel_size": (3, 7), "padding": 1}, "does not fit"),
    ],
)
def test_local_connections_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        fp.LocallyConnected2d(4, 6, (5, 4), **({"kernel_size": 3} | settings))


@pytest.mark.parametrize("shape", [(2, 4, 4, 5), (2, 3, 5, 4), (4, 5, 4)])
def test_a_map_of_another_size_is_refused(shape):
    with pytest.raises(ValueError, match=r"expected \[N, 4, 5, 4\]"):
        fp.LocallyConnected2d(4, 6, (5, 4), 3)(torch.zeros(shape))


@pytest.mark.parametrize("noise", ["gaussian", "hadamard", "orthogonal"])
@pytest.mark.parametrize("settings", [{"stride": 2, "padding": 1}, {"groups": 2, "padding": (0, 2)}], ids=str)
def test_a_mirror_settles_at_local_weights_through_the_layers_own_call(noise, settings):
    torch.manual_seed(0)
    layer = fp.LocallyConnected2d(4, 6, (7, 6), (3, 2), **settings)
    path = fp.untie(nn.Sequential(layer, nn.ReLU()), "fa")
    heard = []
    layer.register_forward_hook(lambda module, inputs, output: heard.append(inputs[0].shape[1:]))
    path.mirror(steps=10, settings=fp.Mirror(noise=noise))
    assert path.matrix_angles()["0"] < (8 if noise == "gaussian" else 0.1)
    assert path.gains()["0"] == pytest.approx(1.0, abs=0.02)
    assert set(heard) == {(4, 7, 6)}


def test_a_mirror_of_few_examples_at_a_time_is_that_of_all_at_once(monkeypatch):
    def mirror(values):
        monkeypatch.setattr(fields, "SEEN_VALUES", values)
        torch.manual_seed(0)
        layer = fp.LocallyConnected2d(4, 6, (7, 6), (3, 2), groups=2, padding=1).double()
        calls = []
        layer.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
        path = fp.untie(nn.Sequential(layer, nn.ReLU()), "fa")
        path.mirror(steps=1, settings=fp.Mirror(noise="gaussian", samples=50))
        return layer.feedback.clone(), calls

    whole, calls = mirror(10**6)
    assert calls == [50]
    in_parts, calls = mirror(16 * 7 * 7 * 2 * 12)  # 7x7 positions, 2 groups, 12 inputs
    assert calls == [16, 16, 16, 2]
    assert torch.allclose(in_parts, whole, rtol=0, atol=1e-12)


def test_codes_that_repeat_are_orthogonal_wherever_a_neuron_looks():
    layer = fp.LocallyConnected2d(3, 2, (7, 5), (3, 2), stride=(1, 2), padding=(1, 0))
    path = fp.untie(nn.Sequential(layer, nn.ReLU()), "fa")
    fired = []
    layer.register_forward_hook(lambda module, inputs, output: fired.append(inputs[0]))
    path.mirror(steps=1, settings=fp.Mirror(noise="hadamard"))
    patches = layer.patches(torch.cat(fired))
    products = patches @ patches.mT / patches.shape[2]
    assert torch.equal(products, products.diagonal(dim1=1, dim2=2).diag_embed())


def test_scaling_is_the_equation():
    torch.manual_seed(0)
    norm, mean, variance = fp.SynapticScaling((3, 2)).double(), torch.zeros(3, 2), torch.ones(3, 2)
    for step in range(1, 15):
        y = torch.rand(5, 3, 2, dtype=torch.float64, requires_grad=True)
        share = max(1 / step, 0.1)
        mean = mean + share * (y.mean(0) - mean)
        variance = variance + share * ((y - mean).square().mean(0) - variance)
        gain = (variance + 0.01) ** -0.5
        out = norm(y)
        torch.testing.assert_close(out, gain * (y - mean))
        (sent,) = torch.autograd.grad(out.sum(), y)
        torch.testing.assert_close(sent, gain.expand_as(y))
        mean, variance = mean.detach(), variance.detach()
    norm.eval()
    torch.testing.assert_close(norm(y[:1]), (gain * (y - mean))[:1])


def test_scaling_mixes_no_samples_and_no_neurons():
    norm = fp.SynapticScaling((4,))
    norm(torch.rand(8, 4))
    y = torch.rand(8, 4, requires_grad=True)
    sent = torch.autograd.functional.jacobian(norm, y).reshape(32, 32)
    assert torch.equal(sent, sent.diagonal().diag())
    assert sent.diagonal().min() > 0


@pytest.mark.parametrize("settings", [{"rate": 0.0}, {"rate": 1.5}, {"eps": 0.0}])
def test_scaling_refuses_settings_that_make_no_sense(settings):
    with pytest.raises(ValueError, match="rate must be in"):
        fp.SynapticScaling((3,), **settings)


def test_scaling_refuses_other_neurons():
    with pytest.raises(ValueError, match=r"expected rates \[N, 3\], not \[2, 4\]"):
        fp.SynapticScaling((3,))(torch.zeros(2, 4))


def test_measuring_leaves_what_neurons_remember_as_it_was():
    model = build_model("resnet8", sample_shape=(1, 8, 8), num_classes=3, **ALL_THREE)
    path = fp.untie(model, "fa")
    x, target = torch.rand(6, 1, 8, 8), torch.arange(6) % 3
    F.cross_entropy(model(x), target)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path.delta_angles(lambda: F.cross_entropy(model(x), target))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["lenet", "resnet8", "resnet14x2"])
@pytest.mark.parametrize(
    "parts",
    [{"norm": "scaling"}, {"activation": "rectified-tanh"}, {"connections": "local"}, ALL_THREE],
    ids=str,
)
def test_networks_are_built_of_each_part_alone_and_of_all(name, parts):
    model = build_model(name, sample_shape=(2, 17, 16), num_classes=3, **parts)
    scores = model(torch.rand(4, 2, 17, 16))
    F.cross_entropy(scores, torch.arange(4) % 3).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    kinds = {type(module) for module in model.modules()}
    assert (fp.SynapticScaling in kinds) == ("norm" in parts)
    assert (fp.LocallyConnected2d in kinds) == ("connections" in parts)
    assert (fp.RectifiedTanh in kinds) == ("activation" in parts)
    if parts == ALL_THREE:
        assert not kinds & {nn.Conv2d, nn.BatchNorm2d, nn.ReLU}


@pytest.mark.parametrize("name", ["mlp", "resnet18", "resnet50"])
def test_networks_without_such_a_form_say_so(name):
    with pytest.raises(ValueError, match=f"model {name} has no form with synaptic scaling"):
        build_model(name, sample_shape=(1, 16, 16), num_classes=3, connections="local")


def test_a_users_network_gets_the_parts_that_it_takes():
    try:
        register_model("mine", lambda num_classes, connections: nn.Linear(4, num_classes + len(connections)))
        assert (
            build_model("mine", sample_shape=(1, 2, 2), num_classes=3, connections="local").out_features == 8
        )
    finally:
        MODELS.pop("mine", None)
        _USERS.discard("mine")


@pytest.mark.parametrize("kind", [RunConfig, CompareConfig, AuditConfig])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model": "lenet", "norm": "after"}, "--norm has no effect here: lenet has no BatchNorm"),
        ({"norm": "scaling", "batchnorm_feedback": "sigma"}, "--batchnorm-feedback has no effect here"),
    ],
)
def test_flags_without_effect_are_refused(kind, flags, message):
    with pytest.raises(fp.ConfigError, match=message):
        merge_config(kind(**flags), None)
    assert merge_config(kind(model="lenet", **ALL_THREE), None).connections == "local"


def start(rule, name="resnet8", **parts):
    torch.manual_seed(0)
    size = 16 if name == "lenet" else 8
    model = build_model(name, sample_shape=(1, size, size), num_classes=3, **parts)
    path = fp.untie(model, rule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    x, target = torch.rand(6, 1, size, size), torch.arange(6) % 3

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
        path.step()

    return step, path


SMALL = fp.WeightMirror(fp.Mirror(samples=24, forgetting=0.5))


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("lenet", "kp"),
        ("resnet8", SMALL),
        pytest.param("resnet8", "kp", marks=pytest.mark.slow),
        pytest.param("resnet8", "fa", marks=pytest.mark.slow),
        pytest.param("lenet", SMALL, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_with_all_three_the_audit_makes_no_exception(name, rule):
    report = fp.audit(*start(rule, name, **ALL_THREE), steps=1)
    assert report.transport_free is True
    assert report.declared == {}
    assert set(report.locality.values()) <= {"own pre- and postsynaptic signals", "none in this step"}


@pytest.mark.parametrize(
    ("parts", "exception"),
    [
        pytest.param(ALL_THREE | {"norm": "after"}, {"BatchNorm scale"}, marks=pytest.mark.slow),
        ({"norm": "scaling"}, set()),
    ],
    ids=str,
)
def test_batchnorm_stays_the_only_exception(parts, exception):
    report = fp.audit(*start("kp", **parts), steps=2)
    assert report.transport_free is True
    assert set(report.declared) == exception


def test_the_audit_finds_local_weights_that_are_transported():
    step, path = start("fa", **ALL_THREE)

    def leak():
        step()
        with torch.no_grad():
            path.model.conv1.feedback.copy_(path.model.conv1.weight)

    report = fp.audit(leak, path, steps=2)
    assert report.transport_free is False
    assert {finding.layer for finding in report.findings} == {"conv1"}


@pytest.mark.parametrize("way", ["baseline", pytest.param("push-pull", marks=pytest.mark.slow)])
def test_with_everything_on_no_rate_is_negative_and_no_bias_open(way, monkeypatch):
    """Biases blocked, rates about a baseline or in push-pull, and all three parts, in one training run."""
    sent, open_biases = [], []
    monkeypatch.setattr(
        rates,
        "transmit",
        lambda values, send=rates.transmit: sent.append(float(values.min())) or send(values),
    )
    mirror = fp.Mirror(samples=64, rates=way, baseline=0.4, sigma=0.3, forgetting=0.2)
    step, path = start(fp.WeightMirror(mirror), **ALL_THREE)

    def look(layer, inputs):
        if not torch.is_grad_enabled():  # mirror mode
            open_biases.append(layer.bias is not None)

    for layer in path.layers.values():
        nn.init.constant_(layer.bias, 0.2)
        layer.register_forward_pre_hook(look)
    rates_in_training = []
    for module in path.model.modules():
        if isinstance(module, fp.RectifiedTanh):
            module.register_forward_hook(
                lambda m, i, out: rates_in_training.append(float(out.detach().min()))
            )
    path.mirror(steps=15)
    for _ in range(2):
        step()
    assert min(sent) >= 0.0
    assert min(rates_in_training) >= 0.0
    assert open_biases
    assert not any(open_biases)
    # The head's answers are linear, its n is 64; border neurons of 8x8 maps see few inputs.
    assert max(path.matrix_angles().values()) < 45


def test_rectified_tanh_is_found_behind_a_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), fp.RectifiedTanh(), fp.SynapticScaling((30,)), nn.Linear(30, 2))
    path = fp.untie(model, "wm")
    path.mirror(steps=1)
    model[1].register_forward_hook(lambda module, inputs, output: 0.0 * output)
    with pytest.warns(fp.MirrorWarning, match="do not answer to noise"):
        path.mirror(steps=1)


def neurons_sigma(layer):
    """Return gamma / sigma of a BatchNorm that normalises each neuron of a 5x6x6 layer by itself."""
    norm = nn.BatchNorm1d(5 * 36, affine=False).double()
    norm(layer(2 * torch.randn(64, 3, 6, 6, dtype=torch.float64) + 1).flatten(1))
    norm.running_var *= torch.rand(180, dtype=torch.float64) * 3 + 0.2  # from neuron to neuron
    return torch.rsqrt(norm.running_var + norm.eps).view(5, 6, 6)


def errors_through(layer, gain, b):
    """Return the errors that reach an input through W and sigma, and through B alone."""
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    delta = torch.randn(4, 5, 6, 6, dtype=torch.float64)
    (exact,) = torch.autograd.grad(layer(x) * gain, x, delta)
    (sent,) = torch.autograd.grad(torch.func.functional_call(layer, {"weight": b}, (x,)), x, delta)
    return exact, sent


def test_with_local_connections_b_absorbs_sigma_and_nothing_is_passed():
    """Appendix D.3. Noise passes W and the norm's scale; errors pass B alone, and are backprop's."""
    torch.manual_seed(0)
    layer = fp.LocallyConnected2d(3, 5, (6, 6), 3, padding=1, bias=False).double()
    gain = neurons_sigma(layer)
    path = fp.untie(nn.Sequential(layer), "fa")
    hook = layer.register_forward_hook(lambda module, inputs, z: z * gain)
    path.mirror(steps=1, settings=fp.Mirror(noise="hadamard"))
    hook.remove()
    b = layer.feedback.detach()
    exact, sent = errors_through(path.retie()[0], gain, b)
    torch.testing.assert_close(sent, exact, rtol=1e-9, atol=1e-9)


def test_no_convolution_can_absorb_a_sigma_of_each_neuron():
    """Appendix D.3: "no B could have mirrored the combined effects": the best of them, by least squares."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, 3, padding=1, bias=False).double()
    gain = neurons_sigma(layer)
    best = layer.weight.detach() * gain.mean((1, 2))[:, None, None, None]
    exact, sent = errors_through(layer, gain, best)
    assert torch.rad2deg(torch.acos(F.cosine_similarity(sent.flatten(), exact.flatten(), 0))) > 15


@pytest.mark.parametrize("updates", ["of W", "of W / sigma"])
def test_kolen_pollack_absorbs_sigma_where_the_scaled_synapse_is_what_changes(updates):
    """Errors do not pass sigma. B comes to W; to W / sigma where a change of W is sigma times that of B."""
    torch.manual_seed(0)
    layer = fp.LocallyConnected2d(3, 5, (6, 6), 3, padding=1, bias=False).double()
    gain = neurons_sigma(layer)
    path = fp.untie(nn.Sequential(layer), "kp")
    layer.register_forward_hook(lambda module, inputs, z: z + (z * gain - z).detach())
    by_synapse = gain.permute(1, 2, 0)[..., None, None, None]
    optimizer = torch.optim.SGD(path.model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(150):
        optimizer.zero_grad()
        x = torch.randn(8, 3, 6, 6, dtype=torch.float64)
        (path.model(x) - 3 * x.mean(1, keepdim=True)).square().mean().mul(40).backward()
        if updates == "of W / sigma":
            layer.weight.grad /= by_synapse
        optimizer.step()
        path.step()
    w, b = layer.weight.detach(), layer.feedback.detach()
    to_plain, to_scaled = (angle_deg(b, w * scale) for scale in (1.0, by_synapse))
    assert (to_plain < 1) == (updates == "of W")
    assert (to_scaled < 1) == (updates == "of W / sigma")
    assert max(to_plain, to_scaled) > 10
