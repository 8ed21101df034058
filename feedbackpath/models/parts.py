"""What networks for small images are put together from: as they are usually built, or as a brain might."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from feedbackpath.layers import LocallyConnected2d, RectifiedTanh, SynapticScaling

Norm = Literal["after", "before", "scaling"]
Activation = Literal["relu", "rectified-tanh"]
Connections = Literal["shared", "local"]
Size = tuple[int, int]


@dataclass(frozen=True)
class Parts:
    """Kinds of parts; Section 6 of Akrout et al. 2019 names the last of each for a brain-like network.

    Args:
        norm: BatchNorm "after" or "before" the activation; "scaling": synaptic scaling after it, where every
            neuron has a threshold of its own.
        activation: What follows a layer.
        connections: Weights "shared" over the positions of a map (convolution), or "local": each its own.
    """

    norm: Norm = "after"
    activation: Activation = "relu"
    connections: Connections = "shared"

    @property
    def is_usual(self) -> bool:
        """Whether any network can be built of them."""
        return self.norm != "scaling" and self.activation == "relu" and self.connections == "shared"

    @property
    def activate(self) -> Callable[[Tensor], Tensor]:
        """The activation: torch's function, or a module."""
        return F.relu if self.activation == "relu" else RectifiedTanh()

    def convolve(
        self, in_channels: int, out_channels: int, size: Size, kernel_size: int, *, stride: int = 1,
        padding: int = 0, bias: bool = True,
    ) -> nn.Module:  # fmt: skip
        """Make connections from a map of ``size`` to one of ``shrunk(size, ...)``."""
        if self.connections == "shared":
            return nn.Conv2d(
                in_channels, out_channels, kernel_size, stride=stride, padding=padding, bias=bias
            )
        return LocallyConnected2d(
            in_channels, out_channels, size, kernel_size, stride=stride, padding=padding, bias=bias
        )

    def normalise(self, channels: int, size: Size) -> nn.Module:
        """Make the norm of a map of so many channels."""
        return SynapticScaling((channels, *size)) if self.norm == "scaling" else nn.BatchNorm2d(channels)


def shrunk(size: Size, kernel_size: int, *, stride: int = 1, padding: int = 0) -> Size:
    """Return the size of the map that a kernel leaves of another.

    Example:
        >>> shrunk((28, 28), 5), shrunk((28, 27), 3, stride=2, padding=1)
        ((24, 24), (14, 14))
    """
    height, width = ((side + 2 * padding - kernel_size) // stride + 1 for side in size)
    return height, width
