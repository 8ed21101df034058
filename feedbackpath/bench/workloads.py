"""What is timed: a whole training step of a network on one minibatch of samples, plain or untied."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feedbackpath.errors import ConfigError
from feedbackpath.models import MODELS, READ_TOKENS, build_model, find_builder
from feedbackpath.path import FeedbackPath, untie
from feedbackpath.rules import Rule

NUM_LABELLINGS = 32
PLAIN = "plain"
"""Name of the network that was never untied: what all ratios are to."""


@dataclass(frozen=True)
class Workload:
    """A network and its minibatch.

    Attributes:
        model: A key of `MODELS`.
        sample_shape: ``(C, H, W)``.
        num_classes: Number of outputs.
        batch_size: Samples a step on a CPU.
        cuda_batch_size: Samples a step on a GPU.
    """

    model: str
    sample_shape: tuple[int, int, int]
    num_classes: int
    batch_size: int
    cuda_batch_size: int = 256

    def build(self) -> nn.Module:
        """Return the network with fresh weights."""
        return build_model(self.model, sample_shape=self.sample_shape, num_classes=self.num_classes)


SMALL_IMAGE, IMAGENET_IMAGE = (1, 28, 28), (3, 224, 224)
WORKLOADS = {
    workload.model: workload
    for workload in (
        Workload("mlp", SMALL_IMAGE, 10, 256),
        Workload("lenet", SMALL_IMAGE, 10, 128),
        Workload("transformer", SMALL_IMAGE, 10, 128),
        Workload("resnet8", (1, 24, 24), 200, 128),
        Workload("resnet20", (3, 32, 32), 10, 128),
        Workload("resnet56", (3, 32, 32), 10, 128),
        Workload("resnet18", IMAGENET_IMAGE, 1000, 16),
        Workload("resnet50", IMAGENET_IMAGE, 1000, 8),
    )
}


def find_workload(model: str) -> Workload:
    """Return the workload of a model; networks of other depths and widths take that of their family.

    Raises:
        ConfigError: There is none.

    Example:
        >>> find_workload("resnet8x4").sample_shape, find_workload("resnet32").sample_shape
        ((1, 24, 24), (3, 32, 32))
    """
    if model in WORKLOADS:
        return WORKLOADS[model]
    if model in READ_TOKENS:
        raise ConfigError(
            f"{model} reads tokens, but bench has only images; choose from {', '.join(WORKLOADS)}"
        )
    try:
        find_builder(model)
    except ValueError as error:
        raise ConfigError(f"no model {model!r}; there are {', '.join(MODELS)}") from error
    return replace(WORKLOADS.get(model.partition("x")[0], WORKLOADS["resnet20"]), model=model)


@dataclass(frozen=True)
class Arithmetic:
    """How a step computes.

    Attributes:
        device: torch device.
        is_bf16: Whether the forward pass runs under autocast to bfloat16.
        is_channels_last: Memory format of images and convolutions.
        is_compiled: Whether the network runs under ``torch.compile``, with no graph break allowed.
    """

    device: str = "cpu"
    is_bf16: bool = False
    is_channels_last: bool = True
    is_compiled: bool = False

    @property
    def memory_format(self) -> torch.memory_format:
        """The memory format of images."""
        return torch.channels_last if self.is_channels_last else torch.contiguous_format


def make_optimizer(model: nn.Module, *, is_fused: bool = False) -> torch.optim.SGD:
    """Return the optimizer of every step that is timed, by PyTorch's default loop or its fused kernels."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD(
        learned, lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=is_fused or None
    )


class TrainingStep:
    """One network, its optimizer and its minibatch; calling it does one step of SGD with momentum.

    Args:
        workload: The network and the size of the minibatch.
        rule: The rule that it is untied by; None: it stays a plain PyTorch model.
        batch_size: Samples a step.
        arithmetic: How it computes.
        num_labellings: Labels of the minibatch, taken in turns. One alone W soon knows, and comes to rest: a
            mirror would look better than it is in training.

    Attributes:
        forward: What the minibatch is sent through: the model, or what wraps it.
    """

    def __init__(
        self,
        workload: Workload,
        rule: str | Rule | None,
        batch_size: int,
        arithmetic: Arithmetic,
        num_labellings: int = 1,
    ) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = workload.build().to(arithmetic.device)
        if arithmetic.is_channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.path: FeedbackPath | None = None if rule is None else untie(self.model, rule)
        self.forward: Callable[[Tensor], Tensor] = (
            torch.compile(self.model, fullgraph=True) if arithmetic.is_compiled else self.model
        )
        self.arithmetic = arithmetic
        shape = (batch_size, *workload.sample_shape)
        self.x = torch.randn(shape).to(arithmetic.device, memory_format=arithmetic.memory_format)
        self.labels = torch.randint(workload.num_classes, (num_labellings, batch_size)).to(arithmetic.device)
        self.num_steps = 0
        if self.path is not None and any(rule.send_back.is_broadcast for rule, _ in self.path.groups):
            self.model(self.x)  # B of such a rule is made then
        self.optimizer = make_optimizer(self.model)

    def loss(self) -> Tensor:
        """Run the network forward."""
        device = torch.device(self.arithmetic.device).type
        with torch.autocast(device, torch.bfloat16, enabled=self.arithmetic.is_bf16):
            return F.cross_entropy(self.forward(self.x), self.labels[self.num_steps % len(self.labels)])

    def __call__(self) -> None:
        """Do a step."""
        self.optimizer.zero_grad()
        self.loss().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if self.path is not None:
            self.path.step()
        self.num_steps += 1


def make_steps(
    workload: Workload, rules: Mapping[str, str | Rule], batch_size: int, arithmetic: Arithmetic
) -> dict[str, TrainingStep]:
    """Return a step of the plain network, and one for each rule, on labels that change."""
    every: dict[str, Any] = {PLAIN: None, **rules}
    return {
        name: TrainingStep(workload, rule, batch_size, arithmetic, NUM_LABELLINGS)
        for name, rule in every.items()
    }
