"""Direct feedback alignment (DFA): the output's error goes straight to each layer, through fixed matrices.

Nokland 2016, equation 7. With e the error at the model's output and B_l of layer l, fixed and random::

    delta_{l-1} = phi'(y_{l-1}) B_l e        in place of phi'(y_{l-1}) W_l^T delta_l (backprop)

No error waits for the layers above: one matrix takes it to each layer, and the depth of the net makes no
difference. The last layer gets e itself, as in backprop.

Differs from the paper: B is drawn from N(0, 2 / (inputs + outputs)), with the inputs of the layer and the
outputs of the model, as a last layer's B is under feedback alignment; in the paper, from a uniform law.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from feedbackpath.core.context import RuleContext
from feedbackpath.core.sendback import Broadcast, SendBack
from feedbackpath.rules.base import Facts, Rule, Weights


@dataclass(frozen=True)
class DirectFeedbackAlignment(Rule):
    """Send the output's error straight to each layer's input, through a fixed random matrix.

    B of a layer is ``[outputs, *input]``. It is made when the model first runs. The model's output is one
    tensor ``[..., outputs]``. Recurrent layers and attention, which take their input apart, keep backprop.

    Example:
        >>> import feedbackpath as fp
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
        >>> path = fp.untie(model, "dfa")
        >>> model(torch.ones(2, 8)).sum().backward()
        >>> [(name, tuple(feedback.shape)) for name, _, feedback in path.pairs()]
        [('2', (3, 6))]
    """

    name: ClassVar[str] = "dfa"
    facts: ClassVar[Facts] = Facts(
        paper="Nokland 2016",
        equation="delta_l = phi'(y_l) B^T e, e the output's error",
        needs="a path from the output to each layer",
        verdict="transport-free",
        flops=1.06,
    )
    send_back: ClassVar[SendBack] = Broadcast()
    is_mirrorable: ClassVar[bool] = False

    def start(self, weights: Weights, context: RuleContext) -> None:
        """Draw every B from N(0, 2 / (inputs + outputs))."""
        draw_broadcast(weights, context)


def draw_broadcast(weights: Weights, context: RuleContext) -> None:
    """Draw every B from N(0, 2 / (inputs + outputs)): inputs of its layer, outputs of the model."""
    with torch.no_grad():
        for weight in weights:
            b = weight.feedback
            std = math.sqrt(2.0 / (len(b) + b[0].numel()))
            b.normal_(0.0, std, generator=context.generator(weight, "draw_broadcast"))
