"""What imperfect arrays do to W - B, in closed form: to be drawn over measurements.

The assumptions stand with each formula. Where a measurement parts from it, one of them is broken.
"""

import math


def gap_variance(
    noise: float, lr: float, weight_decay: float, momentum: float = 0.0, sides: int = 2
) -> float:
    """Return the variance at which W - B settles under Kolen-Pollack, where writes have independent noise.

    A step shrinks the gap by lambda and adds noise of variance ``sides s^2``, so that it settles at::

        sides s^2 / (2 lambda - lambda^2),  about s^2 / lambda for two sides,   lambda = lr wd / (1 - mu)

    Holds where the noise of a write does not depend on the weight, and updates are equal but for it.

    Args:
        noise: s, the standard deviation of a write's noise, in units of weight, on each noisy side.
        lr: Learning rate.
        weight_decay: L2 penalty in the gradient, or decoupled decay.
        momentum: mu of SGD.
        sides: 2: W and B are written with noise; 1: one of them.

    Example:
        >>> round(gap_variance(0.01, lr=0.1, weight_decay=1e-2), 3)
        0.1
    """
    shrink = lr * weight_decay / (1.0 - momentum)
    return sides * noise**2 / shrink / 2.0 if shrink else math.inf


def soft_contraction(written: float, bound: float) -> float:
    """Return by what W - B has shrunk after soft bounds have written so much, without weight decay.

    A pulse of either direction takes ``step / bound`` of a weight, and so of a difference of two weights that
    get the same pulses: e-fold for each ``bound`` of change that was written. Holds where the cells of both
    arrays are alike, and weights stay inside their bounds.

    Args:
        written: Sum of the sizes of all changes of one weight, up and down, in units of weight.
        bound: The bound of both sides.

    Example:
        >>> round(soft_contraction(2.0, 1.0), 3)
        0.135
    """
    return math.exp(-written / bound)


def symmetry_spread(bound: float, asymmetry_spread: float) -> float:
    """Return the spread of soft bounds' symmetry points, the floor of W - B that they leave on each side.

    ``w* = bound (c_up - c_down) / (c_up + c_down)``, to first order in the spread ``bound spread / sqrt(2)``.
    Cells of W and of B are drawn apart: where ups and downs balance, ``bound spread`` of W - B is left.

    Example:
        >>> round(symmetry_spread(1.0, 0.3), 3)
        0.212
    """
    return bound * asymmetry_spread / math.sqrt(2.0)


def mirror_angle_deg(inputs: int, samples: int, noise: float, spread: float = 1.0) -> float:
    """Return the angle that independent mirror noise leaves, where answers are read with noise.

    For noise as a share of the answers' root mean square, in degrees::

        tan(angle) = sqrt(c n (1 + noise^2) / N)      (one input's own share of an answer does not disturb)

    Args:
        inputs: n, inputs of a neuron.
        samples: N, samples that a plain average is taken over.
        noise: Noise of the read-out, as ``Read(noise=...)``.
        spread: c, how much more an answer scatters than that of a linear neuron: 2 - 2/pi behind a ReLU.

    Example:
        >>> round(mirror_angle_deg(64, 2048, 0.0)), round(mirror_angle_deg(64, 2048, 1.0))
        (10, 14)
    """
    return math.degrees(math.atan(math.sqrt(spread * inputs * (1.0 + noise**2) / samples)))
