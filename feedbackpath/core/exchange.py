"""Forward through W, errors back through B: the model runs its own forward pass, in PyTorch's own kernels.

An operation in which a forward weight W meets activity saves W for its backward pass. W is what turns the error
delta at the output into the error at the input (Akrout et al. 2019, equations 2 and 3)::

    y  = op(x, W)       the operation itself, whatever it is
    dx = op'(delta, B)  B stands where autograd would have used W
    dW = delta x^T      equation 4: needs no weight
    dB = delta x^T      equation 17: only where B learns (Kolen-Pollack)

``Exchange`` watches the operations of a forward pass and does this at each of them, whichever module or function
reads W: ``Linear``, ``LSTM``, attention, ``einsum``, a tied head. It tells three cases apart:

* W meets activity. Then what autograd saves of W is exchanged for the same part of B.
* W meets no activity: a cast, a sum, a norm, a slice, a penalty. The operation belongs to W alone. B goes through
  the same operation beside it: what was made of W has a partner when it meets activity.
* Two forward weights meet in a product. Errors go between them as in backprop; a warning says so.

``torch.compile`` and ``torch.func`` let nothing be exchanged afterwards. There the operation is written down twice,
``op(x, W)`` for its value and ``op(x, B)`` for its gradients.
"""

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from feedbackpath.core import pytorch
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.core.operations import (
    ADDITIVE, AT_RANDOM, CAST_BY_AUTOCAST, INPUT_FIRST, LINEAR_IN_EACH, NO_VALUES, NO_WEIGHTS, PRODUCTS, RECURRENT, SCALES,
    SHAPED_ALIKE, Call, name_of, replaced, run, tensors_in,
)  # fmt: skip
from feedbackpath.errors import UnconvertedLayerWarning, UntieError


class Known(NamedTuple):
    """What an exchange knows of a tensor that holds no activity.

    Attributes:
        tensor: W, or what was made of it. It is held, so that its id stays its own.
        feedback: B, or what the same operations made of it; None: nothing is exchanged for it.
        origins: The weights that it was made of; none: a constant.
        is_whole: Whether it is W itself.
        is_signal: Whether it may stand for activity: random numbers, rows that were looked up.
    """

    tensor: Tensor
    feedback: Tensor | None
    origins: tuple[UntiedWeight, ...] = ()
    is_whole: bool = False
    is_signal: bool = False


