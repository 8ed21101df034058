"""The built-in task: which of 200 characters is this, in a face that was never trained on?

Characters of the DejaVu fonts are rotated, scaled, sheared, shifted, drawn dark on light or light on dark
over an uneven ground with pixel noise, 24 x 24 pixels in grey. Each sample is computed when it is asked for,
from (seed, epoch, index) alone. There is nothing to download.

The twelve faces are three families (sans, mono, serif), each upright and slanted, regular and bold. Every
family gives up one slanted face: training sees its slant in the other weight and its weight upright, but
never the two together. The sans and the serif face given up are the test, the mono face the validation.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from feedbackpath.data.characters import FACES, INK_SIZE, MASK_SIZE, choose_characters, draw, open_face
from feedbackpath.data.counter import uniform
from feedbackpath.data.dataset import Dataset, Samples, Split, stream_positions
from feedbackpath.errors import DataError

TEST_FACES = ("sans-bold-oblique", "serif-italic")
VALIDATION_FACES = ("mono-bold-oblique",)
TRAIN_FACES = tuple(face for face in FACES if face not in TEST_FACES + VALIDATION_FACES)

DEFAULT_CLASSES = 200
MAX_CLASSES = 1000
DEFAULT_SAMPLES_PER_EPOCH = 25_000
MIN_TEST_SAMPLES = 4_000  # rounded up so that every class appears equally often in every face
MIN_VALIDATION_SAMPLES = 2_000

SAMPLE_SIZE = 24  # pixels a side
FIELD_SIZE = 256  # pixels a side of the random fields that grounds and pixel noise are cut from
MEAN_INK = 0.17  # of a frame
PIXEL_STD = 0.36
FIXED_SEED = 0  # of validation and test: they are the same whatever the seed of a run

# How much samples of one class in one face differ. A pair is a range that is drawn from uniformly; a single
# number is the largest value either way.
ROTATION = math.radians(12)
SCALE = (0.62, 0.92)  # longer side of the upright ink, as a share of the sample's side
SHEAR = 0.15  # sideways move of the top per pixel of height
SHIFT = 2.0  # of the middle, in either direction, in pixels
CONTRAST = (0.4, 1.0)  # ink minus ground, before the sign is drawn
GROUND = 0.3  # brightness of the ground
TEXTURE = (0.0, 0.4)  # amplitude of the uneven ground
NOISE = (0.05, 0.25)  # amplitude of the pixel noise


@dataclass(frozen=True, eq=False)
class GlyphSplit(Split):
    """Samples of characters, drawn when they are asked for."""

    masks: Tensor  # ink of every class in every face, uint8 `[faces, classes, mask, mask]`
    samples_per_epoch: int  # epochs walk through classes and faces in turn
    key: tuple[int, ...]  # of the random numbers, beside the epoch and the index
    fixed: bool  # whether all epochs are the same

    def __len__(self) -> int:
        return self.samples_per_epoch

    def batch(self, indices: Tensor, epoch: int) -> Samples:
        """Return some samples of an epoch: see `Split.batch`."""
        epoch = 0 if self.fixed else epoch
        num_faces, num_classes = self.masks.shape[:2]
        positions = stream_positions(indices, epoch, self.samples_per_epoch, num_faces * num_classes)
        ink = self.masks.flatten(0, 1)[positions, None].float() / 255
        draws = uniform(indices, 14, *self.key, epoch)
        ink = _transform(ink, draws[:, :5])
        return _paint(ink, draws[:, 5:], self._fields), positions % num_classes

    @cached_property
    def _fields(self) -> tuple[Tensor, Tensor]:
        return _random_field(8, *self.key), _random_field(1, *self.key)


def _transform(ink: Tensor, draws: Tensor) -> Tensor:
    """Rotate, scale, shear and shift masks `[N, 1, mask, mask]` into frames `[N, 1, 24, 24]`.

    `grid_sample` asks where in the mask a pixel of the frame comes from, so this is the inverse map.
    """
    angle, scale, shear, right, down = draws[:, :, None, None].unbind(1)
    angle = _either_way(angle, ROTATION)
    shear = _either_way(shear, SHEAR)
    zoom = (INK_SIZE / MASK_SIZE) / _between(scale, SCALE)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    # Written out: `affine_grid` takes as long for these small frames as all the rest of a batch.
    centres = (torch.arange(SAMPLE_SIZE) + 0.5) * (2 / SAMPLE_SIZE) - 1  # of the frame's pixels, -1 to 1
    across = centres - _either_way(right, 2 * SHIFT / SAMPLE_SIZE)
    along = centres[:, None] - _either_way(down, 2 * SHIFT / SAMPLE_SIZE)
    x = (cos + shear * sin) * across + (sin - shear * cos) * along
    y = cos * along - sin * across
    return F.grid_sample(ink, torch.stack([x, y], 1).movedim(1, -1), align_corners=False)


def _paint(ink: Tensor, draws: Tensor, fields: tuple[Tensor, Tensor]) -> Tensor:
    """Give ink `[N, 1, 24, 24]` a brightness, lay it on a ground and normalise."""
    sign, contrast, ground, texture, noise = draws[:, :5, None, None, None].unbind(1)
    corners = (draws[:, 5:9] * (FIELD_SIZE - SAMPLE_SIZE + 1)).long()
    contrast = _between(contrast, CONTRAST) * torch.where(sign < 0.5, -1.0, 1.0)
    image = contrast * (ink - MEAN_INK) + _either_way(ground, GROUND)
    image += _between(texture, TEXTURE) * _windows(fields[0], corners[:, :2])
    image += _between(noise, NOISE) * _windows(fields[1], corners[:, 2:])
    return image / PIXEL_STD


def _random_field(cell: int, *key: int) -> Tensor:
    """Numbers between -1 and 1, smooth over `cell` pixels, `[FIELD_SIZE, FIELD_SIZE]`."""
    side = FIELD_SIZE // cell
    coarse = 2 * uniform(torch.arange(side), side, *key, cell) - 1
    return F.interpolate(coarse[None, None], (FIELD_SIZE, FIELD_SIZE), mode="bilinear")[0, 0]


def _windows(field: Tensor, corners: Tensor) -> Tensor:
    """Cut frames out of a field at their top left corners `[N, 2]`; `[N, 1, 24, 24]`."""
    frames = field.unfold(0, SAMPLE_SIZE, 1).unfold(1, SAMPLE_SIZE, 1)
    return frames[corners[:, 0], corners[:, 1]][:, None]


def _between(draw: Tensor, bounds: tuple[float, float]) -> Tensor:
    low, high = bounds
    return low + (high - low) * draw


def _either_way(draw: Tensor, largest: float) -> Tensor:
    return _between(draw, (-largest, largest))


def load_glyphs(
    *, seed: int = 0, num_classes: int = DEFAULT_CLASSES, samples_per_epoch: int = DEFAULT_SAMPLES_PER_EPOCH
) -> Dataset:
    """Draw the characters and make the three splits: see `load_dataset`."""
    if not 2 <= num_classes <= MAX_CLASSES:
        raise DataError(f"glyphs: num_classes is {num_classes}; choose 2 to {MAX_CLASSES}")
    characters = choose_characters(num_classes, TRAIN_FACES)
    if len(characters) < num_classes:
        raise DataError(f"glyphs: these fonts hold {len(characters)} distinct characters, not {num_classes}")
    train_masks, validation_masks, test_masks = (
        _draw_all(characters, faces) for faces in (TRAIN_FACES, VALIDATION_FACES, TEST_FACES)
    )
    train = GlyphSplit(train_masks, samples_per_epoch, (seed, 0), fixed=False)
    validation = _fixed_split(validation_masks, MIN_VALIDATION_SAMPLES, 1)
    test = _fixed_split(test_masks, MIN_TEST_SAMPLES, 2)
    digest = hashlib.sha256(characters.encode())
    for masks in (train_masks, validation_masks, test_masks):
        digest.update(masks.numpy().data)
    return Dataset(
        "glyphs",
        num_classes,
        (1, SAMPLE_SIZE, SAMPLE_SIZE),
        train,
        validation,
        test,
        facts={
            "source": f"DejaVu fonts of matplotlib {version('matplotlib')}, Pillow {version('Pillow')}",
            "checksum": digest.hexdigest(),
            "samples_per_epoch": samples_per_epoch,
            "sizes": {"validation": len(validation), "test": len(test)},
            "faces": {"train": [*TRAIN_FACES], "validation": [*VALIDATION_FACES], "test": [*TEST_FACES]},
            "characters": characters,
        },
    )


def _draw_all(characters: str, names: tuple[str, ...]) -> Tensor:
    faces = [open_face(name) for name in names]
    return torch.from_numpy(np.stack([[draw(character, face) for character in characters] for face in faces]))


def _fixed_split(masks: Tensor, min_samples: int, number: int) -> GlyphSplit:
    num_cells = masks.shape[0] * masks.shape[1]
    num_samples = math.ceil(min_samples / num_cells) * num_cells
    return GlyphSplit(masks, num_samples, (FIXED_SEED, number), fixed=True)
