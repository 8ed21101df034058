"""Mirror mode: a layer's neurons fire noise, and B learns W from the covariance with what comes out.

Akrout et al. 2019, Section 4, equations 5-7 and 21, Algorithm 1, Appendix D.2. What noise tells of a weight:
``feedbackpath.mirror.estimator``. What B makes of it: ``feedbackpath.mirror.readings``.
"""

import fnmatch
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from feedbackpath.core.context import RuleContext, generator_of
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.core.passage import forward_passage
from feedbackpath.errors import MirrorWarning, RuleError
from feedbackpath.mirror import fields
from feedbackpath.mirror.activations import Activation, find_activations, odd_slope, out_of_place
from feedbackpath.mirror.cost import UseCounter, mirror_budget, mirror_work
from feedbackpath.mirror.designs import Design
from feedbackpath.mirror.devices import average_over_devices, count_devices, own_rank
from feedbackpath.mirror.estimator import Estimate, estimate_with_codes, estimate_with_noise
from feedbackpath.mirror.gain import has_strange_gain
from feedbackpath.mirror.pairs import Pairs, can_pair
from feedbackpath.mirror.rates import RATES
from feedbackpath.mirror.readings import learn_from
from feedbackpath.mirror.schedule import TURN_EVERY, Schedule, sample_of, turn_of
from feedbackpath.mirror.settings import Mirror, When


@dataclass(frozen=True)
class _Turns:
    """What the turns of one rule's weights depend on.

    Attributes:
        settings: How they are mirrored.
        when: And when.
        names: Of the weights, in the order of the model.
        work: What mirroring each of them costs.
        budget: What may be spent a step on average; None: anything.
        schedule: Whose turn it is.
    """

    settings: Mirror
    when: When
    names: list[str]
    work: list[float]
    budget: float | None
    schedule: Schedule

    @cached_property
    def are_chosen(self) -> bool:
        """Whether some weights may have to wait."""
        return self.schedule.is_selective(self.when, self.work, self.budget)


