"""What the three steps of mirror mode share: estimate, reading and schedule."""

import fnmatch
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from feedbackpath.core.context import RuleContext, generator_of
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.errors import MirrorWarning, RuleError
from feedbackpath.mirror import fields
from feedbackpath.mirror.activations import Activation, find_activations, odd_slope, out_of_place
from feedbackpath.mirror.pairs import Pairs
from feedbackpath.mirror.schedule import Schedule
from feedbackpath.mirror.settings import Mirror


class MirrorContext:
    """What estimate, reading and schedule share of one path. Everything here is by the weight's name.

    Args:
        path: What a rule may know of the path: its model, its seed, and the activations that were given.

    Attributes:
        path: The same.
        activations: What follows each layer, as far as it is known.
        odd_slopes: The ``odd_slope`` of each of them.
        passes: How often each weight has been mirrored; absent: never. The noise of a pass depends on the
            path's seed, the weight, and this number alone.
        uses: How often a training step uses each value of a weight; empty until a step has been seen.
        schedules: By the name of a rule's first weight, whose turn it is among that rule's weights.
        pairs: Views of weights that are mirrored the short way.
    """

    def __init__(self, path: RuleContext) -> None:
        self.path = path
        self.activations: dict[str, Activation] = {}
        self.odd_slopes: dict[str, float | None] = {}
        self.passes: dict[str, int] = {}
        self.uses: dict[str, float] = {}
        self.schedules: dict[str, Schedule] = {}
        self.pairs: dict[str, Pairs] = {}
        self._warned: set[tuple[str, str]] = set()

    def find_activations(self, weights: Sequence[UntiedWeight]) -> None:
        """Know the activation that follows each weight's layer, from what was given or by tracing.

        Raises:
            RuleError: Names all the layers for which an activation has to be given.
        """
        unknown = [weight.name for weight in weights if weight.name not in self.activations]
        if not unknown:
            return
        found = find_activations(self.path.model, unknown)
        for name in unknown:
            for pattern, activation in self.path.activations.items():
                if fnmatch.fnmatchcase(name, pattern):
                    found[name] = out_of_place(activation)
        missing = [repr(name) for name in unknown if name not in found]
        if missing:
            raise RuleError(
                f"mirror mode: the activations that follow {', '.join(missing)} cannot be found; give them, "
                "as in untie(model, 'wm', activations={'encoder.*': torch.relu, 'head': torch.nn.Identity()})"
            )
        self.activations |= found
        self.odd_slopes |= {name: odd_slope(activation) for name, activation in found.items()}

    def generator(self, weight: UntiedWeight, rank: int = 0) -> torch.Generator:
        """Return the random numbers of a weight's next pass.

        Args:
            weight: The weight.
            rank: The device's place among those that fire noise of their own.
        """
        key = f"{self.path.seed}/{self.passes.get(weight.name, 0)}/{weight.name}/{weight.feedback_name}"
        return generator_of(f"{key}/{rank}" if rank else key, weight.feedback.device)

    def may_be_dead(self, weight: UntiedWeight, settings: Mirror) -> bool:
        """Whether neurons may be silent: one that has answered always does, if no bias moves it."""
        is_new = weight.name not in self.passes
        return is_new or fields.open_bias(weight, settings.block_bias) is not None

    def warn_once(self, kind: str, name: str, message: str) -> None:
        """Warn of something in a layer, if that has not been done before."""
        if (kind, name) not in self._warned:
            self._warned.add((kind, name))
            warnings.warn(f"mirror mode: {message}", MirrorWarning, stacklevel=3)

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs, as plain values."""
        schedules = {name: schedule.state_dict() for name, schedule in self.schedules.items()}
        return {"passes": dict(self.passes), "uses": dict(self.uses), "schedules": schedules}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to where ``state`` was taken."""
        self.passes, self.uses = dict(state["passes"]), dict(state["uses"])
        self.schedules = {name: Schedule() for name in state["schedules"]}
        for name, schedule in self.schedules.items():
            schedule.load_state_dict(state["schedules"][name])
