"""A plan of mirror mode: what each layer will fire, how near its B will come, and what that costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from feedbackpath.core.layers import UntiedWeight
from feedbackpath.mirror import fields
from feedbackpath.mirror.activations import Activation, is_channelwise, odd_slope
from feedbackpath.mirror.cost import code_length, step_flops
from feedbackpath.mirror.designs import RELU_SPREAD, OrthogonalCodes, spread_of
from feedbackpath.mirror.devices import count_devices
from feedbackpath.mirror.schedule import plan_turns
from feedbackpath.mirror.settings import Mirror


@dataclass(frozen=True)
class LayerPlan:
    """What mirror mode will do with one layer.

    Attributes:
        name: The layer's path.
        inputs: n, the inputs that drive one of its neurons in mirror mode.
        samples: N, samples of noise a pass, on each device.
        angle_deg: Angle that noise leaves between B and W when B's memory is full; 0 with codes, whose only
            error is how far W has moved since.
        flops: Of a pass, as Appendix B counts: two for each product that is added up.
        share: Those FLOPs over a training step's of the whole network.
        steps_between: Training steps from one mirroring to the next, on average, that the schedule pays for.
    """

    name: str
    inputs: int
    samples: int
    angle_deg: float
    flops: float
    share: float
    steps_between: float


def make_plan(
    weights: Sequence[UntiedWeight],
    settings: Mirror,
    activations: Mapping[str, Activation],
    uses: Mapping[str, float],
) -> list[LayerPlan]:
    """Plan mirror mode from the layers' sizes and activations; no value of W is looked at.

    Args:
        weights: The weights to mirror.
        settings: How to mirror.
        activations: What follows each layer, by its name.
        uses: How often a training step uses each value of a weight, by name.
    """
    step = sum(step_flops(weight, uses.get(weight.name, 0.0)) for weight in weights)
    slopes = {weight.name: odd_slope(activations[weight.name]) for weight in weights}
    turns = plan_turns(weights, settings, slopes, uses)
    plans = []
    for weight, flops in zip(weights, turns.flops, strict=True):
        inputs = fields.inputs_in_mirror_mode(weight, settings.field)
        spread = _spread(activations[weight.name], settings)
        plans.append(
            LayerPlan(
                weight.name,
                inputs,
                _count_samples(weight, settings, slopes[weight.name], inputs),
                settings.expected_angle_deg(inputs, spread, count_devices(settings)),
                flops,
                flops / step if step else float("nan"),
                turns.steps_between,
            )
        )
    return plans


def _spread(activation: Activation, settings: Mirror) -> float:
    return RELU_SPREAD if is_channelwise(activation) else spread_of(activation, settings.deviation)


def _count_samples(weight: UntiedWeight, settings: Mirror, slope: float | None, inputs: int) -> int:
    """Return the samples of a pass, on each device."""
    if isinstance(settings.design, OrthogonalCodes):
        return settings.design.samples_for(inputs, 0.0, length=code_length(weight, settings, slope))
    return settings.samples_for(inputs, count_devices(settings))
