"""Mirror mode: a layer's neurons fire noise, and B learns W from the covariance with what comes out.

Akrout et al. 2019, Section 4, equations 5-7 and 21, Algorithm 1, Appendix D.2. Three steps, each a file:

- the estimate, what noise tells of one weight: ``estimator`` (``codes``, ``noise``, and ``pairs`` in short);
- the reading, what B makes of it: ``readings``, and ``gain``, which warns where that is far from W's size;
- the schedule, whose turn it is: ``schedule``, from what ``cost`` counts.

What they share is a ``MirrorContext``.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from feedbackpath.core.context import RuleContext
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.errors import MirrorWarning, RuleError
from feedbackpath.mirror import fields
from feedbackpath.mirror.context import MirrorContext
from feedbackpath.mirror.cost import UseCounter
from feedbackpath.mirror.estimator import estimate, replace_by_pairs
from feedbackpath.mirror.gain import check_gain
from feedbackpath.mirror.readings import learn
from feedbackpath.mirror.schedule import TURN_EVERY, Schedule, Turns, plan_turns, sample_of, turn_of
from feedbackpath.mirror.settings import Mirror, refuse_no_count


class MirrorMode(MirrorContext):
    """Mirror mode of one path.

    Args:
        path: What a rule may know of the path.
    """

    def __init__(self, path: RuleContext) -> None:
        super().__init__(path)
        self._turns: dict[str, tuple[Mirror, Turns]] = {}
        self._watched: list[UntiedWeight] = []
        self._counter: UseCounter | None = None

    @torch.no_grad()
    def run(self, weights: Sequence[UntiedWeight], settings: Mirror, passes: int = 1) -> None:
        """Let each layer fire noise in its turn, ``passes`` times, and let its B learn from it.

        Forward weights, gradients, running statistics and the global random numbers stay untouched.

        Raises:
            RuleError: ``passes`` is no whole number of at least 1.
        """
        refuse_no_count("mirror mode: passes", passes)
        self.find_activations(weights)
        for _ in range(passes):
            for weight in weights:
                mirror_once(self, weight, settings)
        self.pairs.clear()  # views keep memory alive: they are for those who mirror after every step

    def run_until(
        self, weights: Sequence[UntiedWeight], settings: Mirror, angle_deg: float, most_passes: int
    ) -> None:
        """Mirror each layer, all passes averaged alike, until its B is within an angle of its W.

        Args:
            weights: The weights to mirror, from the beginning.
            settings: How, in the calibrated reading.
            angle_deg: When to stop, in degrees; judged as ``average_until`` does.
            most_passes: When to give up.

        Raises:
            RuleError: Another reading settles elsewhere than at W; or ``most_passes`` is no count.

        Warns:
            MirrorWarning: Names the layers that did not get there, and the samples that they would take.
        """
        refuse_no_count("mirror mode: most_passes", most_passes)
        if settings.reading != "calibrated":
            raise RuleError(
                f"mirror: until_angle_deg needs the 'calibrated' reading, not {settings.reading!r}"
            )
        self.find_activations(weights)
        left = [average_until(self, weight, settings, angle_deg, most_passes) for weight in weights]
        short = ", ".join(
            f"{weight.name!r} ({angle:.1f} degrees, would take "
            f"{_count_samples(weight, settings, angle_deg)} samples)"
            for weight, angle in zip(weights, left, strict=True)
            if angle > angle_deg
        )
        if short:
            warnings.warn(
                f"mirror mode: {most_passes} passes leave more than {angle_deg:g} degrees in {short}; allow "
                "more passes or more samples, or use orthogonal codes",
                MirrorWarning,
                stacklevel=3,
            )

    @torch.no_grad()
    def run_due(self, weights: Sequence[UntiedWeight], settings: Mirror, step: int) -> None:
        """Mirror the weights whose turn it is after a training step: see ``When``.

        Args:
            weights: All that one rule governs.
            settings: How to mirror them, and when.
            step: The step's number, from 1.
        """
        self._end_watch()
        if settings.when.layers == "drift" and not self.uses and weights[0] not in self._watched:
            self.watch_step(weights)  # this is a copy, made before there was a step to see
        turns = self._turns_of(weights, settings)
        schedule = self.schedules.setdefault(turns.names[0], Schedule())
        due = set(schedule.choose(turns, step))
        # What has never been mirrored cannot wait: its B is still random.
        due.update(position for position, name in enumerate(turns.names) if name not in self.passes)
        for position in sorted(due):
            weight = weights[position]
            is_seen = turns.are_chosen and self.passes.get(turns.names[position], 0) % TURN_EVERY == 1
            before = sample_of(weight.feedback) if is_seen else None
            mirror_once(self, weight, settings)
            turn = None if before is None else turn_of(before, sample_of(weight.feedback))
            schedule.note(turns.names[position], step, turn)

    def _turns_of(self, weights: Sequence[UntiedWeight], settings: Mirror) -> Turns:
        """Return what the turns of some weights depend on; it is worked out once, when costs are known."""
        known, turns = self._turns.get(weights[0].name, (None, None))
        if turns is None or known is not settings:
            self.find_activations(weights)
            turns = plan_turns(weights, settings, self.odd_slopes, self.uses)
            self._turns[weights[0].name] = settings, turns
        return turns

    def watch_step(self, weights: Sequence[UntiedWeight]) -> None:
        """Count how often the first training step uses each weight: a schedule has to know what it costs."""
        self.close()
        self._watched += weights
        self._counter = UseCounter(self._watched, self.path)

    def _end_watch(self) -> None:
        if self._counter is not None:
            self._counter.stop()
            self.uses = self._counter.share() or self.uses
            self._counter = None
            self._turns.clear()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to where ``state`` was taken."""
        super().load_state_dict(state)
        self._turns.clear()
        self.close()
        # Once the first step is over, the next may be of another size.
        self._counter = UseCounter(self._watched, self.path) if self._watched and not self.uses else None

    def close(self) -> None:
        """Take all hooks off the model, and let go of its memory."""
        self.pairs.clear()
        if self._counter is not None:
            self._counter.stop()


