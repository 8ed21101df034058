"""Sign-symmetry (SS): B has the signs of W, and its own magnitudes.

Liao, Leibo & Poggio 2016; Moskovitz et al. 2018 and Xiao et al. 2019 are the forms that Akrout et al. 2019
compare with. B = M * sign(W), refreshed after every update of W: 1 bit per weight is transported.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from feedbackpath.core.context import RuleContext
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.rules.base import Facts, Rule, Weights, size_at


@dataclass(frozen=True)
class SignSymmetry(Rule):
    r"""Let each feedback weight have its forward weight's sign: ``B = M * sign(W)``.

    Args:
        magnitude: What M is.
            ``"uniform"``: the same for all weights of a layer (Xiao et al. 2019; uSF of Moskovitz et al.);
            ``"fixed"``: \|N(0, scale^2)\|, drawn once (frSF);
            ``"batchwise"``: \|N(0, scale^2)\|, drawn anew after each update (brSF).
        scale: ``"xavier"``: sqrt(2 / (fan_in + fan_out));
            ``"he"``: sqrt(2 / fan_out), which is sqrt(2 / (k k C_out)) for a convolution.

    The paper says only that "the signs of the forward and feedback weights, not necessarily their values,
    must correspond" and cites both sources; we assume ``"uniform"``, the form of the one it compares
    its numbers with, and Glorot & Bengio's scale, as for every random B here. Sending the last layer's
    delta by backprop, as some public versions do, is ``overrides={"fc": "bp"}``.

    Example:
        >>> import feedbackpath as fp
        >>> path = fp.untie(torch.nn.Linear(8, 4), fp.SignSymmetry(magnitude="fixed"))
        >>> ((_, W, B),) = path.pairs()
        >>> bool((B.sign() == W.sign()).all())
        True
    """

    name: ClassVar[str] = "ss"
    facts: ClassVar[Facts] = Facts(
        paper="Liao, Leibo & Poggio 2016; Xiao et al. 2019",
        equation="B = M * sign(W)",
        needs="the sign of each weight after each update",
        verdict="transports weights: their signs",
        flops=1.0,
    )
    group: ClassVar[str] = "transports"
    is_mirrorable: ClassVar[bool] = False
    search_space: ClassVar[Mapping[str, Sequence[str]]] = {
        "magnitude": ("choice", "uniform", "fixed", "batchwise"), "scale": ("choice", "xavier", "he"),
    }  # fmt: skip
    magnitude: Literal["uniform", "fixed", "batchwise"] = "uniform"
    scale: Literal["xavier", "he"] = "xavier"

    def start(self, weights: Weights, context: RuleContext) -> None:
        """Give every B its magnitudes, then the signs of W."""
        with torch.no_grad():
            for weight in weights:
                self._draw_magnitudes(weight, context)
                self._take_signs(weight)

    def step(self, weights: Weights, context: RuleContext) -> None:
        """Give every B the signs that W has now."""
        with torch.no_grad():
            for weight in weights:
                if self.magnitude == "batchwise":
                    self._draw_magnitudes(weight, context)
                self._take_signs(weight)

    def _draw_magnitudes(self, weight: UntiedWeight, context: RuleContext) -> None:
        size = size_at(self.scale, weight)
        if self.magnitude == "uniform":
            weight.feedback.fill_(size)
        else:
            weight.feedback.normal_(0.0, size, generator=context.generator(weight, "sign_symmetry"))

    @staticmethod
    def _take_signs(weight: UntiedWeight) -> None:
        """Put the sign bits of W on the magnitudes that B holds; a 0 has one too.

        So the magnitude outlives a weight that is 0 for a while: no second tensor need remember it.
        """
        sizes: Tensor = weight.feedback
        torch.copysign(sizes, weight.weight, out=sizes)
