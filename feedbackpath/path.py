"""``untie`` and what it returns: the feedback path of a model."""

import fnmatch
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from feedbackpath.core.batchnorm import SigmaBatchNorm
from feedbackpath.core.context import RuleContext
from feedbackpath.core.layers import UntiedWeight, kind_of, list_weights
from feedbackpath.core.modules import FeedbackModule
from feedbackpath.core.surgery import (
    has_own_forward, retie_module, retie_norm, send_back_sigma, survey, untie_modules,
)  # fmt: skip
from feedbackpath.errors import RuleError, UnconvertedLayerWarning, UntieError
from feedbackpath.measure import angles
from feedbackpath.rules import Rule, resolve_rule

if TYPE_CHECKING:
    from feedbackpath.mirror import LayerPlan, Mirror

Activations = Mapping[str, Callable[[Tensor], Tensor]]


def untie(
    model: nn.Module,
    rule: str | Rule,
    *,
    overrides: Mapping[str, str | Rule] | None = None,
    strict: bool = False,
    activations: Activations | None = None,
    batchnorm_feedback: Literal["autograd", "sigma"] = "autograd",
    seed: int = 0,
) -> "FeedbackPath":
    """Give a model's layers feedback weights of their own, in place, and a rule that governs them.

    Forward outputs stay bit-identical and parameters keep their identity. Make the optimizer, and wrap in
    DDP or ``torch.compile``, afterwards.

    Args:
        model: Any model. Each parameter with two dimensions larger than 1 gets a feedback weight, but for
            embeddings and norms.
        rule: A rule or its name: ``"bp"``, ``"fa"``, ``"ss"``, ``"kp"``, ``"wm"``, ``"mirror-kp"``,
            ``"mirror-fa"``.
        overrides: Glob patterns of layer paths to rules, such as ``{"fc": "bp"}``; the last match counts.
        strict: Refuse a model with layers that the rule cannot govern, instead of warning.
        activations: Glob patterns of layer paths to the activation that follows (mirror mode needs it);
            where not given it is found by tracing the model.
        batchnorm_feedback: What BatchNorm sends back in training: the whole gradient, as autograd does, or
            ``"sigma"``: delta times gamma / sigma, as in the paper's Appendix D.3.
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
    found = survey(model)
    names = list(found.convertible)
    rules = _choose_rules(names, resolve_rule(rule), overrides or {})
    _refuse_unmatched_activations(names, activations or {})
    unserved = {
        name: f"{type(layer).__name__}, by {rules[name].name}"
        for name, layer in found.convertible.items()
        if not rules[name].serves(list_weights(name, layer))
    }
    if left := found.unconverted | unserved:
        named = ", ".join(f"{name!r} ({why})" for name, why in left.items())
        message = f"no untied form exists for {named}: errors still go back through the weights there"
        if strict:
            raise UntieError(f"{message}; replace these layers, give them another rule, or untie with strict=False")
        warnings.warn(message, UnconvertedLayerWarning, stacklevel=2)
    if len(unserved) == len(names):
        raise UntieError(f"nothing to untie in {type(model).__name__} by {resolve_rule(rule).name}: {message}")
    layers = {name: layer for name, layer in found.convertible.items() if name not in unserved}
    path = FeedbackPath(model, {name: rules[name] for name in layers}, RuleContext(model, seed, activations))
    try:
        path._start(layers, batchnorm_feedback)
    except BaseException:
        path.retie()
        raise
    return path


def _choose_rules(names: list[str], rule: Rule, overrides: Mapping[str, str | Rule]) -> dict[str, Rule]:
    """Return the rule of each layer; a pattern that matches nothing is an error, not a silence."""
    rules = dict.fromkeys(names, rule)
    for pattern, override in overrides.items():
        matches = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not matches:
            raise UntieError(f"the override {pattern!r} matches no layer; layers are {', '.join(names)}")
        rules |= dict.fromkeys(matches, resolve_rule(override))
    return rules


def _refuse_unmatched_activations(names: list[str], activations: Activations) -> None:
    for pattern in activations:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise UntieError(f"the activation pattern {pattern!r} matches no layer; layers are {', '.join(names)}")


class FeedbackPath:
    """The feedback path of an untied model: its feedback weights, their rules, and what can be asked of them.

    Made by ``untie``.

    Attributes:
        model: The untied model.
        layers: Layer paths to untied layers.
        rules: Layer paths to rules.
        weights: Every untied weight; one parameter in several layers appears once for each of them.
        context: What the rules may know of this path.
        groups: The rules and the weights that each governs, each parameter once.
    """

    def __init__(self, model: nn.Module, rules: Mapping[str, Rule], context: RuleContext) -> None:
        self.model = model
        self.rules = dict(rules)
        self.context = context
        self.layers: dict[str, FeedbackModule] = {}
        self.weights: list[UntiedWeight] = []
        self.groups: list[tuple[Rule, list[UntiedWeight]]] = []
        self._modules: list[FeedbackModule] = []
        self._norms: list[SigmaBatchNorm] = []
        self._is_retied = False

    def _start(self, layers: Mapping[str, nn.Module], batchnorm_feedback: str) -> None:
        """Exchange the modules' classes, make the feedback weights, and let the rules fill them."""
        names = {id(layer): name for name, layer in layers.items()}
        for module in untie_modules(self.model, layers):
            self._modules.append(module)
            if id(module) in names:
                self.layers[names[id(module)]] = module
                self._govern(module, self.rules[names[id(module)]])
        self.weights = [weight for name in layers for weight in self.layers[name].untied.weights]
        for module in self._modules:
            module.untied.is_watched = _is_watched(module, module is self.model)
            module.untied.is_one_product = _is_one_product(module)
        self._make_feedback()
        for rule, group in self.groups:
            ready = [weight for weight in group if weight.has_feedback]
            if ready:
                rule.start(ready, self.context)
            rule.attach(group, self.context)
        self._norms = send_back_sigma(self.model) if batchnorm_feedback == "sigma" else []

    def _govern(self, module: FeedbackModule, rule: Rule) -> None:
        """Let a rule govern a layer."""
        untied = module.untied
        untied.rule, untied.context = rule, self.context
        untied.send_back, untied.is_tied = rule.send_back, rule.is_tied
        if rule.after_backward is not None:
            untied.taps = (_tell_rule,)

    def _make_feedback(self) -> None:
        """Make the feedback weights, one for each forward parameter, and group weights by rule."""
        governed: dict[int, tuple[Rule, nn.Parameter | None]] = {}
        groups: dict[Rule, list[UntiedWeight]] = {}
        for weight in self.weights:
            rule = weight.layer.untied.rule
            key = id(weight.weight)
            if key not in governed:
                governed[key] = rule, _new_feedback(weight, rule)
                groups.setdefault(rule, []).append(weight)
            known_rule, feedback = governed[key]
            if known_rule != rule:
                raise UntieError(
                    f"{weight.name!r} shares its weight with a layer under another rule "
                    f"({known_rule.name}, {rule.name}); give both the same rule"
                )
            setattr(weight.layer, weight.feedback_name, feedback)
        self.groups = list(groups.items())

    def step(self) -> None:
        """Do what the rules do after an update of the forward weights: mirror, take signs, or nothing.

        Call it after ``optimizer.step()``.

        Raises:
            RuleError: The optimizer has left Kolen-Pollack feedback weights out, or ``requires_grad`` of a
                feedback weight was changed, so that it would learn by another rule than its own.
        """
        self._refuse_retied()
        self._refuse_changed_flags()
        self.context.steps += 1
        for rule, group in self.groups:
            rule.step(group, self.context)

    def mirror(
        self,
        steps: int | None = None,
        settings: "Mirror | None" = None,
        *,
        until_angle_deg: float | None = None,
        most_steps: int = 1000,
    ) -> None:
        """Go into mirror mode by hand: before training, in a pause, at any time.

        Where some layers' rule mirrors by itself, only those are mirrored, unless ``settings`` are given. See
        ``feedbackpath.mirror.by_hand.mirror`` for the arguments, and for what it raises and warns of.
        """
        from feedbackpath.mirror import by_hand

        by_hand.mirror(
            self.context, self._to_mirror(), steps, settings, until_angle_deg=until_angle_deg, most_steps=most_steps
        )

    def mirror_from_input(
        self,
        run: Callable[[], object],
        steps: int = 1,
        settings: "Mirror | None" = None,
        *,
        decorrelate: bool = False,
    ) -> None:
        """Drive the whole model with one noisy input, and let every B learn at once (Appendix C.4).

        See ``feedbackpath.mirror.by_hand.mirror_from_input``, and docs/one-input.md for whether that will do.
        """
        from feedbackpath.mirror import by_hand

        groups = self._to_mirror()
        with angles.left_as_it_was(self.weights, self.model):
            by_hand.mirror_from_input(self.context, groups, run, steps, settings, decorrelate=decorrelate)

    def plan(
        self, compute_loss: Callable[[], Tensor], settings: "Mirror | None" = None, *, scale: float = 1.0
    ) -> "list[LayerPlan]":
        """Say what mirror mode will do with each layer: samples, angle, FLOPs, and how often.

        Args:
            compute_loss: Runs the model forward on a minibatch of training; tells how much a step computes.
            settings: How to mirror; None: as the layer's rule does, or by default settings.
            scale: How many times as many samples a training step has.
        """
        from feedbackpath.mirror import by_hand

        groups = self._to_mirror()
        with angles.left_as_it_was(self.weights, self.model):
            return by_hand.plan(self.context, groups, self.weights, compute_loss, settings, scale=scale)

    def _to_mirror(self) -> list[tuple[Rule, list[UntiedWeight]]]:
        self._refuse_retied()
        groups = [group for group in self.groups if group[0].is_mirrorable and group[0].send_back.is_local]
        if not groups:
            raise UntieError("nothing to mirror: every B is W itself (bp), computed from it (ss) or of another shape")
        return groups

    @property
    def mirrors(self) -> bool:
        """Whether a rule of this path uses mirror mode, and gains from ``path.mirror()`` before training."""
        return any(getattr(rule, "mirror", None) is not None for rule, _ in self.groups)

    def pairs(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        """Yield (name, forward weight, feedback weight) of every untied weight that has one by now.

        B is laid out as W; that of a rule that broadcasts errors is ``[outputs, *input]``, and is made when the
        model first runs.
        """
        self._refuse_retied()
        for weight in self.weights:
            if weight.is_tied or weight.has_feedback:
                yield weight.name, weight.weight, weight.feedback

    def matrix_angles(self) -> dict[str, float]:
        """Return each weight's angle between B and W, in degrees; B of another shape than W has none."""
        self._refuse_retied()
        return angles.matrix_angles(self.weights)

    def gains(self) -> dict[str, float]:
        """Return each weight's gain <B, W> / <W, W>: 1 when B has W's size along W."""
        self._refuse_retied()
        return angles.gains(self.weights)

    def delta_angles(self, compute_loss: Callable[[], Tensor]) -> dict[str, float]:
        """Return each layer's angle between its delta through B and through W, in degrees.

        Args:
            compute_loss: Runs the model forward on the same minibatch each time, and returns the loss, a
                scalar. Gradients, running statistics and random numbers are left as they were.
        """
        self._refuse_retied()
        return angles.delta_angles(self.weights, self.model, compute_loss)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip gradients by their norm without counting feedback weights that learn.

        The norm is that of the forward parameters alone, as in backprop; all gradients, B's too, are
        scaled by the same factor, so that W and B stay on one course.

        Returns:
            The norm before clipping, of all forward gradients taken as one vector.
        """
        learned = {id(weight.feedback) for rule, group in self.groups if rule.learns for weight in group}
        with_gradient = [p for p in self.model.parameters() if p.grad is not None]
        forward = [p.grad for p in with_gradient if id(p) not in learned and p.grad is not None]
        norm = torch.nn.utils.get_total_norm(forward, norm_type)
        torch.nn.utils.clip_grads_with_norm_(with_gradient, max_norm, norm)
        return norm

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """See that an optimizer suits the rules: Kolen-Pollack needs W and B treated alike, and decay."""
        for rule, group in self.groups:
            rule.check_optimizer(group, optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs beyond the model's own state: how far the rules have come."""
        return self.context.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state that ``state_dict`` returned."""
        self.context.load_state_dict(state)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up a copied or loaded path: its context belongs to the model that came with it."""
        self.__dict__.update(state)
        self.context.attach(self.model)

    def retie(self) -> nn.Module:
        """Give back plain torch modules, with the forward weights as they are now; return the model.

        Raises:
            UntieError: The path has been retied before.
        """
        self._refuse_retied()
        self._is_retied = True
        for rule, group in self.groups:
            rule.detach(group, self.context)
        self.context.close()
        for module in self._modules:
            retie_module(module)
        for norm in self._norms:
            retie_norm(norm)
        return self.model

    def _refuse_retied(self) -> None:
        if self._is_retied:
            raise UntieError("this path has been retied already: untie the model again for a new one")

    def _refuse_changed_flags(self) -> None:
        """Refuse a B whose ``requires_grad`` was switched, as ``model.requires_grad_(True)`` does to all.

        A fixed B would turn into a Kolen-Pollack one in silence, or a frozen W's B would go on learning.
        """
        for rule, group in self.groups:
            for weight in () if rule.is_tied else group:
                expected = rule.learns and weight.weight.requires_grad
                if weight.has_feedback and weight.feedback.requires_grad != expected:
                    raise RuleError(
                        f"requires_grad of the feedback weight of {weight.name!r} was changed, so that "
                        f"{rule.name} no longer holds: set it back by "
                        f".{weight.feedback_name}.requires_grad_({expected})"
                    )


def _is_watched(module: FeedbackModule, is_model: bool) -> bool:
    """Whether a weight may meet activity in a module's own forward pass, or a broadcast begins there."""
    below = [weight.layer.untied for weight in module.untied.below]
    if is_model and any(untied.send_back.is_broadcast for untied in below):
        return True
    if module.untied.weights and not module.untied.is_tied:
        return True
    return has_own_forward(module) and any(not untied.is_tied for untied in below)


def _is_one_product(module: FeedbackModule) -> bool:
    """Whether a layer can go the short way: torch's own product, B in W's place, and nothing to tell its rule."""
    untied, kind = module.untied, kind_of(module)
    is_plain = kind.is_one_product and not has_own_forward(module) and len(untied.weights) == 1
    return is_plain and untied.is_watched and untied.send_back.is_local and untied.rule.gradients is None


def _new_feedback(weight: UntiedWeight, rule: Rule) -> nn.Parameter | None:
    """Allocate B: like W in dtype, device and, where it has W's shape, memory format; None: there is none yet."""
    shape = rule.send_back.feedback_shape(weight)
    if rule.is_tied or shape is None:
        return None
    w = weight.weight
    empty = torch.empty_like(w) if shape == w.shape else w.new_empty(shape)
    return nn.Parameter(empty.detach(), requires_grad=rule.learns and w.requires_grad)


def _tell_rule(weight: UntiedWeight, x: Tensor, output: Tensor, rows: slice) -> None:
    """Tell a rule of the error that arrives at an output, when it does."""
    untied = weight.layer.untied
    if output.requires_grad:
        output.register_hook(
            lambda delta: untied.rule.after_backward(weight, x.detach(), output.detach(), delta, untied.context)
        )
