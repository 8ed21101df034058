"""Passes of one set of steps: of a step that is there already, or from ``build`` on."""

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from feedbackpath.auditing.before import Early
from feedbackpath.auditing.chain import Chain
from feedbackpath.auditing.copies import freeze, things
from feedbackpath.auditing.files import files_put_back
from feedbackpath.auditing.locality import Disturbed
from feedbackpath.auditing.process import EndlessStep, can_fork, in_fork
from feedbackpath.auditing.record import Record
from feedbackpath.auditing.report import AuditError
from feedbackpath.auditing.stand_ins import StandIn
from feedbackpath.auditing.subject import Stateful, Subject
from feedbackpath.path import WATCHERS, FeedbackPath

Step = Callable[[], object]
PATIENCE = 60.0, 20.0  # a pass without W may take so many seconds, and so many times as long as the first
Build = Callable[[], tuple[Step, FeedbackPath]]


class OfStep:
    """Passes of a step that is there already, each from the same state.

    Args:
        step: The step.
        path: Its path.
        steps: How many to do.
        stateful: What else they change.
    """

    since: Any = "now"

    def __init__(self, step: Step, path: FeedbackPath, steps: int, stateful: Sequence[Stateful]) -> None:
        self.steps, self._step = steps, step
        self.subject = Subject(path.model, path, stateful)
        self.notes = ["compiled code was run eagerly"] if _is_compiled(path.model, step) else []
        self._forks = can_fork() and not self.subject.is_shared
        if not self._forks:
            self.notes.append(
                "no process could be forked: what the step keeps in other objects is not put back"
            )
        self._start = None if self._forks else self.subject.save()
        self._limit = 0.0

    def do(self, tape: Any = None, stand_in: StandIn | None = None) -> Record:
        """Do one pass."""
        started = time.perf_counter()
        limit = self._limit if stand_in else 0.0
        record = self._apart(lambda: self._pass(Chain(self.subject, tape), self.steps, stand_in), limit)
        self._limit = self._limit or _limit_after(started)
        return record

    def disturb(self, record: Record) -> Record:
        """Do the first step with some neurons disturbed."""
        return self._apart(lambda: self._pass(Disturbed(self.subject, record.deltas), 1, None))

    def _pass(self, chain: Chain, steps: int, stand_in: StandIn | None) -> Record:
        if stand_in is not None:
            self.subject.stand_in(*stand_in)
        chain.begin()
        return chain.run(self._step, steps)

    def _apart(self, run: Callable[[], Record], limit: float = 0.0) -> Record:
        if self._start is None:
            return _in_fork(run, limit)
        try:
            with files_put_back():
                return run()
        finally:
            self.subject.restore(self._start)


class OfBuild:
    """Passes that begin with ``build``, each in a process of its own, with W absent from its making on.

    Args:
        build: Returns the step and its path.
        steps: How many to do.
    """

    since: Any = "untie"

    def __init__(self, build: Build, steps: int) -> None:
        import torch._dynamo  # noqa: F401 (once, and not in every pass)

        self.steps, self._build = steps, build
        self.notes: list[str] = []
        self._which, self._limit = 0, 0.0
        self._first: Record | None = None
        freeze()
        self._made_before = [thing for thing in things() if issubclass(type(thing), nn.Parameter)]

    def do(self, tape: Any = None, stand_in: StandIn | None = None) -> Record:
        """Do one pass."""
        started = time.perf_counter()
        limit = self._limit if stand_in else 0.0
        record = self._apart(
            lambda: self._pass(lambda subject: Chain(subject, tape), self.steps, stand_in), limit
        )
        self._limit = self._limit or _limit_after(started)
        if tape is None:
            self._first = record
        return record

    def disturb(self, record: Record) -> Record:
        """Do the first step with some neurons disturbed."""
        return self._apart(lambda: self._pass(lambda subject: Disturbed(subject, record.deltas), 1, None))

    def _apart(self, run: Callable[[], Record], limit: float = 0.0) -> Record:
        try:
            return _in_fork(run, limit)
        except OtherModel as other:
            self._which = other.number
            return _in_fork(run, limit)

    def _pass(self, make: Callable[[Subject], Chain], steps: int, stand_in: StandIn | None) -> Record:
        chains: list[Chain] = []
        models: list[nn.Module] = []
        numbers = {} if self._first is None else self._first.numbers
        kind, _, present = stand_in or (None, {}, frozenset())
        early = Early(kind, frozenset(numbers[name] for name in present if name in numbers))

        def watch(model: nn.Module, path: FeedbackPath | None) -> None:
            models.extend([model] * all(model is not other for other in models))
            if not chains and model is models[-1] and len(models) == self._which + 1:
                early.end(model)
                chains.append(self._begin(model, early, make, stand_in))
            elif chains and path is not None and chains[0].subject.model is model:
                chains[0].attach(path)

        WATCHERS.append(watch)
        try:
            early.begin()
            step, path = self._build()
        except Exception as error:
            if not chains and stand_in is None:
                raise
            record = chains[0].record if chains else Record()
            record.error = error
            if chains:
                chains[0].close()
            return record
        finally:
            WATCHERS.remove(watch)
            if not chains:
                early.end()
        if not chains or chains[0].subject.model is not path.model:
            for number, model in enumerate(models):
                if model is path.model and number != self._which:
                    raise OtherModel(number)
            raise AuditError("audit: build has to untie its model, and return that path")
        chains[0].attach(path)  # once more: optimizers have come
        return chains[0].run(step, steps)

    def _begin(
        self, model: nn.Module, early: Early, make: Callable[[Subject], Chain], stand_in: StandIn | None
    ) -> Chain:
        """Go on with a model that is about to be untied, as it was in the first pass."""
        if any(parameter is known for parameter in model.parameters() for known in self._made_before):
            raise AuditError(
                "audit: build has to make its model itself: this one was there before, and its W with it"
            )
        subject = Subject(model, None)
        carriers = []
        if self._first is not None and stand_in is not None:
            carriers = subject.put_back(self._first.start)
            subject.stand_in(*stand_in)
        chain = make(subject)
        chain.record.carriers = carriers
        if self._first is None:
            chain.record.start = {name: t.detach().clone() for name, t in subject.others.items()}
            found = {name: early.number_of(tensor) for name, tensor in subject.others.items()}
            chain.record.numbers = {name: number for name, number in found.items() if number is not None}
        chain.begin()
        return chain


class OtherModel(Exception):
    """``build`` unties several models, and returns the path of another than was watched.

    Args:
        number: That model's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _in_fork(run: Callable[[], Record], limit: float) -> Record:
    """Do a pass in a forked process; one that does not end may do so where it cannot keep that itself."""
    try:
        return in_fork(run, limit)
    except EndlessStep as error:
        return Record(error=error)


def _limit_after(started: float) -> float:
    """Return how many seconds a pass without W may take, after one with W that has begun at some time."""
    least, times = PATIENCE
    return least + times * (time.perf_counter() - started)


def _is_compiled(model: nn.Module, step: Step) -> bool:
    """Whether the model, or the step, runs under ``torch.compile`` where the user calls it."""
    if getattr(step, "_torchdynamo_orig_callable", None) or getattr(model, "_compiled_call_impl", None):
        return True
    return any(
        type(thing) is torch._dynamo.eval_frame.OptimizedModule and thing._orig_mod is model
        for thing in gc.get_objects()
    )
