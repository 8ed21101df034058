"""The short way for torch's self-attention: PyTorch's own code, with projections that send errors through B.

The exchange (``feedbackpath.core.exchange``) serves attention too, by watching each operation in it, and does
where anything stands between. In a small transformer that takes 4% of a step. Here PyTorch's code runs
unwatched. Only where it calls ``linear``, it calls one that knows the B of each W.
"""

import threading
import types
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from feedbackpath.core.operations import Args, Kwargs
from feedbackpath.core.products import linear
from feedbackpath.core.pytorch import rewired


class _Running(threading.local):
    """The attention that runs in this thread: B of each W that it has yet to meet, by the id of W."""

    def __init__(self) -> None:
        self.unmet: dict[int, Any] = {}


_RUNNING = _Running()
PROJECTING = "_in_projection_packed"  # the part of attention that does, in PyTorch's code
_PYTORCHS = nn.MultiheadAttention.forward, F.multi_head_attention_forward


def attend(layer: Any, args: Args, kwargs: Kwargs) -> Any:
    """Return what self-attention makes of its input; None where it has to go the long way.

    Args:
        layer: An untied ``nn.MultiheadAttention`` that runs torch's own forward pass.
        args: What it is called with.
        kwargs: What else.
    """
    is_of_one_input = len(args) > 2 and args[0] is args[1] is args[2] and args[0].dim() == 3
    is_patched = (nn.MultiheadAttention.forward, F.multi_head_attention_forward) != _PYTORCHS
    untied = getattr(layer.out_proj, "untied", None)
    if not is_of_one_input or is_patched or untied is None or untied.short is None or untied.taps:
        return None
    pairs = [
        (owner._parameters.get(weight.weight_name), getattr(owner, weight.feedback_name, None))
        for owner in (layer, layer.out_proj)
        for weight in owner.untied.weights
    ]
    if not all(_is_alike(w, b) and args[0].dtype == w.dtype for w, b in pairs):
        return None
    unmet = {id(w): b for w, b in pairs}
    before, _RUNNING.unmet = _RUNNING.unmet, unmet
    try:
        output = _forward(layer, *args, **kwargs)
    finally:
        _RUNNING.unmet = before
    return None if unmet else output  # another version of PyTorch may project by other means


def _is_alike(w: Any, b: Any) -> bool:
    is_there = w is not None and b is not None
    return is_there and (b.shape, b.dtype, b.device) == (w.shape, w.dtype, w.device)


def _linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    b = _RUNNING.unmet.pop(id(w), None)
    return F.linear(x, w, bias) if b is None else linear(x, w, b, bias)


def _forward(layer: nn.MultiheadAttention, *args: Any, **kwargs: Any) -> Any:
    """Run the forward pass of PyTorch's attention, all of it as it is now, with the ``linear`` above."""
    parts: dict[str, Any] = {"linear": _linear, "has_torch_function": lambda arguments: False}
    if PROJECTING in vars(F):  # else W is not met, and attention goes the long way
        parts[PROJECTING] = rewired(vars(F)[PROJECTING], linear=_linear)
    attention = rewired(F.multi_head_attention_forward, **parts)
    functions = types.SimpleNamespace(**vars(F) | {"multi_head_attention_forward": attention})
    return rewired(nn.MultiheadAttention.forward, F=functions)(layer, *args, **kwargs)
