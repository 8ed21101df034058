"""ia, sa and aa: the slopes of their losses, and where they settle, in closed form."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import feedbackpath as fp

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
X = (
    X @ torch.diag(torch.linspace(0.5, 2, 6, dtype=torch.float64)) + 0.3
)  # correlated, of other sizes, not centred


def make_layer(bias=True):
    torch.manual_seed(0)
    return nn.Linear(6, 4, bias=bias).double()


def run(path, x, steps=1):
    for _ in range(steps):
        path.model(x).sum().backward()
        path.step()


LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (5, 6)),
    "linear on sequences": (lambda: nn.Linear(6, 4, bias=False), (2, 5, 6)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, padding=1), (4, 2, 7)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (4, 2, 7, 6)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding="same"), (4, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, dilation=2), (2, 2, 4, 4, 5)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rule", ["aa", "ia"])
def test_a_step_goes_down_the_slope_of_the_rules_loss(rule, layer):
    """R is written down from the paper's primitives; autograd gives its slope, in float64."""
    make, shape = LAYERS[layer]
    torch.manual_seed(0)
    model = make().double()
    x = torch.randn(shape, dtype=torch.float64)
    settings = {"aa": fp.ActivationAlignment(rate=0.5), "ia": fp.InformationAlignment(rate=0.5, decay=0.1)}
    fp.untie(model, settings[rule])
    b = model.feedback.detach().clone().requires_grad_()
    bias = None if model.bias is None else model.bias.detach()
    if isinstance(model, nn.Linear):
        op = F.linear
    else:
        given = model.stride, model.padding, model.dilation, model.groups
        op = lambda x, w, bias=None: getattr(F, f"conv{x.dim() - 2}d")(x, w, bias, *given)  # noqa: E731
    y = op(x, model.weight.detach())
    torch.testing.assert_close(y, op(x, model.weight, bias) - (0 if bias is None else bias.view(
        -1, *[1] * (0 if isinstance(model, nn.Linear) else x.dim() - 2))))  # fmt: skip
    probe = x.clone().requires_grad_()
    sent = torch.autograd.grad(op(probe, b), probe, y, create_graph=True)[0]  # op'(y, B)
    kernel = b[0, 0].numel() if b.dim() > 2 else 1
    amp, sparse, null = -(op(x, b) * y).sum(), op(x, b).square().sum() / 2, sent.square().sum() / 2
    torch.testing.assert_close((sent * x).sum(), -amp)
    if rule == "aa":
        loss = (amp + sparse) / (kernel * x.square().sum())
    else:
        loss = (amp + null) / (kernel * y.square().sum()) + 0.1 / 2 * b.square().sum()
    (slope,) = torch.autograd.grad(loss, b)
    path_step(model, x)
    torch.testing.assert_close(model.feedback.detach(), (b - 0.5 * slope).detach(), rtol=1e-10, atol=1e-10)


def path_step(model, x):
    x = x.clone().requires_grad_()
    model(x).square().sum().backward()
    model.untied.rule.step(model.untied.weights, model.untied.context)


@pytest.mark.parametrize("bias", [True, False])
def test_activation_alignments_gap_is_multiplied_by_a_matrix_a_step(bias):
    layer = make_layer(bias)
    path = fp.untie(layer, fp.ActivationAlignment(rate=1.5))
    covariance = X.t() @ X
    shrink = torch.eye(6, dtype=torch.float64) - 1.5 * covariance / covariance.trace()
    gap = (layer.weight - layer.feedback).detach()
    for _ in range(5):
        run(path, X)
        gap = gap @ shrink
        torch.testing.assert_close((layer.weight - layer.feedback).detach(), gap, rtol=1e-10, atol=1e-10)
    run(path, X, 2000)
    torch.testing.assert_close(layer.feedback, layer.weight, rtol=1e-6, atol=1e-6)


def test_activation_alignment_leaves_what_inputs_never_show():
    layer = make_layer()
    path = fp.untie(layer, "aa")
    before = layer.feedback.detach().clone()
    x = X.clone()
    x[:, 3:] = 0
    run(path, x, 2000)
    torch.testing.assert_close(layer.feedback[:, :3], layer.weight[:, :3], rtol=1e-6, atol=1e-6)
    assert torch.equal(layer.feedback[:, 3:], before[:, 3:])


@pytest.mark.parametrize("decay", [pytest.param(0.0, marks=pytest.mark.slow), 0.03, 0.9])
def test_information_alignment_settles_at_the_ridge_regression_of_inputs_on_outputs(decay):
    layer = make_layer()
    path = fp.untie(layer, fp.InformationAlignment(rate=1.0, decay=decay))
    run(path, X, 20_000 if decay == 0.0 else 2000)
    w, c = layer.weight.detach(), X.t() @ X
    of_outputs = w @ c @ w.t()
    ridge = decay * of_outputs.trace() * torch.eye(4, dtype=torch.float64)
    expected = torch.linalg.solve(of_outputs + ridge, w @ c)
    torch.testing.assert_close(layer.feedback.detach(), expected, rtol=1e-6, atol=1e-6)


