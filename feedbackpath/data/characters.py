"""Characters that look unlike one another, drawn in the twelve text faces of the DejaVu fonts.

The fonts come with matplotlib. They share some 2,000 visible characters, many of which are the same to
the eye (Latin A, Greek Α, Cyrillic А) or differ by size or an accent only. `choose_characters` walks
through them in a fixed order and leaves out whatever resembles one it has already taken.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from feedbackpath.errors import DataError

if TYPE_CHECKING:  # matplotlib and Pillow are imported where they are used: other datasets do without
    from PIL.ImageFont import FreeTypeFont

FACES = {
    "sans": "DejaVuSans.ttf",
    "sans-bold": "DejaVuSans-Bold.ttf",
    "sans-oblique": "DejaVuSans-Oblique.ttf",
    "sans-bold-oblique": "DejaVuSans-BoldOblique.ttf",
    "mono": "DejaVuSansMono.ttf",
    "mono-bold": "DejaVuSansMono-Bold.ttf",
    "mono-oblique": "DejaVuSansMono-Oblique.ttf",
    "mono-bold-oblique": "DejaVuSansMono-BoldOblique.ttf",
    "serif": "DejaVuSerif.ttf",
    "serif-bold": "DejaVuSerif-Bold.ttf",
    "serif-italic": "DejaVuSerif-Italic.ttf",
    "serif-bold-italic": "DejaVuSerif-BoldItalic.ttf",
}

MASK_SIZE = 36  # pixels a side
INK_SIZE = 32  # pixels of the longer side of a character within its mask
FONT_SIZE = 56  # pixels an em: most characters are then drawn larger than INK_SIZE, and shrunk

SIMILARITY_LIMIT = 0.965  # cosine of two looks; leaves 1,065 characters over the training faces
BLUR_RADIUS = 1  # pixels of the ink; a small shift or rotation should not tell characters apart

# Letters, digits, symbols and punctuation. Not modifiers (Lm, Sk), which are small copies of other
# characters, and not marks, which need a letter to sit on.
VISIBLE_CATEGORIES = frozenset(
    ("Lu", "Ll", "Lt", "Lo", "Nd", "Nl", "No", "Sm", "Sc", "So", "Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po")
)

# Familiar scripts first; what is in none of these comes last, by code point.
BLOCKS = (
    range(0x0000, 0x0080),  # ASCII
    range(0x0370, 0x0400),  # Greek
    range(0x0400, 0x0530),  # Cyrillic
    range(0x0530, 0x0590),  # Armenian
    range(0x10A0, 0x1100),  # Georgian
    range(0x0080, 0x0370),  # Latin with additions, and phonetic letters
)

Mask = npt.NDArray[np.uint8]
Look = npt.NDArray[np.float32]


def open_face(name: str) -> FreeTypeFont:
    """Open a face by its name in `FACES`."""
    from PIL import ImageFont

    # Basic layout: a character is drawn the same whether or not Pillow was built with a text shaper.
    return ImageFont.truetype(_font_file(name), FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)


def draw(character: str, face: FreeTypeFont) -> Mask:
    """Draw a character so that the longer side of its ink is `INK_SIZE` pixels, in the middle of a mask.

    A mask says how much of each pixel is ink, from 0 to 255, `[MASK_SIZE, MASK_SIZE]`.
    """
    from PIL import Image, ImageDraw, ImageOps

    canvas = Image.new("L", (3 * FONT_SIZE, 3 * FONT_SIZE))
    ImageDraw.Draw(canvas).text((FONT_SIZE, FONT_SIZE), character, fill=255, font=face)
    ink = canvas.crop(canvas.getbbox())
    ink = ImageOps.contain(ink, (INK_SIZE, INK_SIZE), Image.Resampling.BILINEAR)
    mask = Image.new("L", (MASK_SIZE, MASK_SIZE))
    mask.paste(ink, ((MASK_SIZE - ink.width) // 2, (MASK_SIZE - ink.height) // 2))
    return np.array(mask)


def choose_characters(count: int, face_names: Sequence[str]) -> str:
    """Choose the first `count` characters, or fewer, that in none of some faces resemble one before them.

    Example:
        >>> choose_characters(20, ["sans", "serif-italic"])
        '0123456789ABCDEFGHIJ'
    """
    faces = [open_face(name) for name in face_names]
    chosen: list[str] = []
    taken = np.zeros((len(faces), count, (INK_SIZE // 2) ** 2), np.float32)
    for character in _candidates():
        if len(chosen) == count:
            break
        looks: list[Look] = []
        for face, others in zip(faces, taken[:, : len(chosen)], strict=True):
            look = _look(draw(character, face))
            if not look.any() or (others @ look).max(initial=0) >= SIMILARITY_LIMIT:
                break
            looks.append(look)
        else:
            taken[:, len(chosen)] = looks
            chosen.append(character)
    return "".join(chosen)


def _look(mask: Mask) -> Look:
    """Stretch ink to a square, blur it and scale it to length 1: the dot product of two is their cosine.

    Stretched, because proportions change from face to face, and O and 0, or Ы and ы, differ in nothing else.
    """
    from PIL import Image, ImageFilter

    image = Image.fromarray(mask)
    square = image.resize((INK_SIZE, INK_SIZE), Image.Resampling.BILINEAR, box=image.getbbox())
    look = np.asarray(square.filter(ImageFilter.GaussianBlur(BLUR_RADIUS)).reduce(2), np.float32).ravel()
    length = float(np.linalg.norm(look))
    return look / np.float32(max(length, 1))  # a character without ink has length 0


def _candidates() -> list[str]:
    """List the visible characters that all faces have: letters and digits first, accented ones last."""
    from matplotlib.ft2font import FT2Font

    shared = set.intersection(*(set(FT2Font(str(_font_file(name))).get_charmap()) for name in FACES))
    visible = [chr(code) for code in shared if unicodedata.category(chr(code)) in VISIBLE_CATEGORIES]
    return sorted(visible, key=_familiarity)


def _familiarity(character: str) -> tuple[bool, bool, int, int]:
    """Sort key: plain before composed, letters and digits before signs, then by block and code point."""
    code = ord(character)
    block = next((number for number, block in enumerate(BLOCKS) if code in block), len(BLOCKS))
    is_sign = unicodedata.category(character)[0] not in "LN"
    return unicodedata.decomposition(character) != "", is_sign, block, code


def _font_file(name: str) -> Path:
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / FACES[name]
    if not path.is_file():
        raise DataError(
            f"glyphs: {path} is missing; it is one of the DejaVu fonts of matplotlib: "
            "reinstall that with `pip install --force-reinstall matplotlib`"
        )
    return path
