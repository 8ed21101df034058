"""Which layers a rule mirrors after a step: those that have gone stalest, within a share of the step's work.

An exact mirror's only error is staleness: how far W has moved since. The mirror sees that for itself, as
the angle by which B turns when a layer is mirrored again; that angle over the steps between is the layer's
pace, and pace times the steps since is how stale its B must be by now. W is never compared with B.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from feedbackpath.mirror.settings import When

READ_TOGETHER = 32  # angles that a GPU has measured are read so many at once: its queue runs dry each time
UNSEEN_PACE = 1.0  # degrees a step, until a layer has been seen to move
TURN_VALUES = 2**12  # of a B are looked at to tell how far mirroring has turned it
TURN_EVERY = 16  # so many mirrorings of a layer: to look costs a small layer more than to mirror it
LEAST_PACE = 0.25  # of the mean pace: a layer that was slow when last seen may be so no longer


class Schedule:
    """The turn that the layers of one rule are taken in.

    All that it decides follows from work, angles and steps: it is the same on every process of a job.

    Attributes:
        last: The step at which each layer was mirrored last.
        pace: Degrees a step by which each layer's B turned then.
        credit: Work that may be done and has not been.
    """

    def __init__(self) -> None:
        self.last: dict[str, int] = {}
        self.pace: dict[str, float] = {}
        self.credit = 0.0
        self._unread: list[tuple[str, int, Tensor | float]] = []

    def choose(
        self, names: Sequence[str], step: int, when: When, work: Sequence[float], budget: float | None
    ) -> list[int]:
        """Return the positions, in ``names``, of the layers to mirror after this step.

        Args:
            names: The layers, in the order of the model.
            step: The step's number, from 1.
            when: The settings.
            work: What mirroring each of them costs.
            budget: What may be spent a step on average; None: anything.
        """
        if step % when.every:
            return []
        turn = step // when.every - 1
        if when.layers == "turn":
            return [turn % len(names)]
        if when.layers == "alternate":
            return list(range(turn % 2, len(names), 2)) or [0]
        if when.layers == "all":
            return list(range(len(names)))
        return self._stalest(names, step, when, work, budget)

    def is_selective(self, when: When, work: Sequence[float], budget: float | None) -> bool:
        """Whether there is anything to choose: not where all layers can be mirrored every time."""
        has_limit = budget is not None and sum(work) > budget * when.every
        return when.layers == "drift" and (has_limit or when.trigger_deg > 0)

    def _stalest(
        self, names: Sequence[str], step: int, when: When, work: Sequence[float], budget: float | None
    ) -> list[int]:
        if not self.is_selective(when, work, budget):
            return list(range(len(names)))
        self.credit = float("inf") if budget is None else self.credit + budget * when.every
        self._read()
        stale = self._staleness(names, step)
        most = float("inf") if when.within_deg is None else when.within_deg
        chosen = []
        for position in sorted(range(len(names)), key=stale.__getitem__, reverse=True):
            cannot_pay = work[position] > self.credit  # and its turn is not passed on to a cheaper layer
            if stale[position] < when.trigger_deg or (cannot_pay and stale[position] < most):
                break
            chosen.append(position)
            self.credit = max(self.credit - work[position], 0.0)
        self.credit = min(self.credit, max(work))
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
            self._unread.append((name, step - self.last.get(name, 0), turn))
        self.last[name] = step

    def _read(self) -> None:
        if not self._unread:
            return
        is_waiting = any(isinstance(turn, Tensor) and turn.is_cuda for _, _, turn in self._unread)
        if is_waiting and len(self._unread) < READ_TOGETHER:
            return
        for name, age, turn in self._unread:
            # The chord of a turn, in lengths: a B that is as new as random has turned by 90 degrees.
            self.pace[name] = math.degrees(2.0 * math.asin(min(float(turn) / 2.0, 1.0))) / age
        self._unread.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return plain values that ``load_state_dict`` takes up."""
        unread = [(name, age, float(turn)) for name, age, turn in self._unread]
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
        self._unread = [tuple(entry) for entry in state["unread"]]


def sample_of(feedback: Tensor) -> Tensor:
    """Copy some of a B: enough to tell how far it turns."""
    rows = feedback.detach()[:: math.ceil(feedback.numel() / TURN_VALUES)]
    return rows.to(torch.float32, copy=True)


def turn_of(before: Tensor, after: Tensor) -> Tensor:
    """Return how far a B has moved, in its own lengths, as a tensor: nothing waits for it."""
    length = torch.linalg.vector_norm
    turn: Tensor = length(after - before) / length(after).clamp_min(1e-30)  # a W that is 0 gives such a B
    return turn
