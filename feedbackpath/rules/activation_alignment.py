"""Activation alignment (AA): B learns to answer a layer's input as W does.

Kunin et al. 2020, "Two routes to scalable credit assignment without weight symmetry": the primitives amp
and sparse, each with the coefficient 1. With ``y = W x``, and B laid out as W, R is, up to a constant::

    R = E[-y^T B x + 1/2 |B x|^2] = 1/2 E|B x - y|^2 - 1/2 E|y|^2
    dB = -rate (B C - W C) / E|x|^2          C = E[x x^T], so E|x|^2 is the trace of C

So ``W - B`` is multiplied by ``I - rate C / tr C`` a step while W stands still. Along an eigenvector of C
with the eigenvalue c it shrinks by ``1 - rate c / tr C``: B settles at W on all directions that inputs have,
and stays as it was on the others. A convolution does the same with patches in place of x, and the bound
K E|x|^2 for the trace.

No synapse reads W. But x has to pass through B as well, forwards; the paper calls that not local.

Differs from the paper: the step is divided by E|x|^2; B has a rate of its own and takes no part in the
optimizer's momentum and schedule; R does not change W.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from feedbackpath.core.layers import UntiedWeight
from feedbackpath.rules.activity_rule import ActivityRule, forward, product
from feedbackpath.rules.base import Facts


@dataclass(frozen=True)
class ActivationAlignment(ActivityRule):
    """Let B learn to give the layer's output from its input.

    An activation that works in place, such as ``ReLU(inplace=True)``, is refused: it overwrites the output.

    Args:
        rate: The size of a step of B, between 0 and 2.

    Example:
        >>> import feedbackpath as fp
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
        >>> path = fp.untie(model, "aa")
        >>> for _ in range(200):
        ...     model(torch.randn(32, 8)).sum().backward()
        ...     path.step()
        >>> path.matrix_angles()["0"] < 1
        True
    """

    name: ClassVar[str] = "aa"
    facts: ClassVar[Facts] = Facts(
        paper="Kunin et al. 2020",
        equation="dB = -rate (B C - E[y x^T]) / E|x|^2, C = E[x x^T]",
        needs="each layer's input and output, kept",
        verdict="transport-free",
        flops=2.0,
    )
    search_space: ClassVar[Mapping[str, Sequence[Any]]] = {"rate": ("log", 0.01, 1.9)}

    def slope(self, weight: UntiedWeight, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(B x - y) x^T`` and ``|x|^2``, summed over samples."""
        b, layer = weight.feedback, weight.layer
        return product(layer, x, b, forward(layer, x, b) - y), x.square().sum()
