"""How well the errors sent back through B, and the update they make, agree with backprop's."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from feedbackpath.core.exchange import as_backprop
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.core.modules import tapped
from feedbackpath.errors import UntieError
from feedbackpath.measure.angles import angle_deg, chance_angle_deg

WHOLE_UPDATE = "whole update"
"""The key of ``update_angles`` under which all parameters' gradients count as one vector."""
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Delta:
    """A layer's delta, dL/d(layer output), through B, compared with the delta that W would have given.

    Attributes:
        angle_deg: The angle between the two, in degrees.
        chance_deg: One pair in twenty of random vectors of delta's size has a smaller angle.
        norm: The length of delta through B.
        backprop_norm: The length of delta through W. If either length is near 0, the angle means nothing.
    """

    angle_deg: float
    chance_deg: float
    norm: float
    backprop_norm: float

    @property
    def norm_ratio(self) -> float:
        """The length of delta through B over that of delta through W; NaN where both are 0."""
        return self.norm / self.backprop_norm if self.backprop_norm else self.norm * math.inf


def deltas(
    weights: Sequence[UntiedWeight], model: nn.Module, compute_loss: Callable[[], Tensor]
) -> dict[str, Delta]:
    """Compare each layer's delta through B with the delta that W would have given: angle and lengths.

    Delta is dL/d(layer output), the signal that trains the layer's own W; so the last layer's angle is 0,
    and angles grow upstream. The model runs twice on the same random numbers, once as it is and once with
    backprop's backward pass. Gradients, buffers (running statistics), random numbers and B are left as they
    were.

    Args:
        weights: The weights of the layers to measure.
        model: The model they belong to.
        compute_loss: Runs the model forward on the same minibatch each time, and returns the loss, a scalar.

    Returns:
        Layer path to what was measured. Layers whose output needs no gradient are absent, and of ``nn.LSTM``
        and the like all but the last layer: what is measured there is the error that arrives at the output
        of all time steps, and not how it goes back in time.

    Raises:
        UntieError: ``compute_loss`` did not run the untied model, or ran it on something else the second
        time.
    """
    ours, exact = _twice("delta_angles", lambda: _deltas(weights, model, compute_loss))
    return {
        name: Delta(
            angle_deg(delta, exact[name]),
            chance_angle_deg(delta.numel()),
            delta.norm().item(),
            exact[name].norm().item(),
        )
        for name, delta in ours.items()
        if name in exact
    }


def update_angles(
    weights: Sequence[UntiedWeight], model: nn.Module, compute_loss: Callable[[], Tensor]
) -> dict[str, float]:
    """Return the angle between the gradient that training uses and backprop's, in degrees.

    Below 90 a small step along the update makes the loss smaller. Arguments and errors are those of
    `deltas`.

    Returns:
        Each trained parameter's name to its angle, and ``"whole update"`` to that of all of them as one
        vector. Feedback weights are left out, and parameters that the loss does not reach.
    """
    feedback = {id(weight.feedback) for weight in weights if weight.has_feedback and not weight.is_tied}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in feedback}
    ours, exact = _twice("update_angles", lambda: _updates(weights, model, compute_loss, trained))
    both = [name for name in ours if name in exact]
    whole = [torch.cat([found[name].flatten() for name in both]) for found in (ours, exact)]
    return {name: angle_deg(ours[name], exact[name]) for name in both} | {WHOLE_UPDATE: angle_deg(*whole)}


def _twice(name: str, measure: Callable[[], tuple[Gradients, Tensor]]) -> tuple[Gradients, Gradients]:
    """Return what is measured as the model is, and with backprop's backward pass."""
    ours, loss = measure()
    if not ours:
        raise UntieError(
            f"{name}: compute_loss ran no untied layer of this path (or ran it under "
            "reentrant checkpointing): let it run the model of this path"
        )
    with as_backprop():
        exact, again = measure()
    if not torch.allclose(loss, again, rtol=1e-3, equal_nan=True):
        raise UntieError(
            f"{name}: compute_loss returned {float(loss):g} and then {float(again):g} on the same "
            "weights and random numbers; let it run the same minibatch each time"
        )
    return ours, exact


def _one_number(loss: object) -> Tensor:
    """Return a loss that is one."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise UntieError(f"compute_loss returned {what}; let it return the loss, a tensor of one number")
    return loss


def _updates(
    weights: Sequence[UntiedWeight],
    model: nn.Module,
    compute_loss: Callable[[], Tensor],
    trained: dict[str, nn.Parameter],
) -> tuple[Gradients, Tensor]:
    """Return the gradients of the loss by parameter, none of them if no untied layer ran, and the loss."""
    with left_as_it_was(weights, model), outputs_tapped(weights) as outputs, torch.enable_grad():
        loss = _one_number(compute_loss())
        parameters = list(trained.values()) if outputs else []
        found = torch.autograd.grad(loss, parameters, allow_unused=True) if parameters else ()
    named = zip(trained, found, strict=False)
    return {name: gradient for name, gradient in named if gradient is not None}, loss.detach()


def _deltas(
    weights: Sequence[UntiedWeight], model: nn.Module, compute_loss: Callable[[], Tensor]
) -> tuple[Gradients, Tensor]:
    """Return each layer's delta, over all the times that it ran, and the loss."""
    with left_as_it_was(weights, model), outputs_tapped(weights) as outputs, torch.enable_grad():
        loss = _one_number(compute_loss())
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
        if output.requires_grad and _is_output_of(weight):
            name = names[id(weight.layer), weight.weight_name]
            outputs.setdefault(name, []).append(get_gradient_edge(output))

    with tapped([weight.layer for weight in weights], tap):
        yield outputs


def _is_output_of(weight: UntiedWeight) -> bool:
    """Whether a weight's layer returns its output: a recurrent one returns that of its last layer."""
    layer = weight.layer
    return not isinstance(layer, nn.RNNBase) or f"_l{layer.num_layers - 1}" in weight.weight_name


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
