"""``audit``: do the steps with the forward weights absent, and say whether they go through."""

from collections.abc import Sequence, Set
from typing import Any

from feedbackpath.arguments import checked
from feedbackpath.auditing.locality import describe_locality
from feedbackpath.auditing.passes import Build, OfBuild, OfStep, Step
from feedbackpath.auditing.process import LostProcess, in_fresh_process
from feedbackpath.auditing.record import (
    CALLS,
    Record,
    first_differences,
    updates_that_differ,
    weights_that_came_back,
)
from feedbackpath.auditing.report import AuditError, Crossing, Finding, Report
from feedbackpath.auditing.stand_ins import Kind
from feedbackpath.auditing.subject import Stateful
from feedbackpath.errors import UntieError
from feedbackpath.path import FeedbackPath

# Of a check that no stand-in may pass: what is tried in turn, until a pass comes to its end.
ATTEMPTS: tuple[Kind, ...] = ("large noise", "noise", "noise of W's signs")


@checked(AuditError)
def audit(
    step: Step | None = None,
    path: FeedbackPath | None = None,
    *,
    build: Build | None = None,
    steps: int = 2,
    stateful: Sequence[Stateful] = (),
) -> Report:
    """Say whether training steps transport forward weights to the feedback path.

    The steps are done as they are, and what layers and mirror passages answer is recorded. Then they are
    done again with every forward weight absent: zeros or noise stand in for it from the first operation on,
    and layers' answers come from the record. Every delta, every B and what optimizers remember of B must be
    the same to the last bit, step after step. Model, optimizer, random numbers and files are left as they
    were.

    Args:
        step: Does one whole training step: forward pass, backward pass, the optimizer's update,
            ``path.step()``.
        path: The model's feedback path.
        build: Instead of both: returns (step, path). It runs in a fresh process, with W absent from when its
            model is made, so that nothing is left of what W made before. Another process must be able to
            import it.
        steps: Training steps in a row: a leak that waits for k steps takes k + 1 to be seen.
        stateful: What else a step changes, a scheduler or a scaler: it has ``state_dict`` and
            ``load_state_dict``. Needed where no process can be forked, as with a GPU.

    Returns:
        The report: ``transport_free`` is True, False or None (not settled); ``verdict`` says why.

    Raises:
        AuditError: There is no step to audit, or it sends no delta through a layer of this path.

    Example:
        >>> import feedbackpath as fp
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> path = fp.untie(model, "kp")
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        >>> x = torch.randn(16, 4)
        >>> def step():
        ...     optimizer.zero_grad()
        ...     model(x).square().mean().backward()
        ...     optimizer.step()
        ...     path.step()
        >>> fp.audit(step, path).verdict
        'transport-free in the 2 steps watched'
    """
    if steps < 1:
        raise AuditError(f"audit: steps is {steps}; at least one has to be watched")
    if build is not None:
        if step is not None or path is not None:
            raise AuditError("audit: give a step and its path, or build, which returns them; not both")
        try:
            return in_fresh_process(_audit_build, build, steps)
        except LostProcess as lost:
            return _unsettled(f"{lost}: see what stops it when it is run by itself", steps)
    if step is None or path is None:
        raise AuditError("audit: give a step and its path, or build=, which returns them")
    return _settle(OfStep(step, path, steps, stateful))


def _audit_build(build: Build, steps: int) -> Report:
    return _settle(OfBuild(build, steps))


