"""``untie`` and what it returns: the feedback path of a model."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from feedbackpath.core.assembly import Assembly, assemble
from feedbackpath.core.context import RuleContext
from feedbackpath.core.surgery import survey
from feedbackpath.errors import UnconvertedLayerWarning, UntieError
from feedbackpath.measure.deltas import left_as_it_was
from feedbackpath.measure.measures import Measures
from feedbackpath.rules import Rule
from feedbackpath.rules.checks import (
    hidden_weights,
    name_newcomers,
    plain_layers,
    refuse_changed_flags,
    refuse_sharded,
)
from feedbackpath.rules.choice import choose_rules, find_unserved, refuse_unmatched

if TYPE_CHECKING:
    from feedbackpath.hardware import Chip
    from feedbackpath.mirror import LayerPlan, Mirror

Activations = Mapping[str, Callable[[Tensor], Tensor]]

# Called with a model that is about to be untied, and None; and again with its path when that is made.
WATCHERS: list[Callable[[nn.Module, "FeedbackPath | None"], None]] = []


def untie(
    model: nn.Module,
    rule: str | Rule,
    *,
    overrides: Mapping[str, str | Rule] | None = None,
    strict: bool = False,
    activations: Activations | None = None,
    batchnorm_feedback: Literal["autograd", "sigma"] = "autograd",
    chip: "Chip | None" = None,
    seed: int = 0,
) -> "FeedbackPath":
    """Give a model's layers feedback weights of their own, in place, and a rule that governs them.

    Forward outputs stay bit-identical and parameters keep their identity. Make the optimizer, and wrap in
    DDP or ``torch.compile``, afterwards.

    Args:
        model: Any model. Each parameter with two dimensions larger than 1 gets a feedback weight, but for
            embeddings and norms.
        rule: A rule or its name: ``"bp"``, ``"fa"``, ``"kp"``, ``"mirror-kp"``, ...; all are in ``fp.RULES``.
        overrides: Glob patterns of layer paths to rules, such as ``{"fc": "bp"}``; the last match counts.
        strict: Refuse a model with layers that the rule cannot govern, instead of warning; and one with
            weights that are no matrix among its parameters: buffers, flat parameters, layers in a plain list.
        activations: Glob patterns of layer paths to the activation that follows (mirror mode needs it);
            where not given it is found by tracing the model.
        batchnorm_feedback: What BatchNorm sends back in training: the whole gradient, as autograd does, or
            ``"sigma"``: delta times gamma / sigma, as in the paper's Appendix D.3.
        chip: The arrays that hold W and B; ``chip.attach(optimizer)`` follows. None: no devices.
        seed: Seed of everything random in the feedback path.

    Returns:
        The model's feedback path.

    Raises:
        UntieError: The model cannot be untied, or an override matches no layer. The model is as it was.
        RuleError: A rule does not exist, or mirror mode needs activations that cannot be found.

    Warns:
        UnconvertedLayerWarning: Names the layers that own weights and keep backprop's backward pass.

    Example:
        >>> import feedbackpath as fp
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> path = fp.untie(model, "kp", overrides={"2": "bp"})
        >>> list(path.layers)
        ['0', '2']
    """
    for watcher in WATCHERS:
        watcher(model, None)
    found = survey(model)
    rules = choose_rules(found.convertible, rule, overrides or {})
    refuse_unmatched(activations or {}, "activation pattern", found.convertible)
    unserved = find_unserved(found.convertible, rules)
    if left := found.unconverted | unserved | (hidden_weights(model) if strict else {}):
        named = ", ".join(f"{name!r} ({why})" for name, why in left.items())
        message = f"no untied form exists for {named}: errors still go back through the weights there"
        if strict or len(unserved) == len(rules):
            raise UntieError(f"{message}; replace these layers, or give them another rule by overrides=")
        warnings.warn(message, UnconvertedLayerWarning, stacklevel=2)
    layers = {name: layer for name, layer in found.convertible.items() if name not in unserved}
    context = RuleContext(model, seed, activations)
    parts = assemble(model, layers, rules, context, sigma=batchnorm_feedback == "sigma")
    path = FeedbackPath(model, {name: rules[name] for name in layers}, context, parts)
    if chip is not None:
        chip.hold(path)
    for watcher in WATCHERS:
        watcher(model, path)
    return path


class FeedbackPath(Measures):
    """The feedback path of an untied model: its feedback weights, their rules, and what can be asked of them.

    Attributes:
        model: The untied model.
        rules: Layer paths to rules.
        context: What the rules may know of this path.
        layers: Layer paths to untied layers.
        weights: Every untied weight; one parameter in several layers appears once for each of them.
        groups: The rules and the weights that each governs, each parameter once.
        chip: The arrays that hold W and B; None: ordinary memory.
    """

    def __init__(
        self, model: nn.Module, rules: Mapping[str, Rule], context: RuleContext, parts: Assembly
    ) -> None:
        self.model, self.rules, self.context = model, dict(rules), context
        self.layers, self.weights, self.groups = parts.layers, parts.weights, parts.groups
        self._parts, self._is_retied, self._left_out = parts, False, plain_layers(model)
        self.chip: Chip | None = None

    def step(self) -> None:
        """Do what the rules do after an update, ``optimizer.step()``: mirror, take signs, or nothing.

        Raises:
            RuleError: The optimizer has left out feedback weights that learn, or ``requires_grad`` of one was
                changed, so that it would learn by another rule than its own.
        """
        self._refuse_retied()
        refuse_changed_flags(self.groups)
        self.context.steps += 1
        name_newcomers(self.model, self._left_out, self.context.steps)
        with self._writing(is_step=True):
            for rule, group in self.groups:
                rule.step(group, self.context)

    def _writing(self, *, is_step: bool) -> AbstractContextManager[None]:
        return nullcontext() if self.chip is None else self.chip.writing(is_step=is_step)

    def mirror(
        self,
        steps: int | None = None,
        settings: "Mirror | None" = None,
        *,
        until_angle_deg: float | None = None,
        most_steps: int | None = None,
    ) -> None:
        """Go into mirror mode by hand, at any time: see ``feedbackpath.mirror.by_hand.mirror``."""
        from feedbackpath.mirror import by_hand

        self._refuse_retied()
        groups = by_hand.mirrorable(self.groups)
        with self._writing(is_step=False):
            by_hand.mirror(self.context, groups, steps, settings, until_angle_deg, most_steps)

    def plan(
        self, compute_loss: Callable[[], Tensor], settings: "Mirror | None" = None, *, scale: float = 1.0
    ) -> "list[LayerPlan]":
        """Say what mirror mode will do with each layer: see ``feedbackpath.mirror.by_hand.plan``."""
        from feedbackpath.mirror import by_hand

        self._refuse_retied()
        groups = by_hand.mirrorable(self.groups)
        with left_as_it_was(self.weights, self.model):
            return by_hand.plan(self.context, groups, self.weights, compute_loss, settings, scale=scale)

    @property
    def mirrors(self) -> bool:
        """Whether a rule uses mirror mode, and gains from ``path.mirror()`` before training."""
        return any(getattr(rule, "mirror", None) is not None for rule, _ in self.groups)

    def pairs(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        """Yield (name, forward weight, feedback weight) of every untied weight that has one by now.

        B is laid out as W; where errors are broadcast it is ``[outputs, *input]``, made by the first run.
        """
        self._refuse_retied()
        for weight in self.weights:
            if weight.is_tied or weight.has_feedback:
                yield weight.name, weight.weight, weight.feedback

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip gradients by the norm of the forward ones alone, as in backprop; return it, before clipping.

        All gradients are scaled alike, those of feedback weights that learn among them.
        """
        learned = {id(weight.feedback) for rule, group in self.groups if rule.learns for weight in group}
        with_gradient = [p for p in self.model.parameters() if p.grad is not None]
        forward = [p.grad for p in with_gradient if id(p) not in learned if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(forward, norm_type)
        torch.nn.utils.clip_grads_with_norm_(with_gradient, max_norm, norm)
        return norm

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """See that an optimizer suits the rules; what they raise and warn of is said there."""
        for rule, group in self.groups:
            rule.check_optimizer(group, optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs beyond the model's own state: how far the rules have come."""
        chip = {} if self.chip is None else {"chip": self.chip.state_dict()}
        return self.context.state_dict() | chip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state that ``state_dict`` returned."""
        self.context.load_state_dict(state)
        if self.chip is not None and "chip" in state:
            self.chip.load_state_dict(state["chip"])

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up a copied or loaded path: its context belongs to the model that came with it."""
        self.__dict__.update(state)
        self.context.attach(self.model)

    def retie(self) -> nn.Module:
        """Give back plain torch modules, with the forward weights as they are now; return the model."""
        self._refuse_retied()
        self._is_retied = True
        if self.chip is not None:
            self.chip.release()
        self._parts.undo(self.context)
        return self.model

    def _refuse_retied(self) -> None:
        if self._is_retied:
            raise UntieError("this path has been retied already: untie the model again for a new one")
        refuse_sharded(self.weights)
