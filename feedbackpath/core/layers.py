"""What is known of a layer beyond its forward pass: its weights, their fans, and how a mirror sees them.

The generic form (``feedbackpath.core.exchange``) runs any module. What it cannot tell is which dimension of a
weight counts inputs. That is written down here for torch's layers, and by ``feedbackpath.kinds`` for others.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from feedbackpath.core.operations import is_matrix
from feedbackpath.core.usage import is_only_added
from feedbackpath.errors import RuleError

Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TransposedConvolution = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
Recurrent = (nn.RNNBase, nn.RNNCellBase)


@dataclass(frozen=True)
class LayerKind:
    """What is known of one kind of layer.

    Attributes:
        weights: Returns a layer's forward weights with the names of their feedback weights.
        fan_in: Returns the inputs of one output neuron, given the layer and W.
        fan_out: Returns the outputs of one input neuron.
        as_matrix: Views a tensor laid out as W as ``[groups, neurons, inputs]``, given the layer and the
            tensor: a mirror works on that. None: mirror mode leaves this kind of layer alone.
        is_one_product: Whether torch's own forward pass is one product of an input and the weight.
        short: Runs torch's own forward pass unwatched, given the layer, args and kwargs; may return None.
    """

    weights: Callable[[nn.Module], dict[str, str]]
    fan_in: Callable[[nn.Module, Tensor], int]
    fan_out: Callable[[nn.Module, Tensor], int]
    as_matrix: Callable[[nn.Module, Tensor], Tensor] | None = None
    is_one_product: bool = False
    short: Callable[[Any, Any, Any], Any] | None = None


@dataclass(frozen=True)
class UntiedWeight:
    """One forward weight and its feedback weight, wherever in the model they live.

    Attributes:
        name: The layer's path in the model, such as ``"layer1.0.conv1"``; where a layer has several weights
            that are untied, followed by the name of the weight.
        layer: The layer that holds both.
        weight_name: Name of the forward weight on the layer.
        feedback_name: Name of the feedback weight on the layer.
    """

    name: str
    layer: Any
    weight_name: str
    feedback_name: str

    @property
    def weight(self) -> nn.Parameter:
        """The forward weight W."""
        return cast(nn.Parameter, getattr(self.layer, self.weight_name))

    @property
    def feedback(self) -> nn.Parameter:
        """The feedback weight B; W itself under backprop. Rules that send errors locally lay it out as W."""
        own = cast(nn.Parameter | None, getattr(self.layer, self.feedback_name, None))
        if own is None and not self.is_tied:
            raise RuleError(
                f"the feedback weight of {self.name!r} is made when the model first runs: run it once"
            )
        return self.weight if own is None else own

    @property
    def has_feedback(self) -> bool:
        """Whether there is a B of its own by now."""
        return getattr(self.layer, self.feedback_name, None) is not None

    @property
    def is_tied(self) -> bool:
        """Whether B is W itself (backprop)."""
        return bool(self.layer.__dict__["untied"].is_tied)

    @property
    def kind(self) -> LayerKind:
        """What is known of the layer."""
        return kind_of(self.layer)

    @property
    def transposed(self) -> bool:
        """Whether the layer is a transposed convolution, whose W counts inputs first."""
        return isinstance(self.layer, TransposedConvolution)

    @property
    def fan_in(self) -> int:
        """Inputs of one output neuron: for a convolution, the values in its receptive field."""
        return self.kind.fan_in(self.layer, self.weight)

    @property
    def fan_out(self) -> int:
        """Outputs of one input neuron: feedback signals that arrive there through B."""
        return self.kind.fan_out(self.layer, self.weight)


def list_weights(name: str, layer: nn.Module) -> list[UntiedWeight]:
    """List a layer's weights; where there are several, each is named ``layer.weight_name``."""
    names = kind_of(layer).weights(layer)
    return [
        UntiedWeight(name if len(names) == 1 else f"{name}.{weight}".lstrip("."), layer, weight, feedback)
        for weight, feedback in names.items()
    ]


def feedback_name_of(weight_name: str) -> str:
    """Return the name of a feedback weight: ``feedback`` for ``weight``, else ``<name>_feedback``.

    Example:
        >>> feedback_name_of("weight"), feedback_name_of("weight_hh_l0")
        ('feedback', 'weight_hh_l0_feedback')
    """
    return "feedback" if weight_name == "weight" else f"{weight_name}_feedback"


def kind_of(layer: nn.Module) -> LayerKind:
    """Return what a layer's class, or its nearest base, was registered with, if its W is a parameter."""
    kind = next((KINDS[base] for base in type(layer).__mro__ if base in KINDS), UNKNOWN)
    is_made = kind is not UNKNOWN and any(name not in layer._parameters for name in kind.weights(layer))
    return UNKNOWN if is_made else kind


def is_torchs_own(layer_type: type[nn.Module]) -> bool:
    """Whether a class is a layer of torch's, or a subclass that computes nothing in another way."""
    base = next((base for base in layer_type.__mro__ if base in KINDS), None)
    if base is None:
        return False
    told = ("__init__", "__module__", "__doc__", "extra_repr", "reset_parameters")
    own = [kind.__dict__ for kind in layer_type.__mro__[: layer_type.__mro__.index(base)]]
    return not any(callable(value) and name not in told for names in own for name, value in names.items())


