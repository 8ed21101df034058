"""Provenance: every operator of a step is watched, and what its results are made of is noted."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from feedbackpath.auditing.ledger import ACTIVITY, CONSTANT, FEEDBACK, Ledger, Made, join
from feedbackpath.auditing.report import Finding
from feedbackpath.auditing.subject import Subject

RANDOM = ("normal_", "uniform_", "bernoulli_", "random_", "exponential_", "randn", "rand", "randint",
          "randperm", "bernoulli", "normal", "native_dropout", "multinomial")  # fmt: skip
OVERWRITES = ("copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_")
SIGNS = ("sign", "sgn", "signbit", "sign_", "sgn_")


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches a step.

    Args:
        subject: Whose step it is.

    Attributes:
        findings: Where something made of weight reached a B, or a delta.
        declared: Scalars of forward parameters that the backward pass took, by parameter.
        answers: Answers to noise in mirror mode, by layer.
    """

    def __init__(self, subject: Subject) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.subject = subject
        self.findings: dict[tuple[str, str, str, str], Finding] = {}
        self.declared: dict[str, int] = {}
        self.ledger = Ledger()
        self.answers: dict[str, int] = {}
        self._depth = 0
        self._passing: tuple[str, ...] = ()
        for name, weight in subject.forward_weights.items():
            self.ledger.fix(weight, Made("weight", (name,)))
        for name, parameter in subject.declared.items():
            self.ledger.fix(parameter, Made("scale", (name,)))
        for feedback in subject.feedback_weights.values():
            if self.ledger.fixed(feedback) is None:
                self.ledger.fix(feedback, FEEDBACK)

    def enter_forward(self, *_: Any) -> None:
        """Signals go forward through weights from here on."""
        self._depth += 1

    def leave_forward(self, *_: Any) -> None:
        """They do so no longer."""
        self._depth -= 1

    def enter_passage(self, weights: tuple[Tensor, ...]) -> None:
        """Noise goes forward through weights from here on."""
        self.enter_forward()
        made = [self.ledger.fixed(weight) for weight in weights]
        self._passing = tuple(name for part in made if part is not None for name in part.sources)

    def leave_passage(self, weights: tuple[Tensor, ...]) -> None:
        """It does so no longer."""
        self.leave_forward()
        self._passing = ()

    def label_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Note that what an optimizer remembers of W may hold W: decay goes into its momentum."""
        for parameter, state in optimizer.state.items():
            made = self.ledger.fixed(parameter) if isinstance(parameter, Tensor) else None
            if made is not None and made.kind == "weight":
                for value in state.values():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        self.ledger.enter(value, made)

    def check_delta(self, layer: str, delta: Tensor) -> None:
        """Look at a delta that arrives at a layer's output."""
        made = self.ledger.look_up(delta)
        if made.kind == "weight":
            self._find(made, "delta", delta.numel(), made.operation, made.where)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator and note what comes of it."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        for inputs, written, results in _split(func, args, kwargs, output):
            self._note(name, inputs, written, results)
        return output

    def _note(self, name: str, inputs: list[Tensor], written: list[Tensor], results: list[Tensor]) -> None:
        """Note what one operator made of its inputs, or one part of a list operator."""
        overwritten = {id(tensor) for tensor in written} if name in OVERWRITES or name in RANDOM else set()
        read = [tensor for tensor in inputs if id(tensor) not in overwritten]
        parts = [self.ledger.look_up(tensor) for tensor in read]
        if name in RANDOM:
            parts.append(ACTIVITY)
        has_weight = any(made.kind == "weight" for made in parts)
        where = _call_site() if has_weight else ""
        made = join(parts, is_forward=self._depth > 0, operation=f"aten.{name}", where=where)
        if self._passing and has_weight and made.kind == "activity":
            for layer in self._passing:
                self.answers[layer] = self.answers.get(layer, 0) + sum(result.numel() for result in results)
        if name in SIGNS or name == "copysign":
            made = self._signs(name, made, inputs, where)
        if torch._C._current_graph_task_id() != -1 and ACTIVITY in parts and self._depth == 0:
            self._declare(parts)  # a backward pass is going on
        if name.endswith("_like") or name in ("new_empty", "new_zeros", "new_full", "new_empty_strided"):
            made = CONSTANT if name not in RANDOM else ACTIVITY  # the shape of a weight is no weight
        for tensor in written:
            self._write(tensor, made, name, where)
        for tensor in results:
            if not any(_shares_memory(tensor, other) for other in inputs):  # a view is what it shows
                self.ledger.enter(tensor, made)

    def _signs(self, name: str, made: Made, inputs: list[Tensor], where: str) -> Made:
        """Return what signs are made of: of W they are one bit a weight."""
        source = self.ledger.look_up(inputs[1] if name == "copysign" else inputs[0])
        if source.kind != "weight" or made.operation not in ("", f"aten.{name}"):
            return made
        return Made("weight", source.sources, is_sign=True, operation=made.operation, where=made.where)

    def _declare(self, parts: Iterable[Made]) -> None:
        for made in parts:
            for name in made.sources if made.kind == "scale" else ():
                if not name.endswith("bias"):  # a norm's backward pass asks for its bias's shape alone
                    self.declared[name] = self.subject.declared[name].numel()

    def _write(self, tensor: Tensor, made: Made, name: str, where: str) -> None:
        """Note a write; into a B, nothing made of weight may go."""
        fixed = self.ledger.fixed(tensor)
        if fixed is None:
            self.ledger.enter(tensor, made)
        elif fixed.kind == "feedback" and made.kind == "weight":
            self._find(made, "feedback weight", tensor.numel(), f"aten.{name}", where or made.where)

    def _find(self, made: Made, sink: Any, values: int, operation: str, where: str) -> None:
        for layer in made.sources:
            finding = Finding(
                layer, "sign" if made.is_sign else "weight", sink, operation, where, "provenance", values
            )
            self.findings.setdefault((layer, sink, operation, where), finding)


