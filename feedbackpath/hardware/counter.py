"""Count what a chip's arrays do while a network trains: see ``Counter``."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from feedbackpath.core.layers import UntiedWeight
from feedbackpath.core.sendback import Target
from feedbackpath.errors import ChipError
from feedbackpath.hardware.counts import ARRAYS, PHASES, ArrayCounts, Phase, Work, numbers_of, reading
from feedbackpath.hardware.readout import can_read
from feedbackpath.mirror import Mirror, MirrorMode
from feedbackpath.mirror.cost import Dues, UseCounter, channels_of
from feedbackpath.mirror.layouts import view_of

if TYPE_CHECKING:
    from feedbackpath.hardware.arrays import Array
    from feedbackpath.hardware.chip import Chip

COPIES_W = "transports"  # the group of rules that compute B from W


def can_count(rule: Any) -> bool:
    """Whether all that a rule reads is known: forward and backward passes, mirror mode, and W itself."""
    is_mirror = isinstance(getattr(rule, "mirror", None), Mirror)
    is_known = rule.after_backward is None and not isinstance(rule.send_back, Target)
    is_two_arrays = rule.learns and rule.send_back.is_local and not rule.is_mirrorable  # pfa's B is a product
    return is_known and not is_two_arrays and (rule.group in (None, COPIES_W) or is_mirror)


def unknown_in(weights: Sequence[UntiedWeight]) -> str:
    """Name the rules, or else the layers, whose reads are not modelled; empty: all are."""
    rules = {one.layer.untied.rule.name for one in weights if not can_count(one.layer.untied.rule)}
    layers = [repr(one.name) for one in weights if not can_read(one)]
    return f"the rule {', '.join(sorted(rules))}" if rules else ", ".join(layers)


class Counter:
    """The work of a chip's arrays per training step, from now until ``stop``; ``chip.counting`` makes it.

    Reads are counted as the model runs, pulses where they arrive at cells, and mirror mode by what it has
    fired (``feedbackpath.mirror.cost``). Evaluation is not counted, nor what the digital side computes.

    Args:
        chip: The chip.
        weights: All weights of its model.

    Attributes:
        steps: Training steps that were counted.

    Raises:
        ChipError: A rule or a layer does what is not modelled.
    """

    def __init__(self, chip: "Chip", weights: Sequence[UntiedWeight]) -> None:
        self._chip, self._weights = chip, list(weights)
        if unknown := unknown_in(weights):
            raise ChipError(
                f"chip.counting: the work of arrays under {unknown} is not modelled; do not count it"
            )
        self._names = {id(weight.weight): weight.name for weight in reversed(self._weights)}
        context = self._weights[0].layer.untied.context
        self._mode = context.part(MirrorMode) if any(map(_mirrors, self._weights)) else None
        self._uses = UseCounter(self._weights, context)
        self._paid: dict[str, Dues] = {}
        self._is_in_rules = False
        self.reset()

    def __enter__(self) -> Self:
        """Count on."""
        return self

    def __exit__(self, *_: object) -> None:
        """Count no longer, whatever happened."""
        self.stop()

    def __reduce__(self) -> tuple[Any, ...]:
        """Let a copy of a chip be counted by nobody."""
        return type(None), ()

    def stop(self) -> None:
        """Count no longer; what was counted stays."""
        self._uses.stop()
        if self._chip.counter is self:
            self._chip.counter = None

    def reset(self) -> None:
        """Begin anew."""
        self.steps = 0
        self._found: dict[tuple[str, str, Phase], Work] = {}
        self._clear_uses()

    # What was counted

    def counts(self) -> dict[str, ArrayCounts]:
        """Return what the arrays of all layers do in a step: ``"W"``, ``"B"`` where there is one, ``"one"``.

        ``"one"`` is a single array in their place that is read both ways, and trained by bp as W is here.

        Raises:
            ChipError: No step was counted yet.
        """
        total: dict[str, ArrayCounts] = {}
        for of_layer in self.by_layer().values():
            for array, counts in of_layer.items():
                total[array] = total.get(array, ArrayCounts()) + counts
        return {array: total[array] for array in ARRAYS if array in total}

    def by_layer(self) -> dict[str, dict[str, ArrayCounts]]:
        """Return the same, layer by layer."""
        if not self.steps:
            raise ChipError("chip.counting: no training step was counted yet; path.step() ends one")
        return {one.name: self._of_layer(one) for one in self._own()}

    def _of_layer(self, weight: UntiedWeight) -> dict[str, ArrayCounts]:
        (n, m), found = _lines_of(weight), {}
        for array in ARRAYS if _has_b(weight) else ("W", "one"):
            work = {
                phase: self._found[weight.name, array, phase] * (1.0 / self.steps)
                for phase in PHASES
                if (weight.name, array, phase) in self._found
            }
            b, is_read_back = array == "B", "backward" in work
            device = self._chip.feedback_device if b else self._chip.device
            cells = (weight.feedback if b else weight.weight).numel() * device.cells_per_weight
            ins, outs = _lines_of_b(weight) if b else (m, n)
            ins, outs = (ins, outs) if is_read_back else (0, 0)
            found[array] = ArrayCounts(cells, ins + n * (not b), outs + m * (not b), work)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what was counted, as plain values."""
        return {"steps": self.steps, "found": {"\t".join(k): numbers_of(w) for k, w in self._found.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to where ``state`` was taken."""
        self.reset()
        self.steps = state["steps"]
        self._found = {tuple(key.split("\t")): Work(*numbers) for key, numbers in state["found"].items()}

    # What the chip tells

    def before_rules(self) -> None:
        """Hear that rules are about to write B."""
        self._is_in_rules = True
        self._paid = dict(self._mode.paid) if self._mode is not None else {}

    def after_rules(self, is_step: bool) -> None:
        """Take in what mirror mode has fired; and, where that ends a step, what has run in it."""
        for weight in self._own() if self._mode is not None else ():
            self._take_mirror(weight)
        if is_step:
            self.steps += 1
            for weight in self._weights:
                self._take_passes(weight)
            for weight in self._own():
                self._take_rule(weight)
            self._clear_uses()
        self._is_in_rules = False

    def asked(self, array: "Array") -> None:
        """Take in what is brought to an array for a change: that of each cell, or the two signals."""
        weight, phase = array.weight, self._phase_of(array)
        if phase == "mirror" or self._is_idle(array):
            return  # of the one, noise and the answers to it are there already
        if self._is_in_rules or not self._chip.takes_signals:
            self._add_to(array, Work(moved=array.values.numel()))
            return
        n, m = _lines_of(weight)
        alike = [one.name for one in self._weights if one.weight is weight.weight]
        uses, inputs = (
            sum(known.get(name, 0.0) for name in alike) for known in (self._uses.uses, self._uses.inputs)
        )
        new = m * (uses - self._sent(weight, alike))  # errors that no pass has brought to the array yet
        driven = Work(dac=uses * (n + m))
        if array.side == "feedback":
            self._add_to(array, driven + Work(moved=inputs + new))
            return
        self._add(weight, phase, driven + Work(moved=new if weight.is_tied else m * uses), "W")
        self._add(weight, phase, driven + Work(moved=new), "one")

    def wrote(self, array: "Array") -> None:
        """Take in a write: the reads that verify it; cells that take any value take no pulse."""
        if self._is_idle(array):
            return
        if array.device.is_ideal:
            self._add_to(array, Work(writes=array.values.numel()))
        elif self._chip.verify:
            self.read_cells(array, self._chip.verify)

    def read_cells(self, array: "Array", times: int = 1) -> None:
        """Take in that every cell of an array was read, one line after another."""
        self._add_to(array, _reading_cells(array.values) * times)

    def pulsed(self, array: "Array", pulses: Tensor) -> None:
        """Take in pulses as they arrive at cells."""
        work = Work(writes=int(pulses.count_nonzero()), pulses=float(pulses.sum(dtype=torch.float64)))
        if work.writes:
            self._add_to(array, work)

    # Parts of it

    def _own(self) -> list[UntiedWeight]:
        """Return one weight for each array."""
        return [weight for weight in self._weights if self._names[id(weight.weight)] == weight.name]

    def _clear_uses(self) -> None:
        for known in (self._uses.uses, self._uses.sent, self._uses.inputs):
            known.clear()

    def _sent(self, weight: UntiedWeight, names: Sequence[str]) -> float:
        """Return the uses of a weight whose error goes on to an earlier layer, by whatever way."""
        known = self._uses.sent if weight.is_tied or _is_local(weight) else self._uses.uses
        return sum(known.get(name, 0.0) for name in names) if weight.has_feedback or weight.is_tied else 0.0

    def _is_idle(self, array: "Array") -> bool:
        """Whether an optimizer leaves an array as it is: it has no gradient."""
        return not self._is_in_rules and array.values.grad is None

    def _phase_of(self, array: "Array") -> Phase:
        return "mirror" if self._is_in_rules and _mirrors(array.weight) else "update"

    def _add_to(self, array: "Array", work: Work) -> None:
        """Add work of an array; what W's does, the one array does too."""
        arrays = ("B",) if array.side == "feedback" else ("W", "one")
        self._add(array.weight, self._phase_of(array), work, *arrays)

    def _add(self, weight: UntiedWeight, phase: Phase, work: Work, *arrays: str) -> None:
        for array in arrays:
            key = (self._names[id(weight.weight)], array, phase)
            self._found[key] = self._found.get(key, Work()) + work

    def _take_passes(self, weight: UntiedWeight) -> None:
        """Add the forward and the backward pass of a step."""
        (n, m), cells = _lines_of(weight), weight.weight.numel()
        uses, inputs = (known.get(weight.name, 0.0) for known in (self._uses.uses, self._uses.inputs))
        sent = self._sent(weight, [weight.name])
        if uses:
            self._add(weight, "forward", reading(uses, n, m, cells, inputs), "W", "one")
        if not sent:
            return
        back = reading(sent, m, n, cells, sent * m)
        self._add(weight, "backward", back, "one", *(["W"] if weight.is_tied else []))
        if _is_local(weight):
            self._add(weight, "backward", back, "B")
        elif _has_b(weight):
            b = weight.feedback
            errors = inputs / b[0].numel()
            self._add(
                weight, "backward", reading(errors, *_lines_of_b(weight), b.numel(), errors * len(b)), "B"
            )

    def _take_mirror(self, weight: UntiedWeight) -> None:
        """Add what was fired in mirror mode since rules began."""
        assert self._mode is not None
        before, paid = (known.get(weight.name, Dues()) for known in (self._paid, self._mode.paid))
        reads, spikes = paid.reads - before.reads, paid.spikes - before.spikes
        if reads:
            (n, m), noise = _lines_of(weight), spikes - reads * channels_of(weight)
            vectors = noise / n if weight.transposed else reads
            self._add(weight, "mirror", reading(vectors, n, m, weight.weight.numel(), noise), "W")
            self._add(weight, "mirror", Work(moved=spikes), "B")
            if self._chip.writes_ideally:
                self._add(weight, "mirror", Work(writes=weight.feedback.numel()), "B")

    def _take_rule(self, weight: UntiedWeight) -> None:
        """Add what a rule reads of W itself, and writes that cost an ideal chip nothing to do."""
        rule = weight.layer.untied.rule
        if rule.group == COPIES_W:
            self._add(weight, "update", _reading_cells(weight.weight), "W")
        if self._chip.writes_ideally:
            self._is_in_rules = False
            for array in self._chip.arrays_of(weight):
                size = array.values.numel()
                if rule.group == COPIES_W and array.side == "feedback":
                    self._add_to(array, Work(writes=size, moved=size))
                else:
                    self.asked(array)
                    self.wrote(array)


def _mirrors(weight: UntiedWeight) -> bool:
    return isinstance(getattr(weight.layer.untied.rule, "mirror", None), Mirror)


def _has_b(weight: UntiedWeight) -> bool:
    return weight.has_feedback and not weight.is_tied


def _is_local(weight: UntiedWeight) -> bool:
    return _has_b(weight) and bool(weight.layer.untied.send_back.is_local)


def _lines_of(weight: UntiedWeight) -> tuple[int, int]:
    """Return the inputs and the outputs of W's array; groups stand beside each other."""
    view = view_of(weight)
    assert view is not None
    groups, neurons, inputs = view(weight.layer, weight.weight.detach()).shape
    return groups * inputs, groups * neurons


def _lines_of_b(weight: UntiedWeight) -> tuple[int, int]:
    """Return the lines by which an error enters B's array, and those by which it leaves."""
    if _is_local(weight):
        n, m = _lines_of(weight)
        return m, n
    return len(weight.feedback), weight.feedback[0].numel()


def _reading_cells(values: Tensor) -> Work:
    """Return the work of reading every cell by itself: its first dimension is taken line by line."""
    lines, cells = len(values), values.numel()
    return Work(reads=lines, products=cells, dac=lines, adc=cells)
