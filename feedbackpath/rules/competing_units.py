"""Competing hidden units (KH): hidden layers learn without errors, and only the read-out learns from them.

Krotov & Hopfield 2019, "Unsupervised learning by competing hidden units", with R = 1, in the minibatch form
of the code that they published. For an input v, unit m has the drive::

    I_m = sum_i sign(W_mi) |W_mi|^(p - 1) v_i
    dW_mi = rate g_m (v_i - I_m W_mi) / norm      g = 1 for the unit of largest drive, -delta for that of the
                                                  k-th largest, 0 for the others

summed over a minibatch; norm is the largest of the sums in a layer. The unit that wins goes towards the
input, the k-th is pushed off. A unit that goes on winning comes to the length 1: x = sum_i |W_mi|^p changes
as ``p g (I_m - I_m x)``, which is 0 at x = 1 whatever the inputs are.

B is 0, so that no error goes down. A layer that an error reaches is the read-out, and learns from it by the
optimizer; the others compete. In a convolution the channels compete at each position.

The paper lets hidden weights learn first, at a rate that falls linearly to 0, and then the read-out. So does
``steps=N``: call ``path.step()`` N times without the optimizer, then train; hidden layers stay as they are.
``benchmarks/competing_units.py`` does that on MNIST.

Differs from the paper: without ``steps`` the rate stays as it is and the read-out learns at the same time;
hidden layers come before whatever activation the model has (there ReLU(h)^n), and the read-out has the
model's loss; several hidden layers learn at the same time, not one by one. Weights begin with unit variance,
as in the published code: the first step brings those of hidden layers to it, and no more. (Small ones grow
towards the first winner's inputs, and that unit goes on to win all.) Weight decay of the optimizer works
against the length that units come to.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from feedbackpath.core.context import RuleContext
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.errors import RuleError
from feedbackpath.mirror.settings import refuse_no_count
from feedbackpath.rules.activity_rule import ActivityRule, forward, product
from feedbackpath.rules.base import Facts, Weights


@dataclass(frozen=True)
class CompetingUnits(ActivityRule):
    """Let the units of hidden layers compete for inputs; only the read-out learns from the error.

    Args:
        rate: The largest change of a weight in a step, between 0 and 2.
        p: The exponent of the norm that weights come to have; at least 2.
        k: Rank of the unit that is weakened, counted from the one of largest drive; at least 2.
        delta: How much it is weakened.
        steps: Over how many steps the rate falls linearly to 0, after which hidden layers stay as they are;
            at least 2. None: the rate stays as it is.

    Example:
        >>> import torch
        >>> import feedbackpath as fp
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
        >>> path = fp.untie(model, "kh")
        >>> for _ in range(500):
        ...     model(torch.rand(32, 8)).sum().backward()
        ...     path.step()
        >>> lengths = model[0].weight.norm(dim=1)
        >>> model[0].weight.grad.abs().max().item(), bool(lengths.min() < 1.1)
        (0.0, True)
    """

    name: ClassVar[str] = "kh"
    facts: ClassVar[Facts] = Facts(
        paper="Krotov & Hopfield 2019",
        equation="dW_m = rate g_m (v - I_m W_m) / norm; B = 0",
        needs="the ranks of a layer's drives",
        verdict="transport-free",
        flops=2.0,
    )
    group: ClassVar[str] = "fixed"
    reads_output: ClassVar[bool] = False
    search_space: ClassVar[Mapping[str, Sequence[Any]]] = {
        "rate": ("log", 0.001, 0.1),
        "k": ("choice", 2, 4, 7),
        "delta": ("linear", 0.0, 0.4),
        "steps": ("choice", 100, 300, 1000),
    }
    rate: float = 0.02
    p: float = 2.0
    k: int = 2
    delta: float = 0.4
    steps: int | None = None

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        super().__post_init__()
        refuse_no_count("kh: k", self.k, least=2)
        if self.steps is not None:
            refuse_no_count("kh: steps", self.steps, least=2)
        if not (self.p >= 2.0 and self.delta >= 0.0):
            raise RuleError(f"kh: p must be at least 2 and delta at least 0, not {self.p} and {self.delta}")

    def start(self, weights: Weights, context: RuleContext) -> None:
        """Let no error go down."""
        with torch.no_grad():
            for weight in weights:
                weight.feedback.zero_()

    def after_backward(
        self, weight: UntiedWeight, x: Tensor, output: Tensor, delta: Tensor, context: RuleContext
    ) -> None:
        """Let the units of a layer that no error has reached compete."""
        if self.rate_at(context.steps + 1) > 0.0 and not bool(delta.any()):
            super().after_backward(weight, x, output, delta, context)

    def step(self, weights: Weights, context: RuleContext) -> None:
        """Change the W of each layer that has competed; the first time, bring it to unit variance."""
        if context.steps == 1:
            with torch.no_grad():
                for weight in weights:
                    if context.state.pop(weight.name, None):
                        weight.weight.div_(weight.weight.std())
        if self.rate_at(context.steps) > 0.0:
            super().step(weights, context)

    def rate_at(self, step: int) -> float:
        """Return the rate of a step, counted from 1."""
        return self.rate if self.steps is None else self.rate * max(0.0, 1.0 - (step - 1) / self.steps)

    def slope(
        self, weight: UntiedWeight, x: Tensor, y: Tensor, context: RuleContext
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of ``g_m (I_m W_mi - v_i)`` over samples and positions, to be gone down."""
        w, layer = weight.weight.detach().to(x.dtype), weight.layer
        drive = forward(layer, x, w * w.abs().pow(self.p - 2.0))
        units = drive.dim() - w.dim() + 1
        if drive.shape[units] < self.k:
            raise RuleError(
                f"kh: {weight.name!r} has {drive.shape[units]} units, and the one of rank k={self.k} is to "
                "be weakened: set a smaller k, or give this layer another rule by overrides="
            )
        ranked = drive.topk(self.k, dim=units).indices
        g = torch.zeros_like(drive)
        g.scatter_(units, ranked.narrow(units, 0, 1), 1.0)
        g.scatter_(units, ranked.narrow(units, self.k - 1, 1), -self.delta)
        others = [dim for dim in range(drive.dim()) if dim != units]
        pulled = (g * drive).sum(others).view(-1, *[1] * (w.dim() - 1)) * w
        return pulled - product(layer, x, w, g), x.new_ones(())

    def descend(self, weight: UntiedWeight, slope: Tensor, context: RuleContext) -> None:
        """Change W, and not B: its largest change is the rate."""
        largest = torch.linalg.vector_norm(slope, torch.inf).clamp(min=torch.finfo(slope.dtype).tiny)
        weight.weight.addcdiv_(slope, largest, value=-self.rate_at(context.steps))
