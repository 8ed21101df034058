"""Whether the first update of forward weights reaches feedback weights that learn as well."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from feedbackpath.core.context import RuleContext
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.core.pytorch import version_of
from feedbackpath.errors import RuleError
from feedbackpath.rules.base import Weights


class UpdateWatch:
    """Finds an optimizer that was made before ``untie``: it updates W, and never B."""

    def __init__(self, context: RuleContext) -> None:
        self._at_backward: dict[int, tuple[int, int]] = {}
        self._watches: list[RemovableHandle] = []

    def watch(self, weights: Weights) -> None:
        """Watch weights whose B learns, until they have been updated once."""
        self._watches += [self._watch(weight) for weight in weights if weight.feedback.requires_grad]

    def _watch(self, weight: UntiedWeight) -> RemovableHandle:
        """Note the versions of W and B whenever B has got a gradient: the optimizer changes them next."""

        def note(_: Tensor) -> None:
            self._at_backward[id(weight.weight)] = version_of(weight.weight), version_of(weight.feedback)

        return weight.feedback.register_post_accumulate_grad_hook(note)  # type: ignore[no-any-return,no-untyped-call]

    def check(self, weights: Weights) -> None:
        """Refuse an optimizer that has updated W and not B.

        Raises:
            RuleError: Names the weights whose B was left out.
        """
        if not self._watches:
            return
        forgotten, was_updated = [], False
        for weight in weights:
            if weight.feedback.grad is None:
                continue  # nothing of this step was for it to learn
            now = version_of(weight.weight), version_of(weight.feedback)
            before = self._at_backward.get(id(weight.weight), now)
            was_updated |= now[0] > before[0]
            if now[0] > before[0] and now[1] == before[1]:
                forgotten.append(repr(weight.name))
        if was_updated:
            self.close()
        if forgotten:
            raise RuleError(
                "the optimizer updates the forward weights but not the feedback weights of "
                f"{', '.join(forgotten)}; make it after untie, from model.parameters(), and if the rule "
                "broadcasts errors, after the model has run once"
            )

    def close(self) -> None:
        """Take the hooks off the weights."""
        for watch in self._watches:
            watch.remove()
        self._watches.clear()

    def state_dict(self) -> dict[str, Any]:
        """Nothing has to be resumed."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing has to be resumed."""
