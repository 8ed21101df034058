"""Assembly: the modules of a model get their feedback weights, and a rule that governs them.

Nothing here knows a rule by name. What it asks of one is in ``feedbackpath.rules.base.Rule``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from feedbackpath.core.batchnorm import SigmaBatchNorm
from feedbackpath.core.context import RuleContext
from feedbackpath.core.layers import UNKNOWN, UntiedWeight, is_torchs_own, kind_of
from feedbackpath.core.modules import FeedbackModule
from feedbackpath.core.products import multiply
from feedbackpath.core.sendback import LOCAL
from feedbackpath.core.surgery import retie_module, retie_norm, send_back_sigma, untie_modules
from feedbackpath.errors import UntieError


@dataclass
class Assembly:
    """The untied parts of a model.

    Attributes:
        layers: Layer paths to untied layers.
        weights: Every untied weight; one parameter in several layers appears once for each of them.
        groups: The rules and the weights that each governs, each parameter once.
        modules: All modules whose class was exchanged.
        norms: The BatchNorm layers that send back sigma alone.
    """

    layers: dict[str, FeedbackModule] = field(default_factory=dict)
    weights: list[UntiedWeight] = field(default_factory=list)
    groups: list[tuple[Any, list[UntiedWeight]]] = field(default_factory=list)
    modules: list[FeedbackModule] = field(default_factory=list)
    norms: list[SigmaBatchNorm] = field(default_factory=list)

    def undo(self, context: RuleContext) -> None:
        """Give back the plain modules."""
        try:
            for rule, group in self.groups:
                rule.detach(group, context)
            context.close()
        finally:
            for module in self.modules:
                retie_module(module)
            for norm in self.norms:
                retie_norm(norm)


def assemble(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    rules: Mapping[str, Any],
    context: RuleContext,
    *,
    sigma: bool,
) -> Assembly:
    """Exchange the modules' classes, make the feedback weights, and let the rules fill them.

    Args:
        model: The model.
        layers: Paths to the layers that get feedback weights.
        rules: The rule of each.
        context: What the rules may know.
        sigma: Whether BatchNorm is to send back its scale alone.

    Raises:
        UntieError: One weight is under two rules. The model is as it was, whatever is raised.
    """
    made = Assembly()
    try:
        names = {id(layer): name for name, layer in layers.items()}
        for module in untie_modules(model, layers):
            made.modules.append(module)
            if id(module) in names:
                made.layers[names[id(module)]] = module
                _govern(module, rules[names[id(module)]], context)
        made.weights = [weight for name in layers for weight in made.layers[name].untied.weights]
        for module in made.modules:
            module.untied.is_watched = _is_watched(module, module is model)
            kind = kind_of(module) if _can_go_short(module) else UNKNOWN
            module.untied.short = multiply if kind.is_one_product else kind.short
        _make_feedback(made)
        for rule, group in made.groups:
            ready = [weight for weight in group if weight.has_feedback]
            if ready:
                rule.start(ready, context)
            rule.attach(group, context)
        made.norms = send_back_sigma(model) if sigma else []
    except BaseException:
        made.undo(context)
        raise
    return made


def _govern(module: FeedbackModule, rule: Any, context: RuleContext) -> None:
    """Let a rule govern a layer."""
    untied = module.untied
    untied.rule, untied.context = rule, context
    untied.send_back, untied.is_tied = rule.send_back, rule.is_tied
    untied.tells_rule = rule.after_backward is not None


def _make_feedback(made: Assembly) -> None:
    """Make the feedback weights, one for each forward parameter, and group weights by rule."""
    governed: dict[int, tuple[Any, nn.Parameter | None]] = {}
    groups: dict[Any, list[UntiedWeight]] = {}
    for weight in made.weights:
        rule, key = weight.layer.untied.rule, id(weight.weight)
        if key not in governed:
            governed[key] = rule, _new_feedback(weight, rule)
            groups.setdefault(rule, []).append(weight)
        known_rule, feedback = governed[key]
        if known_rule != rule:
            raise UntieError(
                f"{weight.name!r} shares its weight with a layer under another rule ({known_rule.name}, "
                f"{rule.name}); give both the same rule"
            )
        weight.layer.register_parameter(weight.feedback_name, feedback)
    made.groups = list(groups.items())


def _is_watched(module: FeedbackModule, is_model: bool) -> bool:
    """Whether a weight may meet activity in a module's own forward pass, or a broadcast begins there."""
    below = [weight.layer.untied for weight in module.untied.below]
    if is_model and any(untied.send_back.is_broadcast for untied in below):
        return True
    if module.untied.weights and not module.untied.is_tied:
        return True
    return not module.untied.is_quiet and any(not untied.is_tied for untied in below)


def _can_go_short(module: FeedbackModule) -> bool:
    """Whether a layer can go the short way: torch's own product, B in W's place, no more to tell its rule."""
    untied = module.untied
    if not (untied.weights and untied.is_watched) or untied.tells_rule or untied.rule.gradients is not None:
        return False
    return untied.send_back == LOCAL and is_torchs_own(module.plain_type)


def _new_feedback(weight: UntiedWeight, rule: Any) -> nn.Parameter | None:
    """Allocate B, with the memory format of W where it has W's shape; None: there is none yet."""
    shape = rule.send_back.feedback_shape(weight)
    if rule.is_tied or shape is None:
        return None
    w = weight.weight
    empty = torch.empty_like(w) if shape == w.shape else w.new_empty(shape)
    return nn.Parameter(empty.detach(), requires_grad=rule.learns and w.requires_grad)
