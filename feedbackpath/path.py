"""``untie`` and what it returns: the feedback path of a model."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

import feedbackpath.kinds  # noqa: F401 (registers the library's own layers)
from feedbackpath.arguments import checked, checked_methods, refusing
from feedbackpath.core.assembly import Assembly, assemble
from feedbackpath.core.context import RuleContext
from feedbackpath.core.surgery import survey
from feedbackpath.errors import RuleError, UntieError
from feedbackpath.measure.deltas import left_as_it_was
from feedbackpath.measure.measures import Measures
from feedbackpath.rules import Rule, choice, clock
from feedbackpath.rules.checks import clip_by_forward_norm, hidden_weights, refuse_changed_flags
from feedbackpath.rules.forgotten import Reminder
from feedbackpath.rules.guard import Guard
from feedbackpath.rules.unfit import refuse_unfit

if TYPE_CHECKING:
    from feedbackpath.hardware import Chip
    from feedbackpath.mirror import LayerPlan, Mirror

Activations = Mapping[str, Callable[[Tensor], Tensor]]

# Called with a model that is about to be untied, and None; and again with its path when that is made.
WATCHERS: list[Callable[[nn.Module, "FeedbackPath | None"], None]] = []


@checked(UntieError, but=("rule",))
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
    """Give a model's layers their own feedback weights, in place, and a rule by which these change.

    Forward outputs stay bit-identical and parameters keep their identity. Make the optimizer, and wrap in
    DDP or ``torch.compile``, afterwards.

    Args:
        model: Any model. Each parameter with two dimensions larger than 1 gets a feedback weight, except
            embeddings and norms.
        rule: A rule or its name: ``"bp"``, ``"fa"``, ``"kp"``, ``"mirror-kp"``, ...; all are in ``fp.RULES``.
        overrides: Glob patterns of layer paths to rules, such as ``{"fc": "bp"}``; the last match counts.
        strict: Raise an error, instead of a warning, if the rule cannot run some layers; also if the model
            has weights that are no matrices among its parameters: buffers, flat parameters, plain lists.
        activations: Glob patterns of layer paths to the activation after the layer (for mirror mode);
            others are found in the first training step, or by tracing the model.
        batchnorm_feedback: What BatchNorm sends back in training: the whole gradient, as autograd does, or
            ``"sigma"``: delta times gamma / sigma, as in the paper's Appendix D.3.
        chip: The arrays that hold W and B; call ``chip.attach(optimizer)`` afterwards. None: no devices.
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
    refuse_unfit(model, batchnorm_feedback)
    found = survey(model)
    rules = choice.choose_rules([*found.convertible, *found.unconverted], rule, overrides or {})
    choice.refuse_unmatched(activations or {}, "activation pattern", found.convertible)
    left = choice.find_left(found, rules)
    choice.name_left(
        left | (hidden_weights(model) if strict else {}),
        is_error=strict or not found.convertible.keys() - left,
    )
    layers = {name: layer for name, layer in found.convertible.items() if name not in left}
    context = RuleContext(model, seed, activations)
    parts = assemble(model, layers, rules, context, sigma=batchnorm_feedback == "sigma")
    choice.note_left(model, [*left, *found.unconverted])
    path = FeedbackPath(model, {name: rules[name] for name in layers}, context, parts)
    if chip is not None:
        chip.hold(path)
    for watcher in WATCHERS:
        watcher(model, path)
    return path


