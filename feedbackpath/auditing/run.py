"""``audit``: watch a training step, do it again without its weights, and say what crosses."""

import gc
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from feedbackpath.auditing.locality import describe_locality
from feedbackpath.auditing.replay import CORRUPTIONS, Record, Replay
from feedbackpath.auditing.report import AuditError, Crossing, Finding, Report
from feedbackpath.auditing.subject import Stateful, Subject, deltas_seen, differing, forward_passes_seen
from feedbackpath.auditing.watch import Watch, declared_kinds
from feedbackpath.mirror.passage import LISTENERS
from feedbackpath.path import FeedbackPath

Step = Callable[[], object]


def audit(step_fn: Step, path: FeedbackPath, *, steps: int = 2, stateful: Sequence[Stateful] = ()) -> Report:
    """Say whether a training step transports forward weights to the feedback path.

    Two methods, each blind where the other sees. *Provenance*: every operator of the step is watched; values
    made of W alone are followed through copies, views, casts, norms and updates, and must reach no delta and
    no B. *Replay*: the step is done again with W replaced by noise, and by NaN, in all that follows the
    forward pass; every delta and every new B must be the same to the last bit. Model, optimizer, random
    numbers and ``stateful`` are left as they were.

    Args:
        step_fn: Does one whole training step, the same each time: forward pass, backward pass, the
            optimizer's update, ``path.step()``. Let it use one fixed minibatch.
        path: The model's feedback path.
        steps: Training steps in a row to watch and replay: a leak every k steps takes k to be seen.
        stateful: What else a step changes, a scheduler or a scaler: it has ``state_dict`` and
            ``load_state_dict``.

    Returns:
        The report: ``transport_free``, ``verdict``, ``findings``, what crosses, whose signals each B takes.

    Raises:
        AuditError: The step runs no untied layer, or does something else when it is done again.

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
        'transport-free'
    """
    if steps < 1:
        raise AuditError(f"audit: steps is {steps}; at least one has to be watched")
    subject = Subject(path, stateful)
    start = subject.save()
    aliases = _find_aliases(subject)
    with torch.compiler.set_stance("force_eager"):
        try:
            watch, crossings = _watch_steps(subject, step_fn, steps)
            if not crossings:
                raise AuditError(
                    "audit: step_fn sent no delta through a layer of this path: let it train its model"
                )
            subject.restore(start)
            replayed, locality, repeats = _replay_steps(subject, step_fn, steps)
        finally:
            subject.restore(start)
    findings = [*aliases, *watch.findings.values()]
    if not repeats and not findings:
        raise AuditError(
            "audit: the step does something else when it is done again, so that replaying it proves nothing: "
            "let step_fn use one fixed minibatch, and name schedulers, scalers and averages in stateful="
        )
    locality |= {
        finding.layer: "signs of W" if finding.what == "sign" else "W"
        for finding in findings
        if finding.sink == "feedback weight"
    }
    notes = [] if repeats else ["the step is not repeatable, so that replay says nothing"]
    notes += ["compiled code was run eagerly"] if _is_compiled(path.model, step_fn) else []
    findings += _only_replayed(findings, replayed)
    return Report(
        tuple(findings), declared_kinds(subject, watch.declared), crossings, locality, tuple(notes), steps
    )


def _only_replayed(findings: list[Finding], replayed: list[Finding]) -> list[Finding]:
    """Return what only replay saw. It knows where a delta arrives, not which layer's W is in it."""
    layers = {finding.layer for finding in findings if finding.sink == "feedback weight"}
    has_deltas = any(finding.sink == "delta" for finding in findings)
    return [
        finding
        for finding in replayed
        if not (has_deltas if finding.sink == "delta" else finding.layer in layers)
    ]


