"""Feedback layers: a plain torch layer plus ``feedback``, the weight that its backward pass goes through.

An untied layer *is* the torch layer it was, its class exchanged in place: parameters, hooks, buffers,
sharing and identity stay. ``feedback`` is None where the rule is backprop: B is W itself then, and the
layer runs PyTorch's own code.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch.nn.functional as F
from torch import Tensor, nn

from feedbackpath import ops

Tap = Callable[[str, Tensor, Tensor, slice], None]


class FeedbackLayer(nn.Module):
    """What every untied layer has in common; mixed into the torch layer that it extends.

    Attributes:
        plain_type: The torch class that the layer had and gets back.
        tap: While signals are measured, called with (feedback name, input, output, the rows of the weight
            that they belong to).
    """

    plain_type: ClassVar[type[nn.Module]]
    tap: Tap | None = None

    def untied_names(self) -> dict[str, str]:
        """Return the name of each weight that goes forward with the name of its feedback weight."""
        return {"weight": "feedback"}

    def _tapped(self, feedback_name: str, x: Tensor, output: Tensor, rows: slice = slice(None)) -> Tensor:
        if self.tap is not None:
            self.tap(feedback_name, x, output, rows)
        return output

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load as torch does; a plain layer's state has no feedback weight, and B then stays as it is."""
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for name in self.untied_names().values():
            if prefix + name in missing_keys:
                missing_keys.remove(prefix + name)


@contextmanager
def tapped(taps: Mapping[FeedbackLayer, Tap]) -> Iterator[None]:
    """Let layers show their signals to taps for a while, and then to those that they had before."""
    before = {layer: layer.tap for layer in taps}
    try:
        for layer, tap in taps.items():
            layer.tap = tap
        yield
    finally:
        for layer, tap_before in before.items():
            layer.tap = tap_before


