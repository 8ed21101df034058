"""The settings of mirror mode."""

import dataclasses
import math
import numbers
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from feedbackpath.errors import RuleError
from feedbackpath.mirror.designs import DESIGNS, RELU_SPREAD, Design, OrthogonalCodes

MIN_SAMPLES = 512
DEFAULT_ANGLE_DEG = 8.0
Reading = Literal["calibrated", "inside", "printed", "scaled"]


@dataclass(frozen=True)
class When:
    """When a rule mirrors which layers.

    Args:
        layers: ``"drift"``: the layers that have gone stalest, as many as ``cost_share`` pays for, which may
            be all; ``"all"``: all of them; ``"turn"``: one after the other; ``"alternate"``: every second
            layer at once, then the others (Appendix C.4).
        every: Steps from one time to the next.
        cost_share: With ``"drift"``: mirroring's FLOPs as a share of a training step's, on average; None:
            all layers, whatever it costs. FLOPs are counted as Appendix B does, two for each product that is
            added up (``feedbackpath.mirror.cost``). They follow from the sizes and uses of layers, so the
            same layers are mirrored on every machine. A step's are those of all devices together, so that
            training does not depend on their number. Where all devices fire the same noise, each of D
            devices spends up to D times that share of its own FLOPs.
        within_deg: With ``"drift"`` and orthogonal codes: mirror layers that have most likely moved by this
            much, whatever the share; None: the share holds, and small batches may leave B further behind.
            Independent noise moves B by more than W does, and keeps to the share.
        trigger_deg: With ``"drift"``: leave out layers that have most likely moved by less than this, judged
            by how far B moved when that was last looked at. W is never looked at.
    """

    layers: Literal["drift", "all", "turn", "alternate"] = "drift"
    every: int = 1
    cost_share: float | None = 0.03
    within_deg: float | None = 0.7
    trigger_deg: float = 0.0

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        _refuse_unknown_names(self)
        refuse_no_count("When: every", self.every)
        if self.cost_share is not None and not self.cost_share > 0:
            raise RuleError(f"When: cost_share must be above 0, not {self.cost_share}")
        if self.within_deg is not None and not self.within_deg > 0:
            raise RuleError(f"When: within_deg must be above 0, not {self.within_deg}")
        if not self.trigger_deg >= 0:
            raise RuleError(f"When: trigger_deg must be at least 0, not {self.trigger_deg}")


