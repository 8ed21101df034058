"""Kolen-Pollack learning (KP): B is updated as W is, and decay makes their difference vanish.

Akrout et al. 2019, equations 16 and 17 (Kolen & Pollack 1994), in W's layout::

    dW = -eta delta y^T - lambda W
    dB = -eta delta y^T - lambda B        so W - B shrinks by (1 - lambda) a step

Each synapse of B computes the product from its own two signals. The optimizer does the updates: with B
among its parameters, treated as W is, any elementwise optimizer keeps W and B on the same course.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from feedbackpath.core.context import RuleContext
from feedbackpath.errors import KolenPollackWarning, RuleError
from feedbackpath.layers import UntiedWeight
from feedbackpath.rules.base import FeedbackKind, draw_feedback


@dataclass(frozen=True)
class KolenPollack:
    """Give B the gradient of W; weight decay does the rest.

    Make the optimizer after ``untie``, from ``model.parameters()``. With SGD of learning rate lr, momentum
    mu and L2 penalty wd in the gradient, W - B shrinks e-fold in (1 - mu) / (lr wd) steps; without
    weight decay it never does.

    Example:
        >>> import feedbackpath as fp
        >>> model = torch.nn.Linear(3, 2)
        >>> path = fp.untie(model, "kp")
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> bool((model.feedback.grad == model.weight.grad).all())
        True
    """

    name: ClassVar[str] = "kp"
    feedback_kind: ClassVar[FeedbackKind] = "learned"

    def start(self, weights: Sequence[UntiedWeight], context: RuleContext) -> None:
        """Draw every B at random."""
        draw_feedback(weights, context)

    def step(self, weights: Sequence[UntiedWeight], context: RuleContext) -> None:
        """Do nothing: the optimizer has updated B."""


def check_optimizer(
    weights: Sequence[UntiedWeight], optimizer: torch.optim.Optimizer, *, needs_decay: bool
) -> None:
    """See that an optimizer treats W and B alike and lets their difference decay.

    Args:
        weights: The weights under Kolen-Pollack learning.
        optimizer: The optimizer that is to update them.
        needs_decay: Whether B begins unlike W, so that only decay can bring them together.

    Raises:
        RuleError: A feedback weight is not in the optimizer, or its group's settings differ from W's.

    Warns:
        KolenPollackWarning: No weight decay: W - B stays as it is for ever.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    undecayed = []
    for weight in weights:
        if id(weight.weight) not in groups:
            continue
        if id(weight.feedback) not in groups:
            raise RuleError(
                f"Kolen-Pollack: the optimizer has the forward weight of {weight.name!r} but not its "
                "feedback weight; make it after untie, from model.parameters()"
            )
        forward, feedback = groups[id(weight.weight)], groups[id(weight.feedback)]
        differing = [
            key
            for key in forward
            if key not in ("params", "param_names") and forward[key] != feedback.get(key)
        ]
        if differing:
            raise RuleError(
                f"Kolen-Pollack: the optimizer treats the weights of {weight.name!r} differently "
                f"({', '.join(differing)}); put W and B in groups with the same settings"
            )
        if not feedback.get("weight_decay"):
            undecayed.append(repr(weight.name))
    if needs_decay and undecayed:
        warnings.warn(
            f"Kolen-Pollack without weight decay: W - B of {', '.join(undecayed)} will not shrink; "
            "give the optimizer weight_decay > 0",
            KolenPollackWarning,
            stacklevel=3,
        )


class FirstUpdate:
    """Watches whether the first update of forward weights reaches their feedback weights as well.

    Args:
        weights: The weights under Kolen-Pollack learning.
    """

    def __init__(self, weights: Sequence[UntiedWeight]) -> None:
        self._weights = list(weights)
        self._versions_at_backward: dict[int, tuple[int, int]] = {}
        self._watches: list[RemovableHandle] = []
        for weight in self._weights:
            if weight.weight.requires_grad:
                self._watches.append(self._watch(weight))

    def _watch(self, weight: UntiedWeight) -> RemovableHandle:
        """Note the versions of W and B at each backward pass: what changes them next is the optimizer."""

        def note(_: Tensor) -> None:
            versions = weight.weight._version, weight.feedback._version
            self._versions_at_backward[id(weight.weight)] = versions

        return weight.weight.register_post_accumulate_grad_hook(note)  # type: ignore[no-any-return,no-untyped-call]

    def check(self) -> None:
        """Refuse an optimizer that has updated W and not B: it was made before ``untie``, most likely.

        Raises:
            RuleError: Names the weights whose B was left out.
        """
        if not self._watches:
            return
        forgotten, was_updated = [], False
        for weight in self._weights:
            versions = (weight.weight._version, weight.feedback._version)
            before = self._versions_at_backward.get(id(weight.weight), versions)
            was_updated |= versions[0] > before[0]
            if versions[0] > before[0] and versions[1] == before[1]:
                forgotten.append(repr(weight.name))
        if was_updated:
            self.stop_watching()
        if forgotten:
            raise RuleError(
                "the optimizer updates the forward weights but not the feedback weights of "
                f"{', '.join(forgotten)}; make it after untie, from model.parameters()"
            )

    def stop_watching(self) -> None:
        """Take the hooks off the weights."""
        for watch in self._watches:
            watch.remove()
        self._watches.clear()
