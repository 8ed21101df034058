"""Which operations of a forward pass a forward weight meets activity in, and what to do at each.

A model runs its own forward pass, in PyTorch's own kernels. ``Exchange`` watches the operations in it,
whichever module or function reads a weight: ``Linear``, ``LSTM``, attention, ``einsum``, a tied head. It
tells three cases apart:

* W meets activity. Then the error goes back through B: see ``feedbackpath.core.one_operation``.
* W meets no activity: a cast, a sum, a norm, a slice, a penalty. The operation belongs to W alone. B goes
  through the same operation beside it: what was made of W has a partner when it meets activity.
* Two forward weights meet in a product. Errors go between them as in backprop; a warning says so.
"""

import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from feedbackpath.core import operations as ops
from feedbackpath.core import pytorch
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.core.one_operation import Known, exchange_saved, write_twice
from feedbackpath.core.operations import Args, Call, Kwargs, is_matrix, name_of, replaced, run, tensors_in
from feedbackpath.errors import RuleError, UnconvertedLayerWarning, UntieError


class Exchange(TorchFunctionMode):
    """Watches one forward pass and sends errors back through B wherever W meets activity.

    Args:
        weights: The weights that may be met.
        model: Whose buffers are constants.

    Attributes:
        known: What is known of tensors that hold no activity.
        deliveries: Inputs that the error of the model's output is to reach, and their weights.
        is_aside: Whether a layer sees to its one operation itself.
    """

    def __init__(self, weights: Iterable[UntiedWeight], model: nn.Module) -> None:
        super().__init__()
        self.is_traced = torch.compiler.is_compiling()
        self.known: list[Known] = []
        self._by_id: dict[int, Known] = {}
        self.deliveries: list[tuple[Tensor, UntiedWeight]] = []
        self._model = model
        self._has_buffers = False
        self.is_aside = False
        self.learn(weights)

    def learn(self, weights: Iterable[UntiedWeight]) -> None:
        """Know weights as they are now: ``functional_call`` and replicas run layers with others."""
        for weight in weights:
            w = getattr(weight.layer, weight.weight_name)
            if w is not None and self.look_up(w) is None:
                is_local = weight.layer.__dict__["untied"].send_back.is_local
                takes_b = is_local and not RUNNING.is_backprop
                b = getattr(weight.layer, weight.feedback_name, None) if takes_b else None
                if b is not None and (b.shape, b.dtype, b.device) != (w.shape, w.dtype, w.device):
                    of_w, of_b = (f"{list(x.shape)} of {x.dtype} on {x.device}" for x in (w, b))
                    raise UntieError(f"{weight.name!r}: W is {of_w}, B {of_b}: path.retie(), and untie again")
                self._note(Known(w, b, (weight,), is_whole=True))

    def look_up(self, tensor: Tensor) -> Known | None:
        """Return what is known of a tensor; None: it holds activity, or nobody has asked yet."""
        if not self.is_traced:
            return self._by_id.get(id(tensor))
        for one in self.known:  # a compiler that is asked for an input's id compiles anew for each input
            if one.tensor is tensor:
                return one
        return None

    def run_eagerly(self) -> None:
        """Look tensors up by their ids: a compiler that was at work when this was made has given up."""
        self.is_traced = False
        self._by_id = {id(one.tensor): one for one in self.known}

    def _note(self, one: Known) -> None:
        self.known.append(one)
        if not self.is_traced:
            self._by_id[id(one.tensor)] = one

    def __torch_function__(
        self, func: Call, types: Any, args: Args = (), kwargs: Kwargs | None = None
    ) -> Any:
        """Run one operation of the forward pass."""
        if self.is_aside:
            return func(*args, **(kwargs or {}))
        if not self.is_traced and torch.compiler.is_compiling():
            return run(func, args, kwargs or {})  # a part that is compiled by itself watches for itself
        is_plain = not self.is_traced and len(args) > 0 and isinstance(args[0], Tensor)
        if is_plain:
            by_id = self._by_id
            for arg in args:
                kind = type(arg)
                is_many = isinstance(arg, (list, tuple)) and kind is not torch.Size
                if is_many or id(arg) in by_id or (kind is Parameter and (arg.dim() > 1 or arg is args[0])):
                    is_plain = False
        if kwargs and any(isinstance(arg, (Tensor, list, tuple, dict)) for arg in kwargs.values()):
            is_plain = False
        if is_plain:
            return func(*args, **(kwargs or {}))
        return self._run_with_care(func, args, kwargs or {})

    def _run_with_care(self, func: Call, args: Args, kwargs: Kwargs) -> Any:
        tensors = tensors_in((args, kwargs))
        if not self.is_traced:
            self._note_strangers(tensors)
        met = [one for one in map(self.look_up, tensors) if one is not None]
        name = name_of(func)
        given = ops.activity_in(name, args, kwargs) if name in ops.INPUT_FIRST else []
        strangers = [one.tensor for one in met if one.is_stranger and all(one.tensor is not x for x in given)]
        if strangers and name in ops.PRODUCTS and len(strangers) < len(tensors):
            self._name_strangers(strangers, name)
        if not any(one.origins for one in met):
            output = run(func, args, kwargs)
            if all(isinstance(x, Parameter) or self.look_up(x) is not None for x in tensors):  # no activity
                is_signal = "rand" in name or any(one.is_signal for one in met)
                self._learn(output, None, is_signal=is_signal, is_stranger=bool(strangers))
            return output
        if func is F.multi_head_attention_forward:
            with self:  # it hands itself over whole: past that question its projections show
                return _attention(*args, **kwargs)
        if name in ops.NO_WEIGHTS and not (args and met[0].tensor is args[0]):  # else W is standardised
            return run(func, args, kwargs)
        if name in ops.SHAPED_ALIKE:
            output = run(func, args, kwargs)
            self._learn(output, None, is_signal="rand" in name)
            return output
        if name in ops.INPUT_FIRST:
            weights = [one for one in met if all(one.tensor is not x for x in given)]
            met = weights if weights or name in ops.RECURRENT else met  # else its input is the weight
        elif all(self._holds_no_activity(tensor) for tensor in tensors):
            if name not in ops.PRODUCTS:
                return self._derive(func, name, args, kwargs, met)
            definite = [one for one in met if one.origins and not one.is_signal]
            if len(definite) == len([one for one in met if one.origins or one.is_signal]):
                return self._derive(func, name, args, kwargs, met)
            met = definite
        return self._meet(func, name, args, kwargs, met)

    def _note_strangers(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            if type(tensor) is Parameter and is_matrix(tensor) and self.look_up(tensor) is None:
                told = [one.feedback for one in self.known]  # they meet activity in a part that was compiled
                told += self._model.__dict__["untied"].memo.get("left", [])
                self._note(Known(tensor, None, is_stranger=all(one is not tensor for one in told)))

    def _name_strangers(self, strangers: Sequence[Tensor], name: str) -> None:
        """Warn of weights without feedback weights that meet activity: errors go back through them."""
        named = self._model.__dict__["untied"].memo.setdefault("strangers", set())
        for shape in {tuple(stranger.shape) for stranger in strangers}:
            if (shape, name) not in named:
                named.add((shape, name))
                warnings.warn(
                    f"a weight of shape {list(shape)} that has no feedback weight goes into "
                    f"{name}: errors go back through it as in backprop; untie the model after its last layer "
                    "is in place, and let a layer of its own share the weight of a table that is read back",
                    UnconvertedLayerWarning,
                    stacklevel=2,
                )

    def _holds_no_activity(self, tensor: Tensor) -> bool:
        if isinstance(tensor, Parameter) or not ops.holds_values(tensor) or self.look_up(tensor):
            return True
        if not self._has_buffers:
            self._has_buffers = True
            for buffer in self._model.buffers():
                if self.look_up(buffer) is None:
                    self._note(Known(buffer, None))
        return self.look_up(tensor) is not None

    def _learn(self, output: Any, beside: Any, *origins: UntiedWeight, **told: bool) -> None:
        """Know what came of an operation without activity, and its partners."""
        partners = tensors_in(beside)
        for number, tensor in enumerate(tensors_in(output)):
            if ops.holds_values(tensor) and self.look_up(tensor) is None:
                self._note(Known(tensor, partners[number] if partners else None, origins, **told))

    def _derive(self, func: Call, name: str, args: Args, kwargs: Kwargs, met: Sequence[Known]) -> Any:
        """Run an operation on weights alone, and the same one on their partners."""
        if name in ops.NO_VALUES:
            return run(func, args, kwargs)
        if name in ops.PRODUCTS and len({one.origins for one in met if one.origins}) > 1:
            _warn_of_product(met, name)
        origins = tuple(dict.fromkeys([origin for one in met for origin in one.origins]))
        partners = [(one.tensor, one.feedback) for one in met if one.feedback is not None]
        tensors = tensors_in((args, kwargs))
        is_looked_up = any(not ops.holds_values(tensor) for tensor in tensors)
        beside_w = [*partners, *[(x, x.detach()) for x in tensors if x.requires_grad]]  # a gain learns once
        told = {
            "is_signal": is_looked_up or name in ops.PRODUCTS or any(one.is_signal for one in met),
            "is_stranger": any(one.is_stranger for one in met),
        }
        if not partners or (ops.writes(name, kwargs) and met[0].is_whole):  # B is not written to because W is
            output = run(func, args, kwargs)
            self._learn(output, None, *origins, **told)
            return output
        if name in ops.AT_RANDOM:
            state = pytorch.random_state(met[0].tensor)
            output = run(func, args, kwargs)
            with pytorch.random_numbers_from(state, met[0].tensor):
                beside = run(func, *replaced((args, kwargs), beside_w))
        else:
            output = run(func, args, kwargs)
            beside = run(func, *replaced((args, kwargs), beside_w))
        self._learn(output, beside, *origins, **told)
        return output

    def _meet(self, func: Call, name: str, args: Args, kwargs: Kwargs, met: Sequence[Known]) -> Any:
        """Run an operation in which weights meet activity."""
        pairs, tensors = [one for one in met if one.feedback is not None], tensors_in((args, kwargs))
        is_exact = not pairs or name in ops.ADDITIVE or not torch.is_grad_enabled()
        if is_exact or (name in ops.SCALES and _is_scale(tensors, pairs)):
            output = run(func, args, kwargs)
        elif (
            pytorch.is_traced()
            or any(x.layout is not torch.strided for x in tensors)
            or (name in ops.CHAINS and len(tensors) > 2)
        ):
            output = write_twice(func, name, args, kwargs, pairs)
        else:
            output = exchange_saved(func, name, args, kwargs, pairs)
        for one in met:
            _show(one, args, kwargs, output, self)
        return output


class _Running(threading.local):
    """The forward pass that runs in this thread, and how."""

    def __init__(self) -> None:  # in each thread; a compiler's guards count the attributes that are there
        self.exchange: Exchange | None = None  # what watches it
        self.traced: Exchange | None = None  # what watches the part that is being compiled
        self.is_backprop = False  # whether errors go back through W for now
        self.is_off = False  # whether untied modules do nothing of their own for now


RUNNING = _Running()
_attention = pytorch.rewired(F.multi_head_attention_forward, has_torch_function=lambda arguments: False)


@contextmanager
def as_backprop() -> Iterator[None]:
    """Let untied models send errors back through W for a while: it is what they are compared with."""
    before, RUNNING.is_backprop = RUNNING.is_backprop, True
    try:
        yield
    finally:
        RUNNING.is_backprop = before


@contextmanager
def as_plain() -> Iterator[None]:
    """Let untied modules run their own forward pass and nothing else: for those who trace it."""
    before, RUNNING.is_off = RUNNING.is_off, True
    try:
        yield
    finally:
        RUNNING.is_off = before


def watch(forward: Call, args: Args, exchange: Exchange) -> Any:
    """Run a forward pass under an exchange."""
    if not torch.compiler.is_compiling():
        return _watch_eagerly(forward, args, exchange)
    RUNNING.traced = exchange
    try:
        with exchange:
            return forward(*args)
    finally:
        RUNNING.traced = None


@pytorch.uncompiled
def _watch_eagerly(forward: Call, args: Args, exchange: Exchange) -> Any:
    RUNNING.exchange = exchange
    exchange.run_eagerly()
    try:
        with exchange:
            return forward(*args)
    finally:
        RUNNING.exchange = None


def _is_scale(tensors: Sequence[Tensor], pairs: Sequence[Known]) -> bool:
    """Whether a product multiplies each activity by a number of its own: spectra make a convolution."""
    activities = [tensor.shape for tensor in tensors if not any(tensor is one.tensor for one in pairs)]
    broadcast: Call = torch.broadcast_shapes
    is_alike = broadcast(*[tensor.shape for tensor in tensors]) == broadcast(*activities)
    return bool(is_alike) and not any(tensor.is_complex() for tensor in tensors)


def _show(one: Known, args: Args, kwargs: Kwargs, output: Any, exchange: Exchange) -> None:
    """Show the signals of an operation to whoever listens to its weight's layer."""
    for origin in one.origins:
        untied = origin.layer.__dict__["untied"]
        taps = (*untied.taps, tell_rule) if untied.tells_rule else untied.taps
        if taps:
            tensors = tensors_in((args, kwargs))
            x = next((tensor for tensor in tensors if exchange.look_up(tensor) is None), tensors[0])
            for tap in taps:
                tap(origin, x, tensors_in(output)[0], _rows_of(one, origin))


def _rows_of(one: Known, origin: UntiedWeight) -> slice:
    """Return which rows of W met activity: a part of them where a projection is taken from a packed W."""
    w, part = origin.weight, one.tensor
    if one.is_whole or part.untyped_storage().data_ptr() != w.untyped_storage().data_ptr() or not w.stride(0):
        return slice(None)
    first = (part.storage_offset() - w.storage_offset()) // w.stride(0)
    return slice(first, first + len(part))


def _warn_of_product(met: Sequence[Known], name: str) -> None:
    names = ", ".join(dict.fromkeys([repr(origin.name) for one in met for origin in one.origins]))
    warnings.warn(
        f"the weights {names} are multiplied with each other ({name}): errors go between them as in backprop",
        UnconvertedLayerWarning,
        stacklevel=2,
    )


def tell_rule(weight: UntiedWeight, x: Tensor, output: Tensor, rows: slice) -> None:
    """Tell a rule of the error that arrives at an output, when it does."""
    untied, version = weight.layer.untied, None if pytorch.is_traced() else pytorch.version_of(output)
    x, y = x.detach(), output.detach()  # a hook that held the output would keep it for ever

    def tell(delta: Tensor) -> None:
        if untied.rule.reads_output and version not in (None, pytorch.version_of(y)):
            why = "was changed in place: use ReLU() in place of ReLU(inplace=True), or the like"
            raise RuleError(f"the output of {weight.name!r}, which {untied.rule.name} reads, {why}")
        untied.rule.after_backward(weight, x, y, delta, untied.context)

    if output.requires_grad:
        output.register_hook(tell)  # type: ignore[no-untyped-call]
