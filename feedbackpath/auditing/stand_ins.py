"""What stands in for a weight that is absent."""

from typing import Any, Literal

import torch

from feedbackpath.auditing.memory import values_of

Kind = Literal["zeros", "large noise", "noise", "noise of W's signs", "noise of random signs"]
StandIn = tuple[Kind, dict[str, int], frozenset[str]]
"""Its kind; which parameters and buffers multiply activities; the names of weights that stay."""

LARGE = 30.0  # standard deviations of W
preserve_version: Any = torch.autograd.grad_mode._unsafe_preserve_version_counter


@torch.no_grad()
def replace(tensor: Any, kind: Kind, generator: torch.Generator) -> None:
    """Fill a tensor with a stand-in, unseen by autograd.

    Noise has the signs that W has not, unless its kind says otherwise.
    What asks whether W, its sum or its norm is above or below something is answered otherwise by zeros, or by
    large noise of the other signs.
    """
    tensor = values_of(tensor)
    noise = torch.randn(tensor.shape, generator=generator).to(tensor)
    if kind != "noise of random signs":
        noise = torch.where(tensor == 0, noise, noise.abs() * tensor.sign())
    sign = 1.0 if kind == "noise of W's signs" else -1.0
    scale = {"zeros": 0.0, "large noise": LARGE}.get(kind, 1.0)
    size = tensor.detach().float().std(correction=0).clamp_min(1e-3).to(tensor)
    with preserve_version(tensor):
        tensor.copy_(noise * size * scale * sign)
