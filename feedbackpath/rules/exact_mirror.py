"""The exact read-out: after each update orthogonal codes tell each B what its W has become, to rounding.

Not the weight mirror of Akrout et al. 2019, but its limit under ideal conditions: their equation 5
needs ``E[x x^T] = sigma^2 I`` alone, which codes have exactly. It equals backprop to rounding by
construction, and assumes a noiseless read: codes are weak (sigma 0.01), so noise of a hundredth of the
activities hides them. ``ExactMirror(Mirror(noise="hadamard"))`` fires the same codes at sigma 1, through the
real layer, and averages over noise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from feedbackpath.mirror import Mirror
from feedbackpath.rules.base import Facts
from feedbackpath.rules.weight_mirror import WeightMirror


@dataclass(frozen=True)
class ExactMirror(WeightMirror):
    """Read W out after each update: what backprop would give, if a read had no noise.

    Behind (leaky) ReLUs, GELU, SiLU and linear outputs, where nothing changes what a layer does, the
    simulation runs no layer: two products of as many values as W has give the same B.

    Args:
        mirror: Settings of mirror mode.

    Example:
        >>> import feedbackpath as fp
        >>> path = fp.untie(torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.ReLU()), "wm-exact")
        >>> path.mirror()
        >>> path.matrix_angles()["0"] < 0.01
        True
    """

    name: ClassVar[str] = "wm-exact"
    facts: ClassVar[Facts] = Facts(
        paper="after Akrout et al. 2019, eq. 5",
        equation="B = cov(y, x) / sigma^2, x orthogonal codes",
        needs="a second phase, mirror mode; a noiseless read",
        verdict="transport-free",
        flops=1.0,
    )
    search_space: ClassVar[Mapping[str, Sequence[Any]]] = {}  # codes leave no angle
    mirror: Mirror = field(default_factory=Mirror.exact)
