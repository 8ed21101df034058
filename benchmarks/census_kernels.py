"""What follows a layer, read off the kernels that ran: the slow, plain check of ``benchmarks/census.py``.

One level below the functions that ``feedbackpath.mirror.following`` watches. It is noted what each kernel's
result was made of. What follows a layer is then found by going through these notes, with numbers in place
of the layer's output: kernels that only move numbers or add others to them leave the numbers as they are, and
kernels of single numbers are run on them.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from feedbackpath.core.operations import names_in

MOVES = names_in(
    """view _unsafe_view reshape permute transpose t unsqueeze squeeze expand clone _to_copy slice select
    split split_with_sizes unbind cat stack alias native_dropout native_batch_norm cudnn_batch_norm
    _native_batch_norm_legit native_layer_norm native_group_norm _fused_rms_norm roll constant_pad_nd
    masked_fill masked_fill_ where index detach lift_fresh as_strided repeat copy_ index_add index_add_
    _unsafe_index index_select copy slice_scatter"""
)
NUMBERS = names_in(
    """relu relu_ gelu silu silu_ sigmoid sigmoid_ tanh tanh_ hardtanh hardtanh_ hardswish hardswish_
    hardsigmoid hardsigmoid_ leaky_relu leaky_relu_ elu elu_ mish mish_ softplus pow square exp log1p
    clamp clamp_min erf abs threshold _prelu_kernel neg sqrt log_sigmoid_forward rsub reciprocal"""
)
SUMS, SCALES = {"add", "add_", "sub", "sub_", "rsub"}, {"mul", "mul_", "div", "div_"}
STATISTICS = {"mean", "sum", "var", "var_mean", "amax", "amin", "rsqrt", "norm", "linalg_vector_norm", "std"}


class Kernels(TorchDispatchMode):
    """Notes every kernel while a model runs."""

    def __init__(self, weights: Sequence[Any], model: nn.Module) -> None:
        super().__init__()
        self.notes: list[tuple[str, Any, Any, dict[str, Any], list[Tensor]]] = []
        self.users: dict[int, list[int]] = defaultdict(list)
        self.outputs: dict[str, list[Tensor]] = defaultdict(list)
        self._still = {id(p) for p in [*model.parameters(), *model.buffers()]}
        self._weights, self._layers = weights, {id(w.layer): w.layer for w in weights}.values()

    def __enter__(self) -> Self:
        for layer in self._layers:
            layer.untied.taps = (*layer.untied.taps, self._tap)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for layer in self._layers:
            layer.untied.taps = tuple(tap for tap in layer.untied.taps if tap != self._tap)

    def _tap(self, weight: Any, x: Tensor, output: Tensor, rows: slice) -> None:
        self.outputs[weight.name].append(output)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        made = [
            x for x in (output if isinstance(output, (tuple, list)) else [output]) if isinstance(x, Tensor)
        ]
        for tensor in _tensors((args, kwargs)):
            self.users[id(tensor)].append(len(self.notes))
        self.notes.append((func._schema.name.split("::")[1], func, args, kwargs or {}, made))
        return output

    def what_follows(self, name: str, probe: Tensor) -> list[Tensor]:
        """Return what the functions that a layer's output goes into make of some numbers."""
        found: list[Tensor] = []
        for output in self.outputs[name]:
            found += self._go(output, probe.double(), 0, {})
        return found or [probe.double()]

    def _go(self, tensor: Tensor, value: Tensor, since: int, seen: dict[int, Tensor]) -> list[Tensor]:
        """Follow one tensor, and the numbers that stand for it."""
        values, base = {id(tensor): value}, value
        found, rest, aside = [], [], []
        steps = sorted(n for n in set(self.users[id(tensor)]) if n >= since)
        done: set[int] = set()
        used: set[int] = set()
        while steps:
            number = steps.pop(0)
            if number in done:
                continue
            done.add(number)
            name, func, args, kwargs, made = self.notes[number]
            if name in ("detach", "clone") and not self.users[id(made[0])]:
                continue  # autograd keeps it for the backward pass
            given = _tensors((args, kwargs))
            known = [x for x in given if id(x) in values]
            other = [x for x in given if id(x) not in values and x.dim() and id(x) not in self._still]
            if name in STATISTICS or not made or not made[0].is_floating_point():
                aside += [values[id(x)] for x in known if made and made[0].is_floating_point()]
                used.update(id(x) for x in known)
                continue
            used.update(id(x) for x in known)
            is_function = (
                name in NUMBERS or (name in SUMS | SCALES and len(known) == len(given)) or name in SCALES
            )
            if is_function and not other:
                values[id(made[0])] = _run(func, args, kwargs, values)
                used.discard(id(made[0]))
                steps = sorted({*steps, *[n for n in self.users[id(made[0])] if n > number]})
            elif name in MOVES | SUMS | SCALES:
                for x in known:
                    if _is_line(base, values[id(x)]):
                        for one in made[:1] if "norm" in name or "dropout" in name else made:
                            if id(one) not in seen:
                                seen[id(one)] = one
                                rest += self._go(one, base, number + 1, seen)
                    else:
                        found.append(values[id(x)])
            else:
                found += [base if _is_line(base, values[id(x)]) else values[id(x)] for x in known]
        found += [base if _is_line(base, v) else v for key, v in values.items() if key not in used]
        aside = [base if _is_line(base, value) else value for value in aside]
        return found + rest or aside


def _run(func: Any, args: Any, kwargs: Any, values: dict[int, Tensor]) -> Tensor:
    def fill(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) in values:
                return values[id(value)].clone()
            return value.detach().double() if value.dim() == 0 else value.detach().double().flatten()[:1]
        return [fill(v) for v in value] if isinstance(value, (list, tuple)) else value

    made = func(*[fill(a) for a in args], **{k: fill(v) for k, v in kwargs.items()})
    return made[0] if isinstance(made, (tuple, list)) else made


def _is_line(base: Tensor, value: Tensor) -> bool:
    steps = value.diff() / base.diff()
    return bool(steps[0] != 0) and torch.allclose(steps, steps[0].expand_as(steps), rtol=1e-4)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    value = list(value.values()) if isinstance(value, dict) else value
    return [t for part in value for t in _tensors(part)] if isinstance(value, (list, tuple)) else []
