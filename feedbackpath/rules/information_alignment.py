"""Information alignment (IA): B learns to rebuild a layer's input from its output.

Kunin et al. 2020, "Two routes to scalable credit assignment without weight symmetry": the primitives amp,
null and decay. With ``y = W x``, and B laid out as W, so that B^T y rebuilds x, R is, up to a constant::

    R = E[-x^T B^T y + 1/2 |B^T y|^2] / E|y|^2 + decay/2 |B|^2
      = 1/2 E|x - B^T y|^2 / E|y|^2 + decay/2 |B|^2 - 1/2 E|x|^2 / E|y|^2
    dB = -rate ((E[y y^T] B - E[y x^T]) / E|y|^2 + decay B)

With C = E[x x^T] the slope is 0 where B is the ridge regression of x on y::

    B = (W C W^T + decay E|y|^2 I)^-1 W C

For inputs with C = s I and a W of singular values w, B has W's singular vectors and the values
``s w / (s w^2 + decay E|y|^2)``. So B has the direction of W if all its singular values are equal; is its
pseudo-inverse, transposed, without decay; and comes to be a multiple of W C, as under a weight mirror that
hears activity instead of noise, with much decay. C is that of the data: where inputs are correlated B is not
along W.

Differs from the paper: amp and null have the coefficient 1, and are divided by E|y|^2; B has a rate of its
own and takes no part in the optimizer's momentum and schedule; R does not change W.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from feedbackpath.core.context import RuleContext
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.errors import RuleError
from feedbackpath.rules.activity_rule import ActivityRule, backward, product
from feedbackpath.rules.base import Facts


@dataclass(frozen=True)
class InformationAlignment(ActivityRule):
    """Let B learn to give the layer's input from its output.

    An activation that works in place, such as ``ReLU(inplace=True)``, is refused: it overwrites the output.

    Args:
        rate: The size of a step of B; ``rate * (1 + decay)`` is below 2.
        decay: How much B decays, beside the mean square of the output.

    Example:
        >>> import feedbackpath as fp
        >>> layer = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(8, 4))
        >>> _ = torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")
        >>> path = fp.untie(layer, "ia")
        >>> for _ in range(200):
        ...     layer(torch.randn(256, 8)).sum().backward()
        ...     path.step()
        >>> path.matrix_angles()[""] < 15
        True
    """

    name: ClassVar[str] = "ia"
    facts: ClassVar[Facts] = Facts(
        paper="Kunin et al. 2020",
        equation="dB = -rate ((E[y y^T] B - E[y x^T]) / E|y|^2 + decay B)",
        needs="each layer's input and output, kept",
        verdict="transport-free",
        flops=2.34,
    )
    search_space: ClassVar[Mapping[str, Sequence[Any]]] = {
        "rate": ("log", 0.01, 1.0),
        "decay": ("log", 0.001, 0.9),
    }
    decay: float = 0.01

    def __post_init__(self) -> None:
        """Refuse settings at which B does not settle."""
        if not (self.rate > 0.0 and self.decay >= 0.0 and self.rate * (1.0 + self.decay) < 2.0):
            raise RuleError(
                "ia: rate must be above 0, decay at least 0, and rate * (1 + decay) below 2, not "
                f"rate={self.rate}, decay={self.decay}"
            )

    def slope(
        self, weight: UntiedWeight, x: Tensor, y: Tensor, context: RuleContext
    ) -> tuple[Tensor, Tensor]:
        """Return ``y (B^T y - x)^T`` and ``|y|^2``, summed over samples."""
        b, layer = weight.feedback, weight.layer
        return product(layer, backward(layer, x, b, y) - x, b, y), y.square().sum()

    def descend(self, weight: UntiedWeight, slope: Tensor, context: RuleContext) -> None:
        """Let B decay as well."""
        super().descend(weight, slope.add(weight.feedback, alpha=self.decay), context)
