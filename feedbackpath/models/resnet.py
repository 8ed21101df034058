"""Residual networks for ImageNet and for small images, with BatchNorm before or after the ReLU.

`ResNet` has torchvision's parameter names. `CifarResNet` is that of He et al. for images of about 32x32.

``norm="before"`` is the usual block (He et al. 2016: conv → BatchNorm → ReLU) with the stride of a bottleneck
on its 3x3 convolution ("V1.5"), so torchvision's ResNet weights load with ``strict=True`` and mean the same.

``norm="after"`` is the variant that Akrout et al. (2019, Section 6 and Appendix D.3) trained: "signals were
normalized by BatchNorm after the ReLU nonlinearity, rather than before". They say no more. Assumed here:

- every convolution of the residual branch, the last one too, is conv → ReLU → BatchNorm;
- neither ReLU nor BatchNorm follows the sum of branch and shortcut;
- a shortcut that must change shape stays conv → BatchNorm, since it is meant to be linear;
- the stem is conv → ReLU → BatchNorm → max pooling.

Parameters have the same names and shapes in both orders.

``norm="scaling"`` has synaptic scaling where ``"after"`` has BatchNorm, and convolutions with biases: the
thresholds of neurons. That, local connections and rectified tanh are for `CifarResNet`.

References:
    He et al. 2016, Deep residual learning for image recognition, https://arxiv.org/abs/1512.03385
    Akrout et al. 2019, Deep learning without weight transport, https://arxiv.org/abs/1904.05391
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from feedbackpath.layers import LocallyConnected2d
from feedbackpath.models.parts import Norm, Parts, Size, shrunk

_NO_SIZE = 0, 0  # of maps, where no part needs it
_MakeShortcut = Callable[[int, int, int], nn.Module]  # from the channels in, the channels out and the stride


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    Args:
        in_channels: Channels of the input.
        channels: Channels of both convolutions, and of the output.
        stride: Stride of the first convolution.
        parts: What it is put together from.
        size: Of the input's map.
        downsample: What gives the shortcut the branch's shape; None for the identity.
    """

    expansion: ClassVar[int] = 1

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        parts: Parts,
        size: Size,
        downsample: nn.Module | None,
    ) -> None:
        super().__init__()
        out = shrunk(size, 3, stride=stride, padding=1)
        self.conv1 = _conv(in_channels, channels, kernel_size=3, stride=stride, parts=parts, size=size)
        self.bn1 = parts.normalise(channels, out)
        self.conv2 = _conv(channels, channels, kernel_size=3, parts=parts, size=out)
        self.bn2 = parts.normalise(channels, out)
        self.downsample = downsample
        self.norm, self.activate = parts.norm, parts.activate

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, in_channels, H, W]`` to ``[N, channels, ceil(H/stride), ceil(W/stride)]``."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = _rectify(self.conv1(x), self.bn1, self.activate, self.norm)
        return _rectify_and_add(self.conv2(x), self.bn2, shortcut, self.activate, self.norm)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut.

    Takes the arguments of `BasicBlock`; the stride is that of the 3x3, the output has ``4 * channels``.
    """

    expansion: ClassVar[int] = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        parts: Parts,
        size: Size,
        downsample: nn.Module | None,
    ) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, channels, kernel_size=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, kernel_size=3, stride=stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = _conv(channels, self.expansion * channels, kernel_size=1)
        self.bn3 = nn.BatchNorm2d(self.expansion * channels)
        self.downsample = downsample
        self.norm, self.activate = parts.norm, parts.activate

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, in_channels, H, W]`` to ``[N, 4 * channels, ceil(H/stride), ceil(W/stride)]``."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = _rectify(self.conv1(x), self.bn1, self.activate, self.norm)
        x = _rectify(self.conv2(x), self.bn2, self.activate, self.norm)
        return _rectify_and_add(self.conv3(x), self.bn3, shortcut, self.activate, self.norm)


class ResNet(nn.Module):
    """ImageNet's residual network: a 7x7 stem, four stages of 64 to 512 channels, mean pooling and ``fc``.

    Small images run through the same network, whose last stage sees sides of ceil(H/32) and ceil(W/32).

    Args:
        block: `BasicBlock` (ResNet-18) or `Bottleneck` (ResNet-50).
        depths: Blocks in each of the four stages.
        in_channels: Channels of the images.
        num_classes: Number of outputs.
        norm: Whether BatchNorm comes after or before the ReLU.

    Example:
        >>> import torch
        >>> resnet18 = ResNet(BasicBlock, (2, 2, 2, 2), in_channels=3, num_classes=1000, norm="before")
        >>> sum(p.numel() for p in resnet18.parameters())
        11689512
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        *,
        in_channels: int,
        num_classes: int,
        norm: Norm,
    ) -> None:
        super().__init__()
        parts = Parts(norm)
        self.norm, self.activate = norm, parts.activate
        self.conv1 = _conv(in_channels, 64, kernel_size=7, stride=2)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        out = block.expansion
        self.layer1 = _stage(block, 64, 64, depths[0], 1, parts, _NO_SIZE, _project)
        self.layer2 = _stage(block, 64 * out, 128, depths[1], 2, parts, _NO_SIZE, _project)
        self.layer3 = _stage(block, 128 * out, 256, depths[2], 2, parts, _NO_SIZE, _project)
        self.layer4 = _stage(block, 256 * out, 512, depths[3], 2, parts, _NO_SIZE, _project)
        self.fc = nn.Linear(512 * out, num_classes)
        _initialise_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[N, C, H, W]`` to class scores ``[N, num_classes]``."""
        x = self.maxpool(_rectify(self.conv1(x), self.bn1, self.activate, self.norm))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        scores: Tensor = self.fc(x.mean(dim=(2, 3)))
        return scores


class CifarResNet(nn.Module):
    """A 3x3 stem, stages of blocks with 16, 32 and 64 channels times ``width``, mean pooling and ``fc``.

    Args:
        blocks_per_stage: The n of a depth of 6n+2.
        in_channels: Channels of the images.
        num_classes: Number of outputs.
        norm: Whether BatchNorm comes after or before the ReLU; or "scaling".
        width: How many times as many channels.
        parts: What else it is put together from, in ``norm``'s place.
        image_size: ``(H, W)`` of the images; local connections and scaling need it.

    Example:
        >>> import torch
        >>> resnet20 = CifarResNet(3, in_channels=3, num_classes=10, norm="after")
        >>> sum(p.numel() for p in resnet20.parameters())
        269722
        >>> resnet20(torch.zeros(2, 3, 33, 31)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        blocks_per_stage: int,
        *,
        in_channels: int,
        num_classes: int,
        norm: Norm = "after",
        width: int = 1,
        parts: Parts | None = None,
        image_size: Size = _NO_SIZE,
    ) -> None:
        super().__init__()
        parts = parts or Parts(norm)
        self.norm, self.activate = parts.norm, parts.activate
        first, second, third = 16 * width, 32 * width, 64 * width
        half = shrunk(image_size, 3, stride=2, padding=1)
        self.conv1 = _conv(in_channels, first, kernel_size=3, parts=parts, size=image_size)
        self.bn1 = parts.normalise(first, image_size)
        self.layer1 = _stage(
            BasicBlock, first, first, blocks_per_stage, 1, parts, image_size, SubsampleAndPad
        )
        self.layer2 = _stage(
            BasicBlock, first, second, blocks_per_stage, 2, parts, image_size, SubsampleAndPad
        )
        self.layer3 = _stage(BasicBlock, second, third, blocks_per_stage, 2, parts, half, SubsampleAndPad)
        self.fc = nn.Linear(third, num_classes)
        _initialise_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[N, C, H, W]`` to class scores ``[N, num_classes]``."""
        x = _rectify(self.conv1(x), self.bn1, self.activate, self.norm)
        x = self.layer3(self.layer2(self.layer1(x)))
        scores: Tensor = self.fc(x.mean(dim=(2, 3)))
        return scores


class SubsampleAndPad(nn.Module):
    """The shortcut without weights ("option A"): every so many pixels, and zeros for the new channels."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = out_channels - in_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, in_channels, H, W]`` to ``[N, out_channels, ceil(H/stride), ceil(W/stride)]``."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