def own_matrices(layer: nn.Module) -> dict[str, str]:
    """Name every matrix among a layer's own parameters that may multiply a signal."""
    own = layer.named_parameters(recurse=False)
    is_feedback = {feedback_name_of(name) for name, _ in layer.named_parameters(recurse=False)}
    matrices = [name for name, p in own if is_matrix(p) and name not in is_feedback]
    return {name: feedback_name_of(name) for name in matrices if not is_only_added(layer, name)}


def _only_weight(layer: nn.Module) -> dict[str, str]:
    return {"weight": "feedback"}


def _projections(layer: nn.Module) -> dict[str, str]:
    """Name the projections of ``nn.MultiheadAttention``; ``out_proj`` is a layer of its own."""
    if getattr(layer, "in_proj_weight", None) is not None:
        return {"in_proj_weight": "feedback"}
    return {f"{part}_proj_weight": f"{part}_feedback" for part in "qkv"}


def _recurrent_weights(layer: nn.Module) -> dict[str, str]:
    own = [name for name, _ in layer.named_parameters(recurse=False)]
    left = ("_feedback", "_g")  # the latter: the gains of the older weight_norm, one for each neuron
    return {n: feedback_name_of(n) for n in own if n.startswith("weight_") and not n.endswith(left)}


def _groups(layer: nn.Module) -> int:
    return cast(int, getattr(layer, "groups", 1))


def _as_dense(layer: nn.Module, tensor: Tensor) -> Tensor:
    """View ``[out, in, ...]`` as ``[1, neurons, inputs]``."""
    return tensor.reshape(1, tensor.shape[0], -1)


def _as_convolution(layer: nn.Module, tensor: Tensor) -> Tensor:
    """View ``[C_out, C_in / groups, ...]`` as ``[groups, neurons, inputs]``.

    Inputs are in the order of memory, so that no copy is made of a dense tensor, channels last or not.
    """
    if is_channels_last(tensor):
        tensor = with_channels_last(tensor)
    return tensor.reshape(_groups(layer), tensor.shape[0] // _groups(layer), -1)


def _as_transposed_convolution(layer: nn.Module, tensor: Tensor) -> Tensor:
    """View it from one input position: each output position is a neuron of its own."""
    return tensor.reshape(_groups(layer), tensor.shape[0] // _groups(layer), -1).mT


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a tensor ``[N, C, ...]`` is dense with C as the innermost dimension of memory."""
    return not tensor.is_contiguous() and with_channels_last(tensor).is_contiguous()


def with_channels_last(tensor: Tensor) -> Tensor:
    """View ``[N, C, ...]`` as ``[N, ..., C]``."""
    return tensor.permute(0, *range(2, tensor.dim()), 1)


def _kernel(w: Tensor) -> int:
    return math.prod(w.shape[2:])


UNKNOWN = LayerKind(own_matrices, lambda _, w: w[0].numel(), lambda _, w: w.numel() // max(1, w.shape[1]))
_DENSE = LayerKind(
    _only_weight, lambda _, w: w[0].numel(), lambda _, w: w.shape[0], _as_dense, is_one_product=True
)
_CONVOLUTION = LayerKind(
    _only_weight,
    lambda _, w: w[0].numel(),
    lambda layer, w: w.shape[0] // _groups(layer) * _kernel(w),
    _as_convolution,
    is_one_product=True,
)
_TRANSPOSED = LayerKind(
    _only_weight,
    lambda layer, w: w.shape[0] // _groups(layer) * _kernel(w),
    lambda _, w: w[0].numel(),
    _as_transposed_convolution,
    is_one_product=True,
)
_RECURRENT = LayerKind(_recurrent_weights, UNKNOWN.fan_in, UNKNOWN.fan_out, _as_dense)
# They own weights, but no error goes back through a matrix of theirs. Norms scale each neuron by its own
# number (declared in the docs); embeddings are looked up, and have no input to send an error to.
_NO_FEEDBACK = LayerKind(lambda layer: {}, UNKNOWN.fan_in, UNKNOWN.fan_out)

KINDS: dict[type[Any], LayerKind] = {
    nn.Linear: _DENSE,
    nn.Bilinear: LayerKind(_only_weight, UNKNOWN.fan_in, lambda _, w: w.shape[0]),
    nn.MultiheadAttention: LayerKind(_projections, _DENSE.fan_in, _DENSE.fan_out, _as_dense),
    **dict.fromkeys(Convolution, _CONVOLUTION),
    **dict.fromkeys(TransposedConvolution, _TRANSPOSED),
    **dict.fromkeys(Recurrent, _RECURRENT),
    **dict.fromkeys(
        (
            nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d,
            nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm,
            nn.Embedding, nn.EmbeddingBag, nn.PReLU,
        ),
        _NO_FEEDBACK,
    ),
}  # fmt: skip
