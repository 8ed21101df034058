"""Decoding, crops and resizing, against Pillow's own `crop` and `resize` as the plain reference."""

import io

import numpy as np
import pytest
import torch
from image_folders import cut_photograph, encode
from PIL import Image

from feedbackpath.data import decode as decoding
from feedbackpath.data.counter import uniform
from feedbackpath.data.decode import JPEG_MAGIC, UnreadableImageError, decode, image_format, shorten
from feedbackpath.data.imagenet import NUM_DRAWS, centre_view, random_box, random_view

PHOTOGRAPH = cut_photograph(3, (300, 220))
RAW = encode(PHOTOGRAPH)


@pytest.fixture(params=["simplejpeg", "Pillow"])
def decoder(request, monkeypatch):
    if request.param == "Pillow":
        monkeypatch.setattr(decoding, "find_simplejpeg", lambda: None)
    elif decoding.find_simplejpeg() is None:
        pytest.skip("needs simplejpeg")
    return request.param


def draws_of(number):
    return uniform(torch.tensor([number]), NUM_DRAWS, 0)[0].tolist()


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def assert_close_in_grey_levels(fast, slow, mean=0.5):
    assert fast.dtype == slow.dtype == torch.uint8
    assert fast.shape == slow.shape
    assert (fast.double() - slow.double()).abs().mean() < mean


@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("size", [32, 224])
def test_a_random_view_is_what_pillow_makes_of_the_same_box(decoder, number, size):
    draws = draws_of(number)
    with Image.open(io.BytesIO(RAW)) as image:
        part = image.convert("RGB").crop(random_box(*image.size, draws))
    slow = to_tensor(part.resize((size, size), Image.Resampling.BILINEAR))
    assert_close_in_grey_levels(random_view(RAW, size, draws), slow.flip(2) if draws[-1] < 0.5 else slow)


@pytest.mark.parametrize("shape", [(300, 220), (220, 300), (90, 90), (40, 200)])
def test_the_centre_view_is_what_pillow_makes_in_two_steps(decoder, shape):
    raw, size = encode(cut_photograph(5, shape)), 112
    with Image.open(io.BytesIO(raw)) as image:
        share = 128 / min(image.size)
        width, height = (int(side * share + 1e-9) for side in image.size)
        left, top = round((width - size) / 2), round((height - size) / 2)
        slow = image.resize((width, height), Image.Resampling.BILINEAR)
    slow = slow.crop((left, top, left + size, top + size))
    assert_close_in_grey_levels(centre_view(raw, size), to_tensor(slow))


def test_both_decoders_give_the_same_pixels(monkeypatch):
    pytest.importorskip("simplejpeg")
    fast = decode(RAW)
    monkeypatch.setattr(decoding, "find_simplejpeg", lambda: None)
    assert np.abs(fast.astype(int) - decode(RAW)).mean() < 0.5


def test_random_boxes_fit_and_vary():
    boxes = [random_box(120, 80, draws_of(number)) for number in range(300)]
    assert all(0 <= left < right <= 120 and 0 <= top < bottom <= 80 for left, top, right, bottom in boxes)
    shapes = np.array([(right - left, bottom - top) for left, top, right, bottom in boxes])
    shares, ratios = shapes.prod(1) / 9600, shapes[:, 0] / shapes[:, 1]
    assert 0.07 < shares.min() < 0.12
    assert 0.8 < shares.max() < 0.9  # of a 4:3 part in a 3:2 image
    assert 0.7 < ratios.min() < 0.8
    assert 1.25 < ratios.max() < 1.4
    assert len({box[0] for box in boxes}) > 30


@pytest.mark.parametrize("shape", [(1000, 10), (10, 1000), (1, 1), (1, 5)])
def test_where_no_shape_fits_the_box_is_the_largest_in_the_centre(shape):
    width, height = shape
    left, top, right, bottom = random_box(width, height, [0.999] * NUM_DRAWS)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert left == (width - right) or abs(left - (width - right)) == 1
    assert min(right - left, bottom - top) == min(shape)


