"""``audit``: do the steps with the forward weights absent, and say whether they go through."""

from collections.abc import Sequence
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
from feedbackpath.auditing.subject import Stateful
from feedbackpath.errors import UntieError
from feedbackpath.path import FeedbackPath

# Zeros in all layers; then noise in every second one, and in the others: it has the other sign than W and is
# larger. What asks whether W, its sum or its norm is above or below something is answered otherwise by one of
# them. The layers that keep W must be updated as they were: their own errors need no W of other layers.
PASSES: tuple[tuple[float, int | None], ...] = ((0.0, None), (-30.0, 0), (-30.0, 1))
OWN_SIZE = -1.0


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
        record, differing = _record_twice(passes)
        if record.error is not None:
            notes += [f"the step was ended by {type(record.error).__name__}: {record.error}"]
            return Report(tuple(record.aliases), {}, {}, {}, tuple(notes), steps, "", passes.since)
        if record.strays and not record.aliases:
            return _unsettled(
                f"{record.strays[0]!r} runs in another thread, where it is not watched: let the step train "
                "in the thread that calls it",
                steps, passes.since, notes,
            )  # fmt: skip
        if differing:
            kind, layer = differing[0]
            return _unsettled(
                f"done again with W as it was, the steps do something else ({kind} of {layer!r} first): let "
                "step be repeatable: deterministic operations, no clock; where no process can be forked (a "
                "GPU, threads), one fixed minibatch, and schedulers and scalers in stateful=, or build=",
                steps, passes.since, notes,
            )  # fmt: skip
        differing, stops, reason = _do_without_weights(passes, record)
        notes += stops
        findings = _explain(record, differing)
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
        reason, passes.since,
    )  # fmt: skip


def _record_twice(passes: OfStep | OfBuild) -> tuple[Record, list[tuple[str, str]]]:
    """Return what a pass with W present left, and what a second one did otherwise.

    What outlives a pass, such as a thread's memory, holds something else before the first than before all
    others: then the second is taken for the first.
    """
    for _ in range(2):
        record = passes.do()
        if record.error is not None:
            if record.aliases and isinstance(record.error, UntieError):
                return record, []  # B lies in the memory of W, and the path has refused to go on
            raise record.error
        if not any(kind == "delta" for step in record.seen for kind, _, _ in step):
            raise AuditError(
                "audit: step sent no delta through a layer of this path: let it train its own model"
            )
        again = passes.do(record.tape)
        if not (differing := _differences_with_weights(record, again)):
            break
    return record, differing


def _differences_with_weights(record: Record, again: Record) -> list[tuple[str, str]]:
    """Return what two passes with W present do otherwise: then the steps are not repeatable."""
    names = record.parameters[0] if record.parameters else ()
    return first_differences(record, again) or updates_that_differ(record, again, sorted(names))


def _do_without_weights(
    passes: OfStep | OfBuild, record: Record
) -> tuple[list[tuple[str, str]], list[str], str]:
    """Return what differs without W, which passes were stopped by an error, and why it is not settled."""
    stops: list[str] = []
    stopped: list[int | None] = []
    returned: list[str] = []
    carriers: list[str] = []
    reason = record.doubt
    halves = record.halves
    for scale, kept in PASSES:
        present = {name for name, half in halves.items() if kept is not None and half == kept}
        other = passes.do(record.tape, (scale, record.uses, frozenset(present)))
        if other.error is not None and scale:  # a check may want weights of W's own size
            other = passes.do(record.tape, (OWN_SIZE, record.uses, frozenset(present)))
        unmoved = present | {
            name for name, half in halves.items() if half is None and name not in record.uses
        }
        differing = first_differences(record, other) or updates_that_differ(record, other, sorted(unmoved))
        if differing:
            return differing, stops, ""
        if other.error is not None:
            stopped.append(kept)
            with_what = "zeros" if scale == 0 else "noise"
            stops.append(f"with {with_what} for W: {type(other.error).__name__}: {other.error}")
        carriers += other.carriers
        if other.alike:
            reason = (
                "a W and a B are loaded, and are the same, so that it does not show where B comes from: load "
                "an earlier state, or let B learn in build"
            )
        if scale:
            returned += weights_that_came_back(record, other, sorted(record.weights - present))
    if returned:
        reason = (
            f"W of {returned[0]!r} comes back while the step runs, from what is kept elsewhere: let the step "
            f"update W itself, or {'write it by copy_' if passes.since == 'untie' else 'audit it by build='}"
        )
    if carriers:
        reason = (
            f"build reads W before untie, and {carriers[0]!r} of the model is another then: untie first, or "
            "train by an optimizer of PyTorch's until then"
        )
    if len(stopped) > 1:  # of all W and half of them, or of both halves: then updates are not compared
        reason = f"no pass without W came to its end ({stops[0]}): take that check of W out of the step"
    return [], stops, reason


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
