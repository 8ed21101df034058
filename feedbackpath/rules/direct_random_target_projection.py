"""Direct random target projection (DRTP): targets go to the layers, in place of errors.

Frenkel, Lefebvre & Bol 2021. With y* the target, one-hot, and B_l of layer l, fixed and random::

    delta_{l-1} = -phi'(y_{l-1}) B_l y*      in place of phi'(y_{l-1}) B_l e (direct feedback alignment)

Under softmax and cross entropy ``e = p - y*``: its one negative entry is the target's. So -y* is e with
everything but its sign forgotten, and a layer need not wait for the output to learn from it.

Here y* is read off e in just that way, as ``e < 0``: a rule sees the error, and not the labels. A sample
whose e is 0 (a label that the loss ignores; one that the model is certain of to the last bit) sends nothing.

Differs from the paper: y* is divided by the number of samples, as a loss that averages over them divides e.
The last layer learns from e, as there. The paper adds B y*, and its published code subtracts it: for a B that
is drawn from a symmetric law the two are one rule.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from feedbackpath.core.sendback import Broadcast, SendBack
from feedbackpath.errors import RuleError
from feedbackpath.rules.base import Facts
from feedbackpath.rules.direct_feedback_alignment import DirectFeedbackAlignment


def negative_target(error: Tensor) -> Tensor:
    """Return -y* of a mean over samples, read off the error ``[..., outputs]`` of a cross entropy.

    Raises:
        RuleError: A sample has several negative errors, so that they do not tell one class.

    Example:
        >>> negative_target(torch.tensor([[0.1, -0.3, 0.2], [-0.1, 0.1, 0.0]]))
        tensor([[-0.0000, -0.5000, -0.0000],
                [-0.5000, -0.0000, -0.0000]])
    """
    is_target = error < 0
    if not torch.compiler.is_compiling() and bool((is_target.sum(-1) > 1).any()):
        raise RuleError(
            "drtp reads the target from the error at the output, where cross entropy with one class per "
            "sample leaves one negative entry; this error has several: use that loss, or the rule 'dfa'"
        )
    return -is_target.to(error.dtype) / max(1, error[..., 0].numel())


@dataclass(frozen=True)
class DirectRandomTargetProjection(DirectFeedbackAlignment):
    """Send the target straight to each layer's input, through a fixed random matrix.

    For classification by cross entropy, averaged over samples, with one class per sample. If the loss is
    scaled (by a gradient scaler, or for accumulation), only the last layer's update is scaled.

    Example:
        >>> import feedbackpath as fp
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
        >>> path = fp.untie(model, "drtp")
        >>> torch.nn.functional.cross_entropy(model(torch.ones(2, 8)), torch.tensor([0, 2])).backward()
    """

    name: ClassVar[str] = "drtp"
    facts: ClassVar[Facts] = Facts(
        paper="Frenkel, Lefebvre & Bol 2021",
        equation="delta_l = -phi'(y_l) B^T y*, y* the target",
        needs="a path from the target to each layer",
        verdict="transport-free",
        flops=1.06,
    )
    send_back: ClassVar[SendBack] = Broadcast(negative_target)
