"""Two trainings that no machine at hand can do, on paper: what each rule would add to backprop there.

Assumed of both: an accelerator of 312 TFLOP/s at its peak in bfloat16, 1.5 TB/s of memory and 10 us a call;
traffic is hidden behind the passes, which makes backprop's step short and what is added to it large.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cost_model import (
    GAUSSIAN,
    OPTIMIZER_BYTES,
    PAPER_SAMPLES,
    Hardware,
    LayerSize,
    Storage,
    added_bytes,
    added_flops,
    added_seconds,
    appendix_b_flops,
    backprop_bytes,
    step_flops,
    unshared_bytes,
)
from layer_sizes import count_parameters, measure_layers

from feedbackpath.bench.workloads import find_workload
from feedbackpath.mirror.cost import PRODUCTS_STEP

ADDING = ("fa", "ss", "kp", "wm", GAUSSIAN)
PEAK_FLOPS, BANDWIDTH, CALL_SECONDS = 312e12, 1.5e12, 1e-5
GATHERED_BYTES = 2  # of a value in bfloat16, as sharded weights and gradients travel


@dataclass(frozen=True)
class Training:
    """A training to think about.

    Attributes:
        layers: The layers that get feedback weights.
        num_parameters: Of the network, without feedback weights.
        examples: Images or tokens a step, on all devices.
        devices: How many, each with its share of the examples.
        is_sharded: Whether parameters, gradients and optimizer state are split among the devices.
        optimizer: A key of ``OPTIMIZER_BYTES``.
        storage: Bytes kept for a parameter.
        hardware: One device.
        attention_flops: Of products between activities, for one example, forward and backward.
    """

    layers: tuple[LayerSize, ...]
    num_parameters: int
    examples: int
    devices: int
    is_sharded: bool
    optimizer: str
    storage: Storage
    hardware: Hardware
    attention_flops: float = 0.0

    @property
    def shards(self) -> int:
        """Into how many parts the weights are split."""
        return self.devices if self.is_sharded else 1

    @property
    def flops(self) -> float:
        """FLOPs of a device's step under backprop."""
        products = step_flops(self.layers, self.examples) + self.attention_flops * self.examples
        return products / self.devices

    @property
    def seconds(self) -> float:
        """Time of a step under backprop: its products, then its optimizer."""
        moved = OPTIMIZER_BYTES[self.optimizer] * self.num_parameters / self.shards
        return self.flops / self.hardware.flops + moved / self.hardware.bandwidth

    @property
    def memory(self) -> float:
        """Bytes that a device keeps under backprop, without activities."""
        return backprop_bytes(self.num_parameters, self.storage) / self.shards

    @property
    def traffic(self) -> float:
        """Bytes that a device sends a step: gradients around a ring; or sharded weights twice, and gradients.

        The second time it is B that is gathered, under a rule that has one.
        """
        others = (self.devices - 1) / self.devices
        if self.is_sharded:
            return 3.0 * GATHERED_BYTES * self.num_parameters * others
        return 2.0 * self.storage.gradient * self.num_parameters * others


@dataclass(frozen=True)
class Added:
    """What a rule adds to a device's step, as shares of backprop's; and bytes.

    Attributes:
        flops: Of products.
        paper_flops: As Appendix B counts them; 0 for rules that it does not speak of.
        seconds: Of time.
        memory: Of bytes kept.
        num_bytes: These bytes.
        traffic: Of bytes sent.
        unshared_traffic: Of bytes sent, if B's product were reduced for itself, or noise split among devices.
    """

    flops: float
    paper_flops: float
    seconds: float
    memory: float
    num_bytes: float
    traffic: float
    unshared_traffic: float


def add_rule(training: Training, rule: str) -> Added:
    """Return what a rule adds to a training."""
    layers, shards = training.layers, training.shards
    seconds = added_seconds(rule, layers, training.optimizer, training.hardware, shards)
    num_bytes = added_bytes(rule, layers, training.storage) / shards
    return Added(
        flops=added_flops(rule, layers) / shards / training.flops,
        paper_flops=_paper_flops(training, rule) / training.flops,
        seconds=seconds / training.seconds,
        memory=num_bytes / training.memory,
        num_bytes=num_bytes,
        traffic=0.0,
        unshared_traffic=_unshared_traffic(training, rule),
    )


