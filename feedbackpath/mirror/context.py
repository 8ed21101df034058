"""What the steps of mirror mode share of one path: activations, what training showed, and counts."""

import fnmatch
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from feedbackpath.core.context import RuleContext
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.core.pytorch import has_processes
from feedbackpath.errors import MirrorWarning, level_outside, pattern_of
from feedbackpath.mirror.activations import (
    Activation,
    find_activations,
    identity,
    odd_slope,
    out_of_place,
    refuse_no_activation,
)
from feedbackpath.mirror.cost import Dues, dues_of
from feedbackpath.mirror.estimate import Estimate
from feedbackpath.mirror.fields import Field, make_field
from feedbackpath.mirror.schedule import Schedule
from feedbackpath.mirror.settings import Mirror


class MirrorContext:
    """What estimate, reading and schedule share of one path. Everything here is by the weight's name.

    Args:
        path: What a rule may know of the path: its model, its seed, and the activations that were given.

    Attributes:
        path: The same.
        activations: What follows each layer, as far as it is known.
        seen: What a forward pass showed to follow it; None: different things, or no function of one number.
        odd_slopes: The ``odd_slope`` of each of them.
        passes: How often each weight has been mirrored; absent: never.
        samples: Answers of a neuron that B has learnt from, in all of them.
        signals: Of each neuron, what its slope is taken from: mean z (y - mean y) and mean z^2.
        uses: How often a training step uses each value of a weight; empty until a step has been seen.
        shapes: Shape of the input that a training step called each layer with, of all devices together.
        schedules: By the name of a rule's first weight, whose turn it is among that rule's weights.
        paid: What a network would have paid for all passes of this process; resuming begins anew with it.
    """

    def __init__(self, path: RuleContext) -> None:
        self.path = path
        self.activations: dict[str, Activation] = {}
        self.seen: dict[str, Activation | None] = {}
        self.odd_slopes: dict[str, float | None] = {}
        self.passes: dict[str, int] = {}
        self.samples: dict[str, int] = {}
        self.signals: dict[str, Tensor] = {}
        self.uses: dict[str, float] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.schedules: dict[str, Schedule] = {}
        self.paid: dict[str, Dues] = {}
        self._fields: dict[tuple[Any, ...], Field] = {}
        self._warned: set[tuple[str, str]] = set()

    def find_activations(self, weights: Sequence[UntiedWeight]) -> None:
        """Know the activation that follows each weight's layer.

        It is the one that was given; or that was seen in a forward pass; or that a trace finds. What none of
        them tells is taken as linear.

        Warns:
            MirrorWarning: Names, by pattern, the layers whose activation cannot be told.
        """
        unknown = [weight.name for weight in weights if weight.name not in self.activations]
        if not unknown:
            return
        given = self.given_to(unknown)
        unseen = [name for name in unknown if name not in given and name not in self.seen]
        traced = find_activations(self.path.model, unseen) if unseen else {}
        found = {**traced, **self.seen, **given}
        untold = [name for name in unknown if found.get(name) is None]
        if untold:
            self.warn_once(
                "untold",
                "",
                f"the activation after {', '.join(by_pattern(untold))} is unknown, and is taken as linear; "
                "if it is not, give it, as in untie(..., activations={'encoder.*': torch.relu}); if no "
                "training step was taken yet, take one first",
            )
        self.activations |= {name: found.get(name) or identity for name in unknown}
        self.odd_slopes |= {name: odd_slope(self.activations[name]) for name in unknown}

    def given_to(self, names: Sequence[str]) -> dict[str, Activation]:
        """Return the activations that were given for layers.

        Raises:
            RuleError: One is no activation.
        """
        given = {
            name: out_of_place(activation)
            for name in names
            for pattern, activation in self.path.activations.items()
            if fnmatch.fnmatchcase(name, pattern)
        }
        for name, activation in given.items():
            refuse_no_activation(name, activation)
        return given

    def see(self, found: Mapping[str, Activation | None]) -> bool:
        """Know what follows layers from a forward pass: it counts for more than what a trace told.

        Returns whether anything was seen, by all devices of a job: each of them has to call this.
        """
        if has_processes():  # the devices of a job mirror alike: only what all of them have seen
            told: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(told, list(found))
            found = {name: found[name] for name in found if all(name in names for names in told)}
        self.seen.update(found)
        for name in found:
            self.activations.pop(name, None)
        return bool(found)

    def field(self, weight: UntiedWeight, settings: Mirror, seen: tuple[int, ...] | None) -> Field:
        """Return what is fired at a weight: the maps that training showed, or, of codes, the smallest."""
        seen = None if settings.fires_codes else seen
        w = weight.weight
        key = weight.name, weight.weight_name, None if seen is None else seen[1:], w.shape, w.dtype, w.device
        if key not in self._fields or self._fields[key].weight.layer is not weight.layer:
            self._fields[key] = make_field(weight, seen)
        return self._fields[key]

    def shape_seen(self, weight: UntiedWeight) -> tuple[int, ...] | None:
        """Return the shape of what training's minibatch brought a layer; None: none has been seen."""
        seen = self.shapes.get(weight.name)
        return None if seen is None or len(seen) < 2 else seen

    def shape_to_fire(self, weight: UntiedWeight) -> tuple[int, ...] | None:
        """Return the shape that the next pass goes by; None, as if no minibatch had been seen, for the first.

        One small minibatch tells too little to begin with.
        """
        return self.shape_seen(weight) if weight.name in self.passes else None

    def count_samples(self, found: Estimate) -> int:
        """Return how many samples a weight has been mirrored with, those of a new pass included."""
        name = found.weight.name
        self.samples[name] = self.samples.get(name, 0) + found.num_samples
        return self.samples[name]

    def pay(self, weight: UntiedWeight, field: Field, examples: int) -> None:
        """Note what a network pays for a pass of so many examples."""
        self.paid[weight.name] = self.paid.get(weight.name, Dues()) + dues_of(field, examples)

    def forget(self, weight: UntiedWeight) -> None:
        """Begin anew with a weight."""
        for known in (self.passes, self.samples, self.signals):
            known.pop(weight.name, None)

    def generator(self, weight: UntiedWeight, rank: int = 0) -> torch.Generator:
        """Return the random numbers of a weight's next pass, which no other pass, weight or step has.

        Args:
            weight: The weight.
            rank: The device's place among those that fire noise of their own.
        """
        return self.path.generator(weight, f"mirror/{self.passes.get(weight.name, 0)}/{rank}")

    def warn_once(self, kind: str, name: str, message: str) -> None:
        """Warn of something in a layer, if that has not been done before."""
        if (kind, name) not in self._warned:
            self._warned.add((kind, name))
            warnings.warn(f"mirror mode: {message}", MirrorWarning, stacklevel=level_outside())

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs, as plain values."""
        return {
            "passes": dict(self.passes),
            "samples": dict(self.samples),
            "signals": {name: values.clone() for name, values in self.signals.items()},
            "uses": dict(self.uses),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "schedules": {name: schedule.state_dict() for name, schedule in self.schedules.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to where ``state`` was taken."""
        self.passes, self.uses = dict(state["passes"]), dict(state["uses"])
        self.samples, self.signals = dict(state["samples"]), dict(state["signals"])
        self.shapes = {name: tuple(shape) for name, shape in state["shapes"].items()}
        self.schedules = {name: Schedule() for name in state["schedules"]}
        for name, schedule in self.schedules.items():
            schedule.load_state_dict(state["schedules"][name])


def by_pattern(names: Sequence[str]) -> list[str]:
    """Return names, with one pattern for those that differ by numbers alone.

    Example:
        >>> by_pattern(["blocks.0.fc1", "blocks.1.fc1", "head"])
        ["'blocks.*.fc1' (2)", "'head'"]
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(pattern_of(name), []).append(name)
    return [
        repr(pattern) + f" ({len(group)})" if len(group) > 1 else repr(group[0])
        for pattern, group in groups.items()
    ]
