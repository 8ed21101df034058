"""Which activation follows a layer: mirror noise goes through W and then through it (equation 1)."""

import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from feedbackpath.core.exchange import as_plain
from feedbackpath.core.layers import kind_of
from feedbackpath.core.modules import FeedbackModule
from feedbackpath.errors import RuleError
from feedbackpath.layers import RectifiedTanh, SynapticScaling

Activation = Callable[[Tensor], Tensor]
LEAST_SLOPE = 1e-4  # a neuron that answers with less than this share of its drive does not answer

ACTIVATION_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh,
    nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Tanhshrink,
    RectifiedTanh,
)  # fmt: skip
ACTIVATION_FUNCTIONS: dict[Callable[..., Tensor], Activation] = {
    function: function
    for function in (
        F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.softplus, F.softsign,
        F.hardtanh, F.hardsigmoid, F.hardswish, torch.relu, torch.tanh, torch.sigmoid, F.tanh, F.sigmoid,
    )
}  # fmt: skip
OUT_OF_PLACE: dict[Callable[..., Tensor], Activation] = {
    F.relu_: F.relu, F.leaky_relu_: F.leaky_relu, F.elu_: F.elu, F.selu_: F.selu, F.celu_: F.celu,
    F.hardtanh_: F.hardtanh, torch.relu_: torch.relu, torch.tanh_: torch.tanh, torch.sigmoid_: torch.sigmoid,
}  # fmt: skip
ACTIVATION_METHODS: dict[str, Activation] = {
    "relu": torch.relu, "relu_": torch.relu, "tanh": torch.tanh, "tanh_": torch.tanh,
    "sigmoid": torch.sigmoid, "sigmoid_": torch.sigmoid,
}  # fmt: skip
# Elementwise and not linear, with settings or partners that only the model's author can tell: to be given.
UNTOLD_FUNCTIONS = (
    torch.clamp, torch.clamp_min, torch.maximum, torch.minimum, torch.abs, torch.exp, torch.square, torch.pow,
    torch.where, torch.softmax, F.softmax, F.glu, operator.mul, operator.pow, torch.mul,
)  # fmt: skip
UNTOLD_METHODS = (
    "clamp",
    "clamp_",
    "clamp_min",
    "clamp_min_",
    "abs",
    "exp",
    "square",
    "pow",
    "softmax",
    "mul",
)
TRANSPARENT_MODULES = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.Flatten, nn.Unflatten, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, SynapticScaling,
)  # fmt: skip
TRANSPARENT_FUNCTIONS = (operator.add, operator.iadd, torch.add, torch.flatten, F.dropout, F.batch_norm)
TRANSPARENT_METHODS = ("add", "add_", "flatten", "view", "reshape", "contiguous")


def identity(x: Tensor) -> Tensor:
    """Return ``x``: what follows a layer whose output no activation changes."""
    return x


def find_activations(model: nn.Module, names: Iterable[str]) -> dict[str, Activation]:
    """Find the activation that follows each named layer, by tracing the model symbolically.

    Norms, dropout, reshapes and sums with a shortcut on the way are passed over: in mirror mode the
    shortcut is silent, and noise must not reach a norm's running statistics. A layer followed by another
    operation of torch's (pooling, another layer, the output) has a linear output: its activation is the
    identity.

    Args:
        model: The whole model.
        names: Paths of the layers to look for.

    Returns:
        What was found; layers that the trace does not reach, or whose output goes to different
        activations, are absent.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
        >>> found = find_activations(net, ["0", "2"])
        >>> found["0"](torch.tensor(100.0)), found["2"](torch.tensor(100.0))
        (tensor(1.), tensor(100.))
    """
    wanted = set(names)
    found = _find_in_encoder_layers(model, wanted) | _find_in_recurrent_layers(model, wanted)
    traced: dict[str, list[Activation | None]] = {}
    modules = dict(model.named_modules())
    for node in _trace(model, wanted):
        if node.op == "call_module" and node.target in wanted:
            traced.setdefault(str(node.target), []).append(_follow(node, modules))
    for name, activations in traced.items():
        first = activations[0]
        if first is not None and all(is_same(first, other) for other in activations):
            found.setdefault(name, first)
    return found


def _trace(model: nn.Module, wanted: set[str]) -> list[torch.fx.Node]:
    """Return the nodes of the model's graph; none where Python's control flow hides it."""

    class Tracer(torch.fx.Tracer):
        traced_func_name = "plain_forward" if isinstance(model, FeedbackModule) else "forward"

        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            is_inside = any(name.startswith(f"{module_qualified_name}.") for name in wanted)
            is_torch = m.__module__.startswith("torch.nn") and not isinstance(m, nn.Sequential)
            is_leaf = not is_inside and not isinstance(m, nn.Sequential)
            return (isinstance(m, FeedbackModule) and bool(m.untied.weights)) or is_torch or is_leaf

    if "" in wanted:  # the model is one layer: nothing follows it
        graph = torch.fx.Graph()
        graph.call_module("", (graph.placeholder("x"),))
        return list(graph.nodes)
    memo = model.untied.memo if isinstance(model, FeedbackModule) else {}
    before = dict(memo)  # tracing looks for parameters one by one, which is no average of weights
    try:
        with as_plain():
            return list(Tracer().trace(model).nodes)
    except Exception:
        # Tracing runs the user's forward with stand-ins and can fail in as many ways as there are models;
        # all mean the same here, and the caller says which layers' activations have to be given.
        return []
    finally:
        memo.clear()
        memo.update(before)


