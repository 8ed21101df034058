"""Which activation follows a layer, seen in a forward pass: what takes up the layer's output, and what then.

Each tensor that comes of a layer's output is known as a function of it, elementwise. Sums, norms, masks,
reshapes and scales are passed over, as in ``feedbackpath.mirror.activations``. Where such a tensor goes into
anything else, the function that it has become is what follows the layer.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from feedbackpath.core import pytorch
from feedbackpath.core.context import RuleContext
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.core.modules import FeedbackModule
from feedbackpath.core.operations import (
    ADDITIVE,
    SCALES,
    SHAPED_ALIKE,
    Args,
    Call,
    Kwargs,
    name_of,
    names_in,
    tensors_in,
)
from feedbackpath.mirror.activations import (
    ACTIVATION_FUNCTIONS,
    ACTIVATION_METHODS,
    OUT_OF_PLACE,
    Activation,
    identity,
    is_affine,
    is_same,
    with_settings,
)

# Functions of one number, applied to each.
_ELEMENTWISE = names_in(
    """relu relu6 leaky_relu prelu elu selu celu gelu silu mish tanh sigmoid softplus softsign hardtanh
    hardsigmoid hardswish tanhshrink hardshrink softshrink threshold logsigmoid rrelu clamp clamp_min
    clamp_max clip abs exp expm1 log log1p sqrt rsqrt reciprocal square pow __pow__ __rpow__ float_power erf
    sin cos neg __neg__ sign maximum minimum"""
)
_ARITHMETIC = ADDITIVE & names_in(
    "add add_ sub sub_ subtract rsub __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ maximum minimum"
)
PASSED_OVER = names_in(
    """view reshape flatten unflatten permute transpose swapaxes movedim moveaxis unsqueeze squeeze expand
    expand_as contiguous to float double half bfloat16 type type_as clone alias __getitem__ chunk split
    split_with_sizes tensor_split unbind cat concat stack hstack vstack narrow select index_select roll flip
    pad dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout batch_norm layer_norm
    group_norm instance_norm rms_norm normalize masked_fill masked_fill_ where T mT repeat view_as reshape_as
    channel_shuffle pixel_shuffle pixel_unshuffle gather index_add index_add_ scatter_add scatter_add_"""
)
# What they make of a signal is a statistic of it: no neuron's answer goes on through them.
_STATISTICS = names_in(
    """mean sum var std var_mean std_mean norm vector_norm linalg_vector_norm max min amax amin argmax topk
    isnan isinf any all"""
)
_OF_SEVERAL = names_in("softmax log_softmax glu softmin gumbel_softmax maxout")


@dataclass(frozen=True)
class _Slot:
    """Stands for a tensor that comes of a layer's output: ``compute`` makes it of that."""

    compute: Activation


@dataclass(frozen=True)
class _Followed:
    """A tensor that comes of the outputs of layers.

    Attributes:
        names: The layers' weights.
        base: What it is a function of: their output, as far as nothing but linear operations has changed it.
        compute: That function.
    """

    names: frozenset[str]
    base: int
    compute: Activation = identity


