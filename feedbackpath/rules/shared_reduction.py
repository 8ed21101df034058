"""Kolen-Pollack on several devices: the outer product is reduced once, for W, and handed to B.

W and B have the same gradient (Akrout et al. 2019, equations 16-18), so that DistributedDataParallel, which
averages gradients over the replicas, has to send it only once. B is left out of its traffic, and takes over
W's gradient when that has been averaged. Every replica draws the same B from its seed: no B is ever sent.

On one device the same is done where a layer shares its weight with an embedding: B gets what W gets at both.
"""

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from feedbackpath.core import pytorch
from feedbackpath.core.context import RuleContext
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.core.modules import FeedbackModule
from feedbackpath.errors import RuleError
from feedbackpath.rules.base import Weights
from feedbackpath.rules.update_watch import UpdateWatch

IGNORED = "_ddp_params_and_buffers_to_ignore"  # what DistributedDataParallel asks its module for


def weights_used_elsewhere(model: nn.Module) -> tuple[set[int], set[int]]:
    """Return the ids of parameters that modules without feedback weights use too.

    Returns:
        Those that embeddings alone use: a look-up is a product with a signal of one 1, and what W gets there,
        delta at the neurons of its row, is as local as at a layer. And those that other modules use.
    """
    used: tuple[set[int], set[int]] = (set(), set())
    for module in model.modules():
        if not (isinstance(module, FeedbackModule) and module.untied.weights):
            is_local = isinstance(module, nn.Embedding) and not module.sparse
            used[0 if is_local else 1].update(id(p) for p in module.parameters(recurse=False))
    return used[0] - used[1], used[1]


class SharedReduction:
    """Keeps B out of DistributedDataParallel's traffic, and gives it W's gradient after a backward pass."""

    def __init__(self, context: RuleContext) -> None:
        self._context = context
        self._before: list[str] | None = None
        self._has_begun = False
        self._hooks: list[RemovableHandle] = []
        self._weights: dict[tuple[int, str], UntiedWeight] = {}
        self._waits_for: int | None = None

    def begin(self, weights: Weights, looked_up: Weights = ()) -> None:
        """Leave the feedback weights of a model out of what is sent; ``attach`` then shares gradients.

        Args:
            weights: The weights.
            looked_up: Those of them that are an embedding's table too: B gets what W gets there.

        Raises:
            RuleError: A weight is no parameter, but was made of others in a forward pass.
        """
        if made := [repr(weight.name) for weight in weights if not weight.weight.is_leaf]:
            raise RuleError(
                f"the weight of {', '.join(made)} is made of other parameters in each forward pass: untie "
                "the model before its first one, or give the layer another rule by overrides="
            )
        if not pytorch.can_wait():
            return
        for weight in looked_up:
            weight.layer.untied.memo.setdefault("looked_up", set()).add(weight.weight_name)
        model = self._context.model
        if not self._has_begun:
            self._before, self._has_begun = getattr(model, IGNORED, None), True
        learning = [weight for weight in weights if weight.weight.requires_grad]
        for weight in learning:
            weight.layer.untied.memo.setdefault("reduced_once", set()).add(weight.weight_name)
        ids = {id(weight.feedback) for weight in learning}
        # DistributedDataParallel puts a dot before the name of a parameter of the model itself.
        names = [f"{path}.{name}" for path, module in model.named_modules()
                 for name, p in module.named_parameters(recurse=False) if id(p) in ids]  # fmt: skip
        names += [name.removeprefix(".") for name in names if name.startswith(".")]
        # Past setattr: a module that is given something new is watched from then on.
        vars(model)[IGNORED] = [*(getattr(model, IGNORED, None) or ()), *names]

    def attach(self, weights: Weights) -> None:
        """Hook on to weights that are new: those of a model that was untied, copied or loaded."""
        once = [w for w in weights if w.weight_name in w.layer.untied.memo.get("reduced_once", ())]
        self._weights |= {(id(weight.layer), weight.weight_name): weight for weight in once}
        mine = weakref.WeakMethod(self._hand_over_later)  # the garbage collector does not see these hooks

        def hand_over_later(_: Tensor) -> None:
            if (method := mine()) is not None:
                method()

        self._hooks += [
            weight.weight.register_post_accumulate_grad_hook(hand_over_later)  # type: ignore[no-untyped-call]
            for weight in once
            if weight.weight.requires_grad
        ]

    def _hand_over_later(self) -> None:
        """Hand gradients over once this backward pass has ended: of several devices, or of a table."""
        number = pytorch.backward_id()
        if any(map(_is_due, self._weights.values())) and (number is None or number != self._waits_for):
            self._waits_for = number
            pytorch.after_backward(self._hand_over)

    @torch.no_grad()
    def _hand_over(self) -> None:
        """Give every B the gradient of W; also where this process has not used a layer that others have."""
        for weight in filter(_is_due, self._weights.values()):
            gradient, feedback = weight.weight.grad, weight.feedback
            if gradient is None or not feedback.requires_grad:
                continue
            if gradient.untyped_storage().nbytes() == gradient.nbytes:
                feedback.grad = pytorch.share(gradient)
            elif feedback.grad is None:
                feedback.grad = gradient.clone()
            else:  # a part of what is sent at once: all of that would be kept
                feedback.grad.copy_(gradient)
            self._context.part(UpdateWatch).note(weight)

    def close(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._has_begun:
            self._has_begun = False
            model = self._context.model
            if self._before is None:
                delattr(model, IGNORED)
            else:
                vars(model)[IGNORED] = self._before

    def state_dict(self) -> dict[str, Any]:
        """Nothing has to be resumed."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing has to be resumed."""


def _is_due(weight: UntiedWeight) -> bool:
    """Whether W's gradient is not B's own: it is an average over devices, or an embedding adds to it."""
    return pytorch.has_processes() or weight.weight_name in weight.layer.untied.memo.get("looked_up", ())