def _rectify(x: Tensor, bn: nn.Module, activate: Callable[[Tensor], Tensor], norm: Norm) -> Tensor:
    """Normalise and rectify ``x``, in the order that ``norm`` names."""
    return activate(bn(x)) if norm == "before" else bn(activate(x))


def _initialise_convolutions(model: nn.Module) -> None:
    """Draw convolutions from N(0, 2/fan_out), which keeps the scale of δ on its way back through ReLUs.

    BatchNorm (1 and 0) and linear layers keep PyTorch's own initial values, as in torchvision's ResNets.

    References:
        He et al. 2015, Delving deep into rectifiers, Section 2.2, equation 14, https://arxiv.org/abs/1502.01852
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, LocallyConnected2d):
            module.reset_parameters((2.0 / (module.out_channels * prod(module.kernel_size))) ** 0.5)


def _rectify_and_add(
    x: Tensor, bn: nn.Module, shortcut: Tensor, activate: Callable[[Tensor], Tensor], norm: Norm
) -> Tensor:
    """Close a block: "before" rectifies the sum, "after" only the branch."""
    return activate(bn(x) + shortcut) if norm == "before" else bn(activate(x)) + shortcut


def _conv(
    in_channels: int,
    out_channels: int,
    *,
    kernel_size: int,
    stride: int = 1,
    parts: Parts = Parts(),  # noqa: B008 (frozen)
    size: Size = _NO_SIZE,
) -> nn.Module:
    return parts.convolve(
        in_channels, out_channels, size, kernel_size,
        stride=stride, padding=kernel_size // 2, bias=parts.norm == "scaling",
    )  # fmt: skip


def _stage(
    block: type[BasicBlock] | type[Bottleneck],
    in_channels: int,
    channels: int,
    depth: int,
    stride: int,
    parts: Parts,
    size: Size,
    make_shortcut: _MakeShortcut,
) -> nn.Sequential:
    """Chain ``depth`` blocks, the first of which changes the number of channels and the resolution."""
    out_channels = channels * block.expansion
    is_same = stride == 1 and in_channels == out_channels
    downsample = None if is_same else make_shortcut(in_channels, out_channels, stride)
    blocks = [block(in_channels, channels, stride, parts, size, downsample)]
    size = shrunk(size, 3, stride=stride, padding=1)
    blocks += [block(out_channels, channels, 1, parts, size, None) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)


def _project(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    return nn.Sequential(
        _conv(in_channels, out_channels, kernel_size=1, stride=stride), nn.BatchNorm2d(out_channels)
    )
