"""Exact mirroring at the price of reading W and writing B, where a layer's answers to noise are odd.

A layer that answers a code and its negative with phi(z) - phi(-z) = 2 s z (``odd_slope``: ReLU, GELU, SiLU,
no activation; bias blocked) tells W exactly by orthogonal codes of any length: how many inputs fire together
makes a difference to how long it takes to simulate, and to nothing else. Here two do, a and b, while all
others are silent. Their codes are the rows of a Hadamard matrix with random signs c, d = +-1, each followed
by its negative::

    a fires (c, d), b fires (-d, c):    z_1 = c w_a - d w_b            z_2 = d w_a + c w_b
    cov / (sigma^2 s), sigma = 1:       B_a = (c z_1 + d z_2) / 2      B_b = (c z_2 - d z_1) / 2

That is z = (c + i d) w and B = (c - i d) z / 2 for the complex numbers w = w_a + i w_b: two products of as
many values as W has. ``estimate_with_codes`` is the longer way, for every activation.
"""

import functools

import torch
from torch import Tensor

from feedbackpath.core.layers import UntiedWeight
from feedbackpath.mirror import fields
from feedbackpath.mirror.covariance import LEAST_SLOPE
from feedbackpath.mirror.designs import draw_signs
from feedbackpath.mirror.settings import Mirror

PAIR = 2  # inputs that fire together
CHUNK_VALUES = 2**17  # of W, that a CPU works on at once: drives, which B's place holds, stay in its cache


def can_pair(weight: UntiedWeight, settings: Mirror, slope: float | None) -> bool:
    """Whether answers are odd, travel as signed numbers, and replace B in a precision that holds products.

    Args:
        weight: The weight to mirror; not a transposed convolution's, whose inputs are not side by side.
        settings: How.
        slope: The ``odd_slope`` of the activation that follows its layer; None: it has none.
    """
    has_bias = fields.open_bias(weight, settings.block_bias) is not None
    are_odd = slope is not None and abs(slope) >= LEAST_SLOPE and not has_bias
    is_precise = weight.weight.dtype == weight.feedback.dtype in (torch.float32, torch.float64)
    is_signed = settings.is_exact and settings.rates == "signed"
    return are_odd and is_signed and is_precise and not weight.transposed


class Pairs:
    """One weight and its B, seen as pairs of inputs: views that are made once and fired as often as needed.

    Args:
        weight: A weight that ``can_pair``.
        settings: How it is mirrored.

    Attributes:
        can_fire: Whether W and B lie in memory alike, so that pairs can be seen there.
    """

    def __init__(self, weight: UntiedWeight, settings: Mirror) -> None:
        w, b = weight.weight.detach(), weight.feedback.detach()
        self._settings, self._places = settings, _places_of(weight)
        source, target = fields.as_rows(w, weight), fields.as_rows(b, weight)
        self.can_fire = (
            fields.is_laid_out_alike(w, b)
            and (w.data_ptr(), b.data_ptr()) == (source.data_ptr(), target.data_ptr())  # no copy was made
            and source.is_contiguous()
            and target.is_contiguous()
            and w.storage_offset() % PAIR == b.storage_offset() % PAIR == 0
        )
        num_neurons, num_inputs = source.shape
        self._has_single = num_inputs % PAIR == 1
        self._chunks: list[tuple[Tensor, Tensor]] = []
        if self.can_fire:
            size = max(1, CHUNK_VALUES // num_inputs) if w.device.type == "cpu" else num_neurons
            source, target = (rows if self._has_single else _as_pairs(rows) for rows in (source, target))
            self._chunks += zip(torch.split(source, size), torch.split(target, size), strict=True)
        self._code, self._decode = _codes(-(-num_inputs // PAIR), w.device, w.dtype)

    def are_of(self, weight: UntiedWeight, settings: Mirror) -> bool:
        """Whether W and B still lie where they did, and are mirrored as they were."""
        return self._settings is settings and self._places == _places_of(weight)

    def fire(self) -> None:
        """Let all inputs fire, two at a time, and replace B by what neurons answer."""
        if self._has_single:
            for source, target in self._chunks:
                self._fire_with_single(source, target)
            return
        for source, target in self._chunks:
            torch.mul(source, self._code, out=target)
            torch.mul(target, self._decode, out=target)

    def _fire_with_single(self, source: Tensor, target: Tensor) -> None:
        """Fire an odd number of inputs: the last has a partner that is connected to nothing."""
        padded = source.new_zeros(len(source), source.shape[1] + 1)
        padded[:, :-1].copy_(source)
        _as_pairs(padded).mul_(self._code).mul_(self._decode)
        target.copy_(padded[:, :-1])


def _places_of(weight: UntiedWeight) -> tuple[object, ...]:
    """Return where and how W and B lie in memory."""
    w, b = weight.weight, weight.feedback
    return w.data_ptr(), b.data_ptr(), w.shape, w.stride(), b.stride()


def _as_pairs(rows: Tensor) -> Tensor:
    """View ``[neurons, inputs]`` as ``[neurons, inputs / 2]`` complex numbers, a pair of inputs each."""
    return torch.view_as_complex(rows.view(len(rows), -1, PAIR))


@functools.cache
def _codes(num_pairs: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return c + i d of each pair, and what decodes its answers, (c - i d) / 2."""
    signs = draw_signs(torch.empty(num_pairs, PAIR, device="cpu"), torch.Generator().manual_seed(0))
    code = torch.view_as_complex(signs.to(device, dtype))
    return code, code.conj().resolve_conj() / 2.0