def _settle(passes: OfStep | OfBuild) -> Report:
    """Do the passes and come to a verdict."""
    steps, notes = passes.steps, list(passes.notes)
    try:
        record, apart = _record_twice(passes)
        if record.error is not None:
            notes += [f"the step was ended by {type(record.error).__name__}: {record.error}"]
            return Report(tuple(record.aliases), {}, {}, {}, tuple(notes), steps, "", passes.since)
        if record.strays and not record.aliases:
            return _unsettled(
                f"{record.strays[0]!r} runs in another thread, where it is not watched: let the step train "
                "in the thread that calls it",
                steps, passes.since, notes,
            )  # fmt: skip
        without = None if apart[-1] else _Without(passes, record)
        if without is None or (apart[0] and not without.differing):
            kind, layer = apart[0][0]
            return _unsettled(
                f"repeated with W unchanged, the steps give something else ({kind} of {layer!r} first): let "
                "step be repeatable: deterministic operations, no clock; where no process can be forked (a "
                "GPU, threads), one fixed minibatch, and schedulers and scalers in stateful=, or build=",
                steps, passes.since, notes,
            )  # fmt: skip
        notes += without.stops
        findings = _explain(record, without.differing)
        locality, untold = _locality(passes, record)
        notes += untold
    except LostProcess as lost:
        return _unsettled(f"{lost}: see what stops it when it is run by itself", steps, passes.since, notes)
    locality |= {
        finding.layer: "signs of W" if finding.what == "sign" else "W"
        for finding in findings
        if finding.sink == "feedback weight"
    }
    return Report(
        tuple(findings), record.declared, _crossings(record, steps), locality, tuple(notes), steps,
        without.reason, passes.since,
    )  # fmt: skip


def _record_twice(passes: OfStep | OfBuild) -> tuple[Record, list[list[tuple[str, str]]]]:
    """Return what a pass with W present left, and what a second one did otherwise; at most twice.

    What outlives a pass, such as a thread's memory, holds something else before the first than before all
    others: then two more are compared, which may show a leak, but settle nothing.
    """
    apart: list[list[tuple[str, str]]] = []
    for _ in range(2):
        record = passes.do()
        if record.error is not None:
            if record.aliases and isinstance(record.error, UntieError):
                return record, [[]]  # B lies in the memory of W, and the path has refused to go on
            raise record.error
        if not any(kind == "delta" for step in record.seen for kind, _, _ in step):
            raise AuditError(
                "audit: step sent no delta through a layer of this path: let it train its own model"
            )
        again = passes.do(record.tape)
        apart.append(_differences_with_weights(record, again))
        if not apart[-1]:
            break
    return record, apart


def _differences_with_weights(record: Record, again: Record) -> list[tuple[str, str]]:
    """Return what two passes with W present do otherwise: then the steps are not repeatable."""
    names = record.parameters[0] if record.parameters else ()
    return first_differences(record, again) or updates_that_differ(record, again, sorted(names))


class _Without:
    """Passes without weights, and what they have found.

    Zeros stand in for all. Then noise does in every second layer, and in the others: layers that keep their W
    must be updated as they were, because their own errors need no W of other layers. Where anything besides
    was seen to be made of W, signs are exchanged at random too, and layers are halved in other ways, until
    each of two has kept its W where the other had none.

    Attributes:
        differing: What is another without W: then W is transported.
        stops: Which passes were ended by an error, and by what.
    """

    def __init__(self, passes: OfStep | OfBuild, record: Record) -> None:
        self._passes, self._record = passes, record
        self._layers = _layers_of(record)
        self._reasons: dict[str, str] = {}
        self.differing: list[tuple[str, str]] = []
        self.stops: list[str] = []
        has_zeros = self._do("zeros") is not None
        self._halve(0, has_zeros)
        if any(not sight.is_ours for sight in record.sights.values()):
            self._do("noise of random signs")
            for digit in range(1, max(map(int.bit_length, self._layers.values()), default=0)):
                self._halve(digit, has_zeros)

    @property
    def reason(self) -> str:
        """Why it is not settled; empty: it is."""
        found = (self._reasons.get(kind, "") for kind in ("stop", "carrier", "return", "load"))
        return "" if self.differing else next(filter(None, found), self._record.doubt)

    def _halve(self, digit: int, has_zeros: bool) -> None:
        """Do without the W of half of the layers, and of the others, by a binary digit of their numbers."""
        for half in (0, 1):
            present = {name for name, number in self._layers.items() if number >> digit & 1 == half}
            for kind in ATTEMPTS:
                other = self._do(kind, present)
                if other is not None or self.differing:
                    break
            if self.differing:
                return
            if other is None or (kind == ATTEMPTS[-1] and not has_zeros):
                self._reasons["stop"] = (
                    f"no pass without W came to its end ({self.stops[0]}): take that check of W out of the "
                    "step"
                )
            elif returned := weights_that_came_back(
                self._record, other, sorted(self._record.weights - present)
            ):
                advice = "write it by copy_" if self._passes.since == "untie" else "audit it by build="
                self._reasons["return"] = (
                    f"W of {returned[0]!r} comes back while the step runs, from what is kept elsewhere: let "
                    f"the step update W itself, or {advice}"
                )

    def _do(self, kind: Kind, present: Set[str] = frozenset()) -> Record | None:
        """Do a pass without all W but those present; return what it left, None if an error has ended it."""
        if self.differing:
            return None
        record = self._record
        other = self._passes.do(record.tape, (kind, record.uses, frozenset(present)))
        compared = present | (record.layers.keys() - self._layers.keys())
        self.differing = first_differences(record, other) or updates_that_differ(
            record, other, sorted(compared)
        )
        if other.carriers:
            self._reasons["carrier"] = (
                f"build reads W before untie, and {other.carriers[0]!r} of the model is another then: untie "
                "first, or train by an optimizer of PyTorch's until then"
            )
        if other.alike:
            self._reasons["load"] = (
                "a W and a B are loaded, and are the same, so that it does not show where B comes from: load "
                "an earlier state, or let B learn in build"
            )
        if other.error is None:
            return other
        if not self.differing and kind not in ATTEMPTS[:-1]:
            self.stops.append(f"with {kind} for W: {type(other.error).__name__}: {other.error}")
        return None