class Follower(TorchFunctionMode):
    """Watches one forward pass for what the outputs of layers go into.

    Attributes:
        told: By a weight's name, every function that its output was seen to go on as; None: one that is none
            of single numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[str, list[Activation | None]] = defaultdict(list)
        self._aside: dict[str, list[Activation | None]] = defaultdict(list)
        self._followed: dict[int, _Followed] = {}
        self._taken_up: set[int] = set()
        self._kept: list[Tensor] = []  # so that their ids stay their own

    def begin_at(self, name: str, output: Tensor) -> None:
        """Follow the output of a layer."""
        self._note(output, _Followed(frozenset([name]), id(output)))

    def end(self, outputs: Any) -> None:
        """Say what becomes of what nothing took up: it leaves the model, or nobody sees it."""
        leaving = {id(tensor) for tensor in _tensors_of(outputs)}
        for key, one in self._followed.items():
            if key not in self._taken_up:
                self._tell([one], self.told if key in leaving else self._aside, is_seen=key in leaving)
        for name, seen in self._aside.items():
            self.told[name] = self.told.get(name) or seen
        self._followed.clear()
        self._kept.clear()

    def __torch_function__(
        self, func: Call, types: Any, args: Args = (), kwargs: Kwargs | None = None
    ) -> Any:
        """Run one operation, and follow what it takes up."""
        output = func(*args, **(kwargs or {}))
        if self._followed and not torch.compiler.is_compiling():
            self._follow(func, args, kwargs or {}, output)
        return output

    def _note(self, tensor: Tensor, one: _Followed) -> None:
        self._followed[id(tensor)] = one
        self._taken_up.discard(id(tensor))
        self._kept.append(tensor)

    def _follow(self, func: Call, args: Args, kwargs: Kwargs, output: Any) -> None:
        given = tensors_in((args, kwargs))
        met = [(tensor, self._followed[id(tensor)]) for tensor in given if id(tensor) in self._followed]
        made = [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
        if not met or not made or name_of(func) in SHAPED_ALIKE | {"detach", "data"}:
            return
        self._taken_up.update(id(tensor) for tensor, _ in met)
        found = [one for _, one in met]
        whole = name_of(func)
        name = whole if whole.startswith("__") else whole.rstrip("_")
        others = [
            x for x in given if id(x) not in self._followed and not isinstance(x, nn.Parameter) and x.dim()
        ]
        is_alone = len({one.base for one in found}) == 1 and not others
        takes_numbers = len(met) == sum(1 for x in given if x.dim())
        if is_alone and (name in _ELEMENTWISE or (name in SCALES | _ARITHMETIC and takes_numbers)):
            compute = _function_of(func, name, args, kwargs, met)
            self._note(made[0], _Followed(found[0].names, found[0].base, compute))
        elif name in PASSED_OVER or name in SCALES or name in ADDITIVE or whole in ADDITIVE:
            straight = [one for one in found if is_affine(one.compute)]
            self._tell([one for one in found if one not in straight], self.told)
            names = frozenset(name for one in straight for name in one.names)
            for tensor in made if names else ():
                self._note(tensor, _Followed(names, id(tensor)))
        elif name in _STATISTICS:
            self._tell(found, self._aside)
        else:
            self._tell(found, self.told, is_seen=name not in _OF_SEVERAL)

    def _tell(
        self, found: Sequence[_Followed], told: dict[str, list[Activation | None]], *, is_seen: bool = True
    ) -> None:
        for one in found:
            compute = identity if is_affine(one.compute) else one.compute
            for name in one.names:
                told[name].append(compute if is_seen or compute is not identity else None)


class Following:
    """Watches the outermost forward passes of a model for what follows its layers.

    Args:
        path: The path: what runs while it is measured is not counted.
        weights: The weights of the layers.
        is_measured: Whether what runs while the path is measured counts, and nothing else.

    Attributes:
        told: By a weight's name, every function that its output was seen to go on as.
    """

    def __init__(
        self, path: RuleContext, weights: Sequence[UntiedWeight], *, is_measured: bool = False
    ) -> None:
        self.told: dict[str, list[Activation | None]] = {}
        self._path, self._is_measured = path, is_measured
        self._depth, self._follower = 0, Follower()
        self._layers: list[Any] = list({id(weight.layer): weight.layer for weight in weights}.values())
        self._hooks = []
        for layer in self._layers:
            layer.untied.taps = (*layer.untied.taps, self._tap)
        for module in path.model.modules():
            owns = isinstance(module, FeedbackModule) and bool(module.untied.weights)
            if module is path.model or (not owns and any(True for _ in module.children())):
                self._hooks.append(module.register_forward_pre_hook(self._enter))
                self._hooks.append(module.register_forward_hook(self._leave, always_call=True))

    def __enter__(self) -> Self:
        """Watch on."""
        return self

    def __exit__(self, *_: object) -> None:
        """Watch no longer, whatever happened."""
        self.stop()

    def found(self) -> dict[str, Activation | None]:
        """Return what follows each weight's layer that was seen; None: different things."""
        return {name: _only_one(functions) for name, functions in self.told.items()}

    def stop(self) -> None:
        """Take all hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        for layer in self._layers:
            layer.untied.taps = tuple(tap for tap in layer.untied.taps if tap != self._tap)
        self._hooks.clear()
        self._layers.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Let a copy, which comes along with a copy of the model, watch nothing."""
        idle: dict[str, Any] = {
            "_layers": [],
            "_hooks": [],
            "_path": None,
            "_follower": None,
            "_depth": 0,
            "told": {},
        }
        return {**self.__dict__, **idle}

    def _is_idle(self) -> bool:
        if torch.compiler.is_compiling() or not self._layers or self._path is None:
            return True
        return self._path.is_measuring != self._is_measured or pytorch.is_in_backward()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling() and (self._depth or not self._is_idle()):
            self._depth += 1
            if self._depth == 1:
                self._follower = Follower()
                self._follower.__enter__()  # type: ignore[no-untyped-call]

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and self._depth:
            self._depth -= 1
            if self._depth == 0:
                self._follower.__exit__(None, None, None)  # type: ignore[no-untyped-call]
                self._follower.end(output)
                for name, functions in self._follower.told.items():
                    self.told.setdefault(name, []).extend(functions)

    def _tap(self, weight: UntiedWeight, x: Tensor, output: Tensor, rows: slice) -> None:
        # What hooks (a chip's converters, say) make of the output may be out of sight: a trace tells.
        if not torch.compiler.is_compiling() and self._depth and not weight.layer._forward_hooks:
            self._follower.begin_at(weight.name, output)


