"""Mirror mode: a layer's neurons fire noise, and B learns W from the covariance with what comes out.

Akrout et al. 2019, Section 4, equations 5-7 and 21, Algorithm 1, Appendix D.2. For a layer that gets noise x
and answers y = phi(W x + b)::

    cov = mean of (y - mean y) x^T          E[cov] = sigma^2 E[phi'(W x + b)] W     (equation 11)
    B  <- decayed B + rate * cov

Subtracting the mean of x as well, as Algorithm 1 does, would change nothing: y is already centred.
"""

import fnmatch
import math
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from feedbackpath.errors import RuleError
from feedbackpath.layers import UntiedWeight
from feedbackpath.mirror.activations import Activation, find_activations
from feedbackpath.mirror.noise import fire_gaussian, fire_orthogonal

MIN_SAMPLES = 512
RELU_SPREAD = 1.17  # how much more a mirror's samples scatter behind a ReLU than behind a linear neuron


@dataclass(frozen=True)
class Mirror:
    """Settings of mirror mode.

    Args:
        reading: How covariance and decay enter, with d = ``forgetting``, eta = ``rate``, lambda = ``decay``:
            ``"calibrated"``: B <- (1 - d) B + d cov / (sigma^2 E[phi']), which is ``"inside"`` with
            lambda = sigma^2 E[phi'] and eta lambda = d; settles at W, each row times its neuron's mean
            slope over the layer's: at W itself where all have one mean slope, as behind (leaky) ReLUs;
            ``"inside"``: B <- B + eta (cov - lambda B), settles at sigma^2 E[phi'] / lambda times W;
            ``"printed"``: B <- (1 - lambda) B + eta cov, as in Algorithm 1, settles at
            sigma^2 E[phi'] eta / lambda times W: a tenth of W's size behind a ReLU, with the paper's numbers.
        forgetting: d, the share of B that a ``"calibrated"`` pass replaces.
        rate: eta_B of the paper, for the other two readings.
        decay: lambda_WM of the paper, for the other two readings.
        sigma: Standard deviation of the noise.
        samples: Noise samples a pass for each weight; None: as many as ``target_angle_deg`` needs.
        target_angle_deg: Angle between B and W, in degrees, that sampling noise alone would leave.
        noise: ``"gaussian"``: independent, the paper's; ``"orthogonal"``: +-sigma codes, each with its
            negative, whose covariance is exactly sigma^2 I, so that one pass measures a W behind ReLUs
            exactly (with biases blocked). ``samples`` and ``target_angle_deg`` are not used then, and
            ``"calibrated"`` replaces the whole of B at each pass.
        block_bias: Whether neurons close off their biases in mirror mode (equation 12). Without it,
            neurons with different biases answer with different slopes, and B's rows differ in size.

    With ``"calibrated"``, E[phi'] is the mean slope of the layer's activation under the noise, and the first
    passes are averaged plainly (d = 1/n for pass n, until that falls to ``forgetting``), so that the
    random initial B is forgotten at once.
    """

    reading: Literal["calibrated", "inside", "printed"] = "calibrated"
    forgetting: float = 0.1
    rate: float = 0.1
    decay: float = 0.5
    sigma: float = 1.0
    samples: int | None = None
    target_angle_deg: float = 8.0
    noise: Literal["gaussian", "orthogonal"] = "gaussian"
    block_bias: bool = True

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        for name, known in (
            ("reading", ("calibrated", "inside", "printed")),
            ("noise", ("gaussian", "orthogonal")),
        ):
            if getattr(self, name) not in known:
                raise RuleError(f"Mirror: {name}={getattr(self, name)!r} is not one of {', '.join(known)}")
        for name in ("forgetting", "rate", "decay", "sigma", "target_angle_deg"):
            if not getattr(self, name) > 0:
                raise RuleError(f"Mirror: {name} must be above 0, not {getattr(self, name)}")
        if not self.target_angle_deg < 90:
            raise RuleError(f"Mirror: target_angle_deg must be below 90, not {self.target_angle_deg}")
        if self.share_replaced > 1:
            raise RuleError(
                f"Mirror: a pass would replace {self.share_replaced:g} of B; at most 1 makes sense"
            )
        if self.samples is not None and self.samples < 2:
            raise RuleError(f"Mirror: samples must be at least 2, not {self.samples}")

    @property
    def share_replaced(self) -> float:
        """The share of B that a pass replaces in this reading."""
        shares = {"calibrated": self.forgetting, "inside": self.rate * self.decay, "printed": self.decay}
        return shares[self.reading]

    @property
    def memory_passes(self) -> int:
        """Passes of a first mirroring: B then has forgotten its beginning and is as good as it gets."""
        if self.noise == "orthogonal" and self.reading == "calibrated":
            return 1
        if self.reading == "calibrated":
            return math.ceil(2.0 / self.forgetting) - 1
        return math.ceil(math.log(1000.0) / self.share_replaced)  # a thousandth of the random B is left

    def samples_for(self, fan_in: int) -> int:
        """Return noise samples a pass for neurons of ``fan_in`` inputs.

        tan(angle) = 1.17 sqrt(fan_in / N_eff) with N_eff = N (2 - d) / d for a memory that forgets d a pass;
        but at least 512, for in a layer of few inputs the angle needs less than the gain does.

        Example:
            >>> Mirror(target_angle_deg=8).samples_for(576)
            2102
        """
        if self.samples is not None:
            return self.samples
        effective = fan_in * (RELU_SPREAD / math.tan(math.radians(self.target_angle_deg))) ** 2
        return max(MIN_SAMPLES, math.ceil(effective * self.share_replaced / (2.0 - self.share_replaced)))


