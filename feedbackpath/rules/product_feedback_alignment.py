"""Product feedback alignment (PFA): errors come back through two matrices, whose product learns to be W.

Li & Benna 2024, "Deep learning without weight symmetry"; equations as in the code that they published. A
population of m neurons stands in the feedback path. With P m by n, fixed and random, and R learned, for a
layer of n neurons::

    B = P^T R                           what errors pass through, laid out as W
    dR = -eta (P delta) x^T - lambda R
    dB = -eta G delta x^T - lambda B    with G = P^T P, since P is fixed

The paper writes B for P. Here B is what errors pass through, as under every rule.

A neuron of the layer above sends errors only to the population, and the population sends them to x. The
entries of P have the variance 1/m, so that G is I on average. W gets ``-eta delta x^T - lambda W``, so
``B - G W`` shrinks by (1 - lambda) a step, and B comes to be G W. G scatters about I: for Gaussian entries
``E|G W - W|^2 = (n + 1) / m |W|^2``, and ``E<G W, W> = |W|^2``. The angle left is near::

    tan(angle) = sqrt((n + 1) / m)      17.5 degrees at m = 10 n, 5.7 at m = 100 n

Differs from the paper: P is Gaussian, not uniform; it may not be sparse. The optimizer is given B, and not
R: for SGD, with momentum and weight decay, dB is P^T dR exactly. A convolution has one population for each
group and position, as there; its P has no kernel.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from feedbackpath.core.context import RuleContext, generator_of
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.errors import KolenPollackWarning, RuleError
from feedbackpath.layers import LocallyConnected2d
from feedbackpath.rules.base import Facts, Weights
from feedbackpath.rules.kolen_pollack import KolenPollack


@dataclass(frozen=True)
class ProductFeedbackAlignment(KolenPollack):
    """Send errors back through a fixed random matrix and a learned one; ``feedback`` is their product.

    Args:
        expansion: m / n, the neurons in the feedback path for each neuron of the layer.
        feedback_rate: eta_R / eta_W.

    Example:
        >>> import feedbackpath as fp
        >>> model = torch.nn.Linear(30, 20)
        >>> path = fp.untie(model, fp.ProductFeedbackAlignment(expansion=100))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
        >>> for _ in range(200):
        ...     optimizer.zero_grad()
        ...     (model(torch.randn(64, 30)) * torch.randn(64, 20)).sum().backward()
        ...     optimizer.step()
        ...     path.step()
        >>> 4 < path.matrix_angles()[""] < 8
        True
    """

    name: ClassVar[str] = "pfa"
    facts: ClassVar[Facts] = Facts(
        paper="Li & Benna 2024",
        equation="B = P^T R, P random and fixed; dR = -eta (P delta) x^T - lambda R",
        needs="more neurons in each feedback path; weight decay",
        verdict="transport-free",
        flops=1.02,
    )
    is_mirrorable: ClassVar[bool] = False
    search_space: ClassVar[Mapping[str, Sequence[Any]]] = {"expansion": ("choice", 1, 3, 10, 30)}
    expansion: float = 10.0

    def __post_init__(self) -> None:
        """Refuse a path without neurons."""
        super().__post_init__()
        if self.scale != "xavier":
            raise RuleError(
                "pfa: scale has no effect, because both matrices have their own distributions; leave it out"
            )
        if not self.expansion > 0.0:
            raise RuleError(f"pfa: expansion must be above 0, not {self.expansion}")

    def serves(self, weights: Weights) -> bool:
        """Layers whose weight meets activity as it is; not one of each position's own."""
        return super().serves(weights) and not isinstance(weights[0].layer, LocallyConnected2d)

    def start(self, weights: Weights, context: RuleContext) -> None:
        """Draw every P and R, and keep their product."""
        super().start(weights, context)
        with torch.no_grad():
            for weight in weights:
                p, r = self._draw(weight, context)
                _as_matrix(weight, weight.feedback).copy_(p.mT @ r)

    def gradients(
        self, weight: UntiedWeight, product: Tensor, context: RuleContext
    ) -> tuple[Tensor, Tensor | None]:
        """Give W the outer product, and B what comes of it through the population."""
        if product.shape != weight.weight.shape:
            raise RuleError(
                f"pfa: the weight of {weight.name!r} meets activity in parts, or in another shape, and pfa "
                f"needs the whole; give it another rule, overrides={{{weight.name!r}: 'kp'}}"
            )
        sent = torch.empty_like(product)
        matrix = _as_matrix(weight, product)
        _as_matrix(weight, sent).copy_(self._mixing(weight, context).to(product) @ matrix)
        return product, self.feedback_rate * sent

    def check_optimizer(self, weights: Weights, optimizer: torch.optim.Optimizer) -> None:
        """See to what Kolen-Pollack needs; warn of an optimizer by which B is no longer the product."""
        super().check_optimizer(weights, optimizer)
        if not isinstance(optimizer, torch.optim.SGD):
            warnings.warn(
                f"pfa: {type(optimizer).__name__} updates the product of the two matrices; only SGD gives "
                "the product that it would give if it updated the learned matrix",
                KolenPollackWarning,
                stacklevel=3,
            )

    def _draw(self, weight: UntiedWeight, context: RuleContext) -> tuple[Tensor, Tensor]:
        """Draw P ``[groups, m, n]`` from N(0, 1 / m) and R ``[groups, m, inputs]`` from Glorot's law."""
        groups, n, inputs = _as_matrix(weight, weight.weight).shape
        everywhere = context.model.__dict__["untied"].below
        name = next((other.name for other in everywhere if other.weight is weight.weight), weight.name)
        cpu = torch.device("cpu")  # P is the same on every device
        generator = generator_of(f"{context.seed}/pfa/{name}/{weight.feedback_name}", cpu)
        m, like = max(1, round(self.expansion * n)), weight.weight
        p, r = (torch.randn(groups, m, size, generator=generator, device=cpu) for size in (n, inputs))
        return (p / math.sqrt(m)).to(like), (r * math.sqrt(2.0 / (m + inputs))).to(like)

    def _mixing(self, weight: UntiedWeight, context: RuleContext) -> Tensor:
        """Return G ``[groups, n, n]``; the layer keeps it."""
        kept: dict[Any, Tensor] = weight.layer.__dict__["untied"].memo.setdefault("pfa", {})
        key = (context.seed, weight.feedback_name)
        if key not in kept:
            p, _ = self._draw(weight, context)
            kept.clear()
            kept[key] = p.mT @ p
        return kept[key]


def _as_matrix(weight: UntiedWeight, tensor: Tensor) -> Tensor:
    """View it as ``[groups, neurons, inputs]``; that of an unknown layer by its first dimension."""
    view = weight.kind.as_matrix
    return tensor.detach().flatten(1)[None] if view is None else view(weight.layer, tensor.detach())