@dataclass(frozen=True)
class Mirror:
    """Settings of mirror mode.

    Args:
        noise: Name of a noise design: ``"orthogonal"`` codes, exact behind ReLUs with blocked biases; or
            independent noise, ``"gaussian"`` (the paper's), ``"uniform"``, ``"signs"``, ``"<name>-pairs"``.
        field: Independent noise drives convolutions by whole maps (``"map"``), as in the paper, or one
            receptive field at a time (``"receptive"``). Codes always do the latter.
        sigma: Standard deviation of the noise; None: 1, or 0.01 for codes in the calibrated reading: so weak
            that any smooth activation is linear to them.
        samples: Samples of independent noise a pass for each weight; None: as many as ``target_angle_deg``
            needs. Codes take as many as there are inputs, twice.
        target_angle_deg: Angle between B and W, in degrees, that sampling noise alone would leave; None: 8.
        reading: How covariance and decay enter, with d = ``forgetting``, eta = ``rate``, lambda = ``decay``:
            ``"calibrated"``: B <- (1 - d) B + d cov / (sigma^2 s), with s each neuron's own mean slope:
            settles at W; with codes d = 1;
            ``"inside"``: B <- B + eta (cov - lambda B), settles at sigma^2 s / lambda times W;
            ``"printed"``: B <- (1 - lambda) B + eta cov, as in Algorithm 1, settles at
            sigma^2 s eta / lambda times W: a tenth of W's size behind a ReLU, with the paper's numbers;
            ``"scaled"``: B <- B + eta cov, and then back to the norm that it had (synaptic scaling).
        forgetting: d, the share of B that a ``"calibrated"`` pass replaces, once the first passes have been
            averaged plainly (d = 1/n for pass n, until that falls to ``forgetting``).
        rate: eta_B of the paper, for the other readings.
        decay: lambda_WM of the paper, for ``"inside"`` and ``"printed"``.
        block_bias: Whether neurons close off their biases in mirror mode (equation 12).
        rates: How signals travel: ``"signed"`` numbers, rates about a ``"baseline"`` (equations 23, 24), or
            by cells in ``"push-pull"`` (Appendix C.2).
        baseline: beta, for rates about a baseline.
        baseline_known: Whether neurons know beta; else they take the mean of the rates that they see.
        across_devices: Where a job has D devices: ``"same"``, all fire the same noise, and nothing is sent;
            ``"averaged"``, each fires its own, and what they find is averaged by one all-reduce a layer, so
            that B learns from D times the samples. ``samples`` are then each device's, and the angle falls
            with the root of D; ``target_angle_deg`` is what all reach together, each with a share of the
            samples. B is the same on all, bit for bit, either way.
        when: When a rule mirrors which layers.
    """

    noise: str = "orthogonal"
    field: Literal["map", "receptive"] = "map"
    sigma: float | None = None
    samples: int | None = None
    target_angle_deg: float | None = None
    reading: Reading = "calibrated"
    forgetting: float = 0.1
    rate: float = 0.1
    decay: float = 0.5
    block_bias: bool = True
    rates: Literal["signed", "baseline", "push-pull"] = "signed"
    baseline: float = 1.0
    baseline_known: bool = True
    across_devices: Literal["same", "averaged"] = "same"
    when: When = dataclasses.field(default_factory=When)

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        if self.noise not in DESIGNS:
            raise RuleError(f"Mirror: noise={self.noise!r} is not one of {', '.join(DESIGNS)}")
        _refuse_unknown_names(self)
        for name in ("forgetting", "rate", "decay", "sigma", "target_angle_deg", "baseline"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise RuleError(f"Mirror: {name} must be above 0, not {value}")
        if self.target_angle_deg is not None and not self.target_angle_deg < 90:
            raise RuleError(f"Mirror: target_angle_deg must be below 90, not {self.target_angle_deg}")
        if self.share_replaced > 1:
            raise RuleError(
                f"Mirror: a pass would replace {self.share_replaced:g} of B; at most 1 makes sense"
            )
        if self.samples is not None and isinstance(self.design, OrthogonalCodes):
            raise RuleError(
                f"Mirror: samples are for independent noise; {self.noise!r} takes as many as there are inputs"
            )
        if self.across_devices == "averaged" and isinstance(self.design, OrthogonalCodes):
            raise RuleError(
                f"Mirror: across_devices='averaged' is for independent noise; {self.noise!r} codes are exact "
                "on one device, so leave it at 'same'"
            )
        if self.samples is not None:
            refuse_no_count("Mirror: samples", self.samples, least=2)

    @classmethod
    def paper(cls, **changes: Any) -> "Mirror":
        """Return the paper's literal settings (Appendix D.2), with changes.

        Gaussian maps of unit variance, eta 0.1, lambda 0.5, a pass through every layer after every
        minibatch, of 2048 samples: its batch size. Biases are not blocked. The decay is read as inside the
        rate, which settles near W's size behind ReLUs and at twice it where the answer is linear;
        ``reading="printed"`` settles at a tenth and a fifth of it.

        Example:
            >>> Mirror.paper().noise, Mirror.paper(samples=128).samples
            ('gaussian', 128)
        """
        literal = cls(
            noise="gaussian", sigma=1.0, samples=2048, reading="inside", block_bias=False, when=When("all")
        )
        return dataclasses.replace(literal, **changes)

    @property
    def design(self) -> Design | OrthogonalCodes:
        """The noise design that ``noise`` names."""
        return DESIGNS[self.noise]

    @property
    def is_exact(self) -> bool:
        """Whether one pass replaces the whole of B by what codes found."""
        return isinstance(self.design, OrthogonalCodes) and self.reading == "calibrated"

    @property
    def deviation(self) -> float:
        """The standard deviation of the noise."""
        if self.sigma is not None:
            return self.sigma
        return 0.01 if self.is_exact else 1.0

    @property
    def share_replaced(self) -> float:
        """The share of B that a pass replaces in this reading, once its memory is full."""
        if self.is_exact:
            return 1.0
        inside = self.rate * self.decay
        shares = {"calibrated": self.forgetting, "inside": inside, "printed": self.decay, "scaled": inside}
        return shares[self.reading]

    @property
    def memory_passes(self) -> int:
        """Passes of a first mirroring: B then has forgotten its beginning and is as good as it gets."""
        if self.is_exact:
            return 1
        if self.reading == "calibrated":
            return math.ceil(2.0 / self.forgetting) - 1
        return math.ceil(math.log(1000.0) / self.share_replaced)  # a thousandth of the random B is left

    def samples_for(self, fan_in: int, devices: int = 1) -> int:
        """Return the samples a pass that each device fires at neurons of ``fan_in`` inputs behind ReLUs.

        tan^2(angle) = spread * fan_in / N_eff with N_eff = N (2 - d) / d for a memory that forgets d a pass;
        but at least 512, for in a layer of few inputs the angle needs less than the gain does. N is shared
        among the devices whose noise is averaged.

        Example:
            >>> Mirror(noise="gaussian", target_angle_deg=8).samples_for(576)
            2097
            >>> Mirror(noise="gaussian", across_devices="averaged").samples_for(576, devices=4)
            525
        """
        angle = self.target_angle_deg or DEFAULT_ANGLE_DEG
        if isinstance(self.design, OrthogonalCodes):
            return self.design.samples_for(fan_in, angle)
        if self.samples is not None:
            return self.samples
        effective = self.design.samples_for(fan_in, angle)
        needed = max(MIN_SAMPLES, effective * self.share_replaced / (2.0 - self.share_replaced))
        return max(2, math.ceil(needed / devices))

    def total_samples_for(self, fan_in: int, devices: int = 1) -> int:
        """Return the samples a pass that B learns from: those of all devices whose noise is averaged."""
        return devices * self.samples_for(fan_in, devices)

    def expected_angle_deg(self, fan_in: int, spread: float = RELU_SPREAD, devices: int = 1) -> float:
        """Return the angle, in degrees, that sampling noise leaves when B's memory is full."""
        share = self.share_replaced
        effective = self.total_samples_for(fan_in, devices) * (2.0 - share) / share
        return self.design.expected_angle_deg(fan_in, math.ceil(effective), spread)


def refuse_no_count(what: str, value: object, least: int = 1) -> None:
    """Refuse what is no whole number of at least ``least``: it would do nothing, or something else.

    Raises:
        RuleError: Says ``what`` has to be one.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise RuleError(f"{what} must be a whole number, not {value!r}")
    if int(value) < least:
        raise RuleError(f"{what} must be at least {least}, not {value}")


def _refuse_unknown_names(settings: Any) -> None:
    """Refuse a value that is none of those that its field's ``Literal`` lists."""
    for name, hint in get_type_hints(type(settings)).items():
        known = get_args(hint)
        if known and all(isinstance(value, str) for value in known) and getattr(settings, name) not in known:
            kind, value = type(settings).__name__, getattr(settings, name)
            raise RuleError(f"{kind}: {name}={value!r} is not one of {', '.join(known)}")
