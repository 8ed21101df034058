"""Plain networks with no learning rule inside, and the table of their names."""

import inspect
import re
from collections.abc import Callable
from difflib import get_close_matches
from math import prod
from typing import get_args

from torch import nn

from feedbackpath.arguments import checked, refuse_name
from feedbackpath.errors import ConfigError
from feedbackpath.models.language import GPT, TextLSTM
from feedbackpath.models.parts import Activation, Connections, Norm, Parts
from feedbackpath.models.resnet import BasicBlock, Bottleneck, CifarResNet, ResNet
from feedbackpath.models.small import MLP, LeNet, RowTransformer

__all__ = [
    "MLP",
    "MODELS",
    "READ_TOKENS",
    "GPT",
    "CifarResNet",
    "LeNet",
    "Norm",
    "Parts",
    "ResNet",
    "RowTransformer",
    "TextLSTM",
    "build_model",
    "register_model",
    "takes_numbers",
    "takes_parts",
]

Builder = Callable[[tuple[int, int, int], int, Parts], nn.Module]
"""Makes a model from the shape ``(C, H, W)`` of a sample, the number of classes and kinds of parts."""


def build_model(
    name: str,
    *,
    sample_shape: tuple[int, int, int],
    num_classes: int,
    norm: Norm = "after",
    activation: Activation = "relu",
    connections: Connections = "shared",
) -> nn.Module:
    """Build the network called ``name`` with fresh weights from PyTorch's random generator.

    Args:
        name: A key of `MODELS`; ``resnetD`` of any depth D = 6n + 2 up to 1202, for small images;
            ``xK`` behind it, or behind ``mlp`` or ``transformer``, makes hidden layers K times as wide.
        sample_shape: Shape of one sample, ``(C, H, W)``.
        num_classes: Number of outputs.
        norm: BatchNorm "after" or "before" the ReLU, no matter in models that have none; or "scaling".
        activation: "relu" or "rectified-tanh".
        connections: "shared" (convolution) or "local". These and "scaling" are for `lenet` and `resnetD`.

    Returns:
        The network, mapping ``[N, C, H, W]`` to ``[N, num_classes]``.

    Raises:
        ValueError: If the name is unknown or the network cannot take such samples.

    Example:
        >>> model = build_model("resnet8", sample_shape=(1, 28, 28), num_classes=10)
        >>> model.layer3[0].conv1
        Conv2d(32, 64, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), bias=False)
        >>> build_model("resnet14x2", sample_shape=(1, 28, 28), num_classes=10).layer3[0].conv1
        Conv2d(64, 128, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), bias=False)
    """
    builder = find_builder(name)
    if name in READ_TOKENS and len(sample_shape) != 1:
        raise ValueError(
            f"model {name} reads tokens: sample_shape must be (context,), got {sample_shape}; "
            "give it text (--data text), or choose a network that reads images"
        )
    takes_images = name not in _USERS and name not in READ_TOKENS and not name.startswith("mlp")
    if min(sample_shape) < 1 or (takes_images and len(sample_shape) != 3):
        raise ValueError(
            f"model {name}: sample_shape must be (channels, height, width), got {sample_shape}; "
            f"of networks here, mlp reads vectors, and {', '.join(sorted(READ_TOKENS))} read tokens"
        )
    if num_classes < 1:
        raise ValueError(f"model {name}: num_classes must be at least 1, got {num_classes}")
    for what, given, known in (
        ("norm", norm, get_args(Norm)),
        ("activation", activation, get_args(Activation)),
        ("connections", connections, get_args(Connections)),
    ):
        if given not in known:
            raise ValueError(f"model {name}: {what} must be one of {', '.join(known)}; got {given!r}")
    parts = Parts(norm, activation, connections)
    if not (parts.is_usual or takes_parts(name) or name in _USERS):
        raise ValueError(
            f"model {name} has no form with synaptic scaling, rectified tanh or local connections; "
            "lenet and resnet8 (resnetD) do"
        )
    return builder(sample_shape, num_classes, parts)


def takes_numbers(name: str) -> bool:
    """Whether a model of ours multiplies its inputs by weights, so that tokens cannot be its inputs.

    Example:
        >>> takes_numbers("mlp"), takes_numbers("gpt")
        (True, False)
    """
    return name not in _USERS and name not in READ_TOKENS


def takes_parts(name: str) -> bool:
    """Whether a model can have synaptic scaling, rectified tanh and local connections.

    Example:
        >>> takes_parts("lenet"), takes_parts("resnet14x2"), takes_parts("resnet18"), takes_parts("mlp")
        (True, True, False, False)
    """
    sized = re.fullmatch(r"resnet(\d+)(?:x\d+)?", name)
    return name == "lenet" or (sized is not None and int(sized[1]) % 6 == 2 and sized[1] != "50")


