"""A cost model on paper: FLOPs, memory, traffic and time that a rule adds to backprop, by layer sizes alone.

Akrout et al. 2019, Appendix B, counts, with n_l inputs, n_{l+1} outputs and n = min(n_l, n_{l+1})::

    Kolen-Pollack    n + 4 n_l n_{l+1}                      FLOPs for each training example
    weight mirror    n + 4 n_l n_{l+1} + 2 n_l n_{l+1}      FLOPs for each sample of noise

Differs from the paper: here W and B share one product, so that Kolen-Pollack adds no product at all, and the
update's own FLOPs come once a step, in the optimizer, and not once an example. A mirror's decay and update
come once a pass too, which leaves two products a sample; and orthogonal codes that inputs fire two at a time
take 6 FLOPs for each value of W, none of them in a matrix product.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from feedbackpath.mirror.cost import PRODUCTS_STEP
from feedbackpath.mirror.settings import Mirror

GAUSSIAN = "wm, Gaussian"
"""The rule that fires the paper's independent noise; ``wm`` is today's ``wm-exact`` here."""
LEARNED = ("kp", "mirror-kp")
PAPER_SAMPLES = Mirror.paper().samples or 0  # Appendix D.2
PAIR = 2  # inputs that fired codes together when the ratios were measured
COST_SHARE = 0.03  # of a step's FLOPs, that a mirror took by default then

# Bytes that operators read and write for one float32 value, and their calls for one weight; tests count them.
SIGN_BYTES = 12  # W and sizes in, B out
CODE_BYTES, CODE_CALLS = 16, 2  # of pairs; on a CPU, of each chunk of a large W
NOISE_BYTES, NOISE_CALLS = 60, 19  # for one sample at one channel, in or out; counted at an earlier version
OPTIMIZER_BYTES = {"sgd": 56, "adamw": 84}  # PyTorch's own, with momentum; not its fused kernels


@dataclass(frozen=True)
class LayerSize:
    """What a layer's cost depends on.

    Attributes:
        inputs: n_l, of one neuron: for a convolution, the values in its receptive field.
        outputs: n_{l+1}, output channels.
        uses: How often one training example uses each value of W: positions, rows, tokens.
        kernel: Positions of a convolution's kernel; 1 elsewhere.
        sends_back: Whether errors go further back: not from a first layer.
        is_conv: Whether it is a convolution.
    """

    inputs: int
    outputs: int
    uses: float = 1.0
    kernel: int = 1
    sends_back: bool = True
    is_conv: bool = False

    @property
    def values(self) -> int:
        """Values of W, and of B."""
        return self.inputs * self.outputs

    @property
    def channels(self) -> int:
        """Channels in and out."""
        return self.inputs // self.kernel + self.outputs


def total_values(layers: Iterable[LayerSize]) -> int:
    """Return the values of all feedback weights.

    Example:
        >>> total_values([LayerSize(3, 4), LayerSize(4, 2)])
        20
    """
    return sum(layer.values for layer in layers)


def step_flops(layers: Iterable[LayerSize], examples: int) -> float:
    """Return the FLOPs of a training step's products, under any rule: 2 values uses for each of three.

    Example:
        >>> step_flops([LayerSize(3, 4, sends_back=False), LayerSize(4, 2)], examples=10)
        960.0
    """
    return sum(2.0 * layer.values * layer.uses * examples * (2 + layer.sends_back) for layer in layers)


def added_flops(rule: str, layers: Iterable[LayerSize]) -> float:
    """Return the FLOPs of products that a rule adds to a step: those of a pass of independent noise.

    Example:
        >>> [added_flops(rule, [LayerSize(32, 10)]) for rule in ("fa", "kp", "wm", GAUSSIAN)]
        [0.0, 0.0, 0.0, 2621440.0]
    """
    samples = PAPER_SAMPLES if rule == GAUSSIAN else 0
    return sum(4.0 * layer.values * samples for layer in layers)


def appendix_b_flops(rule: str, layers: Iterable[LayerSize], examples: int, samples: int) -> float:
    """Return what Appendix B counts, to the letter, for the feedback weights of one step.

    Args:
        rule: ``"kp"``, or a mirror.
        layers: The layers; a shared weight's update is counted at each of its uses.
        examples: Training examples of the step.
        samples: Noise samples of the pass after it.

    Example:
        >>> layers = [LayerSize(3, 4)]
        >>> appendix_b_flops("kp", layers, 2, 10), appendix_b_flops("wm", layers, 2, 10)
        (102.0, 750.0)
    """
    if rule in LEARNED:
        return sum(_update_flops(layer) * layer.uses * examples for layer in layers)
    return sum((_update_flops(layer) + 2.0 * layer.values) * samples for layer in layers)


def _update_flops(layer: LayerSize) -> float:
    return min(layer.inputs, layer.outputs) + 4.0 * layer.values


@dataclass(frozen=True)
class Storage:
    """Bytes that are kept for one value of a parameter, by its use.

    Attributes:
        value: The parameter.
        gradient: Its gradient.
        state: What the optimizer remembers: SGD's momentum, Adam's two moments.
    """

    value: int = 4
    gradient: int = 4
    state: int = 4


def backprop_bytes(num_parameters: int, storage: Storage) -> int:
    """Return the bytes of parameters, gradients and optimizer state; activations are not among them."""
    return num_parameters * (storage.value + storage.gradient + storage.state)


def added_bytes(rule: str, layers: Iterable[LayerSize], storage: Storage) -> int:
    """Return the bytes that stay in memory for the feedback weights: B, and under Kolen-Pollack its state.

    Example:
        >>> [added_bytes(rule, [LayerSize(3, 4)], Storage()) for rule in ("bp", "fa", "kp", "wm")]
        [0, 48, 96, 48]
    """
    if rule == "bp":
        return 0
    return total_values(layers) * (storage.value + storage.state * (rule in LEARNED))


def reduced_bytes(num_parameters: int, storage: Storage) -> int:
    """Return the bytes that a device puts into all-reduces in a step, under any rule.

    Every device holds the whole model. Kolen-Pollack's product is reduced once, for W and B; mirrors draw
    the same noise everywhere.
    """
    return num_parameters * storage.gradient


def unshared_bytes(rule: str, layers: Iterable[LayerSize], storage: Storage) -> int:
    """Return the bytes that a rule would add to ``reduced_bytes``, were nothing shared.

    Kolen-Pollack would reduce B's gradient too; a mirror whose noise is split among devices, its covariance.

    Example:
        >>> [unshared_bytes(rule, [LayerSize(3, 4)], Storage()) for rule in ("fa", "kp", GAUSSIAN)]
        [0, 48, 48]
    """
    sends = rule in (*LEARNED, GAUSSIAN)
    return total_values(layers) * storage.gradient * sends


def moved_bytes(rule: str, layers: Sequence[LayerSize], optimizer: str) -> float:
    """Return the bytes that a step reads and writes for the feedback weights, beside the passes themselves.

    Args:
        rule: The rule; ``GAUSSIAN`` with the paper's number of samples.
        layers: The layers.
        optimizer: A key of ``OPTIMIZER_BYTES``.

    Example:
        >>> [moved_bytes(rule, [LayerSize(32, 10)], "sgd") for rule in ("fa", "ss", "kp", "wm")]
        [0.0, 3840.0, 17920.0, 5120.0]
    """
    if rule == GAUSSIAN:
        return float(NOISE_BYTES * PAPER_SAMPLES * sum(layer.channels for layer in layers))
    by_value = {"ss": SIGN_BYTES, "wm": CODE_BYTES, **dict.fromkeys(LEARNED, OPTIMIZER_BYTES[optimizer])}
    return float(by_value.get(rule, 0) * total_values(layers))


def calls(rule: str, layers: Sequence[LayerSize]) -> int:
    """Return the calls of operators that a step makes for the feedback weights, where each waits its turn.

    Example:
        >>> [calls(rule, [LayerSize(32, 10)] * 3) for rule in ("fa", "ss", "kp", "wm")]
        [0, 3, 0, 6]
    """
    return {"ss": 1, "wm": CODE_CALLS, GAUSSIAN: NOISE_CALLS}.get(rule, 0) * len(layers)


@dataclass(frozen=True)
class Hardware:
    """What one device does in a second.

    Attributes:
        flops: Of products, as a training step reaches them.
        bandwidth: Bytes read from memory or written to it.
        call_seconds: That one operator takes, however small.
    """

    flops: float
    bandwidth: float
    call_seconds: float


def added_seconds(
    rule: str, layers: Sequence[LayerSize], optimizer: str, hardware: Hardware, shards: int = 1
) -> float:
    """Return the seconds that a rule adds to a device's step: FLOPs, bytes and calls one after the other.

    Args:
        rule: The rule; ``GAUSSIAN`` with the paper's number of samples.
        layers: The layers.
        optimizer: A key of ``OPTIMIZER_BYTES``.
        hardware: The device.
        shards: Devices that share the feedback weights' work, each its own rows of them.

    Example:
        >>> hardware = Hardware(flops=1e12, bandwidth=1e12, call_seconds=1e-6)
        >>> round(added_seconds("ss", [LayerSize(1000, 1000)], "sgd", hardware), 9)
        1.3e-05
    """
    by_size = (
        added_flops(rule, layers) / hardware.flops + moved_bytes(rule, layers, optimizer) / hardware.bandwidth
    )
    return by_size / shards + calls(rule, layers) * hardware.call_seconds


@dataclass(frozen=True)
class Calibration:
    """Seconds that a rule was measured to add on one machine: ``(for a weight, for a value)``.

    Attributes:
        dense: By rule, for dense layers.
        convolution: By rule, for convolutions.
    """

    dense: Mapping[str, tuple[float, float]]
    convolution: Mapping[str, tuple[float, float]]


def predict_ratio(
    rule: str, layers: Sequence[LayerSize], examples: int, plain_seconds: float, calibration: Calibration
) -> float:
    """Return a step's time over plain PyTorch's, from what a weight and a value cost on this machine.

    A mirror is spread over steps where mirroring all would take more than its share of a step's FLOPs.
    """
    added = _added_by(calibration, rule, layers)
    if rule == "wm":
        of_passes = _added_by(calibration, "fa", layers)
        added = of_passes + mirrored_share(layers, examples) * (added - of_passes)
    return 1.0 + added / plain_seconds


def _added_by(calibration: Calibration, rule: str, layers: Iterable[LayerSize]) -> float:
    added = 0.0
    for layer in layers:
        rates = calibration.convolution if layer.is_conv else calibration.dense
        by_weight, by_value = rates[rule]
        added += by_weight + by_value * layer.values
    return added


def mirrored_share(layers: Sequence[LayerSize], examples: int) -> float:
    """Return the part of the layers that a mirror's schedule pays for after a step, on average.

    It is ``share 6 V u N / (4 V 2)`` for layers of V values, codes of two and the default share of FLOPs.
    """
    mirror = sum(2 * 2.0 * PAIR * layer.values for layer in layers)
    step = sum(PRODUCTS_STEP * 2.0 * layer.values * layer.uses * examples for layer in layers)
    return min(1.0, COST_SHARE * step / mirror)
