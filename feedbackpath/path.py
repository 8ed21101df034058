"""``untie`` and what it returns: the feedback path of a model."""

import fnmatch
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from feedbackpath import alignment
from feedbackpath.batchnorm import SigmaBatchNorm
from feedbackpath.core.context import RuleContext
from feedbackpath.errors import KolenPollackWarning, RuleError, UnconvertedLayerWarning, UntieError
from feedbackpath.layers import FeedbackLayer, UntiedWeight
from feedbackpath.mirror import LayerPlan, Mirror, by_hand
from feedbackpath.replicas import SharedReduction
from feedbackpath.rules import Rule, resolve_rule
from feedbackpath.rules.kolen_pollack import FirstUpdate, check_optimizer
from feedbackpath.surgery import (
    list_weights,
    retie_layer,
    retie_norm,
    send_back_sigma,
    survey,
    untie_layer,
)

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
        model: Any model with Linear, Conv, ConvTranspose or MultiheadAttention layers.
        rule: A rule or its name: ``"bp"``, ``"fa"``, ``"ss"``, ``"kp"``, ``"wm"``, ``"mirror-kp"``,
            ``"mirror-fa"``.
        overrides: Glob patterns of layer paths to rules, such as ``{"fc": "bp"}``; the last match counts.
        strict: Refuse a model with layers whose weights cannot be untied, instead of warning.
        activations: Glob patterns of layer paths to the activation that follows (mirror mode needs it);
            where not given it is found by tracing the model.
        batchnorm_feedback: What BatchNorm sends back in training: the whole gradient, as autograd does, or
            ``"sigma"``: delta times gamma / sigma, as in the paper's Appendix D.3.
        seed: Seed of everything random in the feedback path.

    Returns:
        The model's feedback path.

    Raises:
        UntieError: The model cannot be untied, or an override matches no layer.
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
    if found.unconverted:
        named = ", ".join(f"{name!r} ({kind})" for name, kind in found.unconverted.items())
        message = f"no untied form exists for {named}: errors still go back through the weights there"
        if strict:
            raise UntieError(f"{message}; replace these layers, or untie with strict=False")
        warnings.warn(message, UnconvertedLayerWarning, stacklevel=2)
    rules = _choose_rules(list(found.convertible), resolve_rule(rule), overrides or {})
    _refuse_unmatched_activations(list(found.convertible), activations or {})
    path = FeedbackPath(model, found.convertible, rules, activations or {}, seed)
    try:
        path._start()
        path._norms = send_back_sigma(model) if batchnorm_feedback == "sigma" else []
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
            raise UntieError(
                f"the activation pattern {pattern!r} matches no layer; layers are {', '.join(names)}"
            )


