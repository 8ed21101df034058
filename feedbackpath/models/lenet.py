"""LeNet with 20 and 50 channels and ReLU, as in Caffe's MNIST example."""

from collections import OrderedDict

from torch import nn


class LeNet(nn.Sequential):
    """Two 5x5 convolutions, each with ReLU and 2x2 max pooling, then 500 hidden units and the classes.

    Differs from LeCun et al. (1998): wider, ReLU for tanh, max pooling for subsampling, no Gaussian output.

    Args:
        sample_shape: Shape of one image, ``(C, H, W)``; H and W at least 16.
        num_classes: Number of outputs.

    Raises:
        ValueError: If the image is too small for two convolutions and poolings.

    Example:
        >>> import torch
        >>> LeNet((1, 28, 28), num_classes=10)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    min_side = 16

    def __init__(self, sample_shape: tuple[int, int, int], num_classes: int) -> None:
        channels, height, width = sample_shape
        if min(height, width) < self.min_side:
            raise ValueError(
                f"lenet: images of {height}x{width} are too small, it needs at least "
                f"{self.min_side}x{self.min_side}; use a larger image size, or model mlp or resnet8"
            )
        pooled_height, pooled_width = (_side_after_convolutions(side) for side in (height, width))
        super().__init__(
            OrderedDict(
                conv1=nn.Conv2d(channels, 20, kernel_size=5),
                relu1=nn.ReLU(),
                pool1=nn.MaxPool2d(2),
                conv2=nn.Conv2d(20, 50, kernel_size=5),
                relu2=nn.ReLU(),
                pool2=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                fc1=nn.Linear(50 * pooled_height * pooled_width, 500),
                relu3=nn.ReLU(),
                fc2=nn.Linear(500, num_classes),
            )
        )


def _side_after_convolutions(side: int) -> int:
    """Return the height or width that is left after both 5x5 convolutions and 2x2 poolings."""
    return ((side - 4) // 2 - 4) // 2
