"""Direct Kolen-Pollack (DKP): direct feedback alignment whose matrices learn by the Kolen-Pollack update.

Webster, Choi & Ahn 2021, with equations 16 and 17 of Akrout et al. 2019. With e the error at the model's
output and x the input of a layer, in the layout of B, ``[outputs, *input]``::

    dW = -eta delta x^T - lambda W
    dB = -eta e x^T - lambda B

In the last layer delta is e, so both get the same product and W - B shrinks by (1 - lambda) a step. In the
layers below B forgets where it began at that rate, and comes to hold the decaying sum of all e x^T.

Differs from the paper: the optimizer updates B as it does W, with its momentum and its decay.
"""

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch

from feedbackpath.core.context import RuleContext
from feedbackpath.errors import KolenPollackWarning, RuleError, level_outside
from feedbackpath.rules.base import Facts, Weights
from feedbackpath.rules.direct_feedback_alignment import DirectFeedbackAlignment
from feedbackpath.rules.update_watch import UpdateWatch


@dataclass(frozen=True)
class DirectKolenPollack(DirectFeedbackAlignment):
    """Send the output's error straight to each layer's input; let the matrices learn from it as well.

    Run the model once before you make the optimizer: only then are the matrices there. Weight decay makes
    them forget their random start.

    Example:
        >>> import feedbackpath as fp
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
        >>> path = fp.untie(model, "dkp")
        >>> model(torch.ones(2, 8)).sum().backward()
        >>> bool((model[2].feedback.grad == model[2].weight.grad).all())
        True
    """

    name: ClassVar[str] = "dkp"
    facts: ClassVar[Facts] = Facts(
        paper="Webster, Choi & Ahn 2021",
        equation="delta_l = phi'(y_l) B^T e; dB = -eta e x^T - lambda B",
        needs="a path from the output to each layer; weight decay",
        verdict="transport-free",
        flops=1.45,
    )
    learns: ClassVar[bool] = True

    def start(self, weights: Weights, context: RuleContext) -> None:
        """Draw every B, and see that the optimizer will know of it."""
        super().start(weights, context)
        context.part(UpdateWatch).watch(weights)

    def attach(self, weights: Weights, context: RuleContext) -> None:
        """Watch the first update of those that are there."""
        context.part(UpdateWatch).watch(weights)

    def step(self, weights: Weights, context: RuleContext) -> None:
        """See that the first update has reached every B; the optimizer has done it."""
        context.part(UpdateWatch).check([weight for weight in weights if weight.has_feedback])

    def check_optimizer(self, weights: Weights, optimizer: torch.optim.Optimizer) -> None:
        """See that an optimizer knows of every B and lets it decay.

        Raises:
            RuleError: The model has not run yet, or a B is not in the optimizer.

        Warns:
            KolenPollackWarning: No weight decay: the random start of B never decays.
        """
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        made = [weight for weight in weights if weight.has_feedback]
        learning = [weight for weight in made if weight.feedback.requires_grad]
        missing = [repr(weight.name) for weight in learning if id(weight.feedback) not in groups]
        if missing or not made:
            raise RuleError(
                f"direct Kolen-Pollack: the optimizer lacks the feedback weights of "
                f"{', '.join(missing) or 'all layers'}; untie the model, run it once with "
                "gradients, so that they are made, and then make the optimizer from model.parameters()"
            )
        undecayed = [repr(w.name) for w in learning if not groups[id(w.feedback)].get("weight_decay")]
        if undecayed:
            warnings.warn(
                f"direct Kolen-Pollack without weight decay: the random start of {', '.join(undecayed)} will "
                "not decay; give the optimizer weight_decay > 0",
                KolenPollackWarning,
                stacklevel=level_outside(),
            )
