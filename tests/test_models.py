import pytest
import torch
import torch.nn.functional as F
from torch import nn

from feedbackpath.models import MLP, MODELS, READ_TOKENS, build_model
from feedbackpath.models.resnet import SubsampleAndPad

SEE_IMAGES = [name for name in MODELS if name not in READ_TOKENS]
RESNETS = [name for name in MODELS if name.startswith("resnet")]


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def operations(model):
    """Name the class or function of every node of the traced graph, with the nodes it feeds on."""
    graph = torch.fx.symbolic_trace(model).graph
    modules = dict(model.named_modules())

    def kind(node):
        return type(modules[node.target]) if node.op == "call_module" else node.target

    return [(kind(node), [kind(parent) for parent in node.all_input_nodes]) for node in graph.nodes]


def torchvision_resnet_keys(depths, convs_per_block, *, downsample_first):
    """Write out the parameter names of torchvision's ResNets by their rule."""
    keys = ["conv1.weight", "bn1.weight", "bn1.bias", "fc.weight", "fc.bias"]
    for stage, depth in enumerate(depths, start=1):
        for block in range(depth):
            prefix = f"layer{stage}.{block}"
            for conv in range(1, convs_per_block + 1):
                keys += [
                    f"{prefix}.conv{conv}.weight",
                    f"{prefix}.bn{conv}.weight",
                    f"{prefix}.bn{conv}.bias",
                ]
            if block == 0 and (stage > 1 or downsample_first):
                keys += [f"{prefix}.downsample.{key}" for key in ("0.weight", "1.weight", "1.bias")]
    return set(keys)


@pytest.mark.parametrize("norm", ["after", "before"])
@pytest.mark.parametrize("name", SEE_IMAGES)
@pytest.mark.parametrize("sample_shape", [(1, 28, 28), (3, 33, 31)], ids=str)
def test_scores_have_a_column_per_class_and_every_parameter_learns(name, norm, sample_shape):
    model = build_model(name, sample_shape=sample_shape, num_classes=7, norm=norm)
    scores = model(torch.randn(2, *sample_shape))
    assert scores.shape == (2, 7)
    F.cross_entropy(scores, torch.tensor([0, 1])).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", SEE_IMAGES)
def test_channels_last_gives_the_same_scores(name):
    torch.manual_seed(0)
    model = build_model(name, sample_shape=(3, 32, 32), num_classes=10).double().eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = model(images)
    strided = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(strided, expected)


@pytest.mark.parametrize(
    ("name", "channels", "num_classes", "expected"),
    [
        ("mlp", 3, 10, (3072 + 1) * 512 + 513 * 512 + 513 * 10),
        ("lenet", 1, 10, 20 * 26 + 50 * 501 + (50 * 25 + 1) * 500 + 501 * 10),
        ("resnet20", 3, 10, 269_722),
        ("resnet56", 3, 10, 853_018),
        ("resnet18", 3, 1000, 11_689_512),
        ("resnet50", 3, 1000, 25_557_032),
    ],
)
def test_parameter_counts_are_the_published_ones(name, channels, num_classes, expected):
    model = build_model(name, sample_shape=(channels, 32, 32), num_classes=num_classes)
    assert count_parameters(model) == expected


@pytest.mark.parametrize(
    ("name", "depth", "channels"), [("resnet14", 14, 64), ("resnet110", 110, 64), ("resnet8x4", 8, 256)]
)
def test_small_resnets_come_in_any_depth_and_width(name, depth, channels):
    model = build_model(name, sample_shape=(3, 32, 32), num_classes=10)
    assert sum(isinstance(layer, nn.Conv2d | nn.Linear) for layer in model.modules()) == depth
    assert model.fc.in_features == channels


@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_hidden_layers_come_in_any_width(name):
    plain, wide = (
        max(p.shape[0] for p in build_model(n, sample_shape=(1, 28, 28), num_classes=10).parameters())
        for n in (name, f"{name}x2")
    )
    assert wide == 2 * plain


@pytest.mark.parametrize("norm", ["after", "before"])
@pytest.mark.parametrize(
    ("name", "depths", "convs_per_block", "downsample_first"),
    [("resnet18", (2, 2, 2, 2), 2, False), ("resnet50", (3, 4, 6, 3), 3, True)],
)
def test_parameters_are_named_as_in_torchvision(name, depths, convs_per_block, downsample_first, norm):
    model = build_model(name, sample_shape=(3, 64, 64), num_classes=1000, norm=norm)
    expected = torchvision_resnet_keys(depths, convs_per_block, downsample_first=downsample_first)
    assert {key for key, _ in model.named_parameters()} == expected


def test_bottleneck_strides_on_its_3x3_convolution():
    block = build_model("resnet50", sample_shape=(3, 64, 64), num_classes=2).layer2[0]
    assert (block.conv1.stride, block.conv2.stride, block.downsample[0].stride) == ((1, 1), (2, 2), (2, 2))


