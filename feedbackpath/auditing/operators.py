"""What PyTorch's operators do with a weight, and the tensors among their arguments."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from feedbackpath.auditing.copies import head
from feedbackpath.auditing.memory import is_plain, parts_of
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.layers import LocallyConnected2d

RANDOM = ("normal_", "uniform_", "bernoulli_", "random_", "exponential_", "randn", "rand", "randint",
          "randperm", "bernoulli", "normal", "native_dropout", "multinomial")  # fmt: skip
OVERWRITES = ("copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_")
SIGNS = ("sign", "sgn", "signbit", "sign_", "sgn_")
FACTORS = ("mul", "mul_", "div", "div_", "addcmul", "addcmul_", "addcdiv", "addcdiv_", "lerp", "lerp_", "pow")
# Parameters that signals meet here multiply none of them.
ADDITIVE = ("add", "add_", "sub", "sub_", "rsub", "cat", "stack", "where", "copy_", "index_put", "index_put_",
            "index_add", "index_copy", "scatter", "scatter_add", "slice_scatter", "select_scatter",
            "masked_fill", "masked_scatter", "maximum", "minimum", "clamp", "_thnn_fused_lstm_cell",
            "_thnn_fused_gru_cell")  # fmt: skip
SUMS = ("sum", "mean")
# They leave PyTorch: what they return is a number of Python's.
EXITS = ("_local_scalar_dense", "equal", "is_nonzero")
# Sums over products of a weight and a signal, and which of their arguments are multiplied.
CONTRACTIONS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "vdot", "linear", "convolution", "convolution_overrideable",
                     "cudnn_convolution", "mkldnn_convolution", "miopen_convolution", "embedding",
                     "mkldnn_linear", "_sparse_sparse_matmul", "_sparse_mm_reduce_impl"), (0, 1)),
    **dict.fromkeys(("addmm", "addmm_", "_addmm_activation", "baddbmm", "baddbmm_", "addbmm", "addmv",
                     "_sparse_addmm", "sparse_sampled_addmm"),
                    (1, 2)),
    **dict.fromkeys(("_trilinear", "mkldnn_rnn_layer", "_scaled_dot_product_flash_attention_for_cpu",
                     "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
                     "_scaled_dot_product_cudnn_attention"), (0, 1, 2)),
}  # fmt: skip
# Of what layers an operator is the forward map, where other layers' weights could be handed out by it.
OWNERS: dict[str, type[nn.Module]] = {
    "embedding": nn.Embedding, "_trilinear": nn.Bilinear, "mkldnn_rnn_layer": nn.RNNBase,
}  # fmt: skip
BILINEAR = [[1, 3], [0], [1, 2], [2, 3]]  # which axes ``bilinear`` adds, and sums over
INNER = ("torch.", "contextlib", "feedbackpath.auditing", "feedbackpath.core", "feedbackpath.mirror.passage")
Call = tuple[list[Tensor], list[Tensor], list[Tensor]]


def split(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Iterator[Call]:
    """Yield (inputs, those written to, results) of a call; of one on lists, element by element.

    A list operator updates many parameters at once, each from its own gradient and momentum: what one is
    made of says nothing of the others. What is no list (a learning rate) belongs to all.
    """
    schema = func._schema.arguments
    values = list(zip([a.name for a in schema], args, strict=False)) + list(kwargs.items())
    writes = {a.name for a in schema if a.alias_info is not None and a.alias_info.is_write}
    lengths = [0]
    if func.overloadpacket.__name__.startswith(("_foreach", "_fused", "_amp_foreach")):
        lengths += [
            len(value) for _, value in values if isinstance(value, list | tuple) and tensors_in(value)
        ]
    if not max(lengths):
        written = [t for name, value in values if name in writes for t in tensors_in(value)]
        yield [t for _, value in values for t in tensors_in(value)], written, tensors_in(output)
        return
    for index in range(max(lengths)):
        chosen = [(name, _element(value, index)) for name, value in values]
        written = [t for name, value in chosen if name in writes for t in tensors_in(value)]
        results = output[index] if isinstance(output, list | tuple) and index < len(output) else ()
        yield [t for _, value in chosen for t in tensors_in(value)], written, tensors_in(results)


def _element(value: Any, index: int) -> Any:
    if isinstance(value, list | tuple):
        return value[index] if index < len(value) else None
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in an argument."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in tensors_in(part)]
    return []


def is_scaling(name: str) -> bool:
    """Whether an operator multiplies each signal by a number of its own, unless its result is larger."""
    return name in FACTORS or is_norm(name)


def multiplies(name: str) -> bool:
    """Whether a signal may be multiplied by what it meets, in no product that is known."""
    return name not in ADDITIVE and name not in CONTRACTIONS


def is_norm(name: str) -> bool:
    """Whether an operator is a layer's that has one scale per channel."""
    return "norm" in name or "prelu" in name


