"""Kolen-Pollack learning (KP): B is updated as W is, and decay makes their difference vanish.

Akrout et al. 2019, equations 16 and 17 (Kolen & Pollack 1994), in W's layout::

    dW = -eta delta y^T - lambda W
    dB = -eta delta y^T - lambda B        so W - B shrinks by (1 - lambda) a step

Each synapse of B computes the product from its own two signals. The optimizer does the updates: with B
among its parameters, treated as W is, any elementwise optimizer keeps W and B on the same course.

Algorithm 2 gives the sides rates of their own, eta_W and eta_B. With SGD, momentum too, r = eta_B / eta_W::

    dB = -r eta delta y^T - lambda B        so r W - B shrinks by (1 - lambda) a step, and the gain goes to r

Differs from the paper: all updates follow the backward pass, as in equations 16 and 17, once gradients are
averaged, clipped and unscaled. Algorithm 2 updates each B just before delta passes through it: an option.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from feedbackpath.core.context import RuleContext
from feedbackpath.errors import KolenPollackWarning, RuleError, level_outside, refuse_no_size
from feedbackpath.rules.base import Facts, Rule, Scale, Weights, draw_feedback
from feedbackpath.rules.look_ahead import LookAhead
from feedbackpath.rules.shared_reduction import SharedReduction, weights_used_elsewhere
from feedbackpath.rules.update_first import UpdateFirst
from feedbackpath.rules.update_watch import UpdateWatch


@dataclass(frozen=True)
class KolenPollack(Rule):
    """Give B the gradient of W; weight decay removes their initial difference.

    Make the optimizer after ``untie``, from ``model.parameters()``. With SGD of learning rate lr, momentum
    mu and L2 penalty wd in the gradient, W - B shrinks by a factor of e in (1 - mu) / (lr wd) steps;
    without weight decay it does not shrink.

    Args:
        feedback_rate: eta_B / eta_W: how much of W's gradient B gets. It takes SGD: an optimizer that divides
            a gradient by its size, such as Adam, undoes it. On several devices B is then averaged by itself.
        scale: Of the initial B: ``"xavier"``, ``"he"``, ``"zero"`` or a number (see ``draw_feedback``).
        order: ``"error-first"``, or Algorithm 2's ``"update-first"``: errors go through B as the update of
            this step leaves it. It takes linear layers, convolutions, and ``path.check_optimizer`` first.

    Example:
        >>> import feedbackpath as fp
        >>> model = torch.nn.Linear(3, 2)
        >>> path = fp.untie(model, "kp")
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> bool((model.feedback.grad == model.weight.grad).all())
        True
    """

    name: ClassVar[str] = "kp"
    facts: ClassVar[Facts] = Facts(
        paper="Kolen & Pollack 1994; Akrout et al. 2019, eq. 16 and 17",
        equation="dB = -eta delta y^T - lambda B",
        needs="weight decay; B's own optimizer state",
        verdict="transport-free",
        flops=1.0,
    )
    learns: ClassVar[bool] = True
    needs_decay: ClassVar[bool] = True
    search_space: ClassVar[Mapping[str, Sequence[Any]]] = {"scale": ("choice", "xavier", "he")}
    feedback_rate: float = field(default=1.0, kw_only=True)
    scale: Scale = field(default="xavier", kw_only=True)
    order: Literal["error-first", "update-first"] = field(default="error-first", kw_only=True)

    def __post_init__(self) -> None:
        """Refuse a rate that is none; choose who carries the error."""
        refuse_no_size("kp: feedback_rate", self.feedback_rate)
        if self.order == "update-first":
            object.__setattr__(self, "send_back", UpdateFirst())

    @property
    def gradients(self) -> Callable[..., tuple[Tensor, Tensor | None]] | None:  # type: ignore[override]
        """What W and B get of an outer product; None: both get it as it is."""
        rate = self.feedback_rate
        return None if rate == 1.0 else lambda weight, product, context: (product, rate * product)

    def start(self, weights: Weights, context: RuleContext) -> None:
        """Draw every B."""
        draw_feedback(weights, context, self.scale)
        looked_up, elsewhere = weights_used_elsewhere(context.model)
        if self.gradients is not None:  # W and B have each its own, and B cannot take over W's
            looked_up, elsewhere = set(), looked_up | elsewhere
        shared = [weight for weight in weights if id(weight.weight) in elsewhere]
        if shared:
            warnings.warn(
                f"the weights of {', '.join(repr(w.name) for w in shared)} are shared with layers that "
                "cannot be untied: W gets gradients there that B does not, so Kolen-Pollack will not bring "
                "them together; untie the weights, or override the rule for these layers",
                KolenPollackWarning,
                stacklevel=level_outside(),
            )
        if self.gradients is None:
            alike = [weight for weight in weights if weight not in shared]
            context.part(SharedReduction).begin(alike, [w for w in alike if id(w.weight) in looked_up])

    def attach(self, weights: Weights, context: RuleContext) -> None:
        """Watch the first update; let B take over the gradient that several processes have averaged for W."""
        context.part(UpdateWatch).watch(weights)
        context.part(SharedReduction).attach(weights)

    def step(self, weights: Weights, context: RuleContext) -> None:
        """See that the first update has reached B, and that B is what was told; the optimizer has done it."""
        context.part(UpdateWatch).check(weights)
        if self.order == "update-first":
            context.part(LookAhead).check(weights)

    def check_optimizer(self, weights: Weights, optimizer: torch.optim.Optimizer) -> None:
        """See that an optimizer treats W and B alike and lets their difference decay.

        Raises:
            RuleError: A feedback weight is not in the optimizer, or its group's settings differ from W's.

        Warns:
            KolenPollackWarning: No weight decay: W - B never changes.
        """
        if weights and self.order == "update-first":
            weights[0].layer.untied.context.part(LookAhead).know(weights, optimizer)
        groups, undecayed = {id(p): group for group in optimizer.param_groups for p in group["params"]}, []
        for weight in weights:
            if id(weight.weight) not in groups or not weight.weight.requires_grad:
                continue
            if id(weight.feedback) not in groups:
                what = f"the optimizer has the forward weight of {weight.name!r} but not its feedback weight"
                raise RuleError(f"Kolen-Pollack: {what}; make it after untie, from model.parameters()")
            forward, feedback = groups[id(weight.weight)], groups[id(weight.feedback)]
            names = [name for name in forward if name not in ("params", "param_names")]
            differing = [name for name in names if forward[name] != feedback.get(name)]
            if differing:
                what = f"treats the weights of {weight.name!r} differently ({', '.join(differing)})"
                raise RuleError(
                    f"Kolen-Pollack: the optimizer {what}; put W and B in groups with the same settings"
                )
            undecayed += [] if feedback.get("weight_decay") else [repr(weight.name)]
        if self.needs_decay and undecayed:
            warnings.warn(
                f"Kolen-Pollack without weight decay: W - B of {', '.join(undecayed)} will not shrink; "
                "give the optimizer weight_decay > 0",
                KolenPollackWarning,
                stacklevel=level_outside(),
            )
