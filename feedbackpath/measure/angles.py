"""How well B agrees with W: matrix angles, gains and delta angles, as in Section 6 of Akrout et al. 2019."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from feedbackpath.core.exchange import as_backprop
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.core.modules import tapped
from feedbackpath.errors import UntieError


def angle_deg(one: Tensor, other: Tensor) -> float:
    """Return the angle between two tensors taken as vectors, in degrees, exact for small angles too.

    ``angle = 2 atan2(|u - v|, |u + v|)`` with u, v of length 1: an arc cosine would lose all digits below
    0.02 degrees in float32. NaN where a tensor is zero or not finite.

    Example:
        >>> round(angle_deg(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])), 3)
        45.0
    """
    u, v = (x.detach().double().flatten() for x in (one, other))
    u, v = u / u.norm(), v / v.norm()
    return math.degrees(2.0 * math.atan2((u - v).norm().item(), (u + v).norm().item()))


def matrix_angles(weights: Sequence[UntiedWeight]) -> dict[str, float]:
    """Return each weight's angle between B and W, in degrees: 0 is alignment, 90 is chance."""
    return {
        weight.name: 0.0 if weight.is_tied else angle_deg(weight.feedback, weight.weight)
        for weight in _alike(weights)
    }


def gains(weights: Sequence[UntiedWeight]) -> dict[str, float]:
    """Return each weight's gain <B, W> / <W, W>: 1 when B has W's size along W."""
    found = {}
    for weight in _alike(weights):
        w, b = (x.detach().double().flatten() for x in (weight.weight, weight.feedback))
        found[weight.name] = (b @ w / (w @ w)).item()
    return found


def _alike(weights: Sequence[UntiedWeight]) -> list[UntiedWeight]:
    """Return the weights whose B can be compared with W: those that send errors locally."""
    return [weight for weight in weights if weight.layer.untied.send_back.is_local]


def delta_angles(
    weights: Sequence[UntiedWeight], model: nn.Module, compute_loss: Callable[[], Tensor]
) -> dict[str, float]:
    """Return the angle between each layer's delta through B and the delta that W would have given.

    Delta is dL/d(layer output), the signal that trains the layer's own W; so the last layer's angle is 0,
    and angles grow upstream. The model runs twice on the same random numbers, once as it is and once with
    backprop's backward pass. Gradients, buffers (running statistics), random numbers and B are left as they
    were.

    Args:
        weights: The weights of the layers to measure.
        model: The model they belong to.
        compute_loss: Runs the model forward on the same minibatch each time, and returns the loss, a scalar.

    Returns:
        Layer path to angle in degrees; layers whose output needs no gradient are absent.

    Raises:
        UntieError: ``compute_loss`` did not run the untied model, or ran it on something else the second
        time.
    """
    ours, loss = _deltas(weights, model, compute_loss)
    if not ours:
        raise UntieError(
            "delta_angles: compute_loss ran no untied layer of this path (or ran it under "
            "reentrant checkpointing): run its own model"
        )
    with as_backprop():
        exact, again = _deltas(weights, model, compute_loss)
    if not torch.allclose(loss, again, rtol=1e-3, equal_nan=True):
        raise UntieError(
            f"delta_angles: compute_loss returned {float(loss):g} and then {float(again):g} on the same "
            "weights and "
            "random numbers; let it run the same minibatch each time"
        )
    return {name: angle_deg(delta, exact[name]) for name, delta in ours.items() if name in exact}


def _deltas(
    weights: Sequence[UntiedWeight], model: nn.Module, compute_loss: Callable[[], Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    """Return each layer's delta, over all the times that it ran, and the loss."""
    with left_as_it_was(weights, model), outputs_tapped(weights) as outputs, torch.enable_grad():
        loss = compute_loss()
        seen = {name: list(edges) for name, edges in outputs.items()}  # a recomputation would add to them
        edges = [edge for of_layer in seen.values() for edge in of_layer]
        found = iter(torch.autograd.grad(loss, edges, allow_unused=True) if edges else ())
    deltas = {name: [next(found) for _ in of_layer] for name, of_layer in seen.items()}
    reached = {name: [delta for delta in parts if delta is not None] for name, parts in deltas.items()}
    together = {
        name: torch.cat([delta.flatten() for delta in parts]) for name, parts in reached.items() if parts
    }
    return together, loss.detach()


@contextmanager
def outputs_tapped(weights: Sequence[UntiedWeight]) -> Iterator[dict[str, list[GradientEdge]]]:
    """Collect where the outputs of untied layers stand in autograd's graph, while the model runs.

    Not the tensors: an activation that works in place would make them its own outputs.
    """
    outputs: dict[str, list[GradientEdge]] = {}
    names = {(id(weight.layer), weight.weight_name): weight.name for weight in weights}

    def tap(weight: UntiedWeight, _: Tensor, output: Tensor, rows: slice) -> None:
        if output.requires_grad:
            name = names[id(weight.layer), weight.weight_name]
            outputs.setdefault(name, []).append(get_gradient_edge(output))

    with tapped([weight.layer for weight in weights], tap):
        yield outputs


@contextmanager
def left_as_it_was(weights: Sequence[UntiedWeight], model: nn.Module) -> Iterator[None]:
    """Let a model run, eagerly, and take back what that changes: running statistics and random numbers."""
    with (
        weights[0].layer.untied.context.measuring(),
        _buffers_restored(model),
        _random_numbers_restored(weights),
        torch.compiler.set_stance("force_eager"),
    ):
        yield


@contextmanager
def _buffers_restored(model: nn.Module) -> Iterator[None]:
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, values in kept:
                buffer.copy_(values)


@contextmanager
def _random_numbers_restored(weights: Sequence[UntiedWeight]) -> Iterator[None]:
    devices = {weight.weight.device for weight in weights if weight.weight.is_cuda}
    keywords: dict[str, Any] = {"devices": sorted(device.index for device in devices)}
    with torch.random.fork_rng(**keywords):
        yield
