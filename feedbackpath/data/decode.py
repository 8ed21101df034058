"""Encoded images to RGB bytes at the size asked for: by simplejpeg where installed, by Pillow otherwise.

Both decode a JPEG with the same library, libjpeg-turbo, down to the lower edge of the part that is wanted,
and resize with PyTorch's antialiased bilinear filter, on bytes: the same pixels to within one grey level of
Pillow's own `crop` and `resize`. Nothing is decoded at reduced scale, which was slower and changed pixels.

A baseline JPEG (ITU-T T.81) holds its blocks row by row from the top, and its frame header says how many
rows of pixels there are. With a smaller number there, the blocks below are never decoded: a crop costs what
lies above its lower edge.

As is usual for ImageNet, EXIF orientation is ignored. Grey, palette, CMYK and 16-bit images become RGB; an
alpha channel is dropped. Pixels without an agreed white, such as 32-bit numbers, are refused, and so are
images that would take much memory or time: `FORMATS`, `MAX_PIXELS`, `MAX_RATIO` and `MAX_SCANNED` set limits.
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

if TYPE_CHECKING:  # Pillow is imported where it is used: other datasets do without
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

Box = tuple[int, int, int, int]
"""Left, top, right and bottom edge, in pixels, as Pillow has it."""

Pixels = npt.NDArray[np.uint8]
"""`[H, W, 3]`."""

ChooseBox = Callable[[int, int], Box]
"""From the width and height of an image to the part that is wanted."""

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
"""What may be opened: Pillow knows others, and hands some of them to programs such as Ghostscript."""

MAX_PIXELS = 2**26  # ImageNet's largest image has 61 million; decoding takes up to 20 bytes each
MAX_RATIO = 100  # of the long side to the short one, which is scaled to a fixed length
MAX_SCANNED = 2**31  # pixels times the scans of a progressive JPEG, each a pass over all; ten are usual
MAX_TEXT = 2**24  # bytes of a PPM in digits, which Pillow reads number by number
MAX_PPM_HEADER = 4096  # bytes: two or three numbers, and comments

JPEG_MAGIC = b"\xff\xd8\xff"
END_OF_JPEG = b"\xff\xd9"
START_OF_SCAN = b"\xff\xda"
BASELINE = (0xC0, 0xC1)  # frame headers whose blocks come in one pass; others take several over the image
NO_SEGMENT = (0xDA, 0xFF)  # the scan itself, and fill bytes, which files hardly ever have
JPEG_COLOURS = ("YCbCr", "Gray", "RGB")  # others simplejpeg would take for RGB: Pillow converts them


class UnreadableImageError(Exception):
    """Bytes that are no image, or only a part of one: ``is_truncated`` if they begin as an image does."""

    def __init__(self, reason: str, *, is_truncated: bool = False) -> None:
        super().__init__(reason)
        self.is_truncated = is_truncated


def decode(raw: bytes, choose_box: ChooseBox | None = None) -> Pixels:
    """Decode an image to RGB.

    Args:
        raw: The bytes of an image file, in one of `FORMATS`.
        choose_box: Says which part is wanted; the whole by default.

    Returns:
        uint8 `[H, W, 3]`, perhaps a view of more.

    Raises:
        UnreadableImageError: It cannot be decoded, or does not go on to its end.
    """
    pixels = _decode_by_simplejpeg(raw, choose_box) if raw.startswith(JPEG_MAGIC) else None
    return _decode_by_pillow(raw, choose_box) if pixels is None else pixels


def _decode_by_simplejpeg(raw: bytes, choose_box: ChooseBox | None) -> Pixels | None:
    """Decode a JPEG; none if simplejpeg refuses, and Pillow shall say whether the file is sound."""
    simplejpeg = find_simplejpeg()
    if simplejpeg is None:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(raw)
        _check_size(raw, width, height)
        if colours not in JPEG_COLOURS:
            return None
        left, top, right, bottom = choose_box(width, height) if choose_box else (0, 0, width, height)
        part = shorten(raw, bottom)
        # What follows the last row of a shortened file is no fault of it.
        pixels: Pixels = simplejpeg.decode_jpeg(part, "RGB", strict=part is raw)
    except ValueError:
        return None
    return pixels[top:bottom, left:right]


def _decode_by_pillow(raw: bytes, choose_box: ChooseBox | None) -> Pixels:
    image = _open(raw)
    box = choose_box(*image.size) if choose_box else None
    if box and image.format == "JPEG":
        image = _open(shorten(raw, box[3]))
    # All bytes are here: no need to feed them in blocks.
    image.decodermaxblock = max(len(raw), image.decodermaxblock)
    try:
        _check_values(image)
        # Cropped before it becomes an array: what is outside need not be copied.
        return np.array(_to_rgb(image.crop(box) if box else image))
    except UnreadableImageError:
        raise
    except Exception as error:
        raise UnreadableImageError(f"it cannot be decoded: {error}", is_truncated=True) from error


def resize(pixels: Pixels, height: int, width: int) -> Tensor:
    """Resize with an antialiased bilinear filter, on bytes, from `[H, W, 3]` to `[3, height, width]`."""
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
    """Return the names and versions of the decoders in use."""
    simplejpeg = f"simplejpeg {version('simplejpeg')}, " if find_simplejpeg() else ""
    return f"{simplejpeg}Pillow {version('Pillow')}"


def image_format(raw: bytes) -> str | None:
    """Return the format of an image, as Pillow calls it, by its bytes and not its name; none if unknown."""
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


def _open(raw: bytes) -> "ImageFile":
    """Read the header of an image."""
    from PIL import Image as pillow

    if not raw:
        raise UnreadableImageError("it is empty")
    if raw[:2] in (b"P1", b"P2", b"P3") and len(raw) > MAX_TEXT:
        raise UnreadableImageError(f"it is text of more than {MAX_TEXT:,} bytes: save it as a binary PPM")
    try:
        if raw[:1] == b"P":  # Pillow reads a PPM's header byte by byte, however long it is
            pillow.open(io.BytesIO(raw[:MAX_PPM_HEADER]), formats=FORMATS)
        image = pillow.open(io.BytesIO(raw), formats=FORMATS)
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        raise UnreadableImageError(f"it claims to have more than {MAX_PIXELS:,} pixels") from error
    except Exception as error:  # a format's reader may raise nearly anything on damaged bytes
        raise UnreadableImageError(f"it is not an image in {', '.join(FORMATS)}") from error
    _check_size(raw, *image.size)
    return image


def _check_size(raw: bytes, width: int, height: int) -> None:
    """Refuse an image by what its header claims, before memory is taken for it."""
    if width * height > MAX_PIXELS:
        raise UnreadableImageError(
            f"it claims {width} x {height} pixels, more than {MAX_PIXELS:,}: make it smaller"
        )
    if max(width, height) > MAX_RATIO * min(width, height):
        raise UnreadableImageError(
            f"it is {width} x {height} pixels, one side is more than {MAX_RATIO} times the other: crop it"
        )
    max_scans = MAX_SCANNED // max(width * height, 1)
    # Most files are too short for so many, and need not be searched.
    if raw.startswith(JPEG_MAGIC) and len(raw) > 10 * max_scans < 10 * raw.count(START_OF_SCAN):
        raise UnreadableImageError(f"its {width} x {height} pixels come in too many scans: save it again")


def _check_values(image: "ImageFile") -> None:
    """Refuse grey values of which nobody can say how bright they are: all but those of 8 or 16 bits."""
    # Tags of TIFF 6.0; with 0 in the second, larger values are darker; 1 in the last stands for unsigned.
    bits_per_sample, photometric, tile_width, tile_height, sample_format = 258, 262, 322, 323, 339
    tags = getattr(image, "tag_v2", {})
    if tags.get(tile_width, 0) * tags.get(tile_height, 0) > MAX_PIXELS:
        raise UnreadableImageError(f"it claims tiles of more than {MAX_PIXELS:,} pixels")
    is_sixteen_bits = tags.get(bits_per_sample, (16,)) == (16,) and tags.get(photometric, 1) != 0
    if image.mode.startswith("I;16") and is_sixteen_bits:
        return
    is_signed = tags.get(sample_format, (1,))[0] not in (1, 4)
    if is_signed or image.mode[0] == "F" or (image.mode[0] == "I" and image.format not in ("PNG", "PPM")):
        raise UnreadableImageError(
            "no standard says which of its grey values is white: save it with 8 or 16 unsigned bits"
        )


def _to_rgb(image: "Image") -> "Image":
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16 bits of grey; Pillow's own conversion would clip and not scale them
        from PIL import Image as pillow

        grey = np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8)
        return pillow.fromarray(grey).convert("RGB")
    if "transparency" in image.info:  # Pillow warns where it drops that of a palette in one step
        image = image.convert("RGBA")
    return image.convert("RGB")


def shorten(raw: bytes, num_rows: int) -> bytes:
    """Return a JPEG whose first ``num_rows`` rows of pixels are those of ``raw``, to the last bit.

    Two more are kept at least, for colours are interpolated between rows. A file that is progressive, is
    damaged in its headers, or does not end as it should stays as it is, and the decoder says what is wrong.
    """
    frame = _find_frame(raw)
    if frame is None or not raw.rstrip(b"\0").endswith(END_OF_JPEG):
        return raw
    height = int.from_bytes(raw[frame + 5 : frame + 7])
    sampling = raw[frame + 11 : frame + 10 + 3 * raw[frame + 9] : 3]
    block_rows = 8 * max(factors & 15 for factors in sampling)
    kept = -(-(num_rows + 2) // block_rows) * block_rows
    if kept >= height:  # 0 stands for a height that is given later
        return raw
    return raw[: frame + 5] + kept.to_bytes(2) + raw[frame + 7 :]


def _find_frame(raw: bytes) -> int | None:
    """Return where the frame header of a baseline JPEG begins, at its marker; None if there is none."""
    position = 2
    while position + 10 < len(raw) and raw[position] == 0xFF:
        marker = raw[position + 1]
        if marker in BASELINE:
            return position
        if marker in NO_SEGMENT:
            return None
        position += 2 + int.from_bytes(raw[position + 2 : position + 4])
    return None
