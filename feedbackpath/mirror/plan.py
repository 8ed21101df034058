"""A plan of mirror mode: what each layer will fire, how near its B will come, and what that costs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from feedbackpath.core.layers import UntiedWeight
from feedbackpath.mirror import fields
from feedbackpath.mirror.context import MirrorContext
from feedbackpath.mirror.cost import Dues, dues_of, mirror_flops, step_flops
from feedbackpath.mirror.estimate import count_devices
from feedbackpath.mirror.fields import Field
from feedbackpath.mirror.noise import spread_of
from feedbackpath.mirror.schedule import Turns
from feedbackpath.mirror.settings import Mirror, passes_to_fill
from feedbackpath.mirror.shortcut import can_read_out
from feedbackpath.mirror.wishart import can_draw


@dataclass(frozen=True)
class LayerPlan:
    """What mirror mode will do with one layer.

    Attributes:
        name: The layer's path.
        inputs: n, the inputs that drive one of its neurons in mirror mode.
        samples: Examples of noise a pass, on each device.
        positions: Answers of a channel to each of them.
        angle_deg: Angle that noise leaves between B and W after enough passes; 0 with codes, whose only
            error is the change of W since.
        flops: What the simulation computes a pass, as Appendix B counts: two for each product that is added
            up.
        share: Those FLOPs over a training step's of the whole network.
        steps_between: Training steps from one mirroring to the next, on average.
        dues: What a brain or a chip pays for a pass.
    """

    name: str
    inputs: int
    samples: int
    positions: int
    angle_deg: float
    flops: float
    share: float
    steps_between: float
    dues: Dues


def examples_of(field: Field, settings: Mirror, seen: tuple[int, ...] | None) -> int:
    """Return how many examples a pass through one layer fires, on each device.

    Args:
        field: What is fired at the layer's weight.
        settings: How.
        seen: Shape of what training's minibatch brings the layer, of all devices; None: not known.
    """
    if settings.fires_codes:
        return settings.examples_for(math.prod(field.code_shape) // field.groups)
    inputs, examples = fields.inputs_of(field.weight), None if seen is None else seen[0]
    return settings.examples_for(inputs, field.positions, examples, count_devices(settings))


def memory_of(context: MirrorContext, weight: UntiedWeight, settings: Mirror) -> int:
    """Return how many passes fill a B's memory."""
    seen = context.shape_to_fire(weight)
    field = context.field(weight, settings, seen)
    samples = examples_of(field, settings, seen) * count_devices(settings) * field.positions
    return passes_to_fill(settings.share_for(fields.inputs_of(weight), samples))


def passes_to(context: MirrorContext, weight: UntiedWeight, settings: Mirror, angle_deg: float) -> int:
    """Return how many passes, averaged alike, are predicted to bring a B to less than an angle of its W."""
    seen = context.shape_to_fire(weight)
    field = context.field(weight, settings, seen)
    samples = examples_of(field, settings, seen) * count_devices(settings) * field.positions
    spread = spread_of(context.activations[weight.name], settings.deviation, settings.pairs)
    variance = settings.relative_variance(fields.inputs_of(weight), samples, spread)
    return math.floor(variance / math.tan(math.radians(angle_deg)) ** 2) + 1


def plan_turns(context: MirrorContext, weights: Sequence[UntiedWeight], settings: Mirror) -> Turns:
    """Work out what the turns of one rule's layers depend on: sizes, uses and settings alone."""
    share, budget = settings.when.cost_share, None
    if share is not None and context.uses:  # else it is not known what a step costs
        budget = share * sum(step_flops(weight, context.uses.get(weight.name, 0.0)) for weight in weights)
    flops = [_flops(context, weight, settings) for weight in weights]
    return Turns([weight.name for weight in weights], settings.when, flops, budget)


def make_plan(
    context: MirrorContext, weights: Sequence[UntiedWeight], settings: Mirror, step: float
) -> list[LayerPlan]:
    """Plan mirror mode from the layers' sizes and activations; no value of W is looked at.

    Args:
        context: What is known of the path: activations, and a step's uses and shapes.
        weights: The weights to mirror.
        settings: How to mirror.
        step: FLOPs of a training step of the whole network.
    """
    turns = plan_turns(context, weights, settings)
    plans = []
    for weight, flops in zip(weights, turns.flops, strict=True):
        seen = context.shape_seen(weight)
        field, inputs = context.field(weight, settings, seen), fields.inputs_of(weight)
        examples = examples_of(field, settings, seen)
        spread = spread_of(context.activations[weight.name], settings.deviation, settings.pairs)
        samples = examples * count_devices(settings) * field.positions
        plans.append(
            LayerPlan(
                weight.name,
                inputs,
                examples,
                field.answers,
                settings.expected_angle_deg(inputs, samples, spread),
                flops,
                flops / step if step else float("nan"),
                turns.steps_between,
                dues_of(field, examples),
            )
        )
    return plans


def _flops(context: MirrorContext, weight: UntiedWeight, settings: Mirror) -> float:
    name = weight.name
    if can_read_out(weight, context.activations[name], context.odd_slopes[name], settings):
        return mirror_flops(weight, 1.0)
    seen = context.shape_seen(weight)
    field = context.field(weight, settings, seen)
    examples = examples_of(field, settings, seen)
    if can_draw(field, context.activations[name], settings, examples):
        return mirror_flops(weight, 2.0 * field.shape[-1] * count_devices(settings))
    examples *= count_devices(settings)
    positions = math.prod(field.shape[1:]) if weight.transposed else field.answers
    return mirror_flops(weight, float(examples * positions))
