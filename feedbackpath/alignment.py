"""How well B agrees with W: matrix angles, gains and delta angles, as in Section 6 of Akrout et al. 2019."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from feedbackpath import ops
from feedbackpath.errors import UntieError
from feedbackpath.layers import FeedbackLayer, Tap, UntiedWeight, tapped


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
        for weight in weights
    }


def gains(weights: Sequence[UntiedWeight]) -> dict[str, float]:
    """Return each weight's gain <B, W> / <W, W>: 1 when B has W's size along W."""
    found = {}
    for weight in weights:
        w, b = (x.detach().double().flatten() for x in (weight.weight, weight.feedback))
        found[weight.name] = (b @ w / (w @ w)).item()
    return found


def delta_angles(
    weights: Sequence[UntiedWeight], model: nn.Module, compute_loss: Callable[[], Tensor]
) -> dict[str, float]:
    """Return the angle between each layer's delta through B and the delta that W would have given.

    Delta is dL/d(layer output), the signal that trains the layer's own W; so the last layer's angle is 0,
    and angles grow upstream. One forward pass, two backward passes over it: the second with W's values
    in B's place. Gradients, buffers (running statistics), random numbers and B are left as they were.

    Args:
        weights: The weights of the layers to measure.
        model: The model they belong to.
        compute_loss: Runs the model forward and returns the loss, a scalar.

    Returns:
        Layer path to angle in degrees; layers whose output needs no gradient are absent.

    Raises:
        UntieError: ``compute_loss`` did not run the untied model.
    """
    with left_as_it_was(weights, model):
        with _outputs_tapped(weights) as outputs, torch.enable_grad():
            loss = compute_loss()
        if not outputs:
            raise UntieError(
                "delta_angles: compute_loss ran no untied layer of this path (or ran it under "
                "reentrant checkpointing): run its own model"
            )
        edges = [edge for of_layer in outputs.values() for edge in of_layer]
        with ops.errors_alone():
            through_feedback = torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True)
            with _forward_values_in_feedback(weights):
                through_weights = torch.autograd.grad(loss, edges, allow_unused=True)
    return _compare(outputs, through_feedback, through_weights)


def _compare(
    outputs: Mapping[str, list[GradientEdge]], ours: Sequence[Tensor | None], exact: Sequence[Tensor | None]
) -> dict[str, float]:
    """Pair up the deltas of each layer, over all the times that it ran."""
    angles, position = {}, 0
    for name, edges in outputs.items():
        chosen = slice(position, position + len(edges))
        position += len(edges)
        found = [(a.flatten(), b.flatten()) for a, b in zip(ours[chosen], exact[chosen], strict=True)
                 if a is not None and b is not None]  # fmt: skip
        if found:
            angles[name] = angle_deg(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    return angles


@contextmanager
def _outputs_tapped(weights: Sequence[UntiedWeight]) -> Iterator[dict[str, list[GradientEdge]]]:
    """Collect where the outputs of untied layers stand in autograd's graph, while the model runs.

    Not the tensors: an activation that works in place would make them its own outputs.
    """
    outputs: dict[str, list[GradientEdge]] = {}
    names = {(id(weight.layer), weight.feedback_name): weight.name for weight in weights}

    def tap_of(layer: FeedbackLayer) -> Tap:
        def tap(feedback_name: str, _: Tensor, output: Tensor, rows: slice) -> None:
            if output.requires_grad:
                edge = get_gradient_edge(output)
                outputs.setdefault(names[id(layer), feedback_name], []).append(edge)

        return tap

    with tapped({weight.layer: tap_of(weight.layer) for weight in weights}):
        yield outputs


@contextmanager
def _forward_values_in_feedback(weights: Sequence[UntiedWeight]) -> Iterator[None]:
    """Let every B hold W's values for a while; ``.data``, so that saved tensors stay valid for autograd."""
    own = [weight for weight in weights if not weight.is_tied]
    kept = {id(weight.feedback): (weight.feedback, weight.feedback.data.clone()) for weight in own}
    try:
        for weight in own:
            weight.feedback.data.copy_(weight.weight.data)
        yield
    finally:
        for feedback, values in kept.values():
            feedback.data.copy_(values)


@contextmanager
def left_as_it_was(weights: Sequence[UntiedWeight], model: nn.Module) -> Iterator[None]:
    """Let a model run, eagerly, and take back what that changes: running statistics and random numbers."""
    with (
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
