"""The schedule: which layers a rule mirrors after a step, the stalest within a share of the step's FLOPs.

An exact mirror's only error is staleness: how far W has moved since. The mirror sees that for itself, as
the angle by which B turns when a layer is mirrored again; that angle over the steps between is the layer's
pace, and pace times the steps since is how stale its B must be by now. W is never compared with B.

What is chosen is a function of layers' sizes and uses, of settings, and of angles that were seen. It is the
same on every machine, on every process of a job, and after a resume.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from feedbackpath.core.layers import UntiedWeight
from feedbackpath.mirror.cost import mirror_flops, step_flops
from feedbackpath.mirror.settings import Mirror, When

UNSEEN_PACE = 1.0  # degrees a step, until a layer has been seen to move
TURN_VALUES = 2**12  # of a B are looked at to tell how far mirroring has turned it
TURN_EVERY = 16  # so many mirrorings of a layer: to look costs a small layer more than to mirror it
LEAST_PACE = 0.25  # of the mean pace: a layer that was slow when last seen may be so no longer


@dataclass(frozen=True)
class Turns:
    """What does not change about the turns of one rule's layers.

    Attributes:
        names: The layers, in the order of the model.
        when: The settings.
        flops: What mirroring each of them costs.
        budget: FLOPs that may be spent a step on average; None: as many as it takes.
    """

    names: Sequence[str]
    when: When
    flops: Sequence[float]
    budget: float | None

    @cached_property
    def are_chosen(self) -> bool:
        """Whether some layers may have to wait: not where all can be mirrored every time."""
        has_limit = self.budget is not None and sum(self.flops) > self.budget * self.when.every
        return self.when.layers == "drift" and (has_limit or self.when.trigger_deg > 0)

    @property
    def steps_between(self) -> float:
        """Training steps from one mirroring of a layer to the next, on average, that the budget pays for."""
        every = float(self.when.every)
        if self.when.layers == "turn":
            return every * len(self.names)
        if self.when.layers == "alternate":
            return every * 2.0
        if self.when.layers == "all" or self.budget is None:
            return every
        return max(every, sum(self.flops) / self.budget) if self.budget else math.inf


def plan_turns(
    weights: Sequence[UntiedWeight],
    settings: Mirror,
    slopes: Mapping[str, float | None],
    uses: Mapping[str, float],
) -> Turns:
    """Work out what turns depend on: sizes, uses and settings alone.

    Args:
        weights: All that one rule governs.
        settings: How to mirror them, and when.
        slopes: The ``odd_slope`` of the activation behind each, by name.
        uses: How often a training step uses each value of a weight, by name; empty: not known, so that
            there is no budget.
    """
    share = settings.when.cost_share
    budget = None
    if share is not None and uses:
        budget = share * sum(step_flops(weight, uses.get(weight.name, 0.0)) for weight in weights)
    return Turns(
        [weight.name for weight in weights],
        settings.when if settings.is_exact else replace(settings.when, within_deg=None),
        [mirror_flops(weight, settings, slopes[weight.name]) for weight in weights],
        budget,
    )


class Schedule:
    """The turn that the layers of one rule are taken in, as it changes from step to step.

    Attributes:
        last: The step at which each layer was mirrored last.
        pace: Degrees a step by which each layer's B turned then.
        credit: FLOPs that may be spent and have not been.
    """

    def __init__(self) -> None:
        self.last: dict[str, int] = {}
        self.pace: dict[str, float] = {}
        self.credit = 0.0
        self._unread: list[tuple[str, int, Number]] = []

    def choose(self, turns: Turns, step: int) -> list[int]:
        """Return the positions, in ``turns.names``, of the layers to mirror after this step, from 1."""
        when, count = turns.when, len(turns.names)
        if step % when.every:
            return []
        turn = step // when.every - 1
        if when.layers == "turn":
            return [turn % count]
        if when.layers == "alternate":
            return list(range(turn % 2, count, 2)) or [0]
        return self._stalest(turns, step) if turns.are_chosen else list(range(count))

    def _stalest(self, turns: Turns, step: int) -> list[int]:
        when, flops = turns.when, turns.flops
        self.credit = math.inf if turns.budget is None else self.credit + turns.budget * when.every
        self._read()
        stale = self._staleness(turns.names, step)
        most = math.inf if when.within_deg is None else when.within_deg
        chosen = []
        for position in sorted(range(len(stale)), key=stale.__getitem__, reverse=True):
            cannot_pay = flops[position] > self.credit  # and its turn is not passed on to a cheaper layer
            if stale[position] < when.trigger_deg or (cannot_pay and stale[position] < most):
                break
            chosen.append(position)
            self.credit = max(self.credit - flops[position], 0.0)
        self.credit = min(self.credit, max(flops))
        return sorted(chosen)

    def _staleness(self, names: Sequence[str], step: int) -> list[float]:
        """Return by how many degrees each layer's B must be behind its W."""
        paces = [self.pace.get(name, UNSEEN_PACE) for name in names]
        least = LEAST_PACE * sum(paces) / len(paces) + 1e-9
        ages = [step - self.last.get(name, 0) for name in names]
        return [max(pace, least) * age for pace, age in zip(paces, ages, strict=True)]

    def note(self, name: str, step: int, turn: Tensor | None) -> None:
        """Note that a layer was mirrored; and how far its B moved, in its own lengths, where seen."""
        if turn is not None and step > self.last.get(name, 0):
            self._unread.append((name, step - self.last.get(name, 0), Number(turn)))
        self.last[name] = step

    def _read(self) -> None:
        """Take up the angles that were seen at earlier steps: all of them, on every kind of device."""
        for name, age, turn in self._unread:
            # The chord of a turn, in lengths: a B that is as new as random has turned by 90 degrees.
            self.pace[name] = math.degrees(2.0 * math.asin(min(turn.read() / 2.0, 1.0))) / age
        self._unread.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return plain values that ``load_state_dict`` takes up."""
        unread = [(name, age, turn.read()) for name, age, turn in self._unread]
        return {
            "last": dict(self.last),
            "pace": dict(self.pace),
            "credit": self.credit,
            "unread": unread,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where ``state`` was taken."""
        self.last, self.pace = dict(state["last"]), dict(state["pace"])
        self.credit = state["credit"]
        self._unread = [(name, age, Number(turn)) for name, age, turn in state["unread"]]


class Number:
    """A number that a device may still be working out.

    A GPU sends it to the host as soon as it is there. By the next step it has long come, and reading it does
    not hold up what was queued since.

    Args:
        value: One value, or a plain number.
    """

    def __init__(self, value: Tensor | float) -> None:
        self._value = value
        self._came: torch.cuda.Event | None = None
        if isinstance(value, Tensor) and value.is_cuda:
            self._value = value.to("cpu", non_blocking=True)
            self._came = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._came.record(torch.cuda.current_stream(value.device))

    def read(self) -> float:
        """Return the number; wait for it where it has not come yet."""
        if self._came is not None:
            self._came.synchronize()
        return float(self._value)


def sample_of(feedback: Tensor) -> Tensor:
    """Copy some of a B: enough to tell how far it turns."""
    rows = feedback.detach()[:: math.ceil(feedback.numel() / TURN_VALUES)]
    return rows.to(torch.float32, copy=True)


def turn_of(before: Tensor, after: Tensor) -> Tensor:
    """Return how far a B has moved, in its own lengths, as a tensor: nothing waits for it."""
    length = torch.linalg.vector_norm
    turn: Tensor = length(after - before) / length(after).clamp_min(1e-30)  # a W that is 0 gives such a B
    return turn
