"""The short way for torch's self-attention: PyTorch's own code, with projections that send errors through B.

The exchange (``feedbackpath.core.exchange``) serves attention too, by watching each operation in it, and does
where anything stands between. In a small transformer that takes 4% of a step. Here PyTorch's code runs
unwatched. Only where it calls ``linear``, it calls one that knows the B of each W.
"""

import threading
import types
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from feedbackpath.core.operations import Args, Kwargs
from feedbackpath.core.products import linear
from feedbackpath.core.pytorch import in_projection, rewired


class _Running(threading.local):
    """The attention that runs in this thread: B of each W that it has yet to meet, by the id of W."""

    def __init__(self) -> None:
        self.unmet: dict[int, Tensor] = {}


_RUNNING = _Running()
_PYTORCHS = F.multi_head_attention_forward


def attend(layer: Any, args: Args, kwargs: Kwargs) -> Any:
    """Return what self-attention makes of its input; None where it has to go the long way.

    Args:
        layer: An untied ``nn.MultiheadAttention`` that runs torch's own forward pass.
        args: What it is called with.
        kwargs: What else.
    """
    out, is_of_one_input = layer.out_proj, len(args) > 2 and args[0] is args[1] is args[2]
    if not is_of_one_input or layer.in_proj_weight is None or F.multi_head_attention_forward is not _PYTORCHS:
        return None
    untied = getattr(out, "untied", None)
    if untied is None or untied.short is None or untied.taps:
        return None
    pairs: list[tuple[Tensor, Any]] = [
        (getattr(owner, weight.weight_name), getattr(owner, weight.feedback_name, None))
        for owner in (layer, out)
        for weight in owner.untied.weights
    ]
    if any(b is None or args[0].dtype != w.dtype for w, b in pairs):
        return None
    _RUNNING.unmet = {id(w): b for w, b in pairs}
    try:
        output = _forward(layer, *args, **kwargs)
    finally:
        unmet, _RUNNING.unmet = _RUNNING.unmet, {}
    return None if unmet else output  # another version of PyTorch may project by other means


def _linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    b = _RUNNING.unmet.pop(id(w), None)
    return F.linear(x, w, bias) if b is None else linear(x, w, b, bias)


def _rewire() -> Callable[..., Any]:
    """Return the forward pass of PyTorch's attention, with the ``linear`` above."""
    parts = {"linear": _linear, "has_torch_function": lambda arguments: False}
    if in_projection is not None:
        parts[in_projection.__name__] = rewired(in_projection, linear=_linear)
    functions = vars(F) | {"multi_head_attention_forward": rewired(_PYTORCHS, **parts)}
    return rewired(nn.MultiheadAttention.forward, F=types.SimpleNamespace(**functions))


_forward = _rewire()