def _follow(node: torch.fx.Node, modules: dict[str, nn.Module]) -> Activation | None:
    """Return the activation that a node's value goes to next; None: several that differ."""
    reached = [_activation_of(user, modules) for user in node.users] or [identity]
    first = reached[0]
    return first if all(is_same(first, other) for other in reached) else None


def _activation_of(user: torch.fx.Node, modules: dict[str, nn.Module]) -> Activation | None:
    if user.op == "call_module":
        module = modules[str(user.target)]
        if isinstance(module, ACTIVATION_MODULES):
            return out_of_place(module)
        plain = module.plain_type if isinstance(module, FeedbackModule) else type(module)
        if not plain.forward.__module__.startswith("torch."):  # a norm may have an activation inside
            return identity if kind_of(module).weights(module) else None
        return _follow(user, modules) if isinstance(module, TRANSPARENT_MODULES) else identity
    if user.op == "call_function":
        target: Any = user.target
        function = OUT_OF_PLACE.get(target, target)
        if function in ACTIVATION_FUNCTIONS:
            return with_settings(ACTIVATION_FUNCTIONS[function], user.args[1:], user.kwargs)
        if function in UNTOLD_FUNCTIONS:
            return None
        return _follow(user, modules) if function in TRANSPARENT_FUNCTIONS else identity
    if user.op == "call_method":
        if user.target in ACTIVATION_METHODS:
            return ACTIVATION_METHODS[str(user.target)]
        if user.target in UNTOLD_METHODS:
            return None
        return _follow(user, modules) if user.target in TRANSPARENT_METHODS else identity
    return identity


def dtype_of(activation: Activation) -> torch.dtype:
    """Return the precision that an activation can be probed in: that of what it has learned, or float64."""
    learned = _learned(activation)
    return learned[0].dtype if learned else torch.float64


def without_hooks(activation: Activation) -> Activation:
    """Return what an activation computes, past the hooks of its module: for those who probe it."""
    origin = origin_of(activation)
    return origin.forward if isinstance(origin, nn.Module) else activation


@torch.no_grad()
def refuse_no_activation(name: str, activation: Activation) -> None:
    """Refuse what answers signals by something else than as many numbers: mirror noise would be lost in it.

    Raises:
        RuleError: It was given for the layer called ``name``.
    """
    z = torch.linspace(-3.0, 3.0, 64, dtype=dtype_of(activation))[:, None]
    try:
        answer = without_hooks(activation)(z.clone())
    except Exception:  # it needs all channels, say, or another device: an error of its own comes when it runs
        return
    if not isinstance(answer, Tensor) or answer.shape != z.shape or not answer.isfinite().all():
        raise RuleError(
            f"mirror mode: the activation given for {name!r} does not return a finite number for each "
            "input between -3 and 3; give the activation after the layer, as in activations={'0': torch.relu}"
        )


def is_channelwise(activation: Activation) -> bool:
    """Whether an activation has a setting for each channel, so that it needs all of them at once."""
    probe = torch.zeros(1, 1, 1)
    try:
        return without_hooks(activation)(probe).shape != probe.shape
    except RuntimeError:
        return True


def odd_slope(activation: Activation) -> float | None:
    """Return s where ``phi(z) - phi(-z) = 2 s z`` for every z: 1/2 of a ReLU, GELU or SiLU.

    None where that does not hold, or is not known to hold for ever: the activation is not one of torch's, or
    it learns.

    Example:
        >>> odd_slope(torch.relu), odd_slope(nn.Identity()), odd_slope(torch.tanh)
        (0.5, 1.0, None)
    """
    if not _is_torchs(activation) or _learned(activation):
        return None
    z = torch.logspace(-8, 8, 161, dtype=torch.float64)
    compute = without_hooks(activation)
    slopes = (compute(z.clone()) - compute(-z)) / (2.0 * z)
    return slopes[0].item() if torch.allclose(slopes, slopes[0], rtol=1e-7, atol=0.0) else None


def out_of_place(activation: Activation) -> Activation:
    """Return the activation, made to leave its argument as it was: mirror mode still needs that."""
    works_in_place = activation in OUT_OF_PLACE or getattr(activation, "inplace", False)
    if not works_in_place and _is_torchs(activation):
        return activation
    return functools.update_wrapper(lambda x: activation(x.clone()), activation)  # others may do as they like


def _is_torchs(activation: Activation) -> bool:
    """Whether an activation is one that torch has, so that it is known what it does."""
    origin = origin_of(activation)
    if isinstance(origin, nn.Module):
        return type(origin) in (*ACTIVATION_MODULES, nn.Identity)
    return origin is identity or origin in ACTIVATION_FUNCTIONS or origin in OUT_OF_PLACE


