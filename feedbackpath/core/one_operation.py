"""One operation in which a forward weight W meets activity: forward through W, error through B.

    y  = op(x, W)       the operation itself, whatever it is
    dx = op'(delta, B)  B stands where autograd would have used W
    dW = delta x^T      needs no weight
    dB = delta x^T      only where B learns

``exchange_saved`` lets autograd keep B where it would keep W for the backward pass. Where that cannot be, as
of sparse activity, ``write_twice`` runs ``op(x, W)`` for its value and ``op(x, B)`` for its gradients. An
operation that is not linear in W has dW at W, and dx and dB at B.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from feedbackpath.core import operations as ops
from feedbackpath.core import pytorch
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.core.operations import Args, Call, Kwargs, replaced, run, tensors_in
from feedbackpath.errors import UntieError

Gradients = Callable[[Tensor], tuple[Tensor, Tensor | None]]


class Known(NamedTuple):
    """What an exchange knows of a tensor that holds no activity.

    Attributes:
        tensor: W, or what was made of it. It is held, so that its id stays its own.
        feedback: B, or what the same operations made of it; None: nothing is exchanged for it.
        origins: The weights that it was made of; none: a constant.
        is_whole: Whether it is W itself.
        is_signal: Whether it may stand for activity: random numbers, rows that were looked up.
        is_stranger: Whether it is a matrix without feedback weights, or was made of one.
    """

    tensor: Tensor
    feedback: Tensor | None
    origins: tuple[UntiedWeight, ...] = ()
    is_whole: bool = False
    is_signal: bool = False
    is_stranger: bool = False


def exchange_saved(func: Call, name: str, args: Args, kwargs: Kwargs, pairs: Sequence[Known]) -> Any:
    """Run an operation whose backward pass uses B where autograd would use W.

    Args:
        func: The operation.
        name: Its name.
        args: Its arguments.
        kwargs: Its keyword arguments.
        pairs: The weights among the arguments.

    Raises:
        UntieError: The operation keeps W, or a copy of it, and is of a kind that cannot be run twice.
    """
    handed = [_hand(one) for one in pairs]
    if name in ops.CAST_BY_AUTOCAST:
        handed = [_cast_in_the_open(w) for w in handed]
    given = [(one.tensor, w) for one, w in zip(pairs, handed, strict=True) if w is not one.tensor]
    own_args, own_kwargs = replaced((args, kwargs), given) if given else (args, kwargs)
    places = {
        w.data_ptr(): _laid_out_as(one.tensor, one.feedback) for one, w in zip(pairs, handed, strict=True)
    }
    is_linear = ops.is_linear(name, own_args, handed)
    state = None if is_linear or name in ops.RECURRENT else pytorch.random_state(handed[0])
    saved: list[int] = []
    hooks = saving(places, saved, keeps_outputs=name not in ops.PRODUCTS)
    with torch.autograd.graph.saved_tensors_hooks(*hooks):
        output = (_run_without_cudnn if name in ops.RECURRENT else run)(func, own_args, own_kwargs)
    # One that is linear takes each weight once. Another may have kept W for W's own gradient, or a copy.
    if name in ops.RECURRENT or (is_linear and places.keys() <= set(saved)):
        return output
    is_clear = is_linear or places.keys().isdisjoint(saved)
    if is_clear and not _hides_a_copy(own_args, own_kwargs, output, places, saved):
        return output
    if ops.writes(name, kwargs):
        raise _cannot(name, pairs)
    if state is None:
        return write_twice(func, name, args, kwargs, pairs)
    with pytorch.random_numbers_from(state, handed[0]):
        return _write_apart(func, name, args, kwargs, pairs)


def saving(
    places: Mapping[int, Tensor], seen: list[int] | None = None, *, keeps_outputs: bool = False
) -> pytorch.Hooks:
    """Return saved-tensor hooks that let autograd keep B for W, and all else as it is.

    Args:
        places: Where W lies in memory, and its B, laid out alike.
        seen: Takes the places in memory of all that is saved.
        keeps_outputs: Whether the operation may save its own output, which must not keep its graph alive.
    """
    version_of = pytorch.version_of
    outer = pytorch.outer_hooks()

    def pack(saved: Tensor) -> Any:
        place = saved.data_ptr()
        if seen is not None:
            seen.append(place)
        b = places.get(place)
        if b is not None:  # it is cast when it is used, not before: no copy of it is kept meanwhile
            return b, version_of(b), (saved.shape, saved.stride(), saved.dtype)
        kept = saved.detach() if keeps_outputs else saved
        return kept, version_of(kept), None

    def unpack(kept: Any) -> Tensor:
        tensor, version, form = kept
        if version_of(tensor) != version:
            _refuse_changed(tensor, version, form is not None)
        if form is None:
            return tensor  # type: ignore[no-any-return]
        shape, stride, dtype = form
        if torch.is_grad_enabled():  # this backward pass is differentiated itself: what that gives goes to W
            tensor = tensor.detach()
        part: Tensor = tensor.as_strided(shape, stride)
        return part if part.dtype is dtype else part.to(dtype)

    if outer is None:
        return pack, unpack
    pack_outside, unpack_outside = outer
    return lambda saved: pack_outside(unpack(pack(saved))), unpack_outside


def _refuse_changed(tensor: Tensor, version: int, is_feedback: bool) -> None:
    """Complain as autograd does of what has changed since it was saved."""
    what = "a feedback weight" if is_feedback else "an input of an untied layer"
    raise RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"{what} of shape {list(tensor.shape)} is at version {pytorch.version_of(tensor)}; "
        f"expected version {version} instead"
    )


def write_twice(func: Call, name: str, args: Args, kwargs: Kwargs, pairs: Sequence[Known]) -> Tensor:
    """Run an operation through W for its value, and through B for its gradients.

    ``value = op(x, W)`` and ``graph = op(x, B)``: the error at ``graph`` is that at the output, so x gets
    ``op'(delta, B)``. W gets ``delta x^T``, which takes no weight. A compiler drops ``graph``'s own value.

    Raises:
        UntieError: The operation is not linear in W and in its input.
    """
    if not ops.is_linear(name, args, [one.tensor for one in pairs]):
        raise _cannot(name, pairs)
    with torch.no_grad():
        value = run(func, args, kwargs)
    swapped = [(one.tensor, swap(one.tensor, one.feedback, _gradients_of(one), False)) for one in pairs]
    graph = run(func, *replaced((args, kwargs), swapped))
    return _TakeValue.apply(graph, value)  # type: ignore[no-any-return, no-untyped-call]


def _write_apart(func: Call, name: str, args: Args, kwargs: Kwargs, pairs: Sequence[Known]) -> Tensor:
    """Run an operation that is not linear in W: by W for its value and W's gradient, by B for x's and B's."""
    constant = [(x, x.detach()) for x in tensors_in((args, kwargs))]  # behind W, which is found first
    told = [(one.tensor, one.feedback, _gradients_of(one)) for one in pairs if one.feedback is not None]
    own = [(w, swap(w, b.detach(), gradients, True)) for w, b, gradients in told]
    through_b = [(w, swap(w.detach(), b, gradients, False)) for w, b, gradients in told]
    state = pytorch.random_state(pairs[0].tensor)
    value = run(func, *replaced((args, kwargs), [*own, *constant]))
    if not isinstance(value, Tensor):
        raise _cannot(name, pairs)
    with pytorch.random_numbers_from(state, pairs[0].tensor):
        graph = run(func, *replaced((args, kwargs), through_b))
    return _TakeValue.apply(graph, value)  # type: ignore[no-any-return, no-untyped-call]


