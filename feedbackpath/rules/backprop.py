"""Backprop (BP), to compare with: B is W itself.

Akrout et al. 2019, equation 2 (Rumelhart, Hinton & Williams 1986): delta_l = phi'(y_l) W_{l+1}^T delta_{l+1}.
"""

from dataclasses import dataclass
from typing import ClassVar

from feedbackpath.rules.base import Facts, Rule


@dataclass(frozen=True)
class Backprop(Rule):
    """Send delta back through W; the layers run PyTorch's own code.

    Example:
        >>> import feedbackpath as fp
        >>> path = fp.untie(torch.nn.Linear(3, 2), fp.Backprop())
        >>> path.matrix_angles()
        {'': 0.0}
    """

    name: ClassVar[str] = "bp"
    facts: ClassVar[Facts] = Facts(
        paper="Rumelhart, Hinton & Williams 1986",
        equation="delta_l = phi'(y_l) W^T delta_(l+1)",
        needs="W itself on the feedback path",
        verdict="transports weights",
        flops=1.0,
    )
    is_tied: ClassVar[bool] = True
    is_mirrorable: ClassVar[bool] = False
