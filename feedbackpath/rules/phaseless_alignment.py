"""Phaseless alignment learning (PAL): B learns W from noise that is added to activity, while W learns.

Max et al. 2024, "Learning efficient backprojections across cortical hierarchies in real time". There is no
mirror mode: each neuron adds noise xi of variance sigma^2 to what it sends, and B hears all of the answer::

    y = W (x + xi)
    dB = rate (y xi^T / sigma^2 - B)        laid out as W, averaged over the samples of a step

xi is independent of x, of the noise of other neurons and of what came from layers below, so that
``E[y xi^T] = sigma^2 W`` and ``E[dB] = rate (W - B)``, exactly and for any activity: B settles at W. The data
do not bias B, but they make it scatter. With n inputs of mean square s about their means, N samples a step::

    E|B - W|^2 / |W|^2  =  n (s / sigma^2 + 1) / N_eff        N_eff = N (2 - rate) / rate

so PAL takes about s / sigma^2 times the samples of a weight mirror, and none that are its own.

Differs from the paper, whose text was not at hand: the update is derived from what it says of the method.
Its neurons work in continuous time and filter noise from signal; here xi is known where it is drawn, and the
mean of y over a minibatch is taken off. B hears y before the activation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from feedbackpath.core.context import RuleContext
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.core.pytorch import uncompiled
from feedbackpath.errors import RuleError, refuse_no_size
from feedbackpath.rules.activity_rule import ActivityRule, own_noise, product
from feedbackpath.rules.base import Facts, Weights


@dataclass(frozen=True)
class PhaselessAlignment(ActivityRule):
    """Add noise to each layer's input while the model trains, and let B learn from the layer's output.

    The forward pass of a model in training mode is a noisy one. ``model.eval()``, ``torch.no_grad()`` and
    measurements of the path have no noise. An activation that works in place is refused, as it overwrites
    the output. A layer has one noise a step on each device: it tells something biased of one that runs twice.

    Args:
        rate: The share of B that a step replaces, between 0 and 2.
        sigma: Standard deviation of the noise.

    Example:
        >>> import feedbackpath as fp
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
        >>> path = fp.untie(model, fp.PhaselessAlignment(sigma=0.5))
        >>> for _ in range(500):
        ...     model(torch.randn(64, 8)).sum().backward()
        ...     path.step()
        >>> max(path.matrix_angles().values()) < 10
        True
    """

    name: ClassVar[str] = "pal"
    facts: ClassVar[Facts] = Facts(
        paper="Max et al. 2024",
        equation="dB = rate (y xi^T / sigma^2 - B), y = W (x + xi)",
        needs="noise on activities; each layer's input and output, kept",
        verdict="transport-free",
        flops=1.71,
    )
    search_space: ClassVar[Mapping[str, Sequence[Any]]] = {
        "rate": ("log", 0.0003, 0.03),
        "sigma": ("log", 0.03, 1.0),
    }
    rate: float = 0.01
    sigma: float = 0.2

    def __post_init__(self) -> None:
        """Refuse what is no noise."""
        super().__post_init__()
        refuse_no_size("pal: sigma", self.sigma)

    def serves(self, weights: Weights) -> bool:
        """Linear layers, and convolutions that pad with zeros; not those whose weight attention reads."""
        unfit = nn.modules.linear.NonDynamicallyQuantizableLinear
        return super().serves(weights) and not isinstance(weights[0].layer, unfit)

    def start(self, weights: Weights, context: RuleContext) -> None:
        """Draw every B, and let noise ride on the inputs of layers; refuse those that share a weight."""
        everywhere: Weights = context.model.__dict__["untied"].below
        for weight in weights:
            sharing = [repr(other.name) for other in everywhere if other.weight is weight.weight]
            if len(sharing) > 1:
                raise RuleError(
                    f"pal: {', '.join(sharing)} share a weight, and their noises cannot be "
                    "separated; untie the weights, or give these layers another rule by overrides="
                )
        super().start(weights, context)
        for weight in weights:
            hook = weight.layer.register_forward_pre_hook(ride, with_kwargs=True)
            weight.layer.untied.memo["pal: hook"] = hook

    def detach(self, weights: Weights, context: RuleContext) -> None:
        """Take the noise off again."""
        for weight in weights:
            if "pal: hook" in weight.layer.untied.memo:  # not where the rule has refused a layer
                weight.layer.untied.memo.pop("pal: hook").remove()

    def after_backward(
        self, weight: UntiedWeight, x: Tensor, output: Tensor, delta: Tensor, context: RuleContext
    ) -> None:
        """Add what this activity tells to that of the step."""
        if weight.layer.training and weight.layer.untied.memo.get("pal") == context.steps:
            super().after_backward(weight, x, output, delta, context)

    def slope(
        self, weight: UntiedWeight, x: Tensor, y: Tensor, context: RuleContext
    ) -> tuple[Tensor, Tensor]:
        """Return ``N (B - y xi^T / (sigma^2 N))``, and the N that it is divided by."""
        b, layer, noise = weight.feedback, weight.layer, self.noise(weight, x, context)
        if x.dim() < b.dim():  # a sample by itself
            x, y, noise = x[None], y[None], noise[None]
        freedom = max(1, len(x) - 1)
        heard = product(layer, noise, b, y - y.mean(0) if len(x) > 1 else y) / (self.sigma**2 * freedom)
        pairs = product(layer, torch.ones_like(x[:1]), b, torch.ones_like(y[:1]))
        slope = torch.where(pairs > 0, b - heard / pairs, 0.0)
        return freedom * slope, slope.new_tensor(freedom / b[0, 0].numel())

    def noise(self, weight: UntiedWeight, x: Tensor, context: RuleContext) -> Tensor:
        """Return the noise of this step that rides on a layer's input: the same whenever it is asked for."""
        drawn = torch.empty(x.shape, device=x.device)
        return drawn.normal_(0.0, self.sigma, generator=own_noise(weight, "pal", context)).to(x.dtype)


@uncompiled
@torch.no_grad()
def _draw(layer: Any, x: Tensor) -> Tensor:
    (weight,), context = layer.untied.weights, layer.untied.context
    layer.untied.memo["pal"] = context.steps  # where another module reads W, no noise rides
    noise: Tensor = layer.untied.rule.noise(weight, x, context)
    return noise


def ride(layer: nn.Module, args: Any, kwargs: Any) -> Any:
    """Add noise to the input of a layer that trains: a hook of its module."""
    untied: Any = layer.untied
    if not (layer.training and torch.is_grad_enabled()) or untied.context.is_measuring:
        return None
    if args:
        return (args[0] + _draw(layer, args[0]), *args[1:]), kwargs
    return args, {**kwargs, "input": kwargs["input"] + _draw(layer, kwargs["input"])}