@checked_methods(RuleError)
class FeedbackPath(Measures):
    """The feedback path of an untied model: its feedback weights, their rules, and measurements.

    Attributes:
        model: The untied model.
        rules: Layer paths to rules.
        context: What the rules may know about this path.
        layers: Layer paths to untied layers.
        weights: Every untied weight; one parameter in several layers appears once for each of them.
        groups: The rules, each with its weights; each parameter appears once.
        chip: The arrays that hold W and B; None: ordinary memory.
    """

    def __init__(
        self, model: nn.Module, rules: Mapping[str, Rule], context: RuleContext, parts: Assembly
    ) -> None:
        self.model, self.rules, self.context = model, dict(rules), context
        self.layers, self.weights, self.groups = parts.layers, parts.weights, parts.groups
        self._parts, self._is_retied = parts, False
        self._guard, self._reminder = Guard(model, parts.weights), Reminder(parts.groups)
        self.chip: Chip | None = None

    def step(self) -> None:
        """Do what the rules do after ``optimizer.step()``: mirror, copy signs, or nothing.

        Raises:
            RuleError: The optimizer has left out feedback weights that learn, or ``requires_grad`` of one was
                changed, so that it would learn by another rule than its own.
        """
        self._reminder.dismiss()
        self._check()
        refuse_changed_flags(self.groups)
        self.context.steps += 1
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
        """Run mirror mode now: see ``feedbackpath.mirror.by_hand.mirror``."""
        from feedbackpath.mirror import by_hand

        self._reminder.dismiss()
        self._check()
        groups = by_hand.mirrorable(self.groups)
        with self._writing(is_step=False):
            by_hand.mirror(self.context, groups, steps, settings, until_angle_deg, most_steps)

    def plan(
        self, compute_loss: Callable[[], Tensor], settings: "Mirror | None" = None, *, scale: float = 1.0
    ) -> "list[LayerPlan]":
        """Say what mirror mode will do with each layer: see ``feedbackpath.mirror.by_hand.plan``."""
        from feedbackpath.mirror import by_hand

        self._check()
        groups = by_hand.mirrorable(self.groups)
        with left_as_it_was(self.weights, self.model):
            return by_hand.plan(self.context, groups, self.weights, compute_loss, settings, scale=scale)

    @property
    def mirrors(self) -> bool:
        """Whether a rule uses mirror mode, and gains from ``path.mirror()`` before training."""
        return any(getattr(rule, "mirror", None) is not None for rule, _ in self.groups)

    def pairs(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        """Yield (name, forward weight, feedback weight) of every untied weight that has a feedback weight.

        B is laid out as W; where errors are broadcast it is ``[outputs, *input]``, made by the first run.
        """
        self._check()
        for weight in self.weights:
            if weight.is_tied or weight.has_feedback:
                yield weight.name, weight.weight, weight.feedback

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip gradients by the norm of the forward weights' gradients, as in backprop; return that norm.

        All gradients are scaled by the same factor, also those of feedback weights that learn.
        """
        self._check()
        return clip_by_forward_norm(self.model, self.groups, self.context, max_norm, norm_type)

    def check_optimizer(
        self, optimizer: torch.optim.Optimizer, *, steps: int | None = None, schedule: clock.Schedule = None
    ) -> dict[str, float]:
        """Check that an optimizer suits the rules; see each rule for its errors and warnings.

        Given a run's ``steps``, return the e-folds of Kolen-Pollack's W - B: ``rules.clock.count_efolds``.
        """
        self._check()
        for rule, group in self.groups:
            rule.check_optimizer(group, optimizer)
        return {} if steps is None else clock.count_efolds(self.groups, optimizer, steps, schedule)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs besides the model's state: the state of the rules."""
        chip = {} if self.chip is None else {"chip": self.chip.state_dict()}
        return self.context.state_dict() | chip | {"rule_names": choice.rule_names(self.rules)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that ``state_dict`` returned, of a path with the same rules."""
        with refusing(UntieError, "this is no state of a path"):
            choice.refuse_other_rules(self.rules, state.get("rule_names"))
            self.context.load_state_dict(state)
            if self.chip is not None and "chip" in state:
                self.chip.load_state_dict(state["chip"])

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up a copied or loaded path: its context belongs to the model that came with it."""
        self.__dict__.update(state)
        self.context.attach(self.model)

    def retie(self) -> nn.Module:
        """Turn the model back into plain torch modules with the present forward weights; return it."""
        self._refuse_retied()
        self._guard.refuse_other_classes()
        self._is_retied = True
        self._guard.release()
        if self.chip is not None:
            self.chip.release()
        self._parts.undo(self.context)
        return self.model

    def _refuse_retied(self) -> None:
        if self._is_retied:
            raise UntieError("this path was already retied: untie the model again for a new path")

    def _check(self) -> None:
        """See that the path may be asked something: it is not retied, and its model still what was untied."""
        self._refuse_retied()
        self._guard.check()
        self._reminder.remind()
