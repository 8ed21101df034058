"""Random numbers that are a pure function of a key and a counter: no state, no order, nothing global.

SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) turns
a 64-bit counter into 64 well-mixed bits, so the numbers of sample 17 need not wait for those of sample 16.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_Bits = npt.NDArray[np.uint64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(bits: _Bits) -> _Bits:
    """SplitMix64's finaliser: every output bit depends on every input bit."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _hash(indices: Tensor, key: tuple[int, ...]) -> _Bits:
    state = np.zeros(1, np.uint64)  # an array, because numpy warns when a uint64 scalar wraps around
    for part in key:
        state = _mix((state + _GOLDEN) ^ np.uint64(part % 2**64))
    return _mix(state + _GOLDEN * (indices.numpy().astype(np.uint64) + np.uint64(1)))


def uniform(indices: Tensor, num_draws: int, *key: int) -> Tensor:
    """Draw numbers in [0, 1) for samples `[N]`, float32 `[N, num_draws]`.

    They depend on nothing but the key, say (seed, split, epoch), the index of the sample and the number of
    the draw: asking for more leaves the first ones as they were.

    Example:
        >>> both = uniform(torch.tensor([3, 5]), 4, 0, 1)
        >>> torch.equal(both[1:], uniform(torch.tensor([5]), 4, 0, 1))
        True
    """
    draws = _GOLDEN * np.arange(1, num_draws + 1, dtype=np.uint64)
    bits = _mix(_hash(indices, key)[:, None] + draws)
    # 24 bits are what float32 holds exactly; more could round up to 1.
    return torch.from_numpy((bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24))


def permutation(length: int, *key: int) -> Tensor:
    """Return the numbers below `length` in an order that depends on nothing but the key, int64 `[length]`."""
    return torch.from_numpy(np.argsort(_hash(torch.arange(length), key), kind="stable"))
