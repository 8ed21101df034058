"""How a kind of layer that is not torch's is described; the library's own kinds; attention's short way."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import cast

from torch import Tensor, nn

from feedbackpath.arguments import checked
from feedbackpath.attention import attend
from feedbackpath.core.layers import KINDS, LayerKind, feedback_name_of, own_matrices
from feedbackpath.errors import UntieError
from feedbackpath.layers import LocallyConnected2d


@checked(UntieError)
def register_layer(
    layer_type: type[nn.Module],
    *,
    weights: Mapping[str, str] | Sequence[str] | None = None,
    fan_in: Callable[[nn.Module, Tensor], int] | None = None,
    fan_out: Callable[[nn.Module, Tensor], int] | None = None,
    as_matrix: Callable[[nn.Module, Tensor], Tensor] | None = None,
) -> None:
    """Describe your own kind of layer; most layers need no description.

    Args:
        layer_type: The class. It holds for subclasses that are not registered themselves.
        weights: Names of the parameters that get a feedback weight, or a mapping of these to the names of
            their feedback weights; by default all parameters with two dimensions larger than 1. An empty list
            leaves the layer to backprop.
        fan_in: Returns the inputs of one output neuron, given the layer and W; by default W is ``[out, in,
            ...]``, as in torch.
        fan_out: Returns the outputs of one input neuron.
        as_matrix: Views a tensor laid out as W as ``[groups, neurons, inputs]``, so that mirror mode can run
            the layer; without it, mirror mode does not run the layer, and warns. ``fan_in`` and ``fan_out``
            follow from it where they are not given and there is one group.

    Raises:
        UntieError: The class is no module.

    Example:
        >>> from feedbackpath.core.layers import kind_of
        >>> class InputFirst(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.kernel = nn.Parameter(torch.randn(30, 20))
        ...     def forward(self, x):
        ...         return x @ self.kernel
        >>> register_layer(InputFirst, as_matrix=lambda layer, w: w.t()[None])
        >>> kind_of(InputFirst()).fan_in(InputFirst(), InputFirst().kernel)
        30
    """
    names = _names_of(weights)
    seen = as_matrix or (lambda layer, w: w.reshape(1, w.shape[0], -1))
    KINDS[layer_type] = LayerKind(
        names,
        fan_in or (lambda layer, w: seen(layer, w).shape[2]),
        fan_out or (lambda layer, w: seen(layer, w).shape[1]),
        as_matrix,
    )


def _names_of(weights: Mapping[str, str] | Sequence[str] | None) -> Callable[[nn.Module], dict[str, str]]:
    if weights is None:
        return own_matrices
    chosen = dict(weights) if isinstance(weights, Mapping) else {n: feedback_name_of(n) for n in weights}
    return lambda layer: chosen


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
