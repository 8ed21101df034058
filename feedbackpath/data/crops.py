"""Which part of an image is looked at, and how: random crops and flips in training, the centre otherwise.

Random resized crops are those of Szegedy et al. (2015), "Going deeper with convolutions", Section 6, in
today's form: 8 to 100% of the area, aspect ratio 3/4 to 4/3. A crop depends on random numbers and the
size of the image, not on the decoder.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from feedbackpath.data.decode import Box, decode, fit_short_side, resize

AREA_SHARES = (0.08, 1.0)
ASPECT_RATIOS = (3 / 4, 4 / 3)
NUM_TRIES = 10
NUM_DRAWS = 2 * NUM_TRIES + 3
"""Random numbers that a training image takes: shapes to try, a position, and whether to flip."""

CENTRE_SHARE = 224 / 256  # of the short side

MEAN = tuple(255 * mean for mean in (0.485, 0.456, 0.406))  # of the training pixels; red, green, blue
STD = tuple(255 * std for std in (0.229, 0.224, 0.225))


def random_view(raw: bytes, size: int, draws: Sequence[float]) -> Tensor:
    """Decode a random part of an image, resize it to a square, and flip it left to right half of the time.

    Args:
        raw: The bytes of an image file.
        size: Pixels a side of the result.
        draws: Numbers in [0, 1), `NUM_DRAWS`.

    Returns:
        uint8 `[3, size, size]`.

    Raises:
        UnreadableImageError: It cannot be decoded.
    """
    pixels = decode(raw, lambda width, height: random_box(width, height, draws))
    view = resize(pixels, size, size)
    return view.flip(2) if draws[-1] < 0.5 else view


def centre_view(raw: bytes, size: int) -> Tensor:
    """Decode an image, resize it until the short side is `size / CENTRE_SHARE`, and cut out the centre.

    Args:
        raw: The bytes of an image file.
        size: Pixels a side of the result.

    Returns:
        uint8 `[3, size, size]`.

    Raises:
        UnreadableImageError: It cannot be decoded.
    """
    pixels = decode(raw)
    height, width = fit_short_side(pixels.shape[0], pixels.shape[1], round(size / CENTRE_SHARE))
    top, left = round((height - size) / 2), round((width - size) / 2)
    return resize(pixels, height, width)[:, top : top + size, left : left + size]


def random_box(width: int, height: int, draws: Sequence[float]) -> Box:
    """Choose a part of an image: area uniform in `AREA_SHARES`, aspect ratio log-uniform in `ASPECT_RATIOS`.

    Shapes are tried until one fits; if none does, it is the largest centred part of an allowed ratio.

    Args:
        width: Of the image, in pixels.
        height: Of the image, in pixels.
        draws: Numbers in [0, 1), `NUM_DRAWS`; the last is not used here.

    Example:
        >>> random_box(500, 375, [0.5] * NUM_DRAWS)
        (91, 29, 409, 347)
    """
    low, high = (math.log(ratio) for ratio in ASPECT_RATIOS)
    right, down = draws[2 * NUM_TRIES : 2 * NUM_TRIES + 2]
    for share_draw, ratio_draw in zip(draws[: 2 * NUM_TRIES : 2], draws[1 : 2 * NUM_TRIES : 2], strict=True):
        area = width * height * (AREA_SHARES[0] + (AREA_SHARES[1] - AREA_SHARES[0]) * share_draw)
        ratio = math.exp(low + (high - low) * ratio_draw)
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left, top = int((width - box_width + 1) * right), int((height - box_height + 1) * down)
            return left, top, left + box_width, top + box_height
    return _centre_box(width, height)


def _centre_box(width: int, height: int) -> Box:
    ratio = min(max(width / height, ASPECT_RATIOS[0]), ASPECT_RATIOS[1])
    box_width, box_height = min(width, round(height * ratio)), min(height, round(width / ratio))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height


def normalise(x: Tensor) -> Tensor:
    """Scale bytes to mean 0 and deviation 1 over ImageNet's training pixels, by channel.

    Args:
        x: uint8 `[N, 3, H, W]`, on any device.

    Returns:
        float32 of the same shape.
    """
    mean, std = (torch.tensor(part, device=x.device).view(3, 1, 1) for part in (MEAN, STD))
    return (x.float() - mean) / std
