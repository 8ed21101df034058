"""Exact mirroring at the price of reading W and writing B, where a layer's answers to noise are odd.

A layer that answers a code and its negative with phi(z) - phi(-z) = 2 s z (``odd_slope``: ReLU, GELU, SiLU,
no activation; bias blocked) tells W exactly by orthogonal codes of any length: how many inputs fire together
makes a difference to how long it takes to simulate, and to nothing else. Here two do, a and b, with the codes
(1, 1) and (x, -x), x = +-1 at random, each followed by its negative, while all others are silent::

    z+ = w_a + w_b x       z- = w_a - w_b x           the drives of a neuron
    B_a = (z+ + z-) / 2    B_b = x (z+ - z-) / 2      cov / (sigma^2 s) with sigma = 1

A few sums take the place of matrix products. ``estimate_with_codes`` is the longer way, for every activation.
"""

import torch
from torch import Tensor

from feedbackpath.layers import UntiedWeight
from feedbackpath.mirror import fields
from feedbackpath.mirror.designs import draw_signs
from feedbackpath.mirror.settings import Mirror

PAIR = 2  # inputs that fire together
CHUNK_VALUES = 2**16  # of W, that a CPU works on at once: their drives stay in its cache
Part = tuple[Tensor, Tensor, Tensor, Tensor]


class Pairs:
    """One weight and its B, seen as pairs of inputs: views that are made once and fired as often as needed.

    Args:
        weight: The weight to mirror.
        settings: How.
        slope: The ``odd_slope`` of the activation that follows its layer; None: it has none.

    Attributes:
        can_fire: Whether this way is open: answers are odd, travel as signed numbers, and replace all of a B
            that lies in memory as W does, in a precision that holds sums.
    """

    def __init__(self, weight: UntiedWeight, settings: Mirror, slope: float | None) -> None:
        w, b = weight.weight.detach(), weight.feedback.detach()
        self._settings, self._places = settings, (w.data_ptr(), b.data_ptr())
        view = fields.as_matrix if weight.transposed else fields.as_rows
        source, target = view(w, weight), view(b, weight)
        has_bias = not settings.block_bias and fields.own_bias(weight) is not None
        self.can_fire = (
            settings.is_exact
            and settings.rates == "signed"
            and slope is not None
            and not has_bias
            and w.dtype == b.dtype
            and w.dtype in (torch.float32, torch.float64)
            and fields.is_laid_out_alike(w, b)
            and self._places == (source.data_ptr(), target.data_ptr())  # no copy was made
        )
        self._parts: list[Part] = []
        if self.can_fire:
            self._parts = _divide(source, target)
            signs = draw_signs(torch.empty(self._parts[0][1].shape[-1]), torch.Generator().manual_seed(0))
            self._x = signs.to(w.device, w.dtype)
            self._decode_b = self._x / 2.0

    def are_of(self, weight: UntiedWeight, settings: Mirror) -> bool:
        """Whether W and B still lie where they did, and the settings are the same."""
        places = weight.weight.data_ptr(), weight.feedback.data_ptr()
        return self._places == places and (self._settings is settings or self._settings == settings)

    def fire(self) -> None:
        """Let all inputs fire, two at a time, and replace B by what neurons answer."""
        first = self._parts[0][0]
        plus, minus = first.new_empty((PAIR, *first.shape))
        for w_a, w_b, b_a, b_b in self._parts:
            if w_a.shape != plus.shape:  # the last part may be smaller
                plus, minus = plus[: len(w_a)], minus[: len(w_a)]
            torch.addcmul(w_a, w_b, self._x, out=plus)
            torch.addcmul(w_a, w_b, self._x, value=-1.0, out=minus)
            torch.lerp(plus, minus, 0.5, out=b_a)
            torch.sub(plus, minus, out=b_b).mul_(self._decode_b)


def _divide(source: Tensor, target: Tensor) -> list[Part]:
    """View the first and the second half of the inputs, of W and of B, some neurons at a time.

    Of an odd number the one in the middle is in both halves: it fires in two pairs.

    Args:
        source: W as ``[..., neurons, inputs]``.
        target: B in the same form.
    """
    inputs = source.shape[-1]
    half, second = (inputs + 1) // 2, inputs // 2
    is_chunked = source.device.type == "cpu" and source.dim() == 2
    size = max(1, CHUNK_VALUES // inputs) if is_chunked else len(source)
    chunks = zip(torch.split(source, size), torch.split(target, size), strict=True)
    return [(w[..., :half], w[..., second:], b[..., :half], b[..., second:]) for w, b in chunks]
