"""The sizes of a model's layers, read off the model: what the cost model goes by."""

from typing import Any

from cost_model import LayerSize
from torch import Tensor, nn

from feedbackpath.bench.workloads import Arithmetic, TrainingStep, Workload
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.core.modules import tapped
from feedbackpath.mirror.cost import UseCounter

EXAMPLES = 2  # BatchNorm needs two


def measure_layers(workload: Workload) -> list[LayerSize]:
    """Return the sizes of all layers that ``untie`` converts, by sending a few examples forward.

    Example:
        >>> from feedbackpath.bench.workloads import find_workload
        >>> measure_layers(find_workload("mlp"))[0]
        LayerSize(inputs=784, outputs=512, uses=1.0, kernel=1, sends_back=False, is_conv=False)
    """
    step = TrainingStep(workload, "fa", EXAMPLES, Arithmetic())
    assert step.path is not None
    weights = step.path.weights
    sends_back: dict[str, bool] = {}

    def note(weight: UntiedWeight, x: Tensor, output: Tensor, rows: slice) -> None:
        sends_back[weight.name] = x.requires_grad

    with tapped([weight.layer for weight in weights], note), UseCounter(weights) as counter:
        step.loss()
    return [_size(weight, counter.uses[weight.name], sends_back[weight.name]) for weight in weights]


def count_parameters(workload: Workload) -> int:
    """Return the values of a network's parameters."""
    return sum(parameter.numel() for parameter in workload.build().parameters())


def _size(weight: UntiedWeight, uses: float, sends_back: bool) -> LayerSize:
    layer: Any = weight.layer
    is_conv = isinstance(layer, nn.modules.conv._ConvNd)
    kernel = layer.weight[0, 0].numel() if is_conv else 1
    return LayerSize(
        weight.fan_in, weight.weight.numel() // weight.fan_in, uses / EXAMPLES, kernel, sends_back, is_conv
    )
