"""Read-out: how converters and noise change the signals that enter and leave an array.

An array is read by driving its inputs and sensing its outputs. With Q a converter's rounding::

    y = Q_out((1 + gain_j) (1 + multiplicative xi) y0 + (noise xi' + offset_j) rms(y0)),    y0 = W Q_in(x)

In the backward pass the same happens to delta on its way through the array of B. A converter's own gradient
is taken for 1, so that nothing but these signals changes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from feedbackpath.core.layers import UntiedWeight
from feedbackpath.errors import ChipError
from feedbackpath.mirror import fields

if TYPE_CHECKING:
    from feedbackpath.hardware.chip import Chip

SIGNALS = ("forward", "backward", "update", "mirror")


@dataclass(frozen=True)
class Read:
    """How one array is read, or one signal is received.

    Args:
        bits: Bits of the converters, in and out; None: no rounding.
        out_bits: Bits of the converters of the outputs, if they differ.
        in_range: Largest input, in the signal's own units; None: the largest of each call.
        out_range: Largest output, likewise.
        noise: Standard deviation of noise added to the outputs, as a share of their root mean square.
        multiplicative: Standard deviation of noise in proportion to each output.
        gain: Spread of a constant gain error from neuron to neuron.
        offset: Spread of a constant offset from neuron to neuron, as a share of the root mean square.

    Example:
        >>> import feedbackpath as fp, torch
        >>> fp.Read(bits=2).quantized(torch.tensor([-1.0, 0.2, 0.7, 1.0]), None, 2)
        tensor([-1.,  0.,  1.,  1.])
    """

    bits: int | None = None
    out_bits: int | None = None
    in_range: float | None = None
    out_range: float | None = None
    noise: float = 0.0
    multiplicative: float = 0.0
    gain: float = 0.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        """Refuse converters and noise that cannot be."""
        for name in ("bits", "out_bits"):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and 2 <= value <= 32):
                raise ChipError(f"Read: {name} must be a whole number from 2 to 32, not {value!r}")
        for name in ("noise", "multiplicative", "gain", "offset"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ChipError(f"Read: {name} must be 0 or more, not {getattr(self, name)}")
        for name in ("in_range", "out_range"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise ChipError(f"Read: {name} must be above 0, not {value}")

    @property
    def is_ideal(self) -> bool:
        """Whether a signal passes as it is."""
        return self == Read()

    @staticmethod
    def quantized(signal: Tensor, largest: float | None, bits: int | None) -> Tensor:
        """Round to the ``2^bits - 1`` levels of a converter that is symmetric about 0."""
        if bits is None:
            return signal if largest is None else signal.clamp(-largest, largest)
        levels = 2 ** (bits - 1) - 1
        if largest is None:
            top = torch.stack(in_memory_order(signal).aminmax()).abs().amax()
        else:
            top = signal.new_tensor(largest)
        at_least_float32 = torch.promote_types(signal.dtype, torch.float32)
        step = (top.to(at_least_float32) / levels).clamp_min_(1e-30)
        rounded: Tensor = (signal * step.reciprocal()).round_().clamp_(-levels, levels)
        return rounded.mul_(step)

    def enter(self, signal: Tensor) -> Tensor:
        """Return the inputs as the array gets them."""
        return self.quantized(signal, self.in_range, self.bits)

    def leave(self, signal: Tensor, neurons: Tensor | None, generator: torch.Generator) -> Tensor:
        """Return the outputs as they are sensed.

        Args:
            signal: What the array returns.
            neurons: Gain and offset of each neuron, ``[2, ...]``, in a shape that broadcasts; None: none.
            generator: Random numbers of the noise.
        """
        read = signal
        if self.multiplicative:
            read = torch.addcmul(read, read, normal_like(signal, generator), value=self.multiplicative)
        if neurons is not None:
            read = read * (1.0 + self.gain * neurons[0])
        if self.noise or neurons is not None:
            rms = torch.linalg.vector_norm(signal) / math.sqrt(max(1, signal.numel()))
            if self.noise:
                drawn = normal_like(signal, generator)
                read = torch.addcmul(read, drawn, rms * self.noise)
            if neurons is not None:
                read = read + rms * self.offset * neurons[1]
        return self.quantized(read, self.out_range, self.out_bits or self.bits)


def reads_of(read: Read | Mapping[str, Read] | None) -> dict[str, Read]:
    """Return how each signal is read."""
    if read is None or isinstance(read, Read):
        one = read or Read()
        return {"forward": one, "backward": one, "update": Read(), "mirror": one}
    unknown = [repr(name) for name in read if name not in SIGNALS]
    if unknown:
        raise ChipError(f"Chip: read= has {', '.join(unknown)}; the signals are {', '.join(SIGNALS)}")
    given = {"mirror": read.get("forward", Read())} | dict(read)
    return {name: given.get(name, Read()) for name in SIGNALS}


def can_read(weight: UntiedWeight) -> bool:
    """Whether the converters of a weight's array stand about its layer: linear layers and convolutions."""
    return fields.runs_itself(weight) and len(weight.layer.untied.weights) == 1