def white(layer):
    """Return inputs with E[x x^T] = I, and W's singular vectors and values."""
    x = torch.linalg.qr(torch.randn(40, 6, dtype=torch.float64))[0] * 40**0.5
    return x, *torch.linalg.svd(layer.weight.detach(), full_matrices=False)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_information_alignment_of_white_inputs_has_the_singular_vectors_of_w(decay):
    layer = make_layer()
    x, u, s, v = white(layer)
    path = fp.untie(layer, fp.InformationAlignment(rate=1.0, decay=decay))
    run(path, x, 3000)
    values = s / (s**2 + decay * s.square().sum())
    torch.testing.assert_close(layer.feedback.detach(), u * values @ v, rtol=1e-6, atol=1e-6)
    if decay == 0.0:
        torch.testing.assert_close(layer.feedback.detach(), torch.linalg.pinv(layer.weight.detach()).t())


def test_information_alignment_of_equal_singular_values_is_along_w():
    layer = make_layer()
    x, u, _, v = white(layer)
    layer.weight.data = 0.7 * u @ v
    path = fp.untie(layer, "ia")
    run(path, x, 1000)
    assert path.matrix_angles()[""] < 1e-4


@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_symmetric_alignments_gap_shrinks_by_its_rate(rate):
    layer = make_layer()
    path = fp.untie(layer, fp.SymmetricAlignment(rate))
    gap = (layer.weight - layer.feedback).detach()
    for step in range(1, 6):
        path.step()
        left = (layer.weight - layer.feedback).detach()
        torch.testing.assert_close(left, (1 - rate) ** step * gap, rtol=1e-12, atol=1e-12)


def audit(rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    path = fp.untie(model, rule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(X[:8].float()), torch.arange(8) % 3).backward()
        optimizer.step()
        path.step()

    return fp.audit(step, path).transport_free


def test_the_audit_says_that_symmetric_alignment_reads_w_and_the_others_do_not():
    verdicts = {rule: audit(rule) for rule in ("sa", "ia", "aa")}
    assert verdicts == {"sa": False, "ia": True, "aa": True}


@pytest.mark.parametrize("rule", ["ia", "aa"])
def test_parts_of_a_batch_and_layers_that_share_a_weight_count_together(rule):
    whole, parted = make_layer(), make_layer()
    paths = fp.untie(whole, rule), fp.untie(parted, rule)
    run(paths[0], X)
    for part in X.split(25):
        parted(part).sum().backward()
    paths[1].step()
    torch.testing.assert_close(whole.feedback, parted.feedback)

    tied = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
    tied[2].weight = tied[0].weight
    path = fp.untie(tied, rule)
    run(path, X)
    assert tied[0].feedback is tied[2].feedback
    assert path.state_dict()["rules"] == {}


@pytest.mark.parametrize("rule", ["ia", "aa"])
def test_a_step_of_which_nothing_was_seen_changes_nothing_but_by_decay(rule):
    layer = make_layer()
    path = fp.untie(layer, fp.InformationAlignment(decay=0.0) if rule == "ia" else rule)
    before = layer.feedback.detach().clone()
    path.step()
    assert torch.equal(layer.feedback, before)


@pytest.mark.parametrize("rule", ["ia", "aa"])
def test_an_output_that_was_changed_in_place_is_refused(rule):
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)).double()
    fp.untie(model, rule)
    with pytest.raises(
        fp.RuleError, match=r"the output of '0', which \w+ reads, was changed in place: use ReLU"
    ):
        model(X).sum().backward()


@pytest.mark.parametrize("rule", ["ia", "aa"])
def test_layers_that_have_no_such_form_are_named(rule):
    layers = [
        nn.Linear(6, 6),
        nn.ConvTranspose1d(6, 6, 3),
        nn.Conv1d(6, 6, 3, padding=1, padding_mode="circular"),
    ]
    with pytest.warns(fp.UnconvertedLayerWarning, match=rf"'1' \(ConvTranspose1d, by {rule}\), '2' \(Conv1d"):
        fp.untie(nn.Sequential(*layers), rule)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fp.ActivationAlignment(rate=2.0), "aa: rate must lie between 0 and 2, not 2.0"),
        (lambda: fp.InformationAlignment(rate=1.9, decay=0.1), r"rate \* \(1 \+ decay\) below 2"),
        (lambda: fp.SymmetricAlignment(rate=0.0), "sa: rate must be above 0 and at most 1"),
    ],
)
def test_rates_at_which_nothing_settles_are_refused(make, message):
    with pytest.raises(fp.RuleError, match=message):
        make()
