"""The settings of mirror mode."""

import dataclasses
import math
import numbers
from dataclasses import dataclass
from typing import Any, Literal

from feedbackpath.arguments import CheckedArguments
from feedbackpath.errors import RuleError, refuse_no_size
from feedbackpath.mirror.noise import code_length, relative_variance, relu_spread

LEAST_FORGETTING, MOST_FORGETTING = 0.02, 0.1
NOISE_DEG = 10.0  # that sampling may leave: where a pass has few samples, B remembers longer
UNSEEN_EXAMPLES = 2048  # of a pass, where no minibatch has been seen: the paper's (Appendix D.2)
CODES = ("orthogonal", "hadamard")
Noise = Literal["gaussian", "uniform", "signs", "orthogonal", "hadamard"]
Reading = Literal["calibrated", "inside", "printed", "scaled"]


@dataclass(frozen=True)
class When(CheckedArguments):
    """When a rule mirrors which layers.

    Args:
        layers: ``"all"`` of them; ``"turn"``: one after the other; ``"alternate"``: every second layer at
            once, then the others (Appendix C.4).
        every: Steps from one time to the next.
        cost_share: With ``"all"``: mirroring's FLOPs as a share of a training step's, on average. Those that
            have waited longest come first. None: all layers, whatever it costs. FLOPs follow from sizes
            (``feedbackpath.mirror.cost``), so the same layers are mirrored on every machine. A step's are
            those of all devices together, so that training does not depend on their number.
    """

    layers: Literal["all", "turn", "alternate"] = "all"
    every: int = 1
    cost_share: float | None = None

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        refuse_no_count("When: every", self.every)
        if self.cost_share is not None:
            refuse_no_size("When: cost_share", self.cost_share)
        if self.cost_share is not None and self.layers != "all":
            raise RuleError(
                f"When: cost_share is for layers='all'; {self.layers!r} is another schedule; give one of them"
            )