def _only_one(functions: Sequence[Activation | None]) -> Activation | None:
    first = functions[0]
    return first if all(is_same(first, other) for other in functions) else None


def _tensors_of(output: Any) -> list[Tensor]:
    """Return the tensors in a model's output, in dataclasses too."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output
    if not isinstance(output, (Mapping, list, tuple)):
        parts = vars(output).values() if dataclasses.is_dataclass(output) else ()
    return [tensor for part in parts for tensor in _tensors_of(part)]


def _function_of(
    func: Call, name: str, args: Args, kwargs: Kwargs, met: Sequence[tuple[Tensor, _Followed]]
) -> Activation:
    """Return an operation as a function of the layer's output; it leaves that as it was."""
    function = OUT_OF_PLACE.get(func, func)
    if name in ACTIVATION_METHODS and function not in ACTIVATION_FUNCTIONS:
        function = ACTIVATION_METHODS[name]
    if len(met) == 1 and met[0][1].compute is identity and function in ACTIVATION_FUNCTIONS:
        return with_settings(ACTIVATION_FUNCTIONS[function], args[1:], kwargs)
    slots = {id(tensor): _Slot(one.compute) for tensor, one in met}
    template = _with_slots((args, kwargs), slots)

    def compute(z: Tensor) -> Tensor:
        filled_args, filled_kwargs = _filled(template, z)
        return func(*filled_args, **filled_kwargs)  # type: ignore[no-any-return]

    return compute


def _with_slots(value: Any, slots: Mapping[int, _Slot]) -> Any:
    """Return an argument with slots for tensors that are not to be kept."""
    if isinstance(value, Tensor):
        return slots.get(id(value), value)
    if isinstance(value, dict):
        return {key: _with_slots(part, slots) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_slots(part, slots) for part in value]
    return value


def _filled(value: Any, z: Tensor) -> Any:
    """Return an argument with its slots filled; each gets a copy, for an operation may work in place."""
    if isinstance(value, _Slot):
        return value.compute(z.clone())
    if isinstance(value, dict):
        return {key: _filled(part, z) for key, part in value.items()}
    if isinstance(value, list):
        return [_filled(part, z) for part in value]
    return value