class FeedbackLinear(FeedbackLayer, nn.Linear):
    """``nn.Linear`` with a feedback weight ``[out_features, in_features]``."""

    plain_type = nn.Linear
    feedback: nn.Parameter | None

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ weight.T + bias``, shape ``[..., out_features]``."""
        feedback = self.feedback
        if feedback is None:
            return self._tapped("feedback", input, super().forward(input))
        output = ops.linear(input, self.weight, feedback, self.bias)
        return self._tapped("feedback", input, output)


class _FeedbackConv(FeedbackLayer, nn.modules.conv._ConvNd):
    """What the six convolutions share: unbatched input and the one call to the untied operation."""

    feedback: nn.Parameter | None

    def _untied(
        self, x: Tensor, feedback: Tensor, padding: tuple[int, ...], output_padding: Sequence[int]
    ) -> Tensor:
        geometry = ops.ConvGeometry(
            self.stride,
            padding,
            self.dilation,
            self.transposed,
            tuple(output_padding),
            self.groups,
        )
        is_batched = x.dim() == len(self.kernel_size) + 2
        batch = x if is_batched else x.unsqueeze(0)
        output = ops.convolution(batch, self.weight, feedback, self.bias, geometry)
        return output if is_batched else output.squeeze(0)


class _ForwardConv(_FeedbackConv):
    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution ``[N, C_out, ...]`` of ``input`` ``[N, C_in, ...]``."""
        if self.feedback is None:
            return self._tapped("feedback", input, super().forward(input))
        x, padding = self._pad(input)
        output = self._untied(x, self.feedback, padding, (0,) * len(padding))
        return self._tapped("feedback", input, output)

    def _pad(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Do the padding that a convolution cannot do by itself; return what is left for it to do."""
        no_padding = (0,) * len(self.kernel_size)
        if self.padding_mode != "zeros":
            return F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), no_padding
        if self.padding == "valid":
            return x, no_padding
        if self.padding != "same":
            return x, cast(tuple[int, ...], self.padding)
        totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        # As torch does: an odd total puts its one extra zero at the end, dimensions listed last first.
        extra = [side for total in reversed(totals) for side in (0, total % 2)]
        return F.pad(x, extra) if any(extra) else x, tuple(total // 2 for total in totals)


class FeedbackConv1d(_ForwardConv, nn.Conv1d):
    """``nn.Conv1d`` with a feedback weight ``[C_out, C_in / groups, K]``."""

    plain_type = nn.Conv1d


class FeedbackConv2d(_ForwardConv, nn.Conv2d):
    """``nn.Conv2d`` with a feedback weight ``[C_out, C_in / groups, K_h, K_w]``."""

    plain_type = nn.Conv2d


class FeedbackConv3d(_ForwardConv, nn.Conv3d):
    """``nn.Conv3d`` with a feedback weight ``[C_out, C_in / groups, K_d, K_h, K_w]``."""

    plain_type = nn.Conv3d


class _TransposedConv(_FeedbackConv, nn.modules.conv._ConvTransposeNd):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return the transposed convolution ``[N, C_out, ...]`` of ``input`` ``[N, C_in, ...]``."""
        if self.feedback is None:
            return self._tapped("feedback", input, super().forward(input, output_size))
        padding = cast(tuple[int, ...], self.padding)
        output_padding = self._output_padding(
            input,
            output_size,
            list(self.stride),
            list(padding),
            list(self.kernel_size),
            len(self.kernel_size),
            list(self.dilation),
        )
        return self._tapped("feedback", input, self._untied(input, self.feedback, padding, output_padding))


class FeedbackConvTranspose1d(_TransposedConv, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with a feedback weight ``[C_in, C_out / groups, K]``."""

    plain_type = nn.ConvTranspose1d


class FeedbackConvTranspose2d(_TransposedConv, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with a feedback weight ``[C_in, C_out / groups, K_h, K_w]``."""

    plain_type = nn.ConvTranspose2d


class FeedbackConvTranspose3d(_TransposedConv, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with a feedback weight ``[C_in, C_out / groups, K_d, K_h, K_w]``."""

    plain_type = nn.ConvTranspose3d


@dataclass(frozen=True)
class UntiedWeight:
    """One forward weight and its feedback weight, wherever in the model they live.

    Attributes:
        name: The layer's path in the model, such as ``"layer1.0.conv1"``.
        layer: The feedback layer that holds both.
        weight_name: Name of the forward weight on the layer.
        feedback_name: Name of the feedback weight on the layer.
    """

    name: str
    layer: FeedbackLayer
    weight_name: str
    feedback_name: str

    @property
    def weight(self) -> nn.Parameter:
        """The forward weight W."""
        # getattr finds parameters last, and path.step() asks for all of them. A pruned W is no parameter.
        own = self.layer._parameters.get(self.weight_name)
        return cast(nn.Parameter, getattr(self.layer, self.weight_name)) if own is None else own

    @property
    def feedback(self) -> nn.Parameter:
        """The feedback weight B, laid out as W; W itself under backprop."""
        own = self.layer._parameters.get(self.feedback_name)
        return self.weight if own is None else own

    @property
    def is_tied(self) -> bool:
        """Whether B is W itself (backprop)."""
        return self.layer._parameters.get(self.feedback_name) is None

    @property
    def transposed(self) -> bool:
        """Whether W's first dimension counts inputs, as in transposed convolutions."""
        return isinstance(self.layer, nn.modules.conv._ConvTransposeNd)

    @property
    def fan_in(self) -> int:
        """Inputs of one output neuron: for a convolution, the values in its receptive field."""
        return self._fan(self.transposed)

    @property
    def fan_out(self) -> int:
        """Outputs of one input neuron: feedback signals that arrive there through B."""
        return self._fan(not self.transposed)

    def _fan(self, count_first_dimension: bool) -> int:
        first, second, *kernel = self.weight.shape
        groups = cast(int, getattr(self.layer, "groups", 1))
        neurons = first // groups if count_first_dimension else second
        for size in kernel:
            neurons *= size
        return neurons
