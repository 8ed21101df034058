"""What an optimizer will make of a feedback weight: told before it does so, and compared afterwards."""

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from feedbackpath.core.context import RuleContext
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.errors import RuleError
from feedbackpath.rules.base import Weights

SETTING = "order='update-first'"


class LookAhead:
    """Asks a copy of the optimizer what it makes of one B and its gradient; any update by itself will do."""

    def __init__(self, context: RuleContext) -> None:
        self._optimizers: dict[int, torch.optim.Optimizer] = {}
        self._expected: dict[int, tuple[Tensor, Tensor]] = {}

    def know(self, weights: Weights, optimizer: torch.optim.Optimizer) -> None:
        """Know which optimizer updates weights.

        Raises:
            RuleError: It hands its work on to another one.
        """
        if any(isinstance(value, torch.optim.Optimizer) for value in vars(optimizer).values()):
            raise RuleError(
                f"{SETTING} needs the optimizer that updates B, and {type(optimizer).__name__} wraps "
                "another: call path.check_optimizer with that one"
            )
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._optimizers |= {id(w.feedback): optimizer for w in weights if id(w.feedback) in held}

    def update(self, weight: UntiedWeight, b: nn.Parameter, gradient: Tensor) -> Tensor:
        """Return what the optimizer will make of B with this gradient."""
        optimizer = self._optimizers.get(id(b))
        groups = [] if optimizer is None else optimizer.param_groups
        group = next((g for g in groups if any(p is b for p in g["params"])), None)
        if optimizer is None or group is None:
            raise RuleError(
                f"{SETTING} has to know which optimizer updates the feedback weight of {weight.name!r}: "
                "call path.check_optimizer(optimizer) before training, and after load_state_dict(assign=True)"
            )
        twin = nn.Parameter(b.detach().clone())
        twin.grad = gradient
        ahead = copy.copy(optimizer)  # its settings and state, and none of its hooks
        ahead.param_groups = [{**group, "params": [twin]}]
        ahead.state = defaultdict(dict, {twin: copy.deepcopy(optimizer.state.get(b, {}))})
        ahead.step()
        self._expected[id(b)] = twin.detach(), (twin - b).detach().norm()
        return twin.detach()

    @torch.no_grad()
    def check(self, weights: Weights) -> None:
        """See that the optimizer has made of B what was told.

        Raises:
            RuleError: Names the weights of which it has made something else.
        """
        due = [weight for weight in weights if id(weight.feedback) in self._expected]
        off = []
        for weight in due:
            expected, size = self._expected.pop(id(weight.feedback))
            rounding = 10 * torch.finfo(expected.dtype).eps * expected.norm()
            off.append((weight.feedback - expected).norm() > 0.01 * size + rounding)
        others = torch.stack(off).tolist() if off else []
        if names := [repr(w.name) for w, is_other in zip(due, others, strict=True) if is_other]:
            raise RuleError(
                f"{SETTING}: errors went through predicted feedback weights of "
                f"{', '.join(names)}, but the optimizer made others: take one backward pass a step, in which "
                "each weight is used once, and do not clip or scale gradients, or write by a chip"
            )

    def close(self) -> None:
        """There is nothing to take off a model."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing has to be resumed."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing has to be resumed."""