class MirrorMode:
    """Mirror mode of one model: its layers' activations, its noise, and how many passes it has made.

    Args:
        model: The untied model.
        activations: Glob patterns of layer paths to the activation that follows; found where not given.
        seed: Seed of the noise. The noise of a pass depends on this seed and the pass's number alone.

    Attributes:
        passes: How often each weight has been mirrored, by its name; absent: never.
    """

    def __init__(
        self, model: nn.Module, activations: Mapping[str, Callable[[Tensor], Tensor]], seed: int
    ) -> None:
        self.model = model
        self.given = dict(activations)
        self.seed = seed
        self.passes: dict[str, int] = {}
        self._activations: dict[str, Activation] = {}

    def run(self, weights: Sequence[UntiedWeight], settings: Mirror, passes: int = 1) -> None:
        """Let each layer fire noise in its turn, ``passes`` times, and let its B learn from it.

        Forward weights, gradients, running statistics and the global random numbers stay untouched.
        """
        self.find_activations(weights)
        for _ in range(passes):
            for weight in weights:
                self._mirror_weight(weight, settings)
                self.passes[weight.name] = self.passes.get(weight.name, 0) + 1

    def find_activations(self, weights: Sequence[UntiedWeight]) -> None:
        """Know the activation that follows each weight's layer, from what was given or by tracing.

        Raises:
            RuleError: Names all the layers for which an activation has to be given.
        """
        unknown = [weight.name for weight in weights if weight.name not in self._activations]
        if not unknown:
            return
        found = find_activations(self.model, unknown)
        for name in unknown:
            for pattern, activation in self.given.items():
                if fnmatch.fnmatchcase(name, pattern):
                    found[name] = activation
        missing = [repr(name) for name in unknown if name not in found]
        if missing:
            raise RuleError(
                f"mirror mode: the activations that follow {', '.join(missing)} cannot be found; give them, "
                "as in untie(model, 'wm', activations={'encoder.*': torch.relu, 'head': torch.nn.Identity()})"
            )
        self._activations |= found

    @torch.no_grad()
    def _mirror_weight(self, weight: UntiedWeight, settings: Mirror) -> None:
        fire = fire_gaussian if settings.noise == "gaussian" else fire_orthogonal
        covariance, slope = fire(
            weight,
            self._activations[weight.name],
            num_samples=settings.samples_for(weight.fan_in),
            sigma=settings.sigma,
            block_bias=settings.block_bias,
            generator=self._generator(weight),
        )
        feedback, rate, decay = weight.feedback, settings.rate, settings.decay
        if settings.reading == "printed":
            feedback.mul_(1.0 - decay).add_(covariance, alpha=rate)
        elif settings.reading == "inside":
            feedback.mul_(1.0 - rate * decay).add_(covariance, alpha=rate)
        else:
            share = self._share(weight, settings)
            _move_towards_gain_one(weight, covariance, slope * settings.sigma**2, share)

    def _share(self, weight: UntiedWeight, settings: Mirror) -> float:
        """Return d, the share of B that this pass replaces: plain averaging until memory is full."""
        if settings.noise == "orthogonal":
            return 1.0
        return max(settings.forgetting, 1.0 / (self.passes.get(weight.name, 0) + 1))

    def _generator(self, weight: UntiedWeight) -> torch.Generator:
        key = f"{self.seed}/{self.passes.get(weight.name, 0)}/{weight.name}/{weight.feedback_name}"
        return generator_of(key, weight)


def generator_of(key: str, weight: UntiedWeight) -> torch.Generator:
    """Return random numbers that depend on a key alone, on a weight's device, apart from the global ones."""
    return torch.Generator(weight.feedback.device).manual_seed(zlib.crc32(key.encode()))


def _move_towards_gain_one(weight: UntiedWeight, covariance: Tensor, scale: Tensor, share: float) -> None:
    """B <- (1 - d) B + d cov / scale; a layer whose neurons never answer keeps its B, and is named."""
    if not scale > 0:
        warnings.warn(
            f"mirror mode: no neuron of {weight.name!r} answers to noise; its feedback weight stays as it is",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    weight.feedback.lerp_(covariance / scale, share)