@pytest.mark.parametrize("name", RESNETS)
def test_norm_says_whether_batchnorm_feeds_on_relus_or_on_convolutions(name):
    for norm, feeds_batchnorm in [("after", F.relu), ("before", nn.Conv2d)]:
        model = build_model(name, sample_shape=(3, 32, 32), num_classes=2, norm=norm)
        parents = [inputs for kind, inputs in operations(model) if kind is nn.BatchNorm2d]
        num_linear_shortcuts = sum(module.endswith("downsample.1") for module, _ in model.named_modules())
        expected = len(parents) if norm == "before" else len(parents) - num_linear_shortcuts
        assert parents.count([feeds_batchnorm]) == expected


@pytest.mark.parametrize("name", RESNETS)
def test_after_leaves_every_residual_sum_linear(name):
    model = build_model(name, sample_shape=(3, 32, 32), num_classes=2, norm="after")
    relu_inputs = [inputs for kind, inputs in operations(model) if kind is F.relu]
    assert relu_inputs
    assert all(inputs == [nn.Conv2d] for inputs in relu_inputs)


@pytest.mark.parametrize("name", ["mlp", "lenet"])
def test_trace_shows_a_relu_behind_each_hidden_layer(name):
    kinds = [kind for kind, _ in operations(build_model(name, sample_shape=(1, 28, 28), num_classes=3))]
    layers = [index for index, kind in enumerate(kinds) if kind in (nn.Linear, nn.Conv2d)]
    assert [kinds[index + 1] for index in layers] == [nn.ReLU] * (len(layers) - 1) + ["output"]


def test_basic_block_before_is_the_textbook_block():
    torch.manual_seed(0)
    block = build_model("resnet18", sample_shape=(3, 32, 32), num_classes=2, norm="before").layer1[0].eval()
    x = torch.randn(2, 64, 5, 5)
    branch = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    torch.testing.assert_close(block(x), F.relu(branch + x))


def test_shortcut_without_weights_keeps_every_second_pixel_and_appends_zeros():
    x = torch.randn(2, 4, 5, 7)
    shortcut = SubsampleAndPad(4, 7, stride=2)(x)
    torch.testing.assert_close(shortcut[:, :4], x[:, :, ::2, ::2])
    assert shortcut.shape == (2, 7, 3, 4)
    assert not shortcut[:, 4:].any()


def test_convolutions_start_with_variance_two_over_fan_out():
    torch.manual_seed(0)
    weight = build_model("resnet18", sample_shape=(3, 32, 32), num_classes=2).layer4[1].conv2.weight
    assert weight.var().item() == pytest.approx(2 / (512 * 9), rel=0.01)


@pytest.mark.parametrize("name", SEE_IMAGES)
def test_the_seed_decides_the_initial_weights(name):
    def first_weight(seed):
        torch.manual_seed(seed)
        return next(build_model(name, sample_shape=(1, 16, 16), num_classes=2).parameters())

    assert torch.equal(first_weight(0), first_weight(0))
    assert not torch.equal(first_weight(0), first_weight(1))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet9", {}, "'resnet9' is unknown; did you mean resnet"),
        ("resnet12", {}, "'resnet12' is unknown"),
        ("resnet2", {}, "'resnet2' is unknown"),
        ("resnet50x2", {}, "'resnet50x2' is unknown"),
        ("resnet1208", {}, "'resnet1208' is too deep: resnetD goes up to resnet1202"),
        ("resnet99999998x4", {}, "too deep"),
        ("lenetx2", {}, "'lenetx2' is unknown"),
        ("mlp3", {}, "'mlp3' is unknown"),
        ("perceiver", {}, "'perceiver' is unknown; there are: mlp, lenet"),
        ("lenet", {"sample_shape": (1, 8, 8)}, "lenet: images of 8x8 are too small, it needs at least 16x16"),
        ("lenet", {"sample_shape": (28, 28)}, "sample_shape must be"),
        ("mlp", {"sample_shape": (0, 28, 28)}, "sample_shape must be"),
        ("mlp", {"num_classes": 0}, "num_classes must be at least 1"),
        ("resnet8", {"norm": "none"}, "norm must be one of after, before, scaling; got 'none'"),
    ],
)
def test_bad_input_is_refused_in_one_line(name, arguments, message):
    arguments = {"sample_shape": (1, 28, 28), "num_classes": 10} | arguments
    with pytest.raises(ValueError, match=message) as caught:
        build_model(name, **arguments)
    assert "\n" not in str(caught.value)


def test_lenet_takes_the_smallest_image_it_says_it_takes():
    assert build_model("lenet", sample_shape=(1, 16, 16), num_classes=2)(torch.zeros(1, 1, 16, 16)).shape == (
        1,
        2,
    )


def test_mlp_needs_an_input_and_an_output():
    with pytest.raises(ValueError, match="at least two numbers"):
        MLP([10])