class MirrorMode:
    """Mirror mode of one model: its layers' activations, its noise, and how many passes it has made.

    Args:
        context: Of the model's path. The noise of a pass depends on its seed and on the pass's number alone.

    Attributes:
        passes: How often each weight has been mirrored, by its name; absent: never.
        schedules: By the name of a group's first weight, whose turn it is in that group.
        uses: How often a training step uses each value of a weight; empty until a step has been seen.
    """

    def __init__(self, context: RuleContext) -> None:
        self.context = context
        self.model = context.model
        self.given = context.activations
        self.passes: dict[str, int] = {}
        self.schedules: dict[str, Schedule] = {}
        self.uses: dict[str, float] = {}
        self._turns: dict[str, _Turns] = {}
        self._counter: UseCounter | None = None
        self._watched: list[UntiedWeight] = []
        self._activations: dict[str, Activation] = {}
        self._odd_slopes: dict[str, float | None] = {}
        self._pairs: dict[str, Pairs] = {}
        self._strange_gains: set[str] = set()
        self._dead: set[str] = set()

    @torch.no_grad()
    def run(self, weights: Sequence[UntiedWeight], settings: Mirror, passes: int = 1) -> None:
        """Let each layer fire noise in its turn, ``passes`` times, and let its B learn from it.

        Forward weights, gradients, running statistics and the global random numbers stay untouched.
        """
        self.find_activations(weights)
        for _ in range(passes):
            for weight in weights:
                self._mirror_weight(weight, settings)
        self._pairs.clear()  # views keep memory alive: they are for those who mirror after every step

    def run_until(
        self, weights: Sequence[UntiedWeight], settings: Mirror, angle_deg: float, most_passes: int
    ) -> None:
        """Mirror each layer, all passes averaged alike, until its B is within an angle of its W.

        The angle is judged by how much passes differ among themselves; W is never looked at. After n of
        them B moves by ``|dB|^2 = v / (n (n - 1))`` with v a pass's variance, and v / n is left in B::

            tan^2(angle) = (n - 1) |dB|^2 / (|B|^2 - (n - 1) |dB|^2)

        Args:
            weights: The weights to mirror, from the beginning.
            settings: How, in the calibrated reading.
            angle_deg: When to stop, in degrees.
            most_passes: When to give up.

        Raises:
            RuleError: Another reading settles elsewhere than at W.

        Warns:
            MirrorWarning: Names the layers that did not get there, and the samples that they would take.
        """
        if settings.reading != "calibrated":
            raise RuleError(
                f"mirror: until_angle_deg needs the 'calibrated' reading, not {settings.reading!r}"
            )
        self.find_activations(weights)
        short = {
            weight: reached
            for weight in weights
            if (reached := self._average_until(weight, settings, angle_deg, most_passes)) > angle_deg
        }
        if short:
            named = ", ".join(
                f"{weight.name!r} ({reached:.1f} degrees, would take "
                f"{_count_samples(weight, settings, angle_deg)} samples)"
                for weight, reached in short.items()
            )
            warnings.warn(
                f"mirror mode: {most_passes} passes leave more than {angle_deg:g} degrees in {named}; allow "
                "more passes or more samples, or use orthogonal codes",
                MirrorWarning,
                stacklevel=3,
            )

    @torch.no_grad()
    def _average_until(
        self, weight: UntiedWeight, settings: Mirror, angle_deg: float, most_passes: int
    ) -> float:
        """Average passes until they agree well enough; return the angle that is left, as they tell."""
        self.passes.pop(weight.name, None)
        reached = 90.0
        for number in range(1, most_passes + 1):
            before = weight.feedback.detach().clone()
            found = self._estimate(weight, settings)
            learn_from(weight, found, settings, 1.0 / number, self._find_dead(weight, found, settings))
            self.passes[weight.name] = number
            if settings.is_exact:
                return 0.0
            noise = (number - 1) * float((weight.feedback - before).square().sum())
            signal = float(weight.feedback.square().sum()) - noise
            if number > 1 and signal > 0:
                reached = math.degrees(math.atan(math.sqrt(noise / signal)))
            if reached <= angle_deg:
                break
        return reached

    @torch.no_grad()
    def run_due(self, weights: Sequence[UntiedWeight], settings: Mirror, step: int) -> None:
        """Mirror the weights whose turn it is after a training step: see ``When``.

        Args:
            weights: All that one rule governs.
            settings: How to mirror them, and when.
            step: The step's number, from 1.
        """
        self._stop_counting()
        turns = self._turns_of(weights, settings)
        names, schedule = turns.names, turns.schedule
        due = set(schedule.choose(names, step, turns.when, turns.work, turns.budget))
        # What has never been mirrored cannot wait: its B is still random.
        due.update(position for position, name in enumerate(names) if name not in self.passes)
        for position in sorted(due):
            weight, passes = weights[position], self.passes.get(names[position], 0)
            before = sample_of(weight.feedback) if turns.are_chosen and passes % TURN_EVERY == 1 else None
            self._mirror_weight(weight, settings)
            turn = None if before is None else turn_of(before, sample_of(weight.feedback))
            schedule.note(weight.name, step, turn)

    def _turns_of(self, weights: Sequence[UntiedWeight], settings: Mirror) -> "_Turns":
        """Return what the turns of some weights depend on; it is worked out once, when costs are known."""
        key = weights[0].name
        turns = self._turns.get(key)
        if turns is None or turns.settings is not settings:
            self.find_activations(weights)
            when = settings.when if settings.is_exact else replace(settings.when, within_deg=None)
            turns = self._turns[key] = _Turns(
                settings,
                when,
                [weight.name for weight in weights],
                [mirror_work(weight, settings, self._odd_slopes[weight.name]) for weight in weights],
                self._budget(weights, settings.when.cost_share),
                self.schedules.setdefault(key, Schedule()),
            )
        return turns

    def watch_step(self, weights: Sequence[UntiedWeight]) -> None:
        """Count how often the first training step uses each weight: a schedule has to know what it costs."""
        self.close()
        self._watched += weights
        self._counter = UseCounter(self._watched)

    def close(self) -> None:
        """Take all hooks off the model, and let go of its memory."""
        self._pairs.clear()
        if self._counter is not None:
            self._counter.stop()

    def _stop_counting(self) -> None:
        if self._counter is not None:
            self._counter.stop()
            self.uses = self._counter.share() or self.uses
            self._counter = None
            self._turns.clear()

    def _budget(self, weights: Sequence[UntiedWeight], cost_share: float | None) -> float | None:
        """Return what a step may spend on mirroring; None: no limit, or no step was seen to measure it by."""
        if cost_share is None or not self.uses:
            return None
        return mirror_budget(weights, self.uses, cost_share)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what can be made anew, and views of weights, which would be copied or cannot be saved."""
        return {**self.__dict__, "_pairs": {}}

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs, as plain values."""
        schedules = {name: schedule.state_dict() for name, schedule in self.schedules.items()}
        return {"passes": dict(self.passes), "uses": dict(self.uses), "schedules": schedules}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to where ``state`` was taken."""
        self.passes, self.uses = dict(state["passes"]), dict(state["uses"])
        self._turns.clear()
        self.schedules = {name: Schedule() for name in state["schedules"]}
        for name, schedule in self.schedules.items():
            schedule.load_state_dict(state["schedules"][name])
        self.close()
        # Once the first step is over, the next may be of another size.
        self._counter = UseCounter(self._watched) if self._watched and not self.uses else None

    @property
    def activations(self) -> dict[str, Activation]:
        """What is known so far of the activations that follow layers, by the weight's name."""
        return dict(self._activations)

    def find_activations(self, weights: Sequence[UntiedWeight]) -> None:
        """Know the activation that follows each weight's layer, from what was given or by tracing.

        Raises:
            RuleError: Names all the layers for which an activation has to be given.
        """
        unknown = [weight.name for weight in weights if weight.name not in self._activations]
        if not unknown:
            return
        found = find_activations(self.model, unknown)
        for name in unknown:
            for pattern, activation in self.given.items():
                if fnmatch.fnmatchcase(name, pattern):
                    found[name] = out_of_place(activation)
        missing = [repr(name) for name in unknown if name not in found]
        if missing:
            raise RuleError(
                f"mirror mode: the activations that follow {', '.join(missing)} cannot be found; give them, "
                "as in untie(model, 'wm', activations={'encoder.*': torch.relu, 'head': torch.nn.Identity()})"
            )
        self._activations |= found
        self._odd_slopes |= {name: odd_slope(activation) for name, activation in found.items()}

    def _mirror_weight(self, weight: UntiedWeight, settings: Mirror) -> None:
        if self._fire_pairs(weight, settings):
            self.passes[weight.name] += 1
            return
        found = self._estimate(weight, settings)
        if (self.passes.get(weight.name, 0) + 1) % settings.memory_passes == 0:
            self._check_gain(found, settings)
        self.learn(weight, found, settings)

    def _fire_pairs(self, weight: UntiedWeight, settings: Mirror) -> bool:
        """Mirror a weight the short way, if that is open and its neurons have answered before."""
        if self._may_be_dead(weight, settings):
            return False
        pairs = self._pairs.get(weight.name)
        if pairs is None or not pairs.are_of(weight, settings):
            if not can_pair(weight, settings, self._odd_slopes[weight.name]):
                return False
            pairs = self._pairs[weight.name] = Pairs(weight, settings)
        if pairs.can_fire:
            with forward_passage(weight.weight):
                pairs.fire()
        return pairs.can_fire

    def learn(self, weight: UntiedWeight, found: Estimate, settings: Mirror) -> None:
        """Let one B learn from what a pass found; plain averaging until its memory is full."""
        passes = self.passes.get(weight.name, 0)
        share = settings.share_replaced
        if settings.reading == "calibrated":
            share = max(share, 1.0 / (passes + 1))
        learn_from(weight, found, settings, share, self._find_dead(weight, found, settings))
        self.passes[weight.name] = passes + 1

    def _check_gain(self, found: Estimate, settings: Mirror) -> None:
        """Warn once of a layer whose B has settled far from W's size; 'calibrated' settles at it."""
        name = found.weight.name
        is_in_doubt = settings.reading != "calibrated" and name not in self._strange_gains
        if is_in_doubt and has_strange_gain(found, settings):
            self._strange_gains.add(name)

    def _estimate(self, weight: UntiedWeight, settings: Mirror) -> Estimate:
        with forward_passage(weight.weight):
            found = self._fire(weight, settings)
        if count_devices(settings) > 1:
            average_over_devices(found)
        return found

    def _fire(self, weight: UntiedWeight, settings: Mirror) -> Estimate:
        activation, design = self._activations[weight.name], settings.design
        rates = RATES[settings.rates](settings.baseline, not settings.baseline_known)
        sigma, block_bias = settings.deviation, settings.block_bias
        if not isinstance(design, Design):
            place = None if self._may_be_dead(weight, settings) else _own_memory(weight, settings)
            return estimate_with_codes(
                weight, activation, rates, sigma=sigma, block_bias=block_bias, scratch=place
            )
        inputs = fields.inputs_in_mirror_mode(weight, settings.field)
        return estimate_with_noise(
            weight, activation, rates, design=design, field=settings.field,
            num_samples=settings.samples_for(inputs, count_devices(settings)), sigma=sigma,
            block_bias=block_bias, generator=self._generator(weight, own_rank(settings)),
        )  # fmt: skip

    def _find_dead(self, weight: UntiedWeight, found: Estimate, settings: Mirror) -> Tensor | None:
        """Return which channels do not answer; warn once of a layer that has some. None: there are none."""
        if settings.reading != "calibrated" or not self._may_be_dead(weight, settings):
            return None
        is_dead = found.is_dead
        num_dead = int(is_dead.sum())
        if num_dead and weight.name not in self._dead:
            self._dead.add(weight.name)
            warnings.warn(
                f"mirror mode: {num_dead} of {len(is_dead)} neurons of {weight.name!r} do not answer "
                "to noise; their B stays as it is there (blocked biases or a larger sigma may help)",
                MirrorWarning,
                stacklevel=2,
            )
        return is_dead if num_dead else None

    def _may_be_dead(self, weight: UntiedWeight, settings: Mirror) -> bool:
        """Whether neurons may be silent: one that has answered always does, if no bias moves it."""
        is_new = weight.name not in self.passes
        return is_new or fields.open_bias(weight, settings.block_bias) is not None

    def _generator(self, weight: UntiedWeight, rank: int) -> torch.Generator:
        key = f"{self.context.seed}/{self.passes.get(weight.name, 0)}/{weight.name}/{weight.feedback_name}"
        return generator_of(f"{key}/{rank}" if rank else key, weight.weight.device)


def _count_samples(weight: UntiedWeight, settings: Mirror, angle_deg: float) -> int:
    """Return how many samples, in all, bring a weight's B to an angle."""
    return settings.design.samples_for(fields.inputs_in_mirror_mode(weight, settings.field), angle_deg)


def _own_memory(weight: UntiedWeight, settings: Mirror) -> Tensor | None:
    """Return B's own memory for the estimate that replaces it, where it can hold one; else None."""
    feedback = weight.feedback.detach()
    if not settings.is_exact or feedback.dtype not in (torch.float32, torch.float64):
        return None
    memory = feedback.as_strided((feedback.numel(),), (1,))
    place = fields.make_estimate(weight, feedback.dtype, memory)
    return memory if fields.is_laid_out_alike(place, feedback) else None