class Exchange(TorchFunctionMode):
    """Watches one forward pass and sends errors back through B wherever W meets activity.

    Args:
        weights: The weights that may be met.
        model: Whose buffers are constants.
    """

    def __init__(self, weights: Iterable[UntiedWeight], model: nn.Module) -> None:
        super().__init__()
        self.is_traced = torch.compiler.is_compiling()
        self.known: list[Known] = []
        self._by_id: dict[int, Known] = {}
        self.deliveries: list[tuple[Tensor, UntiedWeight]] = []
        self._model = model
        self._has_buffers = False
        self.is_aside = False  # while a layer sees to its one operation itself
        self.learn(weights)

    def learn(self, weights: Iterable[UntiedWeight]) -> None:
        """Know weights as they are now: ``functional_call`` and replicas run layers with others."""
        for weight in weights:
            w = getattr(weight.layer, weight.weight_name)
            if w is not None and self.look_up(w) is None:
                is_local = weight.layer.__dict__["untied"].send_back.is_local
                b = getattr(weight.layer, weight.feedback_name) if is_local and not RUNNING.is_backprop else None
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
        self, func: Call, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation of the forward pass."""
        if self.is_aside or (not self.is_traced and torch.compiler.is_compiling()):
            return run(func, args, kwargs or {})  # a part that is compiled by itself watches for itself
        is_plain = not self.is_traced and len(args) > 0 and isinstance(args[0], Tensor)
        if is_plain:
            by_id = self._by_id
            for arg in args:
                if id(arg) in by_id or isinstance(arg, (list, tuple)):
                    is_plain = False
        if kwargs:
            for arg in kwargs.values():
                if isinstance(arg, (Tensor, list, tuple, dict)):
                    is_plain = False
        if is_plain:
            return run(func, args, kwargs or {})
        return self._run_with_care(func, args, kwargs or {})

    def _run_with_care(self, func: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = tensors_in((args, kwargs))
        looked_up = [self.look_up(tensor) for tensor in tensors]
        met = [one for one in looked_up if one is not None]
        name = name_of(func)
        if not any([one.origins for one in met]):
            output = run(func, args, kwargs)
            if len(met) == len(tensors):
                self._learn(output, None, (), is_signal="rand" in name or any([one.is_signal for one in met]))
            return output
        if func is F.multi_head_attention_forward:
            with self:
                return pytorch.attention(*args, **kwargs)
        if name in NO_WEIGHTS:
            return run(func, args, kwargs)
        if name in SHAPED_ALIKE:
            output = run(func, args, kwargs)
            self._learn(output, None, (), is_signal="rand" in name)
            return output
        if name in INPUT_FIRST:
            x = args[0] if args else kwargs.get("input")
            met = [one for one in met if one.tensor is not x]
        elif all([self._holds_no_activity(tensor) for tensor in tensors]):
            if name not in PRODUCTS:
                return self._derive(func, name, args, kwargs, met)
            definite = [one for one in met if one.origins and not one.is_signal]
            if len(definite) == len([one for one in met if one.origins or one.is_signal]):
                return self._derive(func, name, args, kwargs, met)
            met = definite
        return self._meet(func, name, args, kwargs, met)

    def _holds_no_activity(self, tensor: Tensor) -> bool:
        if isinstance(tensor, nn.Parameter) or not tensor.is_floating_point() or self.look_up(tensor) is not None:
            return True
        if not self._has_buffers:
            self._has_buffers = True
            for buffer in self._model.buffers():
                if self.look_up(buffer) is None:
                    self._note(Known(buffer, None))
        return self.look_up(tensor) is not None

    def _learn(
        self, output: Any, beside: Any, origins: tuple[UntiedWeight, ...], *, is_signal: bool = False
    ) -> None:
        """Know what came of an operation without activity, and its partners."""
        partners = tensors_in(beside)
        for number, tensor in enumerate(tensors_in(output)):
            if tensor.is_floating_point() and self.look_up(tensor) is None:
                partner = partners[number] if partners else None
                self._note(Known(tensor, partner, origins, is_signal=is_signal))

    def _derive(
        self, func: Call, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], met: Sequence[Known]
    ) -> Any:
        """Run an operation on weights alone, and the same one on their partners."""
        if name in NO_VALUES:
            return run(func, args, kwargs)
        if name in PRODUCTS and len({one.origins for one in met if one.origins}) > 1:
            _warn_of_product(met, name)
        origins = tuple(dict.fromkeys([origin for one in met for origin in one.origins]))
        partners = [(one.tensor, one.feedback) for one in met if one.feedback is not None]
        is_looked_up = any([not tensor.is_floating_point() for tensor in tensors_in((args, kwargs))])
        is_signal = is_looked_up or name in PRODUCTS or any([one.is_signal for one in met])
        writes = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or "out" in kwargs
        if not partners or (writes and met[0].is_whole):  # B is not written to because W is
            output = run(func, args, kwargs)
            self._learn(output, None, origins, is_signal=is_signal)
            return output
        if name in AT_RANDOM:
            state = pytorch.random_state(met[0].tensor)
            output = run(func, args, kwargs)
            with pytorch.random_numbers_from(state, met[0].tensor):
                beside = run(func, *replaced((args, kwargs), partners))
        else:
            output = run(func, args, kwargs)
            beside = run(func, *replaced((args, kwargs), partners))
        self._learn(output, beside, origins, is_signal=is_signal)
        return output

    def _meet(
        self, func: Call, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], met: Sequence[Known]
    ) -> Any:
        """Run an operation in which weights meet activity."""
        pairs = [one for one in met if one.feedback is not None]
        if not pairs or name in ADDITIVE or not torch.is_grad_enabled() or (name in SCALES and _is_scale(args, kwargs, pairs)):
            output = run(func, args, kwargs)
        elif pytorch.is_traced():
            output = write_twice(func, name, args, kwargs, pairs)
        else:
            output = exchange_saved(func, name, args, kwargs, pairs)
        for one in met:
            _show(one, args, kwargs, output, self)
        return output


class _Running(threading.local):
    """The forward pass that runs in this thread.

    Attributes:
        exchange: What watches it.
        traced: What watches the part that is being compiled.
        is_backprop: Whether errors go back through W for now.
        is_off: Whether untied modules do nothing of their own for now.
    """

    def __init__(self) -> None:  # in each thread; a compiler's guards count the attributes that are there
        self.exchange: Exchange | None = None
        self.traced: Exchange | None = None
        self.is_backprop = False
        self.is_off = False


RUNNING = _Running()


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


def watch(forward: Call, args: tuple[Any, ...], exchange: Exchange) -> Any:
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
def _watch_eagerly(forward: Call, args: tuple[Any, ...], exchange: Exchange) -> Any:
    RUNNING.exchange = exchange
    exchange.run_eagerly()
    try:
        with exchange:
            return forward(*args)
    finally:
        RUNNING.exchange = None


def exchange_product(
    weight: UntiedWeight, w: Tensor, b: Tensor, forward: Call, args: tuple[Any, ...], kwargs: dict[str, Any], running: Exchange | None
) -> Any:
    """Run a layer that is one product of its input and its weight: the short way, past the watching.

    Args:
        weight: The layer's weight.
        w: Its value.
        b: Its feedback weight.
        forward: The layer's own forward pass.
        args: Its arguments.
        kwargs: Its keyword arguments.
        running: What watches the forward pass that this is a part of.
    """
    parameters: dict[str, Any] = weight.layer._parameters
    handed = w
    if b.requires_grad:
        handed = parameters[weight.weight_name] = _share(w, b)
    if running is not None:
        running.is_aside = True
    pytorch.push_hooks(*save_feedback(w, handed, b))
    try:
        return forward(*args, **kwargs)
    finally:
        pytorch.pop_hooks()
        if running is not None:
            running.is_aside = False
        if handed is not w:
            parameters[weight.weight_name] = w


def save_feedback(w: Tensor, handed: Tensor, b: Tensor) -> pytorch.Hooks:
    """Return saved-tensor hooks for one product of an input and W: they keep B for W."""
    place = handed.data_ptr()
    if b.stride() != w.stride() or b.dtype != w.dtype:
        b = _laid_out_as(w, b)
    version_of = pytorch.version_of
    outer = pytorch.outer_hooks()

    def pack(saved: Tensor) -> Any:
        if saved.data_ptr() == place:
            return b, version_of(b), saved.shape, saved.stride()
        return saved, version_of(saved), None, None

    def unpack(kept: Any) -> Tensor:
        tensor, version, shape, stride = kept
        if version_of(tensor) != version:
            _refuse_changed(tensor, version, shape is not None)
        return tensor if shape is None else tensor.detach().as_strided(shape, stride)

    if outer is None:
        return pack, unpack
    pack_outside, unpack_outside = outer
    return lambda saved: pack_outside(unpack(pack(saved))), unpack_outside


def exchange_saved(
    func: Call, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], pairs: Sequence[Known]
) -> Any:
    """Run an operation whose backward pass uses B where autograd would use W.

    Args:
        func: The operation.
        name: Its name.
        args: Its arguments.
        kwargs: Its keyword arguments.
        pairs: The weights among the arguments.

    Raises:
        UntieError: The operation keeps a copy of W that cannot be told from activity.
    """
    handed = [hand(one) for one in pairs]
    if name in CAST_BY_AUTOCAST:
        handed = [_cast_in_the_open(w) for w in handed]
    places = [(one.tensor, w, one.feedback) for one, w in zip(pairs, handed, strict=True)]
    hooks = _SavedTensors(places, keeps_outputs=name not in PRODUCTS)
    given = [(w, own) for w, own, _ in places if own is not w]
    if given:
        args, kwargs = replaced((args, kwargs), given)
    with torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack):
        output = _run_without_cudnn(func, args, kwargs) if name in RECURRENT else run(func, args, kwargs)
    if hooks.found < len(pairs) and name not in RECURRENT:
        if _hides_a_copy(args, kwargs, output, pairs, hooks.elsewhere):
            return write_twice(func, name, args, kwargs, pairs)
    return output


class _SavedTensors:
    """What autograd is given to keep for the backward pass of one operation: B for W, all else as it is.

    Args:
        places: W; what the operation is given of it; and B.
        keeps_outputs: Whether the operation may save its own output, which must not keep its graph alive.

    Attributes:
        found: How often W was saved.
        elsewhere: Where all else that was saved lies in memory.
    """

    __slots__ = ("_outer", "_places", "_keeps_outputs", "found", "elsewhere")

    def __init__(self, places: Sequence[tuple[Tensor, Tensor, Any]], *, keeps_outputs: bool) -> None:
        self._places = {handed.data_ptr(): _laid_out_as(w, b) for w, handed, b in places}
        self._keeps_outputs = keeps_outputs
        self._outer = pytorch.outer_hooks()
        self.found = 0
        self.elsewhere: list[int] = []

    def pack(self, saved: Tensor) -> Any:
        place = saved.data_ptr()
        b = self._places.get(place)
        if b is None:
            self.elsewhere.append(place)
            if self._outer is not None:
                return self._outer[0](saved)
            kept = saved.detach() if self._keeps_outputs else saved
            return kept, pytorch.version_of(kept), None
        self.found += 1
        # B is cast when it is used, not before: no copy of it is kept meanwhile.
        part = b, pytorch.version_of(b), (saved.shape, saved.stride(), saved.dtype)
        return part if self._outer is None else self._outer[0](_take(*part))

    def unpack(self, kept: Any) -> Tensor:
        return _take(*kept) if self._outer is None else self._outer[1](kept)


def _take(tensor: Tensor, version: int, form: tuple[Any, ...] | None) -> Tensor:
    """Return what was kept, complaining as autograd does where it has changed since."""
    if pytorch.version_of(tensor) != version:
        _refuse_changed(tensor, version, form is not None)
    if form is None:
        return tensor
    shape, stride, dtype = form
    part = tensor.as_strided(shape, stride)
    return part if part.dtype == dtype else part.to(dtype)


def _refuse_changed(tensor: Tensor, version: int, is_feedback: bool) -> None:
    what = "a feedback weight" if is_feedback else "an input of an untied layer"
    raise RuntimeError(
        f"one of the variables needed for gradient computation has been modified by an inplace operation: {what} of "
        f"shape {list(tensor.shape)} is at version {pytorch.version_of(tensor)}; expected version {version} instead"
    )


def write_twice(
    func: Call, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], pairs: Sequence[Known]
) -> Tensor:
    """Run an operation through W for its value, and through B for its gradients.

    ``value = op(x, W)`` and ``graph = op(x, B)``: the error at ``graph`` is that at the output, so x gets
    ``op'(delta, B)``. W gets ``delta x^T``, which takes no weight. A compiler drops ``graph``'s own value.

    Raises:
        UntieError: The operation is not linear in W and in its input.
    """
    if name not in LINEAR_IN_EACH:
        names = ", ".join([repr(origin.name) for one in pairs for origin in one.origins])
        raise UntieError(
            f"the weight of {names} goes into {name}, whose backward pass cannot be led through a feedback "
            "weight here: leave the layer to backprop, untie(..., overrides={path: 'bp'}), or run it eagerly, "
            "without torch.compile, torch.func or autocast"
        )
    with torch.no_grad():
        value = run(func, args, kwargs)
    swapped = [(one.tensor, _Swap.apply(one.tensor, one.feedback, _gradients_of(one))) for one in pairs]
    graph = run(func, *replaced((args, kwargs), swapped))
    return _TakeValue.apply(graph, value)  # type: ignore[no-any-return]


def hand(one: Known) -> Tensor:
    """Return W as an operation is to use it: where B learns, B gets of the gradient what its rule gives it."""
    gradients = _gradients_of(one)
    if one.feedback is None or not (one.feedback.requires_grad or gradients is not None):
        return one.tensor
    if gradients is None:
        return _Share.apply(one.tensor, one.feedback)  # type: ignore[no-any-return]
    return _Split.apply(one.tensor, one.feedback, gradients)  # type: ignore[no-any-return]


def _gradients_of(one: Known) -> Callable[[Tensor], tuple[Tensor, Tensor | None]] | None:
    """Return what a rule makes of the outer product for W and for B; None: both get it as it is."""
    return one.origins[0].layer.__dict__["untied"].gradients_of(one.origins[0]) if one.origins else None


class _Share(torch.autograd.Function):
    """Hand W on as it is; its gradient goes to B as well."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, b: Tensor) -> Tensor:
        return w.view_as(w)

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> Any:
        (delta,) = deltas
        return delta, pytorch.share(delta)