@checked(ConfigError)
def register_model(name: str, make: Callable[..., nn.Module]) -> None:
    """Give a network of one's own a name, so that ``--model NAME`` finds it.

    Args:
        name: Its name.
        make: Returns it with fresh weights from PyTorch's random generator. It is called with those of
            ``sample_shape``, ``num_classes`` (outputs), ``norm``, ``activation`` and ``connections`` that it
            takes.

    Raises:
        ConfigError: The name is taken.
    """
    refuse_name(name, "a model", ConfigError)
    taken = inspect.signature(make).parameters.keys()

    def build(sample_shape: tuple[int, int, int], num_classes: int, parts: Parts) -> nn.Module:
        known = {"sample_shape": sample_shape, "num_classes": num_classes, **vars(parts)}
        return make(**{option: value for option, value in known.items() if option in taken})

    if name in MODELS:
        raise ConfigError(f"there is a model {name!r} already: choose another name")
    MODELS[name] = build
    _USERS.add(name)


def find_builder(name: str) -> Builder:
    """Return what builds the network called ``name``, of the table or of another depth or width."""
    if name in MODELS:
        return MODELS[name]
    sized = re.fullmatch(r"(mlp|transformer|resnet([1-9]\d*))(?:x([1-9]\d*))?", name)
    depth, width = (int(size or 1) for size in sized.group(2, 3)) if sized else (1, 1)
    if sized and sized[1] in SIZED:
        return SIZED[sized[1]](width)
    if depth % 6 == 2 and depth not in (2, 50):  # resnet50 is ImageNet's, and resnet50x2 would not be
        if depth > DEEPEST:
            raise ValueError(f"model {name!r} is too deep: resnetD goes up to resnet{DEEPEST}")
        return _cifar_resnet((depth - 2) // 6, width)
    close = get_close_matches(name, MODELS, n=1)
    hint = f"did you mean {close[0]}? There are" if close else "there are"
    raise ValueError(
        f"model {name!r} is unknown; {hint}: {', '.join(MODELS)}; resnetD of any depth D = 6n + 2; "
        "and K times as wide, as in resnet20x4, mlpx2, transformerx2"
    )


def _mlp(width: int = 1) -> Builder:
    return lambda sample_shape, num_classes, parts: MLP(
        (prod(sample_shape), 512 * width, 512 * width, num_classes)
    )


def _lenet(sample_shape: tuple[int, int, int], num_classes: int, parts: Parts) -> nn.Module:
    return LeNet(sample_shape, num_classes, parts=parts)


def _transformer(width: int = 1) -> Builder:
    return lambda sample_shape, num_classes, parts: RowTransformer(
        sample_shape, num_classes, width=128 * width, num_heads=4 * width
    )


def _cifar_resnet(blocks_per_stage: int, width: int = 1) -> Builder:
    return lambda sample_shape, num_classes, parts: CifarResNet(
        blocks_per_stage,
        in_channels=sample_shape[0],
        num_classes=num_classes,
        width=width,
        parts=parts,
        image_size=sample_shape[1:],
    )


def _resnet(block: type[BasicBlock] | type[Bottleneck], depths: tuple[int, int, int, int]) -> Builder:
    return lambda sample_shape, num_classes, parts: ResNet(
        block, depths, in_channels=sample_shape[0], num_classes=num_classes, norm=parts.norm
    )


READ_TOKENS = frozenset(["gpt", "gpt-124m", "lstm"])
"""Names of the networks that read tokens, not images."""
_USERS: set[str] = set()  # names of networks that users registered
DEEPEST = 1202  # the deepest network of He et al. (2016)
SIZED: dict[str, Callable[[int], Builder]] = {"mlp": _mlp, "transformer": _transformer}
MODELS: dict[str, Builder] = {
    "mlp": _mlp(),
    "lenet": _lenet,
    "transformer": _transformer(),
    "resnet8": _cifar_resnet(1),
    "resnet20": _cifar_resnet(3),
    "resnet56": _cifar_resnet(9),
    "resnet18": _resnet(BasicBlock, (2, 2, 2, 2)),
    "gpt": lambda sample_shape, num_classes, parts: GPT(sample_shape[0], num_classes),
    "gpt-124m": lambda sample_shape, num_classes, parts: GPT(
        sample_shape[0], num_classes, width=832, num_heads=13, num_layers=15
    ),
    "lstm": lambda sample_shape, num_classes, parts: TextLSTM(num_classes),
    "resnet50": _resnet(Bottleneck, (3, 4, 6, 3)),
}