def _layers_of(record: Record) -> dict[str, int]:
    """Return the number of each parameter's layer; a weight in no layer is not in the next one's half."""
    found = {name: number for name, number in record.layers.items() if number is not None}
    following = 0
    for name in reversed(record.uses):
        following = found.setdefault(name, following ^ 1)
    return found


def _locality(passes: OfStep | OfBuild, record: Record) -> tuple[dict[str, str], list[str]]:
    """Return, by layer, what its B's update takes; or a note that says why that was not measured."""
    try:
        disturbed = passes.disturb(record)
    except LostProcess as lost:
        return {}, [f"locality was not measured: with neurons disturbed, {lost}"]
    if disturbed.error is None:
        return describe_locality(record, disturbed, record.transposed), []
    error = disturbed.error
    return {}, [
        f"locality was not measured: with neurons disturbed, {type(error).__name__} ended the step: {error}"
    ]


def _explain(record: Record, differing: Sequence[tuple[str, str]]) -> list[Finding]:
    """Name layer, operation and line of what was found, as far as W's traces tell."""
    findings = list(record.aliases)
    kinds = {kind for kind, _ in differing}
    exits: dict[str, tuple[str, str]] = {}
    for (layer, sink, operation, where), sight in record.sights.items():
        if sink == "exit":
            exits.setdefault(layer, (operation, where))
        elif sink in kinds and layer in record.uses:
            what: Any = "sign" if sight.made.is_sign else "weight"
            findings.append(Finding(layer, what, sink, operation, where, "provenance", sight.values))
    explained = {finding.sink for finding in findings}
    if "delta" in explained:
        explained |= kinds  # what else differs follows from it
    for kind, layer in differing:
        if kind not in explained:
            operation, where = exits.get(layer, next(iter(exits.values()), ("", "")))
            values = record.sizes.get((kind, layer), 0) if kind != CALLS else 0
            findings.append(Finding(layer, "weight", kind, operation, where, "absence", values))
    return findings


def _crossings(record: Record, steps: int) -> dict[str, Crossing]:
    deltas: dict[str, int] = {}
    for layer, delta in record.deltas:
        deltas[layer] = deltas.get(layer, 0) + delta.numel()
    names = dict.fromkeys([*deltas, *record.answers, *record.probes])
    return {
        name: Crossing(
            record.activities.get(name, 0), deltas.get(name, 0), record.answers.get(name, 0) // steps,
            -(-record.probes.get(name, 0) // steps),
        )
        for name in names
    }  # fmt: skip


def _unsettled(reason: str, steps: int, since: Any = "now", notes: Sequence[str] = ()) -> Report:
    return Report((), {}, {}, {}, tuple(notes), steps, reason, since)
