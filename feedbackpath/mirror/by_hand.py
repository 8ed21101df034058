"""Mirror mode by hand: what ``path.mirror`` and ``path.plan`` do."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from feedbackpath.core.context import RuleContext
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.errors import RuleError
from feedbackpath.mirror.cost import UseCounter
from feedbackpath.mirror.mode import MirrorMode
from feedbackpath.mirror.plan import LayerPlan, make_plan
from feedbackpath.mirror.settings import Mirror, refuse_no_count

Groups = Sequence[tuple[object, Sequence[UntiedWeight]]]
"""Rules, each with the weights that it governs. A rule that mirrors has its settings in ``mirror``."""


def mirror(
    context: RuleContext,
    groups: Groups,
    steps: int | None = None,
    settings: Mirror | None = None,
    until_angle_deg: float | None = None,
    most_steps: int = 1000,
) -> None:
    """Go into mirror mode: before training, in a pause, at any time.

    Where some layers' rule mirrors by itself, only those are mirrored, unless ``settings`` are given.

    Args:
        context: What a rule may know of the path.
        groups: What may be mirrored.
        steps: Passes through all layers; None: as many as a first mirroring takes.
        settings: How to mirror; None: as the layer's rule does, or by default settings.
        until_angle_deg: Begin anew, and go on with each layer until its B is so near to W, in degrees,
            judged by how much passes differ among themselves; instead of ``steps``.
        most_steps: Passes after which to give up on that, with a warning that names the layers.

    Raises:
        RuleError: Both ``steps`` and ``until_angle_deg`` are given, or the angle makes no sense, or a number
            of passes is no whole number of at least 1.

    Warns:
        MirrorWarning: Neurons do not answer, or a layer is too wide to get to ``until_angle_deg``.
    """
    mode = context.part(MirrorMode)
    refuse_no_count("mirror: most_steps", most_steps)
    if steps is not None:
        refuse_no_count("mirror: steps", steps)
    if until_angle_deg is not None and (steps is not None or not 0 < until_angle_deg < 90):
        raise RuleError(
            f"mirror: give steps or until_angle_deg, between 0 and 90 degrees; not {steps} and "
            f"{until_angle_deg}"
        )
    for weights, how in _choose(groups, settings):
        if until_angle_deg is not None:
            mode.run_until(weights, how, until_angle_deg, most_steps)
        else:
            mode.run(weights, how, how.memory_passes if steps is None else steps)


def plan(
    context: RuleContext,
    groups: Groups,
    weights: Sequence[UntiedWeight],
    compute_loss: Callable[[], Tensor],
    settings: Mirror | None = None,
    *,
    scale: float = 1.0,
) -> list[LayerPlan]:
    """Say what mirror mode will do with each layer: samples, angle, FLOPs, and how often.

    Args:
        context: What a rule may know of the path.
        groups: What may be mirrored.
        weights: All weights of the path: a step's FLOPs are theirs.
        compute_loss: Runs the model forward on a minibatch of training; tells how much a step computes.
        settings: How to mirror; None: as the layer's rule does, or by default settings.
        scale: How many times as many samples a training step has.

    Raises:
        RuleError: The activations of some layers cannot be found, or ``scale`` is not above 0.

    Example:
        >>> import feedbackpath as fp
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))
        >>> path = fp.untie(model, "kp")
        >>> plan = path.plan(lambda: model(torch.randn(64, 100)).sum(), fp.Mirror(noise="gaussian"))
        >>> [(layer.name, layer.samples) for layer in plan]
        [('0', 512), ('2', 512)]
    """
    if not 0 < scale < math.inf:
        raise RuleError(f"plan: scale must be above 0 and finite, not {scale}")
    mode = context.part(MirrorMode)
    with context.measuring(), torch.enable_grad(), UseCounter(weights) as counter:
        compute_loss()
    uses = {name: scale * count for name, count in counter.share().items()}
    plans = []
    for group, how in _choose(groups, settings):
        mode.find_activations(group)
        plans += make_plan(group, how, mode.activations, uses)
    return plans


def _choose(groups: Groups, settings: Mirror | None) -> list[tuple[Sequence[UntiedWeight], Mirror]]:
    """Return groups of weights, and how to mirror them."""
    of_rules = [(weights, getattr(rule, "mirror", None)) for rule, weights in groups]
    mirroring = [(weights, how) for weights, how in of_rules if isinstance(how, Mirror)]
    chosen = mirroring if settings is None and mirroring else [(w, settings or Mirror()) for w, _ in of_rules]
    unable = [repr(weight.name) for group, _ in chosen for weight in group if weight.kind.as_matrix is None]
    if unable:
        raise RuleError(
            f"mirror mode cannot run the layers of {', '.join(unable)}: tell it how by "
            "fp.register_layer(..., as_matrix=...), or give them the rule 'bp' by overrides="
        )
    return chosen
