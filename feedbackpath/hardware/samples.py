"""Updates sample by sample: one net update hides how many pulses go up and down.

A sample i asks for ``d_i = -lr delta_i x_i``, the product at one cell. Their sum may be small while many
pulses go up and as many down; devices that are not linear feel each of them. The mean-field form has two
sums, of what goes up and of what goes down, from four products of signals split by sign::

    U = lr (delta- x+ + delta+ x-)        D = lr (delta+ x+ + delta- x-)        U - D = -lr delta x

and as many pulses as their means, with the variance ``sum of p (1 - p)``, p = |d_i| / step < 1.
"""

import torch
from torch import Tensor

from feedbackpath.core.layers import UntiedWeight
from feedbackpath.hardware.cells import Cells, Device
from feedbackpath.hardware.readout import product


def write_samples(
    weight: UntiedWeight,
    device: Device,
    cells: Cells,
    w: Tensor,
    x: Tensor,
    delta: Tensor,
    lr: float,
    generator: torch.Generator,
    is_exact: bool,
) -> Tensor:
    """Return the weights after the samples of a step have been written.

    Args:
        weight: Whose layer says how x and delta are multiplied.
        device: What the cells are.
        cells: What was drawn for them.
        w: The weights before.
        x: Input ``[N, ...]``.
        delta: Error at the output ``[N, ...]``, of the loss whose gradient is the sum over samples.
        lr: The learning rate.
        generator: Random numbers of the writes.
        is_exact: One sample after another (positions of a map at once); else the mean-field form.
    """
    if is_exact:
        for one, other in zip(torch.split(x, 1), torch.split(delta, 1), strict=True):
            w = device.write(w, product(weight, one, other).mul_(-lr), cells, generator)
        return w
    up, down = _both_ways(weight, x, delta, lr / device.step)
    up_squares, down_squares = _both_ways(
        weight, x.square(), delta.square(), (lr / device.step) ** 2, x, delta
    )
    ups, downs = (
        _count(mean, squares, generator) for mean, squares in ((up, up_squares), (down, down_squares))
    )
    is_up = torch.ones_like(w, dtype=torch.bool)
    # Half of the ups before the downs and half after: the order of single pulses is random.
    half = (0.5 * ups).add_(torch.empty_like(ups).uniform_(generator=generator)).floor_()
    for pulses, way in ((half, is_up), (downs, ~is_up), (ups - half, is_up)):
        w = device.apply(w, pulses, way, cells, generator)
    return w


def _both_ways(
    weight: UntiedWeight, x: Tensor, delta: Tensor, scale: float, x_sign: Tensor | None = None,
    delta_sign: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return what goes up and what goes down, summed over samples, from products split by sign."""
    signs = (x if x_sign is None else x_sign) > 0, (delta if delta_sign is None else delta_sign) > 0
    (x_plus, x_minus), (d_plus, d_minus) = (
        (torch.where(sign, signal.abs(), 0.0), torch.where(sign, 0.0, signal.abs()))
        for signal, sign in zip((x, delta), signs, strict=True)
    )
    up = product(weight, x_plus, d_minus).add_(product(weight, x_minus, d_plus))
    down = product(weight, x_plus, d_plus).add_(product(weight, x_minus, d_minus))
    return up.mul_(scale), down.mul_(scale)


def _count(mean: Tensor, squares: Tensor, generator: torch.Generator) -> Tensor:
    """Draw whole numbers of this mean, and of the variance ``mean - squares``, at least that of rounding."""
    spread = (mean - squares).clamp_min_(0.0)
    # Rounding at random adds 1/6 on average where the spread is wide; a narrow one is all rounding.
    normal = (
        torch.empty_like(mean).normal_(generator=generator).mul_((spread - 1.0 / 6.0).clamp_min_(0.0).sqrt_())
    )
    drawn = (mean + normal).clamp_min_(0.0)
    return drawn.add_(torch.empty_like(drawn).uniform_(generator=generator)).floor_()