def is_of_matrix(name: str) -> bool:
    """Whether each signal meets every number of a matrix: where systems are solved, or distances taken."""
    return any(part in name for part in ("linalg", "solve", "cdist", "euclidean_dist"))


def is_forward_map(name: str, args: tuple[Any, ...], place: int, weight: UntiedWeight) -> bool:
    """Whether a product takes W as its layer does: from inputs to outputs, and the whole of it.

    Args:
        name: The operator.
        args: Its arguments.
        place: Which of them W is.
        weight: W.
    """
    w: Tensor = weight.weight.detach()
    given = args[place]
    if not is_plain(given) or given.numel() != w.numel():
        return False
    if given.dim() == 3 and w.dim() == 2 and len(given) == 1:  # a batch of one product, as einsum makes it
        given = given[0]
    is_as_it_is = _is_same(given, w)
    if "convolution" in name:
        transposed = args[6] if name in ("convolution", "convolution_overrideable") else weight.transposed
        return bool(place == 1 and is_as_it_is and transposed == weight.transposed)
    if name in OWNERS and not isinstance(weight.layer, OWNERS[name]):
        return False
    if name == "_trilinear":
        return bool(place == 1 and is_as_it_is and list(args[3:7]) == BILINEAR)
    if "rnn" in name or name == "linear":
        return bool(place > 0 and is_as_it_is)
    if isinstance(weight.layer, LocallyConnected2d):
        w = weight.layer.as_groups(w)
    elif w.dim() != 2:
        return False
    first, other = CONTRACTIONS[name]
    expected = w if place == first else w.mT
    return place in (first, other) and _is_same(given, expected)


def _is_same(given: Tensor, weight: Tensor) -> bool:
    """Whether a tensor is a view of a weight, or its values as they are now in another precision."""
    strides = zip(given.shape, given.stride(), weight.stride(), strict=False)
    if given.shape != weight.shape or any(own != its and n > 1 for n, own, its in strides):
        return False
    if given.dtype != weight.dtype:  # under autocast, say
        return torch.equal(given, weight.to(given.dtype))
    return given.data_ptr() == weight.data_ptr()


def form_of(
    args: tuple[Any, ...], places: Iterable[int], weights: Sequence[Tensor] = ()
) -> tuple[object, ...]:
    """Return how weights lie in a product: what tells one with W from one with its transpose."""
    return tuple(
        (i, tuple(t.shape[-2:]), _is_transposed(t, weights))
        if is_plain(t)
        else (i, tuple(t.shape), str(t.layout), *(head(part).tolist() for part in parts_of(t)[1:]))
        for i in places
        for t in tensors_in(args[i])
    )