def _paper_flops(training: Training, rule: str) -> float:
    """Return Appendix B's FLOPs of one device: its share of the examples, or of a mirror's samples."""
    if rule not in ("kp", GAUSSIAN):
        return 0.0
    return appendix_b_flops(rule, training.layers, training.examples, PAPER_SAMPLES) / training.devices


def _unshared_traffic(training: Training, rule: str) -> float:
    """Return the share of its traffic that a rule would add: each byte goes as W's gradient does."""
    of_all = unshared_bytes("kp", [LayerSize(training.num_parameters, 1)], training.storage)
    reduced = 1 / 3 if training.is_sharded else 1.0
    return reduced * unshared_bytes(rule, training.layers, training.storage) / of_all


def resnet50_on_32_devices() -> Training:
    """Return the paper's training: 2048 images of 224 x 224 a step (Appendix D.1), SGD with momentum.

    The accelerator reaches a fifth of its peak, as convolutions and BatchNorm do.
    """
    workload = find_workload("resnet50")
    return Training(
        layers=tuple(measure_layers(workload)),
        num_parameters=count_parameters(workload),
        examples=2048,
        devices=32,
        is_sharded=False,
        optimizer="sgd",
        storage=Storage(value=4, gradient=4, state=4),
        hardware=Hardware(0.2 * PEAK_FLOPS, BANDWIDTH, CALL_SECONDS),
    )


BLOCKS, WIDTH, HIDDEN, VOCABULARY, SEQUENCE = 32, 4096, 11008, 32000, 2048


def transformer_of_7_billion() -> Training:
    """Return a decoder of 32 blocks: width 4096, gated layers of 11008, 32000 tokens, sequences of 2048.

    2^22 tokens a step on 64 devices, AdamW, float32 parameters sharded and gathered in bfloat16. The
    accelerator reaches half of its peak.
    """
    layers = transformer_layers(BLOCKS, WIDTH, HIDDEN, VOCABULARY)
    norms_and_embedding = (2 * BLOCKS + 1) * WIDTH + VOCABULARY * WIDTH
    return Training(
        layers=tuple(layers),
        num_parameters=sum(layer.values for layer in layers) + norms_and_embedding,
        examples=2**22,
        devices=64,
        is_sharded=True,
        optimizer="adamw",
        storage=Storage(value=4, gradient=4, state=8),
        hardware=Hardware(0.5 * PEAK_FLOPS, BANDWIDTH, CALL_SECONDS),
        attention_flops=attention_flops(BLOCKS, WIDTH, SEQUENCE),
    )


def transformer_layers(blocks: int, width: int, hidden: int, vocabulary: int) -> list[LayerSize]:
    """Return the layers of a decoder with gated hidden layers: q, k, v, o, gate, up, down; and the head.

    Example:
        >>> len(transformer_layers(2, 8, 16, 100))
        15
    """
    attention = [LayerSize(width, width)] * 4
    feed_forward = [LayerSize(width, hidden)] * 2 + [LayerSize(hidden, width)]
    return (attention + feed_forward) * blocks + [LayerSize(width, vocabulary)]


def attention_flops(blocks: int, width: int, sequence: int) -> float:
    """Return the FLOPs of attention for one token: queries by keys, weights by values; twice that going back.

    Causal: a token sees half of the sequence on average.

    Example:
        >>> attention_flops(1, 8, 10)
        480.0
    """
    forward = 2 * 2.0 * width * sequence / 2
    return PRODUCTS_STEP * forward * blocks


def add_every_rule(training: Training, rules: Sequence[str] = ADDING) -> dict[str, Added]:
    """Return what each rule adds to a training."""
    return {rule: add_rule(training, rule) for rule in rules}
