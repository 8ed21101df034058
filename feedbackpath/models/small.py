"""Small networks: fully connected, convolutional, and a transformer that reads an image row by row."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from feedbackpath.layers import RectifiedTanh, SynapticScaling
from feedbackpath.models.parts import Parts, shrunk


class MLP(nn.Sequential):
    """Flatten, then fully connected layers ``fc1``, ``fc2``, … with a ReLU between each two.

    Args:
        widths: Numbers of units from the flattened input to the classes, so one more than there are layers.

    Example:
        >>> import torch
        >>> MLP((784, 512, 10))(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, widths: Sequence[int]) -> None:
        if len(widths) < 2:
            raise ValueError(
                f"MLP: widths must name an input and an output, at least two numbers; got {widths}"
            )
        modules: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        for index, (in_features, out_features) in enumerate(pairwise(widths), start=1):
            if index > 1:
                modules[f"relu{index - 1}"] = nn.ReLU()
            modules[f"fc{index}"] = nn.Linear(in_features, out_features)
        super().__init__(modules)


class LeNet(nn.Sequential):
    """Two 5x5 convolutions, each with ReLU and 2x2 max pooling, then 500 hidden units and the classes.

    As in Caffe's MNIST example. Differs from LeCun et al. (1998): wider, ReLU for tanh, max pooling for
    subsampling, no Gaussian output.

    Args:
        sample_shape: Shape of one image, ``(C, H, W)``; H and W at least 16.
        num_classes: Number of outputs.
        parts: What it is put together from; synaptic scaling follows the three activations, BatchNorm never.

    Raises:
        ValueError: If the image is too small for two convolutions and poolings.

    Example:
        >>> import torch
        >>> LeNet((1, 28, 28), num_classes=10)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        sample_shape: tuple[int, int, int],
        num_classes: int,
        *,
        parts: Parts = Parts(),  # noqa: B008 (frozen)
    ) -> None:
        channels, height, width = sample_shape
        if min(height, width) < 16:
            raise ValueError(
                f"lenet: images of {height}x{width} are too small, it needs at least 16x16; "
                "use a larger image size, or model mlp or resnet8"
            )
        modules: OrderedDict[str, nn.Module] = OrderedDict()

        def activate(number: int, *shape: int) -> None:
            modules[f"relu{number}"] = nn.ReLU() if parts.activation == "relu" else RectifiedTanh()
            if parts.norm == "scaling":
                modules[f"norm{number}"] = SynapticScaling(shape)

        size = height, width
        for number, (inputs, outputs) in enumerate(((channels, 20), (20, 50)), start=1):
            modules[f"conv{number}"] = parts.convolve(inputs, outputs, size, kernel_size=5)
            size = shrunk(size, 5)
            activate(number, outputs, *size)
            modules[f"pool{number}"] = nn.MaxPool2d(2)
            size = shrunk(size, 2, stride=2)
        modules["flatten"] = nn.Flatten()
        modules["fc1"] = nn.Linear(50 * size[0] * size[1], 500)
        activate(3, 500)
        modules["fc2"] = nn.Linear(500, num_classes)
        super().__init__(modules)


class RowTransformer(nn.Module):
    """A transformer encoder over the rows of an image, and a linear layer on the mean of its outputs.

    Args:
        sample_shape: ``(C, H, W)``; H rows are read, each a vector of C W values.
        num_classes: Number of outputs.
        width: Features of a row in the encoder.
        num_heads: Attention heads; they share the width.
        num_layers: Encoder layers, norm first.

    Example:
        >>> import torch
        >>> RowTransformer((1, 28, 28), 10)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        sample_shape: tuple[int, int, int],
        num_classes: int,
        *,
        width: int = 128,
        num_heads: int = 4,
        num_layers: int = 2,
    ) -> None:
        super().__init__()
        channels, rows, columns = sample_shape
        self.embed = nn.Linear(channels * columns, width)
        self.position = nn.Embedding(rows, width)
        layer = nn.TransformerEncoderLayer(
            width, num_heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[N, num_classes]`` of images ``[N, C, H, W]``."""
        rows = x.transpose(1, 2).flatten(2)
        encoded: Tensor = self.encoder(self.embed(rows) + self.position.weight)
        return self.head(encoded.mean(1))  # type: ignore[no-any-return]
