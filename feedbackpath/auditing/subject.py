"""Whose step is audited: its weights, and all of its state, so that a step can be done again."""

import copy
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from feedbackpath.core.layers import UntiedWeight
from feedbackpath.core.modules import tapped
from feedbackpath.path import FeedbackPath

State = dict[str, Any]
preserve_version: Any = torch.autograd.grad_mode._unsafe_preserve_version_counter


class Stateful(Protocol):
    """What a step changes besides the model and its optimizer: a scheduler, a scaler, an average."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Go back to it."""


class Subject:
    """A model with a feedback path, and the optimizers that its step is found to use.

    Args:
        path: The feedback path.
        stateful: What else a step changes.

    Attributes:
        forward_weights: By name, every parameter that is a matrix and no B.
        feedback_weights: By layer, every B that is a tensor of its own.
        declared: By name, the other parameters: scales of norms, and biases.
        optimizers: Found when they step, with their state from before.
    """

    def __init__(self, path: FeedbackPath, stateful: Sequence[Stateful]) -> None:
        self.path, self.model, self.stateful = path, path.model, list(stateful)
        pairs = list(path.pairs())
        layer_of = {id(weight): name for name, weight, _ in pairs}
        self.feedback_weights = {name: b for name, w, b in pairs if b is not w}
        own = {id(feedback) for feedback in self.feedback_weights.values()}
        self.forward_weights: dict[str, nn.Parameter] = {}
        self.declared: dict[str, nn.Parameter] = {}
        for name, parameter in self.model.named_parameters():
            if id(parameter) in layer_of:
                self.forward_weights[layer_of[id(parameter)]] = parameter
            elif id(parameter) not in own:
                kind = self.forward_weights if parameter.dim() > 1 else self.declared
                kind[name] = parameter
        self.optimizers: dict[int, tuple[torch.optim.Optimizer, State]] = {}

    @property
    def tensors(self) -> Iterator[Tensor]:
        """All parameters and buffers."""
        yield from self.model.parameters()
        yield from self.model.buffers()

    @contextmanager
    def finding_optimizers(self) -> Iterator[None]:
        """Keep the state of every optimizer as it is before it first steps."""

        def note(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            if id(optimizer) not in self.optimizers:
                self.optimizers[id(optimizer)] = (optimizer, copy.deepcopy(optimizer.state_dict()))

        hook = register_optimizer_step_pre_hook(note)
        try:
            yield
        finally:
            hook.remove()

    @torch.no_grad()
    def save(self) -> State:
        """Return a copy of everything that a step may change."""
        return {
            "values": [tensor.detach().clone() for tensor in self.tensors],
            "gradients": [None if p.grad is None else p.grad.clone() for p in self.model.parameters()],
            "path": copy.deepcopy(self.path.state_dict()),
            "stateful": [copy.deepcopy(part.state_dict()) for part in self.stateful],
            "optimizers": {key: copy.deepcopy(o.state_dict()) for key, (o, _) in self.optimizers.items()},
            "training": [module.training for module in self.model.modules()],
            "random": _random_state(),
        }

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """Go back to a saved state."""
        for tensor, value in zip(self.tensors, state["values"], strict=True):
            with preserve_version(tensor):
                tensor.copy_(value)
        for parameter, gradient in zip(self.model.parameters(), state["gradients"], strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        self.path.load_state_dict(copy.deepcopy(state["path"]))
        for part, value in zip(self.stateful, state["stateful"], strict=True):
            part.load_state_dict(copy.deepcopy(value))
        for key, (optimizer, first) in self.optimizers.items():
            optimizer.load_state_dict(copy.deepcopy(state["optimizers"].get(key, first)))
        for module, training in zip(self.model.modules(), state["training"], strict=True):
            module.training = training
        _set_random_state(state["random"])


@contextmanager
def deltas_seen(path: FeedbackPath, see: Any) -> Iterator[None]:
    """Call ``see(layer, output)`` with the output of every untied weight while the model runs forward."""
    names = {(id(weight.layer), weight.weight_name): weight.name for weight in path.weights}

    def tap(weight: UntiedWeight, _: Tensor, output: Tensor, rows: slice) -> None:
        see(names[id(weight.layer), weight.weight_name], output)

    with tapped([weight.layer for weight in path.weights], tap):
        yield


@contextmanager
def forward_passes_seen(model: nn.Module, enter: Any, leave: Any) -> Iterator[None]:
    """Call ``enter(module)`` and ``leave(module)`` round the forward pass of every module of a model."""
    hooks = []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(lambda module, args: enter(module)))
        end = module.register_forward_hook(lambda module, args, output: leave(module), always_call=True)
        hooks.append(end)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def differing(ones: Iterable[Tensor], others: Iterable[Tensor]) -> list[bool]:
    """Return which tensors differ in any bit that is not NaN on both sides."""
    return [not _is_same(one, other) for one, other in zip(ones, others, strict=True)]


def _is_same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _random_state() -> State:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "python": random.getstate(),
        "numpy": np.random.get_state(),
    }


def _set_random_state(state: State) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