@dataclass(frozen=True)
class Mirror(CheckedArguments):
    """Settings of mirror mode.

    Args:
        noise: What all neurons of a layer fire at once. Independent noise: ``"gaussian"`` (the paper's),
            ``"uniform"``, ``"signs"``. Or codes that are orthogonal to each other: ``"orthogonal"``, the
            exact read-out, which assumes that W is read without noise; ``"hadamard"``, the same codes at
            sigma 1, always through the layer's own call, which average over noise.
        sigma: Standard deviation of the noise; None: 1, or 0.01 for ``"orthogonal"``, so weak that any
            smooth activation is nearly linear there.
        samples: Examples of independent noise a pass, on each device. In a convolution an example is a whole
            map, and each position of it is a sample. None: as many as ``target_angle_deg`` needs, or, where
            that is None too, as many as the minibatch of training has; 2048 where none has been seen.
        target_angle_deg: Angle between B and W, in degrees, that sampling noise alone may leave behind a
            ReLU.
        reading: How covariance and decay enter, with d = ``forgetting``, eta = ``rate``, lambda = ``decay``:
            ``"calibrated"``: B <- (1 - d) B + d cov / (sigma^2 s), with s each neuron's own mean slope:
            settles at W; with codes d = 1;
            ``"inside"``: B <- B + eta (cov - lambda B), settles at sigma^2 s / lambda times W;
            ``"printed"``: B <- (1 - lambda) B + eta cov, as in Algorithm 1, settles at
            sigma^2 s eta / lambda times W: a tenth of W's size behind a ReLU, with the paper's numbers;
            ``"scaled"``: B <- B + eta cov, and then back to the norm that it had (synaptic scaling).
        forgetting: d, the share of B that a ``"calibrated"`` pass replaces, after the first passes, which are
            a plain average (d = 1/n for pass n, until that falls to ``forgetting``). None: in each layer the
            share that leaves 10 degrees of sampling noise, but between 2% and 10%.
        rate: eta_B of the paper, for the other readings.
        decay: lambda_WM of the paper, for ``"inside"`` and ``"printed"``.
        block_bias: Whether neurons leave out their biases in mirror mode (equation 12).
        rates: How signals travel: ``"signed"`` numbers, rates about a ``"baseline"`` (equations 23, 24), or
            by cells in ``"push-pull"`` (Appendix C.2).
        baseline: beta, for rates about a baseline.
        baseline_known: Whether neurons know beta; else they take the mean of the rates that they see.
        across_devices: Where a job has D devices: ``"same"``, all fire the same noise, and nothing is sent;
            ``"averaged"``, each fires its own, and what they find is averaged by one all-reduce a layer.
            ``samples`` that are given are then each device's; those that follow from the minibatch or an
            angle are shared out. B is the same on all, bit for bit, either way.
        when: When a rule mirrors which layers.
        pairs: Whether each pattern of independent noise is followed by its negative, so that what is even in
            an answer cancels; a pair counts as two samples.
        draw: How pairs of Gaussian noise are simulated: by ``"each"`` pattern; or as a ``"whole"``, in linear
            and attention layers that nothing changes, where ``phi(z) - phi(-z) = 2 s z`` (linear, ReLU, GELU,
            SiLU). B follows the same law, at a cost that does not grow with the samples. Other layers fire
            each pattern, and a warning says why.
    """

    noise: Noise = "gaussian"
    sigma: float | None = None
    samples: int | None = None
    target_angle_deg: float | None = None
    reading: Reading = "calibrated"
    forgetting: float | None = None
    rate: float = 0.1
    decay: float = 0.5
    block_bias: bool = True
    rates: Literal["signed", "baseline", "push-pull"] = "signed"
    baseline: float = 1.0
    baseline_known: bool = True
    across_devices: Literal["same", "averaged"] = "same"
    when: When = dataclasses.field(default_factory=When)
    pairs: bool = False
    draw: Literal["each", "whole"] = "each"

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        for name in ("forgetting", "rate", "decay", "sigma", "target_angle_deg", "baseline"):
            value = getattr(self, name)
            if value is not None:
                refuse_no_size(f"Mirror: {name}", value)
        if self.target_angle_deg is not None and not self.target_angle_deg < 90:
            raise RuleError(f"Mirror: target_angle_deg must be below 90, not {self.target_angle_deg}")
        if (share := self.share_for(1, 1.0)) > 1:
            raise RuleError(f"Mirror: a pass would replace {share:g} of B; at most 1 is possible")
        if self.samples is not None:
            refuse_no_count("Mirror: samples", self.samples, least=2)
            if self.target_angle_deg is not None:
                raise RuleError("Mirror: give samples or target_angle_deg, not both")
        for name, value in (("samples", self.samples), ("target_angle_deg", self.target_angle_deg)):
            if self.fires_codes and value is not None:
                raise RuleError(
                    f"Mirror: {name} is for independent noise; {self.noise!r} takes as many samples as there "
                    "are inputs, twice"
                )
        if self.pairs and (self.fires_codes or self.rates != "signed"):
            raise RuleError(
                "Mirror: pairs is for independent noise of signed numbers, not for "
                f"noise={self.noise!r} with rates={self.rates!r}"
            )
        if self.pairs and self.samples is not None and self.samples % 2:
            raise RuleError(f"Mirror: samples must be even with pairs=True, not {self.samples}")
        if self.draw == "whole" and not (self.pairs and self.noise == "gaussian"):
            raise RuleError("Mirror: draw='whole' needs noise='gaussian' and pairs=True")
        if self.draw == "whole" and self.when.cost_share is not None:
            raise RuleError(
                "Mirror: draw='whole' changes what a pass costs, and When(cost_share=...) goes by that; give "
                "one of them, or When(every=...)"
            )
        if self.across_devices == "averaged" and self.fires_codes:
            raise RuleError(
                f"Mirror: across_devices='averaged' is for independent noise; {self.noise!r} codes are "
                "already exact on one device; leave it at 'same'"
            )

    @classmethod
    def paper(cls, **changes: Any) -> "Mirror":
        """Return the paper's literal settings (Appendix D.2), with changes.

        Gaussian maps of unit variance, eta 0.1, lambda 0.5, a pass through every layer after every
        minibatch, of 2048 examples, averaged over all positions of their maps. Biases are not blocked. The
        decay is inside the rate, as Figure 4a asks for (docs/paper.md): it settles near W's size behind
        ReLUs and at twice it where the answer is linear; ``reading="printed"`` at a tenth and a fifth.

        Example:
            >>> Mirror.paper().noise, Mirror.paper(samples=128).samples
            ('gaussian', 128)
        """
        literal = cls(sigma=1.0, samples=2048, reading="inside", block_bias=False)
        return dataclasses.replace(literal, **changes)

    @classmethod
    def exact(cls, **changes: Any) -> "Mirror":
        """Return the exact read-out, with changes: one pass replaces B by W, to rounding.

        That is so behind (leaky) ReLUs, GELU, SiLU and linear outputs with biases blocked, and nearly so
        behind any smooth activation. It assumes a noiseless read.
        """
        return dataclasses.replace(cls(noise="orthogonal"), **changes)

    @property
    def fires_codes(self) -> bool:
        """Whether neurons fire orthogonal codes, and not independent noise."""
        return self.noise in CODES

    @property
    def is_exact(self) -> bool:
        """Whether one pass replaces the whole of B by what codes found."""
        return self.fires_codes and self.reading == "calibrated"

    @property
    def deviation(self) -> float:
        """The standard deviation of the noise."""
        if self.sigma is not None:
            return self.sigma
        return 0.01 if self.noise == "orthogonal" else 1.0

    def share_for(self, inputs: int, samples: float) -> float:
        """Return the share of B that a pass replaces in this reading, once its memory is full.

        Args:
            inputs: n, the inputs of a neuron.
            samples: Answers of a neuron, or channel, a pass.
        """
        if self.reading in ("inside", "scaled"):
            return self.rate * self.decay
        if self.reading == "printed":
            return self.decay
        if self.fires_codes:
            return 1.0
        if self.forgetting is not None or self.target_angle_deg is not None:
            return self.forgetting or MOST_FORGETTING
        needed = self.relative_variance(inputs, 1.0) / math.tan(math.radians(NOISE_DEG)) ** 2
        return min(max(2.0 * samples / (needed + samples), LEAST_FORGETTING), MOST_FORGETTING)

    def examples_for(
        self, inputs: int, positions: float = 1.0, seen: int | None = None, devices: int = 1
    ) -> int:
        """Return the examples of noise that a pass fires, on each device.

        Args:
            inputs: n, the inputs of a neuron; of one group and example all of them, where codes are fired.
            positions: Answers of a channel to one example.
            seen: Examples of training's minibatch, of all devices; None: not known.
            devices: Devices that fire noise of their own.
        """
        if self.fires_codes:
            return 2 * code_length(inputs)
        if self.samples is not None:
            return self.samples
        examples: float = UNSEEN_EXAMPLES if seen is None else seen
        if self.target_angle_deg is not None:
            share = self.share_for(inputs, 1.0)
            variance = self.relative_variance(inputs, (2.0 - share) / share * positions)
            examples = variance / math.tan(math.radians(self.target_angle_deg)) ** 2
        least = 2 if self.pairs else 1  # whole pairs
        return max(2, least * math.ceil(examples / devices / least))

    def relative_variance(self, inputs: int, samples: float, spread: float | None = None) -> float:
        """Return ``E|B - W|^2 / |W|^2`` of a pass of independent noise at gain 1.

        Args:
            inputs: n, the inputs of a neuron.
            samples: N, answers that the estimate is averaged over.
            spread: How much more an answer scatters than that of a linear neuron; None: behind a ReLU.
        """
        told = samples / 2.0 if self.pairs else samples
        return relative_variance(self.noise, inputs, told, spread or relu_spread(self.pairs))

    def expected_angle_deg(self, inputs: int, samples: float, spread: float | None = None) -> float:
        """Return the angle, in degrees, that sampling noise leaves when B's memory is full.

        Args:
            inputs: n, the inputs of a neuron.
            samples: Answers of a neuron, or channel, a pass, of all devices that average theirs.
            spread: How much more an answer scatters than that of a linear neuron; None: behind a ReLU.
        """
        if self.fires_codes:
            return 0.0
        share = self.share_for(inputs, samples)
        effective = samples * (2.0 - share) / share
        return math.degrees(math.atan(math.sqrt(self.relative_variance(inputs, effective, spread))))


def passes_to_fill(share: float) -> int:
    """Return the passes of a first mirroring: B then has forgotten how it began."""
    return 1 if share == 1.0 else math.ceil(5.0 / share)


def refuse_no_count(what: str, value: object, least: int = 1) -> None:
    """Refuse what is no whole number of at least ``least``: it would do nothing, or something else.

    Raises:
        RuleError: Says ``what`` has to be one.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise RuleError(f"{what} must be a whole number, not {value!r}")
    if int(value) < least:
        raise RuleError(f"{what} must be at least {least}, not {value}")