def _learned(activation: Activation) -> list[nn.Parameter]:
    """Return what an activation learns."""
    if settings := getattr(activation, "settings", None):  # of a function, as F.prelu's weight
        return [setting for setting in settings if isinstance(setting, nn.Parameter)]
    origin = origin_of(activation)
    return list(origin.parameters()) if isinstance(origin, nn.Module) else []


def origin_of(activation: Activation) -> Any:
    """Return the module or function that an activation is made of."""
    origin = inspect.unwrap(activation)
    return getattr(origin, "__self__", None) if isinstance(origin, MethodType) else origin


def with_settings(
    function: Callable[..., Tensor], positional: Sequence[Any], named: Mapping[str, Any]
) -> Activation:
    """Bind the settings that a model calls a functional activation with (a slope, say)."""
    settings = {key: value for key, value in named.items() if key not in ("input", "inplace")}
    positional = [value for value in positional if not isinstance(value, bool)]  # in place or not
    if not settings and not positional:
        return function
    bound = functools.wraps(function)(lambda x: function(x, *positional, **settings))
    bound.settings = [*positional, *settings.values()]  # type: ignore[attr-defined]
    return bound


def is_same(one: Activation | None, other: Activation | None) -> bool:
    """Whether two activations agree on numbers that tell all of torch's activations apart."""
    if one is None or other is None or one is other:
        return one is other
    probe = torch.tensor([-7.0, -2.0, -0.4, 0.3, 1.5, 8.0])
    try:
        with torch.no_grad():
            answers = (without_hooks(activation)(probe.clone()) for activation in (one, other))
            return torch.equal(*answers)
    except RuntimeError:  # PReLU with one slope a channel cannot take the probe
        return False


def is_affine(activation: Activation) -> bool:
    """Whether an activation is a scale and a shift of each number, so that a layer before it is linear."""
    if activation is identity:
        return True
    probe = torch.linspace(-8.0, 8.0, 33, dtype=torch.float64)
    try:
        with torch.no_grad():
            steps = without_hooks(activation)(probe.clone()).double().diff()
    except RuntimeError:  # a setting for each channel
        return False
    return steps.shape == (32,) and bool(steps[0] != 0) and torch.allclose(steps, steps[0].expand(32))


def _find_in_encoder_layers(model: nn.Module, wanted: set[str]) -> dict[str, Activation]:
    """Read what torch's Transformer layers say of themselves: they cannot be traced.

    ``linear1`` feeds the layer's activation; the projections and ``linear2`` have linear outputs.
    """
    found: dict[str, Activation] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            prefix = f"{name}." if name else ""
            inside = (layer for layer in wanted if layer.startswith(prefix))
            found |= {
                layer: module.activation if layer == f"{prefix}linear1" else identity for layer in inside
            }
        elif isinstance(module, nn.MultiheadAttention):
            prefix = f"{name}." if name else ""
            found |= {layer: identity for layer in wanted if layer == name or layer.startswith(prefix)}
    return found


class Gates:
    """What follows a weight of a recurrent layer: each gate answers by its own nonlinearity.

    Args:
        activations: Those of the gates, in the order of W's rows.

    Example:
        >>> Gates(torch.sigmoid, torch.tanh)(torch.zeros(3, 8))[0]
        tensor([0.5000, 0.5000, 0.5000, 0.5000, 0.0000, 0.0000, 0.0000, 0.0000])
    """

    def __init__(self, *activations: Activation) -> None:
        self.activations = activations

    def __call__(self, z: Tensor) -> Tensor:
        """Answer drives ``[samples, gates * neurons]``."""
        parts = z.reshape(len(z), len(self.activations), -1).unbind(1)
        return torch.cat([answer(part) for answer, part in zip(self.activations, parts, strict=True)], 1)


def _find_in_recurrent_layers(model: nn.Module, wanted: set[str]) -> dict[str, Activation]:
    """Read what torch's recurrent layers say of themselves: noise drives a gate from one side at a time.

    A GRU's reset gate is open in mirror mode: noise in its state reaches the candidate whole. A projection
    of an LSTM's output is linear.
    """
    found: dict[str, Activation] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            prefix = f"{name}." if name else ""
            inside = [weight for weight in wanted if weight.rpartition(".")[0] == name]
            gates = _gates_of(module)
            found |= {w: identity if w.startswith(f"{prefix}weight_hr") else gates for w in inside}
    return found


def _gates_of(module: nn.Module) -> Activation:
    kind = getattr(module, "mode", "")
    if kind == "LSTM" or isinstance(module, nn.LSTMCell):  # input, forget, cell, output
        return Gates(torch.sigmoid, torch.sigmoid, torch.tanh, torch.sigmoid)
    if kind == "GRU" or isinstance(module, nn.GRUCell):  # reset, update, candidate
        return Gates(torch.sigmoid, torch.sigmoid, torch.tanh)
    return torch.relu if "relu" in (kind.lower()[4:], getattr(module, "nonlinearity", "")) else torch.tanh