def declared_kinds(subject: Subject, declared: dict[str, int]) -> dict[str, int]:
    """Add up scalars by the kind of layer that they belong to: ``BatchNorm scale``."""
    kinds: dict[str, int] = {}
    modules = dict(subject.model.named_modules())
    for name, count in declared.items():
        module = modules[name.rpartition(".")[0]]
        is_batch_norm = isinstance(module, nn.modules.batchnorm._NormBase)
        kind = "BatchNorm scale" if is_batch_norm else f"{type(module).__name__} {name.rpartition('.')[2]}"
        kinds[kind] = kinds.get(kind, 0) + count
    return kinds


def _split(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Iterator[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
    """Yield (inputs, those written to, results) of a call; of one on lists, element by element.

    A list operator updates many parameters at once, each from its own gradient and momentum: what one is
    made of says nothing of the others. What is no list (a learning rate) belongs to all.
    """
    values = list(zip([a.name for a in func._schema.arguments], args, strict=False)) + list(kwargs.items())
    writes = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    is_list_operator = func.overloadpacket.__name__.startswith(("_foreach", "_fused", "_amp_foreach"))
    lengths = [len(value) for _, value in values if isinstance(value, list | tuple) and _tensors(value)]
    if not is_list_operator or not lengths:
        inputs = [tensor for _, value in values for tensor in _tensors(value)]
        yield (
            inputs,
            [t for name, value in values if name in writes for t in _tensors(value)],
            _tensors(output),
        )
        return
    for index in range(max(lengths)):
        chosen = [(name, _element(value, index)) for name, value in values]
        inputs = [tensor for _, value in chosen for tensor in _tensors(value)]
        written = [t for name, value in chosen if name in writes for t in _tensors(value)]
        results = output[index] if isinstance(output, list | tuple) and index < len(output) else ()
        yield inputs, written, _tensors(results)


def _element(value: Any, index: int) -> Any:
    if isinstance(value, list | tuple):
        return value[index] if index < len(value) else None
    return value


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors in an argument."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in _tensors(part)]
    return []


def _shares_memory(one: Tensor, other: Tensor) -> bool:
    return one is other or one.untyped_storage()._cdata == other.untyped_storage()._cdata


def _call_site() -> str:
    """Return file and line of the innermost call that is not PyTorch's or the audit's own."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if not module.startswith(("torch.", "feedbackpath.auditing", "contextlib")) and module != "torch":
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "an unknown line"