def gradient16():
    return Image.fromarray((np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16))


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    return encode(PHOTOGRAPH, exif=exif)


@pytest.mark.parametrize(
    ("raw", "reference"),
    [
        (encode(PHOTOGRAPH.convert("L")), PHOTOGRAPH.convert("L").convert("RGB")),
        (encode(PHOTOGRAPH.convert("CMYK")), PHOTOGRAPH),
        (encode(PHOTOGRAPH, "PNG"), PHOTOGRAPH),
        (encode(PHOTOGRAPH.convert("RGBA"), "PNG"), PHOTOGRAPH),
        (encode(PHOTOGRAPH, progressive=True), PHOTOGRAPH),
        (
            encode(PHOTOGRAPH.quantize(64), "PNG", transparency=b"\x80\x00"),
            PHOTOGRAPH.quantize(64).convert("RGB"),
        ),
        (rotated(), PHOTOGRAPH),
        (encode(PHOTOGRAPH, "GIF"), None),
        (encode(PHOTOGRAPH, "WEBP"), None),
    ],
    ids=["grey", "cmyk", "png", "alpha", "progressive", "palette", "exif", "gif", "webp"],
)
def test_all_kinds_of_images_become_rgb(decoder, raw, reference):
    pixels = decode(raw)
    assert pixels.shape == (220, 300, 3)
    if reference is not None:
        assert np.abs(pixels.astype(int) - np.array(reference)).mean() < 4  # what JPEG loses


def test_sixteen_bits_are_scaled_and_not_clipped():
    pixels = decode(encode(gradient16(), "PNG"))
    assert np.array_equal(pixels[:, :, 0], np.array(gradient16()) >> 8)
    assert np.array_equal(pixels[:, :, 0], pixels[:, :, 2])


@pytest.mark.parametrize(
    ("raw", "message", "is_truncated"),
    [
        (b"", "empty", False),
        (b"a text", "not an image", False),
        (b"\xff\xd8\xff but no more", "not an image", False),
        (RAW[: len(RAW) // 2], "truncated", True),
        (RAW[:-2000], "truncated", True),
        (encode(PHOTOGRAPH, "PNG")[:5000], "cannot be decoded", True),
    ],
    ids=["empty", "text", "magic", "half", "end", "png"],
)
def test_what_is_no_whole_image_is_refused(decoder, raw, message, is_truncated):
    with pytest.raises(UnreadableImageError, match=message) as caught:
        decode(raw)
    assert caught.value.is_truncated == is_truncated


@pytest.mark.parametrize(
    "options",
    [
        {}, {"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True},
        {"restart_marker_rows": 1}, {"optimize": True}, {"comment": b"\xff\xc0" * 9},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_part_is_the_same_as_when_all_is_decoded(decoder, mode, options):
    raw = encode(PHOTOGRAPH.convert(mode), **options)
    whole = decode(raw)
    for top, bottom in [(0, 1), (3, 100), (0, 220), *((5, bottom) for bottom in range(150, 184))]:
        part = decode(raw, lambda width, height, rows=(top, bottom): (7, rows[0], width, rows[1]))
        assert np.array_equal(part, whole[top:bottom, 7:]), (top, bottom)


def test_a_shortened_file_decodes_fewer_rows_and_others_stay_as_they_are():
    assert Image.open(io.BytesIO(shorten(RAW, 40))).size == (300, 48)
    for raw in (
        RAW[:-2000],
        RAW[:100],
        encode(PHOTOGRAPH, progressive=True),
        b"\xff\xd8\xff\xc0",
        JPEG_MAGIC,
    ):
        assert shorten(raw, 40) is raw
    assert shorten(RAW, 220) is RAW


def test_a_truncated_file_is_refused_where_its_part_is_whole(decoder):
    with pytest.raises(UnreadableImageError, match="truncated"):
        decode(RAW[:-2000], lambda width, height: (0, 0, 16, 16))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF"])
def test_the_format_is_read_from_the_bytes(kind):
    assert image_format(encode(PHOTOGRAPH, kind)) == kind


def test_no_format_is_none():
    assert image_format(b"a text") is None
