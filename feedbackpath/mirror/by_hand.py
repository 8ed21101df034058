"""Mirror mode by hand: what ``path.mirror`` and ``path.plan`` do."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from feedbackpath.core.context import RuleContext
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.errors import RuleError, UntieError
from feedbackpath.mirror.cost import UseCounter, step_flops
from feedbackpath.mirror.following import Following
from feedbackpath.mirror.layouts import view_of
from feedbackpath.mirror.mode import MirrorMode
from feedbackpath.mirror.plan import LayerPlan, make_plan
from feedbackpath.mirror.settings import Mirror, refuse_no_count

MOST_STEPS = 1000
Groups = Sequence[tuple[object, Sequence[UntiedWeight]]]
"""Rules, each with the weights that it governs. A rule that mirrors has its settings in ``mirror``; one that
mirrors once, the angle that it asks for in ``start_angle_deg``."""
Governed = TypeVar("Governed", bound=tuple[Any, Sequence[UntiedWeight]])


def mirrorable(groups: Sequence[Governed]) -> list[Governed]:
    """Return the groups that mirror mode makes sense for.

    Raises:
        UntieError: There is none.
    """
    found = [group for group in groups if group[0].is_mirrorable and group[0].send_back.is_local]
    if not found:
        raise UntieError(
            "nothing to mirror: every B is W itself (bp), computed from it (ss), of another shape (dfa) "
            "or of a form of its own (fa-sparse, ia); choose another rule, such as wm, mirror-kp, fa or kp"
        )
    return found


def mirror(
    context: RuleContext,
    groups: Groups,
    steps: int | None = None,
    settings: Mirror | None = None,
    until_angle_deg: float | None = None,
    most_steps: int | None = None,
) -> None:
    """Run mirror mode: before training, in a pause, at any time.

    If the rule of some layers uses mirror mode, only these are mirrored, unless ``settings`` are given.

    Args:
        context: What a rule may know of the path.
        groups: What may be mirrored.
        steps: Passes through all layers; None: as many as fill B's memory, 5 / d of them where a pass
            replaces the share d of B; or, of a rule that mirrors once, as many as bring B to the angle that
            it asks for.
        settings: How to mirror; None: as the layer's rule does, or by default settings.
        until_angle_deg: Instead of ``steps``: start again, and mirror each layer until the angle of its B to
            W is at most this, in degrees, as estimated from the differences between passes.
        most_steps: Passes after which to give up on that, with a warning that names the layers; None: 1000.

    Raises:
        RuleError: Both ``steps`` and ``until_angle_deg`` are given, or the angle makes no sense, or a number
            of passes is no whole number of at least 1.

    Warns:
        MirrorWarning: Neurons do not answer, or a layer is too wide to reach ``until_angle_deg``, or its
            angle cannot be estimated.
    """
    mode = context.part(MirrorMode)
    if most_steps is not None:
        refuse_no_count("mirror: most_steps", most_steps)
    if steps is not None:
        refuse_no_count("mirror: steps", steps)
    if until_angle_deg is not None and (steps is not None or not 0 < until_angle_deg < 90):
        raise RuleError(
            f"mirror: give steps or until_angle_deg, between 0 and 90 degrees; not {steps} and "
            f"{until_angle_deg}"
        )
    for rule, weights, how in _choose(groups, settings):
        if until_angle_deg is not None:
            mode.run_until(weights, how, until_angle_deg, most_steps or MOST_STEPS)
        elif steps is None and settings is None and getattr(rule, "start_angle_deg", None) is not None:
            mode.begin(weights, how, rule.start_angle_deg)  # type: ignore[attr-defined]
        else:
            mode.run(weights, how, steps)


def plan(
    context: RuleContext,
    groups: Groups,
    weights: Sequence[UntiedWeight],
    compute_loss: Callable[[], Tensor],
    settings: Mirror | None = None,
    *,
    scale: float = 1.0,
) -> list[LayerPlan]:
    """Say what mirror mode will do with each layer: samples, angle, costs, and how often.

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
        >>> plan = path.plan(lambda: model(torch.randn(64, 100)).sum())
        >>> [(layer.name, layer.samples, round(layer.share, 2)) for layer in plan]
        [('0', 64, 0.61), ('2', 64, 0.06)]
    """
    if not 0 < scale < math.inf:
        raise RuleError(f"plan: scale must be above 0 and finite, not {scale}")
    mode = context.part(MirrorMode)
    following = Following(context, weights, is_measured=True)
    with context.measuring(), torch.enable_grad(), UseCounter(weights) as counter, following:
        compute_loss()
    mode.see(following.found())
    counter.share()
    before = mode.uses, mode.shapes
    mode.uses = {name: scale * count for name, count in counter.uses.items()}
    mode.shapes = {
        name: (round(scale * shape[0]), *shape[1:]) for name, shape in counter.shapes.items() if shape
    }
    step = sum(step_flops(weight, mode.uses.get(weight.name, 0.0)) for weight in weights)
    plans = []
    try:
        for _, group, how in _choose(groups, settings):
            mode.find_activations(group)
            plans += make_plan(mode, group, how, step)
    finally:
        mode.uses, mode.shapes = before
    return plans


def _choose(groups: Groups, settings: Mirror | None) -> list[tuple[object, Sequence[UntiedWeight], Mirror]]:
    """Return rules with their groups of weights, and how to mirror these."""
    of_rules = [(rule, weights, getattr(rule, "mirror", None)) for rule, weights in groups]
    mirroring = [(rule, weights, how) for rule, weights, how in of_rules if isinstance(how, Mirror)]
    if settings is not None or not mirroring:
        mirroring = [(rule, weights, settings or Mirror()) for rule, weights, _ in of_rules]
    unable = [repr(weight.name) for _, group, _ in mirroring for weight in group if view_of(weight) is None]
    if unable:
        raise RuleError(
            f"mirror mode cannot run the layers of {', '.join(unable)}: tell it how by "
            "fp.register_layer(..., as_matrix=...), or give them the rule 'bp' by overrides="
        )
    return mirroring