# What ``apply`` comes to where nothing is traced, without looking once more whether that is so.
_share: Callable[[Tensor, Tensor], Tensor] = super(torch.autograd.Function, _Share).apply


class _Split(torch.autograd.Function):
    """Hand W on as it is; a rule says what of its gradient goes to W and what to B."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, b: Tensor, gradients: Any) -> Tensor:
        ctx.gradients = gradients
        return w.view_as(w)

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> Any:
        for_w, for_b = ctx.gradients(*deltas)
        return for_w, for_b if ctx.needs_input_grad[1] else None, None


class _Swap(torch.autograd.Function):
    """Hand B on in W's place; the gradient goes to W, and to B where it learns."""

    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor, b: Tensor, gradients: Any) -> Tensor:
        return b.view_as(b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.gradients = inputs[2]

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> Any:
        (delta,) = deltas
        for_w, for_b = (delta, delta.clone()) if ctx.gradients is None else ctx.gradients(delta)
        return for_w, for_b if ctx.needs_input_grad[1] else None, None


class _TakeValue(torch.autograd.Function):
    """Have the value of one tensor and the gradients of another."""

    generate_vmap_rule = True

    @staticmethod
    def forward(graph: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> Any:
        return *deltas, None


def _laid_out_as(w: Tensor, b: Tensor | None) -> Tensor:
    """Return B with its values in the order of W's memory: B itself, if it is laid out alike."""
    assert b is not None
    b = b.detach()
    if b.stride() == w.stride():
        return b
    return torch.empty_strided(w.shape, w.stride(), dtype=b.dtype, device=b.device).copy_(b)


def _cast_in_the_open(w: Tensor) -> Tensor:
    """Cast W as autocast would: its own copy, made out of sight, could not be told from activity."""
    device = w.device.type
    if not torch.is_autocast_enabled(device) or w.dtype == torch.float64:
        return w
    return w.to(torch.get_autocast_dtype(device))


def _run_without_cudnn(func: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a recurrent layer: cuDNN packs its weights into one buffer, whose parts cannot be exchanged."""
    with torch.backends.cudnn.flags(enabled=False):
        return run(func, args, kwargs)


def _hides_a_copy(
    args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, pairs: Sequence[Known], saved: Sequence[int]
) -> bool:
    """Whether an operation may have saved a copy of W: something that is none of its arguments or results."""
    arguments = tensors_in((args, kwargs))
    if not any([x.requires_grad for x in arguments if not any([x is one.tensor for one in pairs])]):
        return False  # no error is asked for
    own = {tensor.data_ptr() for tensor in [*arguments, *tensors_in(output)]}
    return not own.issuperset(saved)


def _is_scale(args: tuple[Any, ...], kwargs: dict[str, Any], pairs: Sequence[Known]) -> bool:
    """Whether a product multiplies each activity by a number of its own, and fans none out."""
    tensors = tensors_in((args, kwargs))
    activities = [tensor.shape for tensor in tensors if not any([tensor is one.tensor for one in pairs])]
    return torch.broadcast_shapes(*[tensor.shape for tensor in tensors]) == torch.broadcast_shapes(*activities)


def _show(one: Known, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, exchange: Exchange) -> None:
    """Show the signals of an operation to whoever listens to its weight's layer."""
    for origin in one.origins:
        taps = origin.layer.__dict__["untied"].taps
        if taps:
            tensors = tensors_in((args, kwargs))
            x = next((tensor for tensor in tensors if exchange.look_up(tensor) is None), tensors[0])
            for tap in taps:
                tap(origin, x, tensors_in(output)[0], _rows_of(one, origin))


def _rows_of(one: Known, origin: UntiedWeight) -> slice:
    """Return which rows of W met activity: a part of them where a projection is taken from a packed weight."""
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
