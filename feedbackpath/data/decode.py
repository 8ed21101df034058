"""Encoded images to RGB bytes at the size asked for: by simplejpeg where installed, by Pillow otherwise.

Both decode a JPEG with the same library, libjpeg-turbo, down to the lower edge of the part that is wanted,
and resize with PyTorch's antialiased bilinear filter, on bytes: the same pixels to within one grey level of
Pillow's own `crop` and `resize`. Nothing is decoded at reduced scale, which was slower and changed pixels.

As is usual for ImageNet, EXIF orientation is ignored. Grey, palette, CMYK and 16-bit images become RGB; an
alpha channel is dropped.
"""

import io
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from feedbackpath.data.jpeg import shorten

if TYPE_CHECKING:  # Pillow is imported where it is used: other datasets do without
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

Box = tuple[int, int, int, int]
"""Left, top, right and bottom edge, in pixels, as Pillow has it."""

Pixels = npt.NDArray[np.uint8]
"""`[H, W, 3]`."""

JPEG_MAGIC = b"\xff\xd8\xff"
JPEG_COLOURS = ("YCbCr", "Gray", "RGB")  # others simplejpeg would take for RGB: Pillow converts them


class UnreadableImageError(Exception):
    """Bytes that are no image, or only a part of one.

    Attributes:
        is_truncated: Whether they begin as an image does.
    """

    def __init__(self, reason: str, *, is_truncated: bool = False) -> None:
        super().__init__(reason)
        self.is_truncated = is_truncated


def decode(raw: bytes, choose_box: Callable[[int, int], Box] | None = None) -> Pixels:
    """Decode an image to RGB.

    Args:
        raw: The bytes of an image file of any format that Pillow reads.
        choose_box: From width and height to the part that is wanted; the whole by default.

    Returns:
        uint8 `[H, W, 3]`, perhaps a view of more.

    Raises:
        UnreadableImageError: It cannot be decoded, or does not go on to its end.
    """
    pixels = _decode_jpeg(raw, choose_box) if raw.startswith(JPEG_MAGIC) and find_simplejpeg() else None
    return decode_with_pillow(raw, choose_box) if pixels is None else pixels


def decode_with_pillow(raw: bytes, choose_box: Callable[[int, int], Box] | None = None) -> Pixels:
    """Decode an image to RGB by Pillow alone: see `decode`."""
    image = _open(raw)
    box = choose_box(*image.size) if choose_box else None
    if box and image.format == "JPEG":
        image = _open(shorten(raw, box[3]))
    image.decodermaxblock = len(raw)  # all bytes are here: no need to feed them in blocks
    try:
        # Cropped before it becomes an array: what is outside need not be copied.
        return np.array(_to_rgb(image.crop(box) if box else image))
    except Exception as error:
        raise UnreadableImageError(f"it cannot be decoded: {error}", is_truncated=True) from error


def resize(pixels: Pixels, height: int, width: int) -> Tensor:
    """Resize with an antialiased bilinear filter, on bytes.

    Args:
        pixels: uint8 `[H, W, 3]`.
        height: Of the result.
        width: Of the result.

    Returns:
        uint8 `[3, height, width]`.

    Example:
        >>> resize(np.full((40, 30, 3), 7, np.uint8), 8, 6).shape
        torch.Size([3, 8, 6])
    """
    # Channels last, so that PyTorch takes its vectorised kernel for bytes.
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return F.interpolate(image, (height, width), mode="bilinear", antialias=True)[0]


def fit_short_side(height: int, width: int, size: int) -> tuple[int, int]:
    """Return the height and width at which the short side is `size`; the long one is rounded down.

    Example:
        >>> fit_short_side(375, 500, 256)
        (256, 341)
    """
    short = min(height, width)
    return height * size // short, width * size // short


def describe_decoders() -> str:
    """Return the names and versions of the decoders in use.

    Example:
        >>> describe_decoders().endswith(f"Pillow {version('Pillow')}")
        True
    """
    simplejpeg = f"simplejpeg {version('simplejpeg')}, " if find_simplejpeg() else ""
    return f"{simplejpeg}Pillow {version('Pillow')}"


def image_format(raw: bytes) -> str | None:
    """Return the format of an image, as Pillow calls it, by its bytes and not its name; none if unknown.

    Example:
        >>> image_format(JPEG_MAGIC + b"...")
        'JPEG'
    """
    if raw.startswith(JPEG_MAGIC):
        return "JPEG"
    try:
        return _open(raw).format
    except UnreadableImageError:
        return None


@cache
def find_simplejpeg() -> ModuleType | None:
    """Return simplejpeg, or none if it is not installed."""
    try:
        import simplejpeg
    except ImportError:
        return None
    module: ModuleType = simplejpeg
    return module


def _decode_jpeg(raw: bytes, choose_box: Callable[[int, int], Box] | None) -> Pixels | None:
    """Decode by simplejpeg; none if it refuses, and Pillow shall say whether the file is sound."""
    simplejpeg = find_simplejpeg()
    assert simplejpeg is not None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(raw)
        if colours not in JPEG_COLOURS:
            return None
        left, top, right, bottom = choose_box(width, height) if choose_box else (0, 0, width, height)
        part = shorten(raw, bottom)
        # What follows the last row of a shortened file is no fault of it.
        pixels: Pixels = simplejpeg.decode_jpeg(part, "RGB", strict=part is raw)
    except ValueError:
        return None
    return pixels[top:bottom, left:right]


def _open(raw: bytes) -> "ImageFile":
    """Read the header of an image."""
    from PIL import Image as pillow

    if not raw:
        raise UnreadableImageError("it is empty")
    try:
        return pillow.open(io.BytesIO(raw))
    except Exception as error:  # a format's reader may raise nearly anything on damaged bytes
        raise UnreadableImageError("it is not an image") from error


def _to_rgb(image: "Image") -> "Image":
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16 bits of grey; Pillow's own conversion would clip and not scale them
        from PIL import Image as pillow

        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return pillow.fromarray(grey).convert("RGB")
    if "transparency" in image.info:  # Pillow warns where it drops that of a palette in one step
        image = image.convert("RGBA")
    return image.convert("RGB")
