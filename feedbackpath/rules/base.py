"""What a rule is: how feedback weights begin, who carries the error, and what happens when."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from feedbackpath.arguments import CheckedArguments, checked
from feedbackpath.core.context import RuleContext
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.core.sendback import LOCAL, SendBack
from feedbackpath.errors import RuleError, refuse_no_size
from feedbackpath.rules.spelling import warn_of_misspelt

Weights = Sequence[UntiedWeight]
Scale = Literal["xavier", "he", "zero"] | float


@dataclass(frozen=True)
class Facts:
    """What ``feedbackpath rules`` says of a rule. None, or an empty text: not known.

    Attributes:
        paper: Where it comes from.
        equation: What it does, in W's layout.
        needs: Phases, memory and signals beyond those of a feedforward pass with a matrix B.
        verdict: How its audit's verdict begins.
        flops: FLOPs of matrix products in a training step of ResNet-8, over backprop's.
    """

    paper: str = ""
    equation: str = ""
    needs: str = ""
    verdict: str = ""
    flops: float | None = None


class Rule(CheckedArguments):
    """How feedback weights get their values. A subclass has a ``name`` and the hooks that it needs.

    Make it a frozen dataclass: its fields are its settings, and layers with equal rules are passed
    to the hooks together. What changes during training belongs into ``context.state``.

    Attributes:
        name: Short name, as on the command line.
        send_back: How the error gets to a layer's input.
        is_tied: Whether B is W itself (backprop).
        learns: Whether B gets the gradient of the outer product, and the optimizer updates it.
        is_mirrorable: Whether ``path.mirror()`` may be called: not if B is W, or is computed from it.
        gradients: ``gradients(weight, product, context)`` returns the gradients of W and B from an outer
            product ``delta x^T``; None: both get the product itself.
        after_backward: ``after_backward(weight, x, output, delta, context)`` is called in each backward pass,
            when the error delta arrives at the output of the operation in which W met activity; None: never.
            With it, the input x of each layer is kept until then.
        reads_output: Whether ``after_backward`` needs the output as it was; an operation that has changed it
            in place is then refused.
        group: The heading under which ``feedbackpath rules`` lists it; None: derived from the above.
        search_space: What ``feedbackpath tune`` searches for this rule beside learning rate and weight decay:
            names of settings to ``("log", low, high)``, ``("linear", low, high)`` or ``("choice", a, b)``.
        facts: Paper, equation, needs, verdict and cost, for ``feedbackpath rules``.
        label: Its name in full, for legends and headings; None: its name.
        colour: ``#RRGGBB``, for figures; None: a colour is chosen.
    """

    name: ClassVar[str]
    send_back: ClassVar[SendBack] = LOCAL
    is_tied: ClassVar[bool] = False
    learns: ClassVar[bool] = False
    is_mirrorable: ClassVar[bool] = True
    gradients: ClassVar[Callable[..., tuple[Tensor, Tensor | None]] | None] = None
    after_backward: ClassVar[Callable[..., None] | None] = None
    reads_output: ClassVar[bool] = False
    group: ClassVar[str | None] = None
    search_space: ClassVar[Mapping[str, Sequence[Any]]] = {}
    facts: ClassVar[Facts] = Facts()
    label: ClassVar[str | None] = None
    colour: ClassVar[str | None] = None

    def __init_subclass__(cls, **settings: Any) -> None:
        """Warn of a subclass with a misspelt hook."""
        super().__init_subclass__(**settings)
        warn_of_misspelt(cls, Rule)

    def serves(self, weights: Weights) -> bool:
        """Whether the rule can run a layer with these weights; if not, a warning names the layer."""
        return self.send_back.serves(list(weights))

    def start(self, weights: Weights, context: RuleContext) -> None:
        """Give every feedback weight its first value: by default a random one."""
        draw_feedback(weights, context)

    def step(self, weights: Weights, context: RuleContext) -> None:
        """Do what follows an update of W; called by ``path.step()``, after ``optimizer.step()``."""

    def check_optimizer(self, weights: Weights, optimizer: torch.optim.Optimizer) -> None:
        """Refuse an optimizer that does not suit the rule, or warn of it."""

    def attach(self, weights: Weights, context: RuleContext) -> None:
        """Hook on to parameters that are new: those of a model that was untied, copied or loaded."""

    def detach(self, weights: Weights, context: RuleContext) -> None:
        """Take such hooks off again; called by ``retie``."""


def group_of(rule: type[Rule]) -> str:
    """Return the heading that a rule is listed under: its own, or one that its other attributes tell.

    Example:
        >>> import feedbackpath as fp
        >>> [group_of(fp.RULES[name]) for name in ("bp", "ss", "fa", "kp", "dfa", "wm")]
        ['ruler', 'transports', 'fixed', 'learned', 'broadcast', 'mirrors']
    """
    told = {
        "ruler": rule.is_tied,
        "mirrors": hasattr(rule, "__dataclass_fields__") and "mirror" in rule.__dataclass_fields__,
        "broadcast": rule.send_back.is_broadcast,
        "learned": rule.learns or rule.after_backward is not None,
    }
    return rule.group or next((group for group, holds in told.items() if holds), "fixed")


@checked(RuleError)
def draw_feedback(weights: Weights, context: RuleContext, scale: Scale = "xavier") -> None:
    """Draw every feedback weight from N(0, s^2), independently of W. The paper leaves s open.

    Scales: ``"xavier"``, s^2 = 2 / (fan_in + fan_out) (Glorot & Bengio 2010, equation 12); ``"he"``, s^2 = 2
    / fan_out: errors keep their size through ReLUs (He et al. 2015, equation 14); ``"zero"``, s = 0; a
    number: Glorot and Bengio's s times this number.

    Raises:
        RuleError: The number is not above 0.
    """
    with torch.no_grad():
        for weight in weights:
            if weight.weight.numel() == 0:
                continue
            size = size_at(scale, weight)
            weight.feedback.normal_(0.0, size, generator=context.generator(weight, "draw_feedback"))


def size_at(scale: Scale, weight: UntiedWeight) -> float:
    """Return the standard deviation that a scale names."""
    if not isinstance(scale, str):
        refuse_no_size("the scale of B", scale)
        return scale * size_at("xavier", weight)
    fans = {"xavier": weight.fan_in + weight.fan_out, "he": weight.fan_out, "zero": math.inf}
    return math.sqrt(2.0 / fans[scale])
