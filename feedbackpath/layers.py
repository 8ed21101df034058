"""Plain layers of a more brain-like network. They know nothing of rules, and need only torch.

Akrout et al. 2019, Section 6: "More brain-like implementations would have to replace BatchNorm with some
kind of synaptic scaling, ReLU with a bounded function such as rectified tanh, and convolution with
non-weight-sharing local connections."
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RectifiedTanh(nn.Module):
    """The rate of a neuron that is silent below its threshold and saturates: ``max(tanh(z), 0)``.

    Example:
        >>> RectifiedTanh()(torch.tensor([-1.0, 0.0, 100.0]))
        tensor([0., 0., 1.])
    """

    def forward(self, z: Tensor) -> Tensor:
        """Return rates between 0 and 1 of drives of any shape."""
        return F.relu(torch.tanh(z))


class SynapticScaling(nn.Module):
    """Scale each neuron's rate by its own past rates: a norm that needs no other neuron or sample.

    With y the rate that a neuron fires, ``m`` and ``v`` running means of it and of its squared deviation::

        m <- m + r (mean of y - m)
        v <- v + r (mean of (y - m)^2 - v)
        out = g (y - m)        g = 1 / sqrt(v + eps)
        dL/dy = g delta

    Means are over the samples of a step; r is 1 over the number of steps, and later ``rate``. Nothing is
    learned. Errors do not pass through ``m`` and ``g``, because these are slow. A cell that receives the
    neuron's rate, such as one of the feedback path, can keep the same averages, so only the rate has to
    reach it. Put this layer behind the activation, where signals are rates.

    Differs from Turrigiano (2008): presynaptic, where each target scales what it receives, and it takes the
    mean off (Appendix C.2 of Akrout et al. 2019: rates about a baseline that is estimated locally).

    Args:
        shape: Of a layer's neurons, such as ``(C, H, W)`` or ``(features,)``: each has a state of its own.
        rate: r, the share of the averages that a step replaces in the long run.
        eps: Keeps a neuron that hardly fires from being scaled up without end: g is at most 1 / sqrt(eps).

    Raises:
        ValueError: The input is no batch of that shape; ``rate`` or ``eps`` is out of range.

    Example:
        >>> norm = SynapticScaling((3,))
        >>> out = norm(torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]))
        >>> [round(x, 1) for x in out[0].tolist()]
        [-1.0, 0.0, 1.0]
    """

    mean: Tensor
    variance: Tensor
    steps: Tensor

    def __init__(self, shape: tuple[int, ...], *, rate: float = 0.1, eps: float = 1e-2) -> None:
        super().__init__()
        if not (0.0 < rate <= 1.0 and eps > 0.0):
            raise ValueError(
                f"SynapticScaling: rate must be in (0, 1] and eps above 0, not {rate:g} and {eps:g}"
            )
        self.shape, self.rate, self.eps = tuple(shape), rate, eps
        self.register_buffer("mean", torch.zeros(self.shape))
        self.register_buffer("variance", torch.ones(self.shape))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, y: Tensor) -> Tensor:
        """Return ``[N, *shape]`` scaled; in training, take this step into the averages first."""
        if y.shape[1:] != self.shape:
            raise ValueError(
                f"SynapticScaling: expected rates [N, {', '.join(map(str, self.shape))}], not {list(y.shape)}"
            )
        if self.training:
            self._average(y.detach())
        gain = torch.rsqrt(self.variance + self.eps)
        return (y - self.mean) * gain

    @torch.no_grad()
    def _average(self, y: Tensor) -> None:
        self.steps += 1
        share = (1.0 / self.steps).clamp_min(self.rate).to(self.mean.dtype)
        y = y.to(self.mean.dtype)
        self.mean.lerp_(y.mean(0), share)
        self.variance.lerp_((y - self.mean).square().mean(0), share)

    def extra_repr(self) -> str:
        """Return the settings, for ``print``."""
        return f"{self.shape}, rate={self.rate:g}, eps={self.eps:g}"


class LocallyConnected2d(nn.Module):
    """A convolution whose positions have weights of their own: each neuron sees a part of the map.

    For neuron o of group q = (position, group of channels)::

        y[q, o] = sum over i of weight[q, o, i] x[patch of q, i] + bias[o, position]

    Synapses whose input lies in the padding do not exist: their weights are 0, and stay so.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        input_size: ``(H, W)`` of the input's map: the number of weights depends on it.
        kernel_size: Of the part that a neuron sees, ``(height, width)`` or one number for both.
        stride: Steps from one neuron's part to the next one's.
        padding: Zeros around the map.
        groups: Groups of channels that meet only each other.
        bias: Whether each neuron has a bias.

    Attributes:
        weight: ``[H_out, W_out, C_out, C_in / groups, *kernel_size]``, drawn as torch does for convolutions.
        bias: ``[C_out, H_out, W_out]``, or None.

    Raises:
        ValueError: Sizes do not fit together.

    Example:
        >>> layer = LocallyConnected2d(2, 4, input_size=(8, 8), kernel_size=3, stride=2, padding=1)
        >>> layer(torch.zeros(5, 2, 8, 8)).shape, layer.weight.shape
        (torch.Size([5, 4, 4, 4]), torch.Size([4, 4, 4, 2, 3, 3]))
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        input_size: tuple[int, int],
        kernel_size: int | tuple[int, int],
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.input_size = _pair(input_size)
        self.kernel_size, self.stride, self.padding = map(_pair, (kernel_size, stride, padding))
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"LocallyConnected2d: {in_channels} and {out_channels} channels cannot be split into "
                f"{groups} groups"
            )
        walks = zip(self.input_size, self.kernel_size, self.stride, self.padding, strict=True)
        height, width = ((size + 2 * p - k) // s + 1 for size, k, s, p in walks)
        if min(height, width) < 1:
            raise ValueError(
                f"LocallyConnected2d: a kernel of {self.kernel_size} does not fit into a map of "
                f"{self.input_size} with padding {self.padding}"
            )
        self.output_size = height, width
        shape = (height, width, out_channels, in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(out_channels, height, width)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float | None = None) -> None:
        """Draw weights from N(0, std^2), or as torch's convolutions do; those in the padding are 0."""
        bound = 1.0 / math.sqrt(self.weight[0, 0, 0].numel())
        if std is None:
            self.weight.uniform_(-bound, bound)
        else:
            self.weight.normal_(0.0, std)
        exists = self.patches(self.weight.new_ones(1, self.in_channels, *self.input_size))
        self.as_groups(self.weight).mul_(exists.mT)
        if self.bias is not None:
            self.bias.uniform_(-bound, bound)

    def as_groups(self, weight: Tensor) -> Tensor:
        """View what is laid out as the weight as ``[positions * groups, neurons, inputs]``."""
        return weight.reshape(-1, self.out_channels // self.groups, weight[0, 0, 0].numel())

    def patches(self, x: Tensor) -> Tensor:
        """Return what neurons see of ``[N, C, H, W]``, as ``[positions * groups, inputs, N]``.

        Samples stand side by side in memory, so that each position's product is one of plain matrices.
        """
        (down, along), (high, wide) = self.padding, self.output_size
        padded = F.pad(x.permute(1, 2, 3, 0), (0, 0, along, along, down, down)).contiguous()
        seen = [
            padded[:, i :: self.stride[0], j :: self.stride[1]][:, :high, :wide].permute(1, 2, 0, 3)
            for i in range(self.kernel_size[0])
            for j in range(self.kernel_size[1])
        ]
        inputs = self.weight[0, 0, 0].numel()
        return torch.stack(seen, 3).reshape(high * wide * self.groups, inputs, len(x))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, C_in, H, W]`` to ``[N, C_out, H_out, W_out]``."""
        if x.shape[1:] != (self.in_channels, *self.input_size):
            raise ValueError(
                f"LocallyConnected2d: expected [N, {self.in_channels}, {self.input_size[0]}, "
                f"{self.input_size[1]}], not {list(x.shape)}"
            )
        z = torch.bmm(self.as_groups(self.weight), self.patches(x))
        z = z.view(*self.output_size, self.out_channels, len(x)).permute(3, 2, 0, 1)
        return z if self.bias is None else z + self.bias

    def extra_repr(self) -> str:
        """Return the settings, for ``print``."""
        return (
            f"{self.in_channels}, {self.out_channels}, input_size={self.input_size}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"groups={self.groups}, bias={self.bias is not None}"
        )


def _pair(value: Any) -> tuple[int, int]:
    height, width = (value, value) if isinstance(value, int) else value
    return int(height), int(width)
