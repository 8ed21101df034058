"""Where what is made of W goes: it names layer, operation and line, and decides nothing."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from feedbackpath.auditing import operators as ops
from feedbackpath.auditing.ledger import ACTIVITY, CONSTANT, UNKNOWN, Ledger, Made, join, num_stored
from feedbackpath.auditing.memory import place_of
from feedbackpath.auditing.record import UPDATE, Record, digest_of
from feedbackpath.auditing.subject import Subject
from feedbackpath.core import pytorch


class Traces:
    """Notes what each operator makes of what it is given.

    Args:
        ledger: What each tensor is made of.
        record: Where sights of W go.
        subject: Whose steps they are.
    """

    def __init__(self, ledger: Ledger, record: Record, subject: Subject) -> None:
        self._ledger, self._record, self._subject = ledger, record, subject
        self._inputs: set[str] = set()
        self._written_early: list[tuple[Tensor, Made, str, str]] = []

    def attach(self) -> None:
        """Note what was written into B before it was known as one."""
        for tensor, made, name, where in self._written_early:
            for feedback in self._subject.feedback_weights.values():
                if tensor.data_ptr() == feedback.data_ptr():
                    renamed = tuple(self._subject.renamed.get(source, source) for source in made.sources)
                    made = dataclasses.replace(made, sources=renamed)
                    self._record.add_sight("feedback weight", made, f"aten.{name}", where, feedback.numel())
        self._written_early.clear()

    def made_of(self, tensor: Tensor) -> Made:
        """Return what a tensor is made of; a parameter that multiplies activities is weight."""
        made = self._ledger.look_up(tensor)
        if made.kind == "other" and any(source in self._record.uses for source in made.sources):
            return Made("weight", tuple(s for s in made.sources if s in self._record.uses))
        return made

    def learned_inputs(self, made: Mapping[int, Made], calls: Sequence[nn.Module]) -> dict[int, Made]:
        """Return which operands are parameters that a layer is called with, such as a first state: signals.

        So are they in its backward pass, where they meet its errors. One that is a matrix elsewhere is known
        as such from there.

        Args:
            made: What the operands of a product are made of, by place.
            calls: The innermost module that is being called, if there is one.
        """
        parts = {i: m for i, m in made.items() if m.kind == "other"}
        if not parts:
            return {}
        if pytorch.is_in_backward() and ops.is_of_engine():
            return {i: ACTIVITY for i, m in parts.items() if self._inputs.issuperset(m.sources)}
        sources = [m.sources[0] for m in made.values() if m.kind == "weight"]
        weight = self._subject.weight_named(sources[0]) if len(sources) == 1 else None
        called = [part for module in calls for part in (module, getattr(module, "out_proj", None))]
        if weight is None or weight.layer not in called or len(parts) != len(made) - 1:
            return {}
        self._inputs |= {source for m in parts.values() for source in m.sources}
        return dict.fromkeys(parts, ACTIVITY)

    def product(self, tensor: Tensor, is_inside: bool) -> Made | None:
        """Return what a sum of products of a weight and a signal, that is about to be made, is made of.

        Outside the model nothing answers for an untied layer.
        """
        made = self.made_of(tensor)
        is_of_layers = any(source in self._subject.forward_weights for source in made.sources)
        if not made.is_product or (is_of_layers and not is_inside):
            return None
        for source in made.sources:  # summed, it is a weight and no scale
            if size := self._record.scales.pop(source, 0):
                self._record.uses[source] = size
        return dataclasses.replace(made, kind="weight")

    def note(
        self,
        name: str,
        inputs: list[Tensor],
        written: list[Tensor],
        results: list[Tensor],
        is_held: bool,
        is_forward: bool,
    ) -> None:
        """Note what one operator made of its inputs, or one part of a list operator."""
        overwritten = {id(t) for t in written} if name in ops.OVERWRITES or name in ops.RANDOM else set()
        parts = [(t, self.made_of(t)) for t in inputs if id(t) not in overwritten]
        weights = [(t, made) for t, made in parts if made.kind == "weight"]
        where = ops.call_site() if weights and not is_held else ""
        if is_held:
            made = ACTIVITY
        elif name in ops.RANDOM or name.endswith("_like") or name.startswith("new_"):
            made = CONSTANT
        else:
            made = self._join(name, parts, weights, [*results, *written], where, is_forward)
        if weights and name in ops.EXITS:
            self._record.add_sight("exit", made, f"aten.{name}", where, weights[0][0].numel())
        if is_forward and not is_held:
            self._follow_signals(name, [t for t, part in parts if part.kind == "activity"], results)
        for tensor in written:
            self._write(tensor, made, name, where)
        for tensor in results:
            if place_of(tensor) not in {place_of(t) for t in inputs}:
                self._ledger.enter(tensor, made)

    def _join(
        self,
        name: str,
        parts: list[tuple[Tensor, Made]],
        weights: Any,
        results: list[Tensor],
        where: str,
        is_forward: bool,
    ) -> Made:
        """Return what comes of an operator that is no layer's forward map."""
        made = join([part for _, part in parts], f"aten.{name}", where)
        signals = [t for t, part in parts if part.kind == "activity"]
        others = {source: t for t, part in parts for source in part.sources if part.kind == "other"}
        if is_forward and "fft" in name:  # in that domain, number by number, it acts as a matrix
            self._note_factors(others, errors_come_back=True, is_matrix=True)
        if is_forward and (masked := self._masked(name, parts, results)):
            return masked
        if name in ops.SIGNS or name == "copysign":
            source = parts[1 if name == "copysign" else 0][1]
            is_sign = source.kind == "weight" and not source.operation
            return (
                Made("weight", source.sources, is_sign=True, operation=f"aten.{name}", where=where)
                if is_sign
                else made
            )
        if not (is_forward and signals and results):
            return made
        is_repeated = results[0].numel() > max(self._num_signals(t) for t in signals)
        is_larger = name in ops.FACTORS and is_repeated
        errors_come_back = any(t.requires_grad for t in signals)
        if ops.is_scaling(name) or (errors_come_back and ops.multiplies(name)):
            self._note_factors(others, errors_come_back, is_larger or ops.is_of_matrix(name))
        if ops.is_norm(name) and is_repeated and others and errors_come_back:
            self._record.repeats.setdefault(ops.call_site(), next(iter(others)))
        if is_larger and made.kind == "weight":
            self._record.uses |= {source: weights[0][0].numel() for source in made.sources}
            return Made("weight", made.sources, is_product=True, signals=tuple(map(digest_of, signals)))
        if is_larger and others:
            return Made("activity", tuple(others), is_product=True, signals=tuple(map(digest_of, signals)))
        is_weight_changed = any(t.shape == results[0].shape for t, _ in weights)
        return made if made.kind != "weight" or is_weight_changed else ACTIVITY

    def _masked(self, name: str, parts: list[tuple[Tensor, Made]], results: list[Tensor]) -> Made | None:
        """Return what a parameter makes with data alone: of its own shape, it is a matrix with a mask."""
        others = [(t, part) for t, part in parts if part.kind == "other"]
        is_data = all(part is UNKNOWN or part.kind in ("other", "constant") for _, part in parts)
        is_matrix = is_data and name in ops.FACTORS and len(others) == 1 and others[0][0].dim() > 1
        return others[0][1] if is_matrix and results and results[0].shape == others[0][0].shape else None

    def _num_signals(self, tensor: Tensor) -> int:
        return min(num_stored(tensor), self._ledger.root_of(tensor).size)

    def _follow_signals(self, name: str, signals: list[Tensor], results: list[Tensor]) -> None:
        """Note that results hold the same signals: transformed one by one, put elsewhere, or repeated."""
        roots = {self._ledger.root_of(tensor) for tensor in signals if tensor.is_floating_point()}
        is_product = name in ops.CONTRACTIONS or (name in ops.FACTORS and len(signals) > 1)
        for result in results if len(roots) == 1 and not is_product else ():
            self._ledger.enter_root(result, next(iter(roots)))

    def _note_factors(self, others: Mapping[str, Tensor], errors_come_back: bool, is_matrix: bool) -> None:
        """Tell scales, which multiply each signal by a number of its own, from the weights of a matrix.

        Those multiply each signal several times, or by parts of one parameter.
        """
        for source, tensor in others.items():
            whole = self._subject.others.get(source, tensor)
            if errors_come_back and (is_matrix or tensor.numel() < whole.numel()):
                self._record.uses[source] = whole.numel()
                self._record.scales.pop(source, None)
            elif source not in self._record.uses:
                self._record.scales[source] = tensor.numel()

    def _write(self, tensor: Tensor, made: Made, name: str, where: str) -> None:
        """Note a write; into a B, nothing made of weight may go, and into a W nothing of another."""
        fixed = self._ledger.fixed(tensor)
        if fixed is None:
            self._ledger.enter(tensor, made)
            if made.kind == "weight" and not self._subject.forward_weights:
                self._written_early.append((tensor, made, name, where))
        elif made.kind == "weight" and fixed.kind == "feedback":
            self._record.add_sight(
                "feedback weight", made, f"aten.{name}", where or made.where, tensor.numel()
            )
        elif made.kind == "weight" and fixed.sources:
            made = dataclasses.replace(made, sources=tuple(s for s in made.sources if s not in fixed.sources))
            self._record.add_sight(UPDATE, made, f"aten.{name}", made.where or where, tensor.numel())

    def see_thread(self, mode: Any, name: str | None) -> None:
        """Note that a layer runs in a thread that begins in the step: modes watch one thread each."""
        if name is not None and mode.watches and mode not in _get_current_dispatch_mode_stack():
            self._record.strays.append(name)

    def see_exit(self, name: str, tensor: Tensor) -> None:
        """Note that a tensor leaves PyTorch."""
        made = self.made_of(tensor)
        if made.kind == "weight":
            self._record.add_sight("exit", made, f"Tensor.{name}", ops.call_site(), tensor.numel())
