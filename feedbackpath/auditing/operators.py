"""What PyTorch's operators do with a weight, and the tensors among their arguments."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from feedbackpath.core.layers import UntiedWeight
from feedbackpath.layers import LocallyConnected2d

RANDOM = ("normal_", "uniform_", "bernoulli_", "random_", "exponential_", "randn", "rand", "randint",
          "randperm", "bernoulli", "normal", "native_dropout", "multinomial")  # fmt: skip
OVERWRITES = ("copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_")
SIGNS = ("sign", "sgn", "signbit", "sign_", "sgn_")
FACTORS = ("mul", "mul_", "div", "div_")
SUMS = ("sum", "mean")
# They leave PyTorch: what they return is a number of Python's.
EXITS = ("_local_scalar_dense", "equal", "is_nonzero")
# Sums over products of a weight and a signal, and which of their arguments are multiplied.
CONTRACTIONS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "vdot", "linear", "convolution", "convolution_overrideable",
                     "cudnn_convolution", "mkldnn_convolution", "miopen_convolution", "embedding"), (0, 1)),
    **dict.fromkeys(("addmm", "addmm_", "_addmm_activation", "baddbmm", "baddbmm_", "addbmm", "addmv"),
                    (1, 2)),
    **dict.fromkeys(("_trilinear", "mkldnn_rnn_layer", "_scaled_dot_product_flash_attention_for_cpu",
                     "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
                     "_scaled_dot_product_cudnn_attention"), (0, 1, 2)),
}  # fmt: skip
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


def is_forward_map(name: str, args: tuple[Any, ...], place: int, weight: UntiedWeight) -> bool:
    """Whether a product takes W as its layer does: from inputs to outputs, and the whole of it.

    Args:
        name: The operator.
        args: Its arguments.
        place: Which of them W is.
        weight: W.
    """
    w: Tensor = weight.weight
    given = args[place]
    if given.data_ptr() != w.data_ptr() or given.numel() != w.numel():
        return False
    is_as_it_is = bool(given.shape == w.shape and given.stride() == w.stride())
    if "convolution" in name:
        transposed = args[6] if name in ("convolution", "convolution_overrideable") else weight.transposed
        return bool(place == 1 and is_as_it_is and transposed == weight.transposed)
    if "rnn" in name or name in ("linear", "_trilinear"):
        return bool(place > 0 and is_as_it_is)
    if isinstance(weight.layer, LocallyConnected2d):
        w = weight.layer.as_groups(w)
    elif w.dim() != 2:
        return False
    first, other = CONTRACTIONS[name]
    expected = w if place == first else w.mT
    is_alike = given.shape == expected.shape and given.stride() == expected.stride()
    return bool(place in (first, other) and is_alike)


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


def _calling_frame() -> Any:
    frame: Any = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module != "torch" and not module.startswith(INNER):
            return frame
        frame = frame.f_back
    return None


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