def _is_transposed(tensor: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether a matrix is the transpose of W: by how it lies in W's memory; a copy, by its values."""
    copied = [w.detach() for w in weights if tensor.dim() == 2 and tensor.shape == w.shape == w.mT.shape]
    for w in copied if all(tensor.data_ptr() != w.data_ptr() for w in copied) else ():
        if torch.equal(tensor.detach().to(w.dtype), w):
            return False
        if torch.equal(tensor.detach().to(w.dtype), w.mT):
            return True
    return tensor.dim() > 1 and tensor.stride(-1) >= tensor.stride(-2)


def is_turned(name: str, args: tuple[Any, ...], place: int, weights: Sequence[UntiedWeight]) -> bool:
    """Whether a product takes what is like a weight, a copy or an average, from outputs to inputs.

    Args:
        name: The operator.
        args: Its arguments.
        place: Which of them the matrix or kernel is; it belongs to no layer.
        weights: Those that it may be like.
    """
    given: Tensor = args[place].detach()
    if not is_plain(given):  # large ones, such as a graph's, are like none
        if all(given.numel() != w.weight.numel() for w in weights):
            return False
        given = given.to_dense()
    given = given.squeeze(0) if given.dim() == 3 and "convolution" not in name else given
    if given.dim() < 2:
        return False
    counts_inputs_first = args[6] if "convolution" in name and len(args) > 6 else False
    if "convolution" not in name and "rnn" not in name and name != "linear":
        counts_inputs_first = name == "embedding" or place != CONTRACTIONS[name][0]
    own, other = (turn(given), given) if counts_inputs_first else (given, turn(given))
    known = [turn(w.weight.detach()) if w.transposed else w.weight.detach() for w in weights]
    least = max(0.3, 4.5 / given.numel() ** 0.5)  # by chance, one in 100,000 is more alike
    turned, alike = (max((likeness(t, w) for w in known), default=0.0) for t in (other, own))
    return bool(turned > max(least, 1.5 * alike))


def turn(kernel: Tensor) -> Tensor:
    """Return what goes from outputs to inputs as a matrix, or a convolution's kernel, goes the other way."""
    return kernel.transpose(0, 1).flip(tuple(range(2, kernel.dim())))


def likeness(one: Tensor, other: Tensor) -> float:
    """Return how the values of two tensors correlate, without the sign; 0: their shapes differ."""
    if one.shape != other.shape:
        return 0.0
    a, b = (t.float().flatten() - t.float().mean() for t in (one, other))
    return float((a @ b).abs() / (a.norm() * b.norm()).clamp_min(1e-30))


def call_site() -> str:
    """Return file and line of the innermost call that is not PyTorch's, the core's or the audit's own."""
    frame = _calling_frame()
    return "an unknown line" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def calling_module() -> str:
    """Return the module of this library whose line that call is; empty: it is another's.

    A name alone does not make one.
    """
    frame = _calling_frame()
    module = None if frame is None else sys.modules.get(frame.f_globals.get("__name__", ""))
    name = getattr(module, "__name__", "")
    is_own = name.startswith("feedbackpath.") and frame.f_globals is vars(module)
    return name if is_own else ""


def is_of_engine() -> bool:
    """Whether PyTorch's backward pass itself runs an operator, and no hook or function of another's."""
    for _, module in _frames():
        if module.startswith("torch.autograd"):
            return True
        if _is_of_another(module):
            return False
    return True


def _calling_frame() -> Any:
    return next((frame for frame, module in _frames() if _is_of_another(module)), None)


def _frames() -> Iterator[tuple[Any, str]]:
    """Yield the calls that run, the innermost first, and the module that each stands in."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        yield frame, frame.f_globals.get("__name__", "")
        frame = frame.f_back


def _is_of_another(module: str) -> bool:
    """Whether a module is not PyTorch's, the core's or the audit's own."""
    return module != "torch" and not module.startswith(INNER)


class Exits(TorchFunctionMode):
    """Sees where tensors leave PyTorch: by NumPy, by pickle, by address, as numbers of Python's.

    Args:
        see: Called with the name of the method, and the tensor.
    """

    NAMES = ("numpy", "tolist", "__array__", "data_ptr", "__reduce_ex__", "__dlpack__", "untyped_storage")

    def __init__(self, see: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self._see = see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a method or function."""
        name = getattr(func, "__name__", "")
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if name in self.NAMES and isinstance(args[0], Tensor) and not caller.startswith("feedbackpath."):
            self._see(name, args[0])
        return func(*args, **(kwargs or {}))