class FeedbackPath:
    """The feedback path of an untied model: its feedback weights, their rules, and what can be asked of them.

    Made by ``untie``.

    Attributes:
        model: The untied model.
        layers: Layer paths to feedback layers.
        rules: Layer paths to rules.
        weights: Every untied weight; one parameter in several layers appears once for each of them.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        rules: Mapping[str, Rule],
        activations: Activations,
        seed: int,
    ) -> None:
        self.model = model
        self.rules = dict(rules)
        self.layers = {name: untie_layer(layer) for name, layer in layers.items()}
        self.weights = [weight for name, layer in self.layers.items() for weight in list_weights(name, layer)]
        self.context = RuleContext(model, seed, activations)
        self._groups: list[tuple[Rule, list[UntiedWeight]]] = []
        self._norms: list[SigmaBatchNorm] = []
        self._reduction: SharedReduction | None = None
        self._is_retied = False
        self._first_update = FirstUpdate([])

    def _start(self) -> None:
        """Make the feedback weights, one for each forward parameter, and let the rules fill them."""
        governed: dict[int, tuple[Rule, nn.Parameter | None]] = {}
        for weight in self.weights:
            rule = self.rules[_layer_name(weight, self.layers)]
            if id(weight.weight) not in governed:
                governed[id(weight.weight)] = (rule, _make_feedback(weight.weight, rule))
            known_rule, feedback = governed[id(weight.weight)]
            if known_rule != rule:
                raise UntieError(
                    f"{weight.name!r} shares its weight with a layer under another rule "
                    f"({known_rule.name}, {rule.name}); give both the same rule"
                )
            setattr(weight.layer, weight.feedback_name, feedback)
        for rule, group in self._group_by_rule().items():
            self._groups.append((rule, group))
            rule.start(group, self.context)
        self._first_update = FirstUpdate(self._learned_weights())
        elsewhere = self._weights_used_elsewhere()
        self._warn_of_weights_used_elsewhere(elsewhere)
        learning = (weight for weight in self._learned_weights() if weight.weight.requires_grad)
        if alike := [weight for weight in learning if id(weight.weight) not in elsewhere]:
            self._reduction = SharedReduction(self.model, alike)

    def _group_by_rule(self) -> dict[Rule, list[UntiedWeight]]:
        """Group weights by rule, each parameter once."""
        groups: dict[Rule, list[UntiedWeight]] = {}
        seen: set[int] = set()
        for weight in self.weights:
            if id(weight.weight) not in seen:
                seen.add(id(weight.weight))
                groups.setdefault(self.rules[_layer_name(weight, self.layers)], []).append(weight)
        return groups

    def step(self) -> None:
        """Do what the rules do after an update of the forward weights: mirror, take signs, or nothing.

        Call it after ``optimizer.step()``.

        Raises:
            RuleError: The optimizer has left Kolen-Pollack feedback weights out, or ``requires_grad`` of a
                feedback weight was changed, so that it would learn by another rule than its own.
        """
        self._refuse_retied()
        self._refuse_changed_flags()
        self._first_update.check()
        self.context.steps += 1
        for rule, group in self._groups:
            rule.step(group, self.context)

    def mirror(
        self,
        steps: int | None = None,
        settings: Mirror | None = None,
        *,
        until_angle_deg: float | None = None,
        most_steps: int = 1000,
    ) -> None:
        """Go into mirror mode by hand: before training, in a pause, at any time.

        Where some layers' rule mirrors by itself, only those are mirrored, unless ``settings`` are given.

        See ``feedbackpath.mirror.by_hand.mirror`` for the arguments, and for what it raises and warns of.

        Raises:
            UntieError: There is nothing to mirror: every B is W itself or computed from it.
        """
        by_hand.mirror(
            self.context, self._to_mirror(), steps, settings,
            until_angle_deg=until_angle_deg, most_steps=most_steps,
        )  # fmt: skip

    def mirror_from_input(
        self,
        run: Callable[[], object],
        steps: int = 1,
        settings: Mirror | None = None,
        *,
        decorrelate: bool = False,
    ) -> None:
        """Drive the whole model with one noisy input, and let every B learn at once (Appendix C.4).

        Forward weights, gradients, running statistics and the global random numbers stay as they were. See
        ``feedbackpath.mirror.by_hand.mirror_from_input``, and docs/one-input.md for whether that will do.
        """
        groups = self._to_mirror()
        with alignment.left_as_it_was(self.weights, self.model):
            by_hand.mirror_from_input(self.context, groups, run, steps, settings, decorrelate=decorrelate)

    def plan(
        self, compute_loss: Callable[[], Tensor], settings: Mirror | None = None, *, scale: float = 1.0
    ) -> list[LayerPlan]:
        """Say what mirror mode will do with each layer: samples, angle, FLOPs, and how often.

        See ``feedbackpath.mirror.by_hand.plan`` for the arguments.
        """
        groups = self._to_mirror()
        with alignment.left_as_it_was(self.weights, self.model):
            return by_hand.plan(self.context, groups, self.weights, compute_loss, settings, scale=scale)

    def _to_mirror(self) -> list[tuple[Rule, list[UntiedWeight]]]:
        """Return the groups of weights whose B a mirror may teach."""
        self._refuse_retied()
        groups = [group for group in self._groups if group[0].feedback_kind in ("own", "learned")]
        if not groups:
            raise UntieError("nothing to mirror: every B is W itself (bp) or computed from it (ss)")
        return groups

    @property
    def mirrors(self) -> bool:
        """Whether a rule of this path uses mirror mode, and gains from ``path.mirror()`` before training."""
        return any(_mirror_settings(rule) for rule, _ in self._groups)

    def pairs(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        """Yield (name, forward weight, feedback weight) of every untied weight, both in W's layout."""
        self._refuse_retied()
        for weight in self.weights:
            yield weight.name, weight.weight, weight.feedback

    def matrix_angles(self) -> dict[str, float]:
        """Return each weight's angle between B and W, in degrees."""
        self._refuse_retied()
        return alignment.matrix_angles(self.weights)

    def gains(self) -> dict[str, float]:
        """Return each weight's gain <B, W> / <W, W>: 1 when B has W's size along W."""
        self._refuse_retied()
        return alignment.gains(self.weights)

    def delta_angles(self, compute_loss: Callable[[], Tensor]) -> dict[str, float]:
        """Return each layer's angle between its delta through B and through W, in degrees.

        Args:
            compute_loss: Runs the model forward and returns the loss, a scalar. Gradients, running
                statistics and random numbers are left as they were.
        """
        self._refuse_retied()
        with self.context.measuring():
            return alignment.delta_angles(self.weights, self.model, compute_loss)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip gradients by their norm without counting Kolen-Pollack feedback weights twice.

        The norm is that of the forward parameters alone, as in backprop; all gradients, B's too, are
        scaled by the same factor, so that W and B stay on one course.

        Returns:
            The norm before clipping, of all forward gradients taken as one vector.
        """
        learned = {id(weight.feedback) for weight in self._learned_weights()}
        with_gradient = [p for p in self.model.parameters() if p.grad is not None]
        forward = [p.grad for p in with_gradient if id(p) not in learned and p.grad is not None]
        norm = torch.nn.utils.get_total_norm(forward, norm_type)
        torch.nn.utils.clip_grads_with_norm_(with_gradient, max_norm, norm)
        return norm

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """See that an optimizer suits the rules: Kolen-Pollack needs W and B treated alike, and decay.

        Raises:
            RuleError: A feedback weight is not in the optimizer, or treated differently from its W.

        Warns:
            KolenPollackWarning: No weight decay: W - B will not shrink.
        """
        for rule, group in self._groups:
            if rule.feedback_kind == "learned":
                learning = [weight for weight in group if weight.weight.requires_grad]
                check_optimizer(learning, optimizer, needs_decay=_mirror_settings(rule) is None)

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
        self._first_update.stop_watching()
        self.context.close()
        for layer in self.layers.values():
            retie_layer(layer)
        for norm in self._norms:
            retie_norm(norm)
        if self._reduction is not None:
            self._reduction.undo()
        return self.model

    def _learned_weights(self) -> list[UntiedWeight]:
        return [w for rule, group in self._groups if rule.feedback_kind == "learned" for w in group]

    def _weights_used_elsewhere(self) -> set[int]:
        """Return the ids of parameters that a module without feedback (an embedding, say) uses as well."""
        return {
            id(parameter)
            for module in self.model.modules()
            if not isinstance(module, FeedbackLayer)
            for parameter in module.parameters(recurse=False)
        }

    def _warn_of_weights_used_elsewhere(self, elsewhere: set[int]) -> None:
        shared = [repr(w.name) for w in self._learned_weights() if id(w.weight) in elsewhere]
        if shared:
            warnings.warn(
                f"the weights of {', '.join(shared)} are shared with layers that cannot be untied: W gets "
                "gradients there that B does not, and Kolen-Pollack will not bring them together; untie the "
                "weights, or override the rule for these layers",
                KolenPollackWarning,
                stacklevel=4,
            )

    def _refuse_retied(self) -> None:
        if self._is_retied:
            raise UntieError("this path has been retied already: untie the model again for a new one")

    def _refuse_changed_flags(self) -> None:
        """Refuse a B whose ``requires_grad`` was switched, as ``model.requires_grad_(True)`` does to all.

        A fixed B would turn into a Kolen-Pollack one in silence, or a frozen W's B would go on learning.
        """
        for rule, group in self._groups:
            learns = rule.feedback_kind == "learned"
            for weight in () if rule.feedback_kind == "tied" else group:
                expected = learns and weight.weight.requires_grad
                if weight.feedback.requires_grad != expected:
                    raise RuleError(
                        f"requires_grad of the feedback weight of {weight.name!r} was changed, so that "
                        f"{rule.name} no longer holds: set it back by "
                        f".{weight.feedback_name}.requires_grad_({expected})"
                    )


def _make_feedback(weight: nn.Parameter, rule: Rule) -> nn.Parameter | None:
    """Allocate B like W: the same shape, dtype, device and memory format; None where B is W itself."""
    if rule.feedback_kind == "tied":
        return None
    learns = rule.feedback_kind == "learned" and weight.requires_grad
    return nn.Parameter(torch.empty_like(weight), requires_grad=learns)


def _mirror_settings(rule: Rule) -> Mirror | None:
    settings = getattr(rule, "mirror", None)
    return settings if isinstance(settings, Mirror) else None


def _layer_name(weight: UntiedWeight, layers: Mapping[str, FeedbackLayer]) -> str:
    return weight.name if weight.name in layers else weight.name.rpartition(".")[0]
