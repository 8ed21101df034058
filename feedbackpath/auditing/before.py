"""What ``build`` does before ``untie``: whoever reads a weight there reads noise.

A weight is in its place only while a forward pass, a backward pass or an optimizer's update runs, or while an
operator writes into it; so that networks may be trained before they are untied. At any other time its memory
holds a stand-in. When ``untie`` begins, every model is what it was in the first pass.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_parameter_registration_hook,
)
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from feedbackpath.auditing.memory import place_of
from feedbackpath.auditing.operators import split
from feedbackpath.auditing.stand_ins import Kind, preserve_version, replace
from feedbackpath.core.operations import is_matrix


class Early(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches what is done before ``untie``.

    Args:
        kind: Of the stand-ins; None: weights stay where they are.
        present: Numbers of the weights that do, in the order in which modules got them.
    """

    def __init__(self, kind: Kind | None, present: frozenset[int] = frozenset()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kind, self._present = kind, present
        self._numbers: dict[int, tuple[int, nn.Parameter]] = {}
        self._own: dict[int, Tensor] = {}
        self._stand_ins: dict[int, Tensor] = {}
        self._depth = 0
        self._is_aside = False
        self._stack = ExitStack()

    def begin(self) -> None:
        """Watch from here on."""
        stack = self._stack
        stack.callback(register_module_parameter_registration_hook(self._register).remove)
        if self._kind is None:
            return
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for begins, ends in (
            (register_module_forward_pre_hook, register_module_forward_hook),
            (register_optimizer_step_pre_hook, register_optimizer_step_post_hook),
        ):
            stack.callback(begins(lambda *_: self._enter()).remove)
            options = {"always_call": True} if ends is register_module_forward_hook else {}
            stack.callback(ends(lambda *_: self._leave(), **options).remove)
        self._exchange(torch.autograd, "_engine_run_backward", self._in_place)
        self._exchange(nn.Module, "_apply", self._in_place)  # it moves and casts
        self._exchange(nn.Parameter, "__deepcopy__", self._copied)
        stack.enter_context(_Setter(self._see_set))
        stack.enter_context(self)

    def end(self, model: nn.Module | None = None) -> None:
        """Watch no longer; the weights of a model, or all, are back in their places."""
        self._stack.close()
        kept = None if model is None else {id(parameter) for parameter in model.parameters()}
        for _, parameter in self._numbers.values():
            if kept is None or id(parameter) in kept:
                self._give(parameter)

    def number_of(self, parameter: Tensor) -> int | None:
        """Return which parameter a module got this one as."""
        return self._numbers.get(id(parameter), (None,))[0]

    def _exchange(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        plain = getattr(owner, name)
        setattr(owner, name, make(plain))
        self._stack.callback(setattr, owner, name, plain)

    def _in_place(self, plain: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._enter()
            try:
                return plain(*args, **kwargs)
            finally:
                self._leave()

        return run

    def _copied(self, plain: Any) -> Any:
        copy = self._in_place(plain)

        def deepcopy(parameter: nn.Parameter, memo: dict[int, Any]) -> Any:
            copied = copy(parameter, memo)
            self._register(None, "", copied)
            return copied

        return deepcopy

    def _register(self, module: Any, name: str, parameter: Any) -> None:
        """Know a parameter; nothing but its own network may see it from now on."""
        if isinstance(parameter, nn.Parameter) and id(parameter) not in self._numbers:
            self._numbers[id(parameter)] = len(self._numbers), parameter
            if self._kind is not None and not self._depth:
                self._take(parameter)

    def _see_set(self, parameter: Any) -> None:
        if id(parameter) in self._numbers and not self._depth:
            self._take(parameter)

    # What is in memory

    def _enter(self) -> None:
        if not self._depth:
            self._give_all()
        self._depth += 1

    def _leave(self) -> None:
        self._depth -= 1
        if not self._depth:
            for _, parameter in list(self._numbers.values()):
                self._take(parameter, anew=False)

    def _give_all(self) -> None:
        for _, parameter in self._numbers.values():
            self._give(parameter)

    @torch.no_grad()
    def _take(self, parameter: nn.Parameter, *, anew: bool = True) -> None:
        """Put a stand-in where a weight is, unless one is there."""
        number = self._numbers[id(parameter)][0]
        is_there = not isinstance(parameter, nn.parameter.UninitializedParameter) and not parameter.is_meta
        if number in self._present or not is_there or not is_matrix(parameter):
            return
        assert self._kind is not None
        value, stand_in = parameter.detach(), self._stand_ins.get(number)
        with self._aside():
            if number in self._own and _is_same(value, stand_in):
                return
            self._own[number] = value.clone()
            if anew or stand_in is None or stand_in.shape != value.shape:
                stand_in = value.clone()
                replace(stand_in, self._kind, torch.Generator().manual_seed(number))
            with preserve_version(parameter):
                value.copy_(stand_in)
            self._stand_ins[number] = stand_in.to(value)

    @torch.no_grad()
    def _give(self, parameter: nn.Parameter) -> Tensor | None:
        """Put a weight in its place, unless something else has been written there; return it."""
        number = self._numbers[id(parameter)][0]
        own = self._own.pop(number, None)
        with self._aside():
            if own is not None and _is_same(parameter.detach(), self._stand_ins[number]):
                with preserve_version(parameter):
                    parameter.detach().copy_(own)
        return own

    def _keep(self, parameter: nn.Parameter, own: Tensor | None) -> None:
        """Keep a weight where its own stand-in was written: what was read comes back, as from a file."""
        number = self._numbers[id(parameter)][0]
        with self._aside():
            if own is not None and _is_same(parameter.detach(), self._stand_ins[number]):
                self._own[number] = own

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Let operators run unwatched."""
        before, self._is_aside = self._is_aside, True
        try:
            yield
        finally:
            self._is_aside = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator: what writes into a weight finds it in its place."""
        kwargs = kwargs or {}
        if self._is_aside or self._depth or func.is_view:
            return func(*args, **kwargs)
        written = [t for _, those, _ in split(func, args, kwargs, None) for t in those]
        places = {place_of(t) for t in written}
        met = [
            parameter
            for number, parameter in self._numbers.values()
            if number in self._own and place_of(parameter) in places
        ] if places else []  # fmt: skip
        own = [self._give(parameter) for parameter in met]
        try:
            return func(*args, **kwargs)
        finally:
            for parameter, value in zip(met, own, strict=True):
                self._keep(parameter, value)
                self._take(parameter)


class _Setter(TorchFunctionMode):
    """Tells when ``parameter.data`` has been set: no operator does that.

    Args:
        tell: Is called with the parameter after it.
    """

    def __init__(self, tell: Callable[[Any], None]) -> None:
        super().__init__()
        self._tell = tell

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a method or function."""
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "__set__" and getattr(func, "__self__", None) is Tensor.data:
            self._tell(args[0])
        return result


def _is_same(one: Tensor, other: Tensor | None) -> bool:
    if other is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other)