def _cannot(name: str, pairs: Sequence[Known]) -> UntieError:
    names = ", ".join([repr(origin.name) for one in pairs for origin in one.origins])
    return UntieError(
        f"the weight of {names} goes into {name}, and errors cannot be sent through a feedback weight there: "
        "leave the layer to backprop, untie(..., overrides={path: 'bp'}), or run it eagerly, without "
        "torch.compile, torch.func or autocast"
    )


def _hand(one: Known) -> Tensor:
    """Return W as an operation is to use it: a B that learns gets what its rule gives it of the gradient."""
    gradients = _gradients_of(one)
    if one.feedback is None or not (one.feedback.requires_grad or gradients is not None):
        return one.tensor
    return swap(one.tensor, one.feedback, gradients, True)


def _gradients_of(one: Known) -> Gradients | None:
    """Return what a rule makes of the outer product for W and for B; None: both get it as it is."""
    return one.origins[0].layer.__dict__["untied"].gradients_of(one.origins[0]) if one.origins else None


class _Swap(torch.autograd.Function):
    """Hand a tensor on in W's place: W itself, or B. The gradient goes to W, and to B where it learns.

    ``gradients``: what a rule makes of it for W and for B; None: both get it as it is.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor, b: Tensor, gradients: Gradients | None, hands_w: bool) -> Tensor:
        return w.view_as(w) if hands_w else b.view_as(b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.gradients = inputs[2]

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> Any:
        (delta,) = deltas
        if ctx.gradients is not None:
            for_w, for_b = ctx.gradients(delta)
        else:
            for_w, for_b = delta, pytorch.share(delta) if ctx.needs_input_grad[1] else None
        return for_w, for_b if ctx.needs_input_grad[1] else None, None, None


swap: Callable[..., Tensor] = _Swap.apply


class _TakeValue(torch.autograd.Function):
    """Have the value of one tensor and the graph of another; what the value was made of gets its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(graph: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> Any:
        return *deltas, *deltas


def _laid_out_as(w: Tensor, b: Tensor | None) -> Tensor:
    """Return B with its values in the order of W's memory: B itself, if it is laid out alike."""
    assert b is not None
    if b.stride() == w.stride():
        return b
    alike = torch.empty_strided(w.shape, w.stride(), dtype=b.dtype, device=b.device)
    return alike.copy_(b.detach())


def _cast_in_the_open(w: Tensor) -> Tensor:
    """Cast W as autocast would: its own copy, made out of sight, could not be told from activity."""
    device = w.device.type
    if not torch.is_autocast_enabled(device) or w.dtype == torch.float64:
        return w
    return w.to(torch.get_autocast_dtype(device))


def _run_without_cudnn(func: Call, args: Args, kwargs: Kwargs) -> Any:
    """Run a recurrent layer: cuDNN packs its weights into one buffer, whose parts cannot be exchanged."""
    with torch.backends.cudnn.flags(enabled=False):
        return run(func, args, kwargs)


def _hides_a_copy(
    args: Args, kwargs: Kwargs, output: Any, weights: Mapping[int, Tensor], saved: Sequence[int]
) -> bool:
    """Whether an operation may have saved a copy of W: something that is none of its arguments or results."""
    arguments = tensors_in((args, kwargs))
    if not any(x.requires_grad for x in arguments if x.data_ptr() not in weights):
        return False  # no error is asked for
    own = {tensor.data_ptr() for tensor in [*arguments, *tensors_in(output)]}
    return not own.issuperset(saved)
