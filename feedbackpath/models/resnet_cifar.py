"""The small residual networks of He et al. (2016, Section 4.2), 6n+2 layers deep, for images of about 32x32.

The blocks, and what BatchNorm after the ReLU means, are those of `feedbackpath.models.resnet`.

References:
    He et al. 2016, Deep residual learning for image recognition, https://arxiv.org/abs/1512.03385
"""

import torch.nn.functional as F
from torch import Tensor, nn

from feedbackpath.models.resnet import BasicBlock, Norm, initialise_convolutions, rectify


class SubsampleAndPad(nn.Module):
    """The shortcut without weights ("option A"): every second pixel, and zeros for the channels that are new.

    Args:
        new_channels: Number of channels to append.
    """

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.new_channels = new_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, C, H, W]`` to ``[N, C + new_channels, ceil(H/2), ceil(W/2)]``."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.new_channels))


class CifarResNet(nn.Module):
    """A 3x3 stem, stages of blocks with 16, 32 and 64 channels times ``width``, mean pooling and ``fc``.

    Args:
        blocks_per_stage: The n of a depth of 6n+2.
        in_channels: Channels of the images.
        num_classes: Number of outputs.
        norm: Whether BatchNorm comes after or before the ReLU.
        width: How many times as many channels.

    Example:
        >>> import torch
        >>> resnet20 = CifarResNet(3, in_channels=3, num_classes=10, norm="after")
        >>> sum(p.numel() for p in resnet20.parameters())
        269722
        >>> resnet20(torch.zeros(2, 3, 33, 31)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, blocks_per_stage: int, *, in_channels: int, num_classes: int, norm: Norm, width: int = 1
    ) -> None:
        super().__init__()
        self.norm = norm
        first, second, third = 16 * width, 32 * width, 64 * width
        self.conv1 = nn.Conv2d(in_channels, first, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = _stage(first, first, blocks_per_stage, norm)
        self.layer2 = _stage(first, second, blocks_per_stage, norm)
        self.layer3 = _stage(second, third, blocks_per_stage, norm)
        self.fc = nn.Linear(third, num_classes)
        initialise_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[N, C, H, W]`` to class scores ``[N, num_classes]``."""
        x = rectify(self.conv1(x), self.bn1, self.norm)
        x = self.layer3(self.layer2(self.layer1(x)))
        scores: Tensor = self.fc(x.mean(dim=(2, 3)))
        return scores


def _stage(in_channels: int, channels: int, depth: int, norm: Norm) -> nn.Sequential:
    """Chain ``depth`` blocks; where the number of channels grows, the first of them halves the resolution."""
    grows = channels != in_channels
    shortcut = SubsampleAndPad(channels - in_channels) if grows else None
    first = BasicBlock(in_channels, channels, 2 if grows else 1, norm, shortcut)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1, norm, None) for _ in range(depth - 1)))
