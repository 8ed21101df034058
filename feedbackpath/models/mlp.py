"""Fully connected networks."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

from torch import nn


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
