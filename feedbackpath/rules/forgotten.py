"""A notice that ``path.step()`` was forgotten: what a rule does after an update, it does only there."""

import warnings
from collections.abc import Sequence

from feedbackpath.core.layers import UntiedWeight
from feedbackpath.core.pytorch import version_of
from feedbackpath.errors import ForgottenStepWarning, level_outside
from feedbackpath.rules.base import Rule, Weights
from feedbackpath.rules.choice import name_of

PATIENCE = 10  # changes of a weight


class Reminder:
    """Warn once if weights were updated many times and their path was never stepped, nor mirrored.

    Each write in place counts up a tensor's version, which is read here: nothing is done in training. Weights
    without gradients are not being trained: an average, or a model that is filled from files. Where B learns
    by the optimizer (Kolen-Pollack), a rule's step only checks, and nothing is said.
    """

    def __init__(self, groups: Sequence[tuple[Rule, Weights]]) -> None:
        acting = [
            (rule, weights)
            for rule, weights in groups
            if type(rule).step is not Rule.step and not rule.learns
        ]
        self._rules = sorted({name_of(rule) for rule, _ in acting})
        self._weights: list[UntiedWeight] = [weight for _, weights in acting for weight in weights]
        self._began = [_version_of(weight) for weight in self._weights]

    def dismiss(self) -> None:
        """Stay silent from now on."""
        self._weights = []

    def remind(self) -> None:
        """Look whether weights have changed.

        Warns:
            ForgottenStepWarning: They have, and nobody has told the path.
        """
        since = zip(self._weights, self._began, strict=False)
        if any(w.weight.grad is not None and _version_of(w) - began > PATIENCE for w, began in since):
            self.dismiss()
            warnings.warn(
                f"weights have changed many times, and path.step() was never called: what "
                f"{', '.join(map(repr, self._rules))} does after an update was not done; call path.step() "
                "after each optimizer.step()",
                ForgottenStepWarning,
                stacklevel=level_outside(),
            )


def _version_of(weight: UntiedWeight) -> int:
    return 0 if weight.weight.is_inference() else version_of(weight.weight)
