"""Whether updates of forward weights reach feedback weights that learn as well, and clipping spares them.

Each weight is watched until its first update: what the optimizer changes, by the values themselves, for no
version counter counts a write through ``.data``; and whether a norm that counts B scales the gradients.
"""

import math
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from feedbackpath.core.context import RuleContext
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.core.pytorch import version_of
from feedbackpath.errors import RuleError
from feedbackpath.rules.base import Weights
from feedbackpath.rules.clipping import scale_of, size_of, warn_of_clipping

_Key = tuple[int, str]
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Noted(NamedTuple):
    """W and B when a step's first gradient had arrived, and the gradient when its last one had.

    Attributes:
        largest: Where the gradient is largest, with W and B there; None: W has another shape, so another one.
    """

    weight: Tensor
    feedback: Tensor
    gradient: Tensor
    version: int
    size: Tensor
    largest: tuple[Tensor, Tensor] | None


class UpdateWatch:
    """Finds an optimizer that updates W without B, or B without W, and a norm that counts B."""

    def __init__(self, context: RuleContext) -> None:
        self._context = context
        self._noted: dict[_Key, _Noted] = {}
        self._watches: dict[_Key, RemovableHandle] = {}

    def watch(self, weights: Weights) -> None:
        """Watch weights whose B learns, each until it has been updated once."""
        for weight in weights:
            if weight.has_feedback and weight.feedback.requires_grad:
                self._stop(_key_of(weight))
                self._watches[_key_of(weight)] = self._watch(weight)

    def _watch(self, weight: UntiedWeight) -> RemovableHandle:
        # The garbage collector does not see these hooks: what they held would never be freed.
        watch, layer, name = weakref.ref(self), weakref.ref(weight.layer), weight.weight_name

        def note(_: Tensor) -> None:
            mine, held = watch(), layer()
            if mine and held is not None and mine._context.has_model:  # else nobody asks
                mine.note(next(w for w in held.untied.weights if w.weight_name == name))

        return weight.feedback.register_post_accumulate_grad_hook(note)  # type: ignore[no-any-return,no-untyped-call]

    def note(self, weight: UntiedWeight) -> None:
        """Note W, B, and B's gradient, which is as it ought to be: what scales it next is something else."""
        key, gradient = _key_of(weight), weight.feedback.grad
        if key not in self._watches or gradient is None or hasattr(gradient, "full_tensor"):
            return
        if gradient.numel():
            w, b, *_ = self._noted.get(key) or (_digest(weight.weight), _digest(weight.feedback))
            place = gradient.abs().argmax() if weight.weight.shape == gradient.shape else None
            largest = None if place is None else (place, _values_at(place, weight))
            self._noted[key] = _Noted(w, b, gradient, version_of(gradient), size_of(gradient), largest)

    def check(self, weights: Weights) -> None:
        """Refuse an optimizer that has updated one of W and B alone, and warn of a norm that counts B.

        Raises:
            RuleError: Names the weights of which one was left out.
        """
        if not self._watches or self._context.writes_apart:
            return
        without_b: list[str] = []
        without_w: list[str] = []
        scales = []
        for weight in weights:
            noted = self._noted.pop(_key_of(weight), None)
            if noted is None or (weight.feedback.grad is None and weight.weight.grad is not None):
                continue  # nothing of this step was for B to learn
            has_w = bool(_digest(weight.weight) != noted.weight)
            has_b = bool(_digest(weight.feedback) != noted.feedback)
            if not (has_b or noted.gradient.any() or weight.feedback.any()):
                continue  # B is 0 and no error has come so far: decay alone has changed W
            if has_w != has_b and not _is_lost(noted, weight):
                (without_b if has_w else without_w).append(repr(weight.name))
            elif has_w and has_b:
                self._stop(_key_of(weight))
                is_written = version_of(noted.gradient) > noted.version
                scales.append(scale_of(noted.gradient, noted.size) if is_written else math.nan)
        for names, whose, others in ((without_b, "forward", "feedback"), (without_w, "feedback", "forward")):
            if names:
                raise RuleError(
                    f"the optimizer updates the {whose} weights but not the {others} weights of "
                    f"{', '.join(names)}; make it after untie, from model.parameters(), after any "
                    "load_state_dict(assign=True), and, if the rule broadcasts, when the model has run once"
                )
        warn_of_clipping(scales)

    def _stop(self, key: _Key) -> None:
        if key in self._watches:
            self._watches.pop(key).remove()

    def close(self) -> None:
        """Take the hooks off the weights."""
        for key in list(self._watches):
            self._stop(key)

    def state_dict(self) -> dict[str, Any]:
        """Nothing has to be resumed."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing has to be resumed."""


def _key_of(weight: UntiedWeight) -> _Key:
    return id(weight.layer), weight.weight_name


def _digest(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's bits, read as whole numbers: another one where any value has changed."""
    return tensor.detach().view(_INTEGERS[tensor.element_size()]).sum()


def _values_at(place: Tensor, weight: UntiedWeight) -> Tensor:
    return torch.stack([w.detach().take(place) for w in (weight.weight, weight.feedback)])


def _is_lost(noted: _Noted, weight: UntiedWeight) -> bool:
    """Whether rounding loses, in the one of W and B that did not change, half of what the other did."""
    if noted.largest is None:
        return False
    place, old = noted.largest
    change = _values_at(place, weight) - old
    return bool((old + change.flip(0) / 2 == old).all())