def is_dense(signal: Tensor) -> bool:
    """Whether a tensor fills its memory without gaps, in whatever order."""
    last = sum((size - 1) * stride for size, stride in zip(signal.shape, signal.stride(), strict=True))
    return signal.numel() == last + 1 and 0 not in signal.stride()


def in_memory_order(signal: Tensor) -> Tensor:
    """View a tensor as one row, in the order of its memory: torch is slow on other orders."""
    if is_dense(signal):
        return signal.as_strided((signal.numel(),), (1,))
    return signal.reshape(-1)


def normal_like(signal: Tensor, generator: torch.Generator) -> Tensor:
    """Draw N(0, 1) in the shape and memory format of a signal."""
    return laid_out_as(signal, signal.new_empty(signal.numel()).normal_(generator=generator))


def laid_out_as(signal: Tensor, row: Tensor) -> Tensor:
    """View a row, in the order of a signal's memory, as that signal."""
    return row.as_strided(signal.shape, signal.stride()) if is_dense(signal) else row.view(signal.shape)


class Port:
    """The converters about one layer's arrays: hooks round its forward pass.

    Args:
        chip: The chip.
        weight: The layer's weight.
    """

    def __init__(self, chip: "Chip", weight: UntiedWeight) -> None:
        self.weight = weight
        self._chip: Chip | None = chip
        self._neurons: dict[str, Tensor | None] = {}
        self._handles = [
            weight.layer.register_forward_pre_hook(self._enter, with_kwargs=True),
            weight.layer.register_forward_hook(self._leave, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    @property
    def chip(self) -> "Chip":
        """The chip."""
        assert self._chip is not None
        return self._chip

    @chip.setter
    def chip(self, chip: "Chip") -> None:
        self._chip = chip

    def __getstate__(self) -> dict[str, Any]:
        """Let a copy of a layer be read ideally, unless its chip is copied along."""
        return {**self.__dict__, "_chip": None}

    @property
    def _is_off(self) -> bool:
        return self._chip is None or bool(self.weight.layer.untied.context.is_measuring)

    def _forward_read(self) -> Read:
        return self.chip.reads["mirror" if self.chip.is_mirroring else "forward"]

    def _enter(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._is_off:
            return None
        if args:
            return (_In.apply(args[0], self), *args[1:]), kwargs  # type: ignore[no-untyped-call]
        return args, kwargs | {"input": _In.apply(kwargs["input"], self)}  # type: ignore[no-untyped-call]

    def _leave(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        if self._is_off:
            return None
        x = args[0] if args else kwargs["input"]
        weight = self.weight
        b = weight.feedback if weight.has_feedback and layer.untied.send_back.is_local else None
        return _Out.apply(output, weight.weight, b, x.detach(), self)  # type: ignore[no-untyped-call]

    def forward_in(self, x: Tensor) -> Tensor:
        """Convert the inputs of the forward array."""
        return self._forward_read().enter(x)

    def forward_out(self, y: Tensor) -> Tensor:
        """Sense the outputs of the forward array."""
        read = self._forward_read()
        purpose = "train" if self.weight.layer.training or self.chip.is_mirroring else "eval"
        return read.leave(y, self._errors(read, y, "forward"), self.chip.generator(purpose, y.device))

    def backward_in(self, delta: Tensor) -> Tensor:
        """Convert the error that enters the feedback array."""
        return self.chip.reads["backward"].enter(delta)

    def backward_out(self, sent: Tensor) -> Tensor:
        """Sense the error that leaves the feedback array."""
        read = self.chip.reads["backward"]
        errors = self._errors(read, sent, "backward")
        return read.leave(sent, errors, self.chip.generator("train", sent.device))

    def update(self, x: Tensor, delta: Tensor, asks_b: bool) -> tuple[Tensor | None, Tensor | None]:
        """Take up the two signals that are multiplied, for each array apart.

        Returns what their products differ by from that of the signals as they are; None: by nothing.
        """
        read, weight = self.chip.reads["update"], self.weight
        generator = self.chip.generator("train", x.device)
        extra: list[Tensor | None] = [None, None]
        for number, side in enumerate(("forward", "feedback") if asks_b else ("forward",)):
            signals = x, delta
            if not read.is_ideal:
                signals = tuple(read.leave(read.enter(s), None, generator) for s in signals)  # type: ignore[assignment]
                extra[number] = product(weight, *signals) - product(weight, x, delta)
            self.chip.take_signals(weight, side, *signals)
        gradients = weight.layer.untied.gradients_of(weight)
        if gradients is not None and extra[0] is not None:
            extra[0] = gradients(extra[0])[0]
            extra[1] = gradients(extra[1])[1] if extra[1] is not None else None
        return extra[0], extra[1]

    def _errors(self, read: Read, signal: Tensor, side: str) -> Tensor | None:
        """Return gain and offset errors of the neurons that a signal comes from."""
        if not (read.gain or read.offset):
            return None
        kernel = self.weight.weight.dim() - 2 if fields.is_convolution(self.weight) else 0
        size = signal.shape[-1 - kernel]
        known = self._neurons.get(side)
        if known is None or known.shape[1] != size or known.device != signal.device:
            generator = self.chip.fixed(f"{side} neurons of {self.weight.name}", signal.device)
            known = torch.empty(2, size, device=signal.device).normal_(generator=generator)
            self._neurons[side] = known
        return known.to(signal.dtype).view(2, size, *(1,) * kernel)


def product(weight: UntiedWeight, x: Tensor, delta: Tensor) -> Tensor:
    """Return ``delta x^T``, summed over samples and positions, laid out as W."""
    layer = weight.layer
    if fields.is_convolution(weight):
        padded, padding = fields.pad_input(layer, fields.pad_as_layer(layer, x))
        return fields.conv_products(fields.geometry_of(layer, padding), weight.weight.detach(), padded, delta)
    return delta.flatten(0, -2).t() @ x.flatten(0, -2)


class _In(torch.autograd.Function):
    """Convert the input of the forward array; sense what comes out of the feedback array."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, port: Port) -> Tensor:
        ctx.port = port
        read = port.forward_in(x)
        return x.view_as(x) if read is x else read

    @staticmethod
    def backward(ctx: Any, *sent: Tensor) -> Any:
        return ctx.port.backward_out(sent[0]), None


class _Out(torch.autograd.Function):
    """Sense the output of the forward array; convert the error that enters the feedback array."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, w: Tensor, b: Tensor | None, x: Tensor, port: Port) -> Tensor:
        ctx.port = port
        ctx.save_for_backward(x if port.chip.takes_signals else None)
        read = port.forward_out(y)
        return y.clone() if read is y else read  # not a view: activations may work in place

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> Any:
        delta = ctx.port.backward_in(deltas[0])
        (x,) = ctx.saved_tensors
        _, asks_w, asks_b, *_ = ctx.needs_input_grad
        for_w = for_b = None
        if x is not None and (asks_w or asks_b):
            for_w, for_b = ctx.port.update(x, delta, asks_b)
        return delta, for_w if asks_w else None, for_b, None, None


class _ConvertError(torch.autograd.Function):
    """Convert the error at the model's output, which a rule sends to every layer at once."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, chip: "Chip") -> Tensor:
        ctx.chip = chip
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> Any:
        return ctx.chip.reads["backward"].enter(errors[0]), None


class OutputPort:
    """The converter of the error at a model's output, where rules send that to every layer.

    Args:
        chip: The chip.
        model: The model.
    """

    def __init__(self, chip: "Chip", model: nn.Module) -> None:
        self.chip: Chip | None = chip
        self._handle = model.register_forward_hook(self._convert)

    def remove(self) -> None:
        """Take the hook off."""
        self._handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        """Let a copy of the model be read ideally, unless its chip is copied along."""
        return {**self.__dict__, "chip": None}

    def _convert(self, model: Any, args: Any, output: Any) -> Any:
        is_off = self.chip is None or model.untied.below[0].layer.untied.context.is_measuring
        if is_off or not isinstance(output, Tensor):
            return None
        return _ConvertError.apply(output, self.chip)  # type: ignore[no-untyped-call]