def _find_aliases(subject: Subject) -> list[Finding]:
    """Find every B that lies in the memory of a W."""
    weights = {w.untyped_storage().data_ptr(): name for name, w in subject.forward_weights.items()}
    found = [
        Finding(name, "weight", "feedback weight", "sharing memory", "untie, or later", "storage", b.numel())
        for name, b in subject.feedback_weights.items()
        if b.numel() and b.untyped_storage().data_ptr() in weights
    ]
    tied = [weight for weight in subject.path.weights if weight.is_tied]
    return found + [
        Finding(w.name, "weight", "feedback weight", "being W itself", "untie", "storage", w.weight.numel())
        for w in tied
    ]


def _watch_steps(subject: Subject, step: Step, steps: int) -> tuple[Watch, dict[str, Crossing]]:
    """Do steps under watch; return what was seen, and what each layer exchanged in the first."""
    watch = Watch(subject)
    activities: dict[str, int] = {}
    deltas: dict[str, int] = {}
    number = 0

    def see_output(layer: str, output: Tensor) -> None:
        def see_delta(delta: Tensor) -> None:
            watch.check_delta(layer, delta)
            deltas[layer] = deltas.get(layer, 0) + delta.numel() * (number == 0)

        if output.requires_grad:
            output.register_hook(see_delta)  # type: ignore[no-untyped-call]
            activities[layer] = activities.get(layer, 0) + output.numel() * (number == 0)

    def label(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        watch.label_optimizer(optimizer)

    LISTENERS.append(watch)
    hook = register_optimizer_step_pre_hook(label)
    try:
        with ExitStack() as stack:
            stack.enter_context(subject.finding_optimizers())
            stack.enter_context(deltas_seen(subject.path, see_output))
            stack.enter_context(forward_passes_seen(subject.model, watch.enter_forward, watch.leave_forward))
            stack.enter_context(watch)
            for number in range(steps):  # noqa: B007 (read by the hooks)
                step()
                watch.ledger.forget_freed()
    finally:
        hook.remove()
        LISTENERS.remove(watch)
    crossings = {
        name: Crossing(activities[name], count, watch.answers.get(name, 0) // steps)
        for name, count in deltas.items()
    }
    return watch, crossings


def _replay_steps(subject: Subject, step: Step, steps: int) -> tuple[list[Finding], dict[str, str], bool]:
    """Replay steps; return where W mattered, whose signals each B took, and whether steps can be repeated."""
    findings: dict[tuple[str, str], Finding] = {}
    locality: dict[str, str] = {}
    for number in range(steps):
        before = subject.save()
        old = {name: b.detach().clone() for name, b in subject.feedback_weights.items()}
        reference = Replay(subject, None, "none").run(step)
        after = subject.save()
        subject.restore(before)
        if _differences(subject, reference, Replay(subject, reference, "none").run(step)):
            return [], locality, False
        for corruption in CORRUPTIONS:
            subject.restore(before)
            record = Replay(subject, reference, corruption).run(step)
            for finding in _differences(subject, reference, record):
                findings.setdefault((finding.layer, finding.sink), finding)
        if number == 0:
            subject.restore(before)
            locality = describe_locality(subject, old, reference, step)
        subject.restore(after)
    return list(findings.values()), locality, True


def _differences(subject: Subject, reference: Record, record: Record) -> list[Finding]:
    sizes = {layer: delta.numel() for layer, delta in reference.deltas}
    found = [
        Finding(layer, "weight", "delta", "", "", "replay", sizes.get(layer, 0)) for layer in record.changed
    ]
    changed = differing(reference.feedback.values(), record.feedback.values())
    names = [name for name, differs in zip(reference.feedback, changed, strict=True) if differs]
    return found + [
        Finding(name, "weight", "feedback weight", "", "", "replay", subject.feedback_weights[name].numel())
        for name in names
    ]


def _is_compiled(model: torch.nn.Module, step: Step) -> bool:
    """Whether the model, or the step, runs under ``torch.compile`` where the user calls it."""
    if getattr(step, "_torchdynamo_orig_callable", None) or getattr(model, "_compiled_call_impl", None):
        return True
    return any(
        type(thing) is torch._dynamo.eval_frame.OptimizedModule and thing._orig_mod is model
        for thing in gc.get_objects()
    )
