"""The exact read-out at the price of reading W and writing B, where nothing but W tells in a layer's answers.

Where a layer answers a code and its negative with ``phi(z) - phi(-z) = 2 s z`` (``odd_slope``: ReLU, GELU,
SiLU, no activation; bias blocked), orthogonal codes of any length tell W exactly. How many inputs fire
together makes a difference to the time of simulating it, and to nothing else. Here one does, with a sign c
of its own, and its neurons answer with ``z = c w``; what they tell is ``B = c z``. No layer runs, so this is
taken only where the layer would do nothing else: see ``can_read_out``.
"""

import functools

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from feedbackpath.core.layers import UntiedWeight, is_torchs_own
from feedbackpath.core.modules import FeedbackModule
from feedbackpath.mirror.activations import LEAST_SLOPE, Activation, origin_of
from feedbackpath.mirror.passage import forward_passage
from feedbackpath.mirror.settings import Mirror

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


def is_plain(weight: UntiedWeight, activation: Activation) -> bool:
    """Whether a layer and its activation do what torch's own do, and no hook changes that."""
    layer, follows = weight.layer, origin_of(activation)
    plain = layer.plain_type if isinstance(layer, FeedbackModule) else type(layer)
    modules = [layer, *([follows] if isinstance(follows, nn.Module) else [])]
    is_hooked = any(getattr(module, hooks) for module in modules for hooks in HOOKS)
    is_heard = any(getattr(torch_module, hooks, None) for hooks in GLOBAL_HOOKS)
    is_changed = any("forward" in vars(module) for module in modules)
    return is_torchs_own(plain) and not (is_hooked or is_heard or is_changed)


def can_read_out(weight: UntiedWeight, activation: Activation, slope: float | None, settings: Mirror) -> bool:
    """Whether the short way finds what the long way does, to rounding.

    Args:
        weight: The weight.
        activation: What follows its layer.
        slope: The ``odd_slope`` of that.
        settings: How it is mirrored.
    """
    is_exact = settings.noise == "orthogonal" and settings.reading == "calibrated"
    return is_exact and answers_by_weight(weight, activation, slope, settings)


def answers_by_weight(
    weight: UntiedWeight, activation: Activation, slope: float | None, settings: Mirror
) -> bool:
    """Whether a layer's answers to a pattern and its negative differ by ``2 s W x``, and by nothing else.

    Not where anything stands between: a bias that stays open, a hook, a layer of one's own, autocast, or
    code that watches operations, as a model of a chip may, and an audit.

    Args:
        weight: The weight.
        activation: What follows its layer.
        slope: The ``odd_slope`` of that.
        settings: How it is mirrored.
    """
    if slope is None or abs(slope) < LEAST_SLOPE or settings.rates != "signed":
        return False
    w, b = weight.weight, weight.feedback
    is_told = _is_open(weight, settings) or w.dtype != b.dtype or type(w) is not nn.Parameter
    if is_told or torch.is_autocast_enabled(w.device.type) or _is_watched():
        return False
    return is_plain(weight, activation)


def read_out(weight: UntiedWeight) -> None:
    """Let each input fire alone, and replace B by what neurons answer."""
    w, b = weight.weight.detach(), weight.feedback.detach()
    signs = _signs(
        (len(w), *(1,) * (w.dim() - 1)) if weight.transposed else (1, *w.shape[1:]), w.device, w.dtype
    )
    with forward_passage(weight.weight):
        torch.mul(w, signs, out=b)
    b.mul_(signs)


def _is_open(weight: UntiedWeight, settings: Mirror) -> bool:
    """Whether a bias takes part in mirror mode: it is not blocked, or is no parameter that could be."""
    bias = getattr(weight.layer, "bias", None)
    is_kept = isinstance(bias, Tensor) and weight.layer._parameters.get("bias") is None
    return bias is not None and (is_kept or not settings.block_bias)


def _is_watched() -> bool:
    """Whether a mode of torch's stands between operations and what they compute."""
    stacks = (
        getattr(torch._C, "_len_torch_function_stack", None),
        getattr(torch._C, "_len_torch_dispatch_stack", None),
    )
    return any(stack is not None and stack() for stack in stacks)


@functools.cache
def _signs(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a sign for each input."""
    drawn = torch.empty(shape, device="cpu").bernoulli_(0.5, generator=torch.Generator().manual_seed(0))
    return drawn.mul_(2.0).sub_(1.0).to(device, dtype)
