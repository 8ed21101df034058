"""The schedule: which layers a rule mirrors after a step (``When``).

What is chosen is a function of layers' sizes and uses, and of settings: the same on every machine, on every
process of a job, and after a resume. No weight is looked at.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from feedbackpath.mirror.settings import When


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

    @property
    def steps_between(self) -> float:
        """Training steps from one mirroring of a layer to the next, on average."""
        every = float(self.when.every)
        if self.when.layers == "turn":
            return every * len(self.names)
        if self.when.layers == "alternate":
            return every * 2.0
        if self.budget is None:
            return every
        return max(every, sum(self.flops) / self.budget) if self.budget else math.inf


class Schedule:
    """The turn that the layers of one rule are taken in, as it changes from step to step.

    Attributes:
        last: The step at which each layer was mirrored last.
        credit: FLOPs that may be spent and have not been.
    """

    def __init__(self) -> None:
        self.last: dict[str, int] = {}
        self.credit = 0.0

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
        if turns.budget is None:
            return list(range(count))
        self.credit += turns.budget * when.every
        chosen = []
        for position in sorted(range(count), key=lambda position: self.last.get(turns.names[position], 0)):
            if turns.flops[position] > self.credit:
                break  # its turn is not passed on to a cheaper layer
            chosen.append(position)
            self.credit -= turns.flops[position]
        self.credit = min(self.credit, max(turns.flops))
        return sorted(chosen)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values that ``load_state_dict`` takes up."""
        return {"last": dict(self.last), "credit": self.credit}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where ``state`` was taken."""
        self.last, self.credit = dict(state["last"]), state["credit"]
