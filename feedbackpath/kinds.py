"""What is known of the library's own layers, told as a user tells it of theirs; and attention's short way."""

import dataclasses
from typing import cast

from torch import Tensor, nn

from feedbackpath.attention import attend
from feedbackpath.core.layers import KINDS, register_layer
from feedbackpath.layers import LocallyConnected2d


def _as_groups(layer: nn.Module, w: Tensor) -> Tensor:
    return cast(LocallyConnected2d, layer).as_groups(w)


def _fan_out(layer: nn.Module, w: Tensor) -> int:
    """Return how many neurons an input reaches, as of a convolution: those whose parts of the map hold it."""
    return w.shape[2] // cast(LocallyConnected2d, layer).groups * w[0, 0, 0, 0].numel()


register_layer(
    LocallyConnected2d,
    weights=["weight"],
    fan_in=lambda layer, w: w[0, 0, 0].numel(),
    fan_out=_fan_out,
    as_matrix=_as_groups,
)
KINDS[nn.MultiheadAttention] = dataclasses.replace(KINDS[nn.MultiheadAttention], short=attend)
