"""Mirror mode: a layer's neurons fire noise, and B learns W from the covariance with what comes out.

Akrout et al. 2019, Section 4, equations 5-7 and 21, Algorithm 1, Appendix D.2. Four steps, each a file:

- the noise, what neurons fire: ``noise``, at what ``fields`` says of the layer;
- the estimate, what the layer's answers tell of W: ``estimate``, and ``shortcut`` for the exact read-out;
- the reading, what B makes of it: ``readings``;
- the schedule, whose turn it is: ``schedule``, from what ``cost`` counts.

What they share is a ``MirrorContext``.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from feedbackpath.core.context import RuleContext
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.core.pytorch import has_processes
from feedbackpath.errors import MirrorWarning, RuleError, level_outside
from feedbackpath.mirror import fields
from feedbackpath.mirror.context import MirrorContext
from feedbackpath.mirror.cost import UseCounter
from feedbackpath.mirror.estimate import Estimate, count_devices, estimate, own_rank
from feedbackpath.mirror.fields import Field
from feedbackpath.mirror.following import Following
from feedbackpath.mirror.passage import LISTENERS
from feedbackpath.mirror.plan import examples_of, memory_of, passes_to, plan_turns
from feedbackpath.mirror.readings import learn
from feedbackpath.mirror.schedule import Schedule, Turns
from feedbackpath.mirror.settings import Mirror, refuse_no_count
from feedbackpath.mirror.shortcut import can_read_out, read_out
from feedbackpath.mirror.wishart import obstacle


class MirrorMode(MirrorContext):
    """Mirror mode of one path.

    Args:
        path: What a rule may know of the path.
    """

    def __init__(self, path: RuleContext) -> None:
        super().__init__(path)
        self._turns: dict[str, tuple[Mirror, Turns]] = {}
        self._watched: list[UntiedWeight] = []
        self._followed: list[UntiedWeight] = []
        self._counter: UseCounter | None = None
        self._following: Following | None = None

    @torch.no_grad()
    def run(self, weights: Sequence[UntiedWeight], settings: Mirror, passes: int | None = 1) -> None:
        """Let each layer fire noise in its turn, ``passes`` times, and let its B learn from it.

        None: as many times as fill each B's memory, 5 / d where a pass replaces the share d of it.

        Forward weights, gradients, running statistics and the global random numbers stay untouched.

        Raises:
            RuleError: ``passes`` is no whole number of at least 1.
        """
        if passes is not None:
            refuse_no_count("mirror mode: passes", passes)
        self.find_activations(weights)
        for weight in weights:
            for _ in range(passes or memory_of(self, weight, settings)):
                mirror_once(self, weight, settings)

    @torch.no_grad()
    def begin(self, weights: Sequence[UntiedWeight], settings: Mirror, angle_deg: float) -> None:
        """Mirror each layer from the beginning, until its B is predicted to be within an angle of its W.

        Predicted from sizes and activations alone, so that no signal decides how long a layer mirrors. Codes
        tell all at once, and are fired once.

        Args:
            weights: The weights to mirror.
            settings: How, in the calibrated reading.
            angle_deg: The angle, in degrees.
        """
        self.find_activations(weights)
        for weight in weights:
            self.forget(weight)
            if settings.is_exact:
                mirror_once(self, weight, settings)
                continue
            count = passes_to(self, weight, settings, angle_deg)
            for number, found in enumerate(fire_alike(self, weight, settings, count), 1):
                learn(self, found, settings, 1.0 / number)

    def run_until(
        self, weights: Sequence[UntiedWeight], settings: Mirror, angle_deg: float, most_passes: int
    ) -> dict[str, float]:
        """Mirror each layer, all passes averaged alike, until its B is within an angle of its W.

        Args:
            weights: The weights to mirror, from the beginning.
            settings: How, in the calibrated reading.
            angle_deg: When to stop, in degrees; judged as ``average_until`` does.
            most_passes: When to give up.

        Returns:
            The angle that each layer is judged to have come to; not a number where that cannot be told.

        Raises:
            RuleError: Another reading settles elsewhere than at W; or ``most_passes`` is no count.

        Warns:
            MirrorWarning: Names the layers that did not get there, with the samples that they would take,
                and those whose angle cannot be told.
        """
        refuse_no_count("mirror mode: most_passes", most_passes)
        if settings.reading != "calibrated":
            raise RuleError(
                f"mirror: until_angle_deg needs the 'calibrated' reading, not {settings.reading!r}"
            )
        self.find_activations(weights)
        left = {
            weight.name: average_until(self, weight, settings, angle_deg, most_passes) for weight in weights
        }
        short = ", ".join(
            f"{weight.name!r} ({left[weight.name]:.1f} degrees{_advice(weight, settings, angle_deg)})"
            for weight in weights
            if left[weight.name] > angle_deg
        )
        untold = ", ".join(repr(name) for name, angle in left.items() if math.isnan(angle))
        messages = [
            f"{most_passes} passes leave more than {angle_deg:g} degrees in {short}; allow more passes or "
            "more samples",
            f"the angle of {untold} cannot be estimated: its passes do not differ, or show nothing",
        ]
        for names, message in zip((short, untold), messages, strict=True):
            if names:
                warnings.warn(f"mirror mode: {message}", MirrorWarning, stacklevel=level_outside())
        return left

    @torch.no_grad()
    def run_due(self, weights: Sequence[UntiedWeight], settings: Mirror, step: int) -> None:
        """Mirror the weights whose turn it is after a training step: see ``When``.

        Args:
            weights: All that one rule governs.
            settings: How to mirror them, and when.
            step: The step's number, from 1.
        """
        self.end_watch()
        self._take_up_seen()
        if not self.uses and weights[0] not in self._watched:
            self.watch_step(weights)  # this is a copy, made before there was a step to see
        turns = self._turns_of(weights, settings)
        schedule = self.schedules.setdefault(turns.names[0], Schedule())
        due = set(schedule.choose(turns, step))
        # What has never been mirrored cannot wait: its B is still random.
        due.update(position for position, name in enumerate(turns.names) if name not in self.passes)
        for position in sorted(due):
            mirror_once(self, weights[position], settings)
            schedule.last[turns.names[position]] = step

    def _turns_of(self, weights: Sequence[UntiedWeight], settings: Mirror) -> Turns:
        """Return what the turns of some weights depend on; it is worked out once, when costs are known."""
        known, turns = self._turns.get(weights[0].name, (None, None))
        if turns is None or known is not settings:
            self.find_activations(weights)
            turns = plan_turns(self, weights, settings)
            self._turns[weights[0].name] = settings, turns
        return turns

    def watch_step(self, weights: Sequence[UntiedWeight], *, counts: bool = True) -> None:
        """See what the first training step brings each layer, and what follows it.

        Args:
            weights: The layers' weights, beside those that are watched already.
            counts: Whether noise is to take the shape of the step's minibatch.

        Raises:
            RuleError: An activation that was given is none.
        """
        self.given_to([weight.name for weight in weights])
        self._followed += weights
        self._watched += weights if counts else []
        self._watch()

    def _watch(self) -> None:
        self.close()
        if self._followed:
            self._following = Following(self.path, self._followed)
        self._count()

    def _count(self) -> None:
        if self._counter is not None:
            self._counter.stop()
        self._counter = UseCounter(self._watched, self.path) if self._watched and not self.uses else None

    def find_activations(self, weights: Sequence[UntiedWeight]) -> None:
        """Know the activation that follows each weight's layer: see ``MirrorContext``."""
        if not has_processes():  # one process may mirror by hand while the others do not
            self._take_up_seen()
        super().find_activations(weights)

    def _take_up_seen(self) -> None:
        following = self._following
        if following is not None and (following.told or has_processes()) and self.see(following.found()):
            following.stop()
            self._following = None
            self._turns.clear()

    def end_watch(self) -> None:
        """Take up what a training step has shown."""
        if self._counter is not None:
            self._counter.stop()
            self._counter.share()
            self.uses, self.shapes = self._counter.uses or self.uses, self._counter.shapes or self.shapes
            self._counter = None
            self._turns.clear()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to where ``state`` was taken."""
        super().load_state_dict(state)
        self._turns.clear()
        self._count()  # once the first step is over, the next may be of another size

    def close(self) -> None:
        """Take all hooks off the model, and let go of its memory."""
        self._fields.clear()
        for watching in (self._counter, self._following):
            if watching is not None:
                watching.stop()


def mirror_once(context: MirrorContext, weight: UntiedWeight, settings: Mirror) -> None:
    """Do one pass through one layer: estimate, then reading."""
    name = weight.name
    if can_read_out(weight, context.activations[name], context.odd_slopes[name], settings):
        read_out(weight)
        field = context.field(weight, settings, None)
        context.pay(weight, field, examples_of(field, settings, None))
        context.passes[name] = context.passes.get(name, 0) + 1
    else:
        learn(context, fire(context, weight, settings), settings)


def fire(context: MirrorContext, weight: UntiedWeight, settings: Mirror) -> Estimate:
    """Let a layer fire the noise of its next pass; B does not learn yet."""
    return next(fire_alike(context, weight, settings, 1))


def fire_alike(
    context: MirrorContext, weight: UntiedWeight, settings: Mirror, passes: int
) -> Iterator[Estimate]:
    """Let a layer fire noise, as often as asked for and as much each time; B learns meanwhile."""
    seen = context.shape_to_fire(weight)
    field = context.field(weight, settings, seen)
    examples, rank = examples_of(field, settings, seen), own_rank(settings)
    _warn_of_each(context, field, settings)
    for _ in range(passes):
        generator = context.generator(weight, rank)
        context.pay(weight, field, examples)
        yield estimate(field, context.activations[weight.name], settings, examples, generator)


def _warn_of_each(context: MirrorContext, field: Field, settings: Mirror) -> None:
    """Warn once for each reason why noise that was to be drawn as a whole is fired; not in an audit."""
    name = field.weight.name
    if settings.draw == "each" or LISTENERS:
        return
    if (reason := obstacle(field, context.activations[name], settings)) is not None:
        context.warn_once(
            "each",
            reason,
            f"{name!r}, and perhaps other layers, fires each pattern in place of draw='whole': {reason}; "
            "path.plan says what a pass costs",
        )


@torch.no_grad()
def average_until(
    context: MirrorContext, weight: UntiedWeight, settings: Mirror, angle_deg: float, most_passes: int
) -> float:
    """Average passes until they agree well enough; return the angle that is left, in degrees, as they tell.

    The angle is judged by how much passes differ among themselves; W is never looked at. Pass n of them
    moves B by dB, with ``E|dB|^2 = v / (n (n - 1))``, v a pass's variance. So v is the mean of
    ``n (n - 1) |dB|^2``, v / n is left in B, and::

        tan^2(angle) = (v / n) / (|B|^2 - v / n)

    What all passes share, a read that errs alike each time, does not show. Neurons that do not answer are
    left out. Not a number: no two passes differ, or none tells anything.
    """
    context.forget(weight)
    feedback, total, reached = weight.feedback.detach(), 0.0, math.nan
    for number, found in enumerate(fire_alike(context, weight, settings, most_passes), 1):
        before = feedback.clone()
        answers = fields.per_neuron(~found.is_silent, weight)
        learn(context, found, settings, 1.0 / number)
        if number == 1:
            continue
        moved, size = (
            float(torch.where(answers, x, 0.0).double().square().sum()) for x in (feedback - before, feedback)
        )
        total += number * (number - 1) * moved
        noise = total / (number - 1) / number
        reached = math.nan
        if 0 < noise < size:
            reached = math.degrees(math.atan(math.sqrt(noise / (size - noise))))
        elif noise > 0:
            reached = 90.0
        if reached <= angle_deg or (noise == 0 and number > 2):
            break
    return reached


def _advice(weight: UntiedWeight, settings: Mirror, angle_deg: float) -> str:
    """Say how many samples, in all, bring a weight's B to an angle by theory."""
    if settings.fires_codes or count_devices(settings) > 1:
        return ""
    needed = settings.relative_variance(fields.inputs_of(weight), 1.0)
    return f", would take {math.ceil(needed / math.tan(math.radians(angle_deg)) ** 2)} samples"