def mirror_once(context: MirrorContext, weight: UntiedWeight, settings: Mirror) -> None:
    """Do one pass through one layer: estimate, then reading."""
    if replace_by_pairs(context, weight, settings):
        return
    found = estimate(context, weight, settings)
    check_gain(context, found, settings)
    learn(context, found, settings)


@torch.no_grad()
def average_until(
    context: MirrorContext, weight: UntiedWeight, settings: Mirror, angle_deg: float, most_passes: int
) -> float:
    """Average passes until they agree well enough; return the angle that is left, in degrees, as they tell.

    The angle is judged by how much passes differ among themselves; W is never looked at. After n of
    them B moves by ``|dB|^2 = v / (n (n - 1))`` with v a pass's variance, and v / n is left in B::

        tan^2(angle) = (n - 1) |dB|^2 / (|B|^2 - (n - 1) |dB|^2)
    """
    context.passes.pop(weight.name, None)
    reached = 90.0
    for number in range(1, most_passes + 1):
        before = weight.feedback.detach().clone()
        learn(context, estimate(context, weight, settings), settings, 1.0 / number)
        if settings.is_exact:
            return 0.0
        noise = (number - 1) * float((weight.feedback - before).square().sum())
        signal = float(weight.feedback.square().sum()) - noise
        if number > 1 and signal > 0:
            reached = math.degrees(math.atan(math.sqrt(noise / signal)))
        if reached <= angle_deg:
            break
    return reached


def _count_samples(weight: UntiedWeight, settings: Mirror, angle_deg: float) -> int:
    """Return how many samples, in all, bring a weight's B to an angle."""
    return settings.design.samples_for(fields.inputs_in_mirror_mode(weight, settings.field), angle_deg)
