"""Decoding, cropping and what is refused; expected pixels are computed with NumPy alone."""

import io
import math
import zlib

import numpy as np
import pytest
from PIL import Image

from lcl_ds.data.documents import BadSampleError
from lcl_ds.data.images import ORIENTATION, _decode, check_image, decode_image, open_image, random_box
from lcl_ds.data.lanes import keyed_rng

SIDE = 48


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def blocks(*colours, side=SIDE):
    """Quarters of four colours: uint8 [side, side, channels], in reading order."""
    half = side // 2
    quarters = [np.full((half, half, len(colours[0])), colour, dtype=np.uint8) for colour in colours]
    return np.concatenate([np.concatenate(quarters[:2], axis=1), np.concatenate(quarters[2:], axis=1)])


RED, GREEN, BLUE, GREY = (200, 10, 20), (10, 180, 30), (20, 30, 220), (128, 128, 128)
PICTURE = blocks(RED, GREEN, BLUE, GREY)


def centres(pixels):
    """The colours in the middle of the four quarters of uint8 [3, H, W], in reading order."""
    quarter = pixels.shape[1] // 4
    at = (quarter, 3 * quarter)
    return [tuple(int(v) for v in pixels[:, y, x]) for y in at for x in at]


def near(found, expected, tolerance):
    return all(abs(a - b) <= tolerance for f, e in zip(found, expected, strict=True) for a, b in zip(f, e, strict=True))


@pytest.mark.parametrize(
    ("format", "options", "tolerance"),
    [("PNG", {}, 0), ("BMP", {}, 0), ("WEBP", {"lossless": True}, 0), ("JPEG", {"quality": 95, "subsampling": 0}, 3)],
)
def test_every_format_gives_its_pixels(format, options, tolerance):
    data = encoded(Image.fromarray(PICTURE), format, **options)
    assert near(centres(decode_image(data, SIDE)), [RED, GREEN, BLUE, GREY], tolerance)
    assert check_image(data).format == format


def test_a_palette_is_looked_up():
    image = Image.fromarray(blocks((0,), (1,), (2,), (1,))[..., 0], "P")
    image.putpalette([*RED, *GREEN, *BLUE])
    assert centres(decode_image(encoded(image), SIDE)) == [RED, GREEN, BLUE, GREEN]


def test_cmyk_is_ink_on_white():
    inks = [(0, 0, 0, 0), (255, 0, 0, 0), (0, 100, 200, 0), (50, 60, 70, 128)]
    expected = [tuple(round((255 - c) * (255 - k) / 255) for c in ink) for *ink, k in inks]
    data = encoded(Image.fromarray(blocks(*inks), "CMYK"), "JPEG", quality=100, subsampling=0)
    assert near(centres(decode_image(data, SIDE)), expected, 4)


def test_16_bit_grey_is_scaled():
    values = np.array([0, 20_000, 40_000, 65_535])
    grey = np.repeat(np.repeat(values.reshape(2, 2), SIDE // 2, axis=0), SIDE // 2, axis=1).astype(np.uint16)
    expected = [(round(v / 257),) * 3 for v in values]
    assert near(centres(decode_image(encoded(Image.fromarray(grey)), SIDE)), expected, 1)


def test_transparent_pixels_show_white():
    colours = [(200, 10, 20, 255), (200, 10, 20, 0), (0, 0, 0, 128), (100, 200, 0, 51)]
    expected = [tuple(round(c * a / 255 + 255 - a) for c in colour) for *colour, a in colours]
    assert near(centres(decode_image(encoded(Image.fromarray(blocks(*colours))), SIDE)), expected, 1)
    palette = Image.fromarray(blocks((0,), (1,), (0,), (1,))[..., 0], "P")
    palette.putpalette([*RED, *GREEN])
    found = centres(decode_image(encoded(palette, transparency=0), SIDE))
    assert found == [(255, 255, 255), GREEN] * 2
    grey = Image.fromarray(blocks((90, 255), (90, 0), (0, 255), (0, 0)), "LA")
    assert centres(decode_image(encoded(grey), SIDE)) == [(90,) * 3, (255,) * 3, (0,) * 3, (255,) * 3]


@pytest.mark.parametrize(("format", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})])
def test_an_animation_gives_its_first_frame(format, options):
    frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in (RED, GREEN, BLUE)]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=100, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert near(centres(decode_image(data, SIDE)), [RED] * 4, 4)


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}
"""What EXIF 2.3 asks for: where the stored rows and columns belong."""


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("format", ["JPEG", "WEBP", "PNG"])
def test_pictures_are_turned_upright(orientation, format):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}, "PNG": {}}[format]
    data = encoded(Image.fromarray(PICTURE), format, exif=exif, **options)
    expected = centres(UPRIGHT[orientation](PICTURE).transpose(2, 0, 1))
    assert near(centres(decode_image(data, SIDE)), expected, 3)


def test_turned_pictures_are_cropped_as_one_sees_them():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    wide = np.zeros((30, 60, 3), dtype=np.uint8)
    wide[:, :30] = 250  # stored left, seen at the top
    seen = decode_image(encoded(Image.fromarray(wide), exif=exif), 20)
    assert (seen[:, :8] > 240).all()
    assert (seen[:, 12:] < 10).all()


def smooth(height, width, seed=0):
    """A picture without detail finer than a 32nd of its sides."""
    coarse = np.random.default_rng(seed).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size():
    data = encoded(smooth(800, 1000), "JPEG", quality=95)
    assert _decode(open_image(data), 1, shrink=800 / 224).size == (500, 400)
    assert _decode(open_image(data), 1, shrink=1.9).size == (1000, 800)
    assert _decode(open_image(data), 1, shrink=50).size == (125, 100)


@pytest.mark.parametrize("size", [32, 90, 224, 500])
def test_the_fraction_shows_the_same_picture(size):
    image = smooth(800, 1000)
    whole = Image.open(io.BytesIO(encoded(image, "JPEG", quality=95))).convert("RGB")
    box = (100, 0, 900, 800)
    expected = np.asarray(whole.resize((size, size), Image.Resampling.BICUBIC, box=box)).astype(float)
    found = decode_image(encoded(image, "JPEG", quality=95), size).transpose(1, 2, 0)
    assert np.abs(found - expected).mean() < 1.5
    assert np.abs(found - expected).max() < 30


def test_the_central_square_is_taken_without_a_generator():
    pixels = np.zeros((20, 60, 3), dtype=np.uint8)
    pixels[:, 20:40] = 200
    cropped = decode_image(encoded(Image.fromarray(pixels)), 8)
    assert (cropped[:, :, 2:6] == 200).all()
    assert (cropped > 170).all()


def test_crops_depend_on_the_key_alone():
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)))
    first, again, other = (decode_image(data, 16, (0.5, 0.9), keyed_rng(*key)) for key in [(1, 2), (1, 2), (1, 3)])
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize("size", [(500, 400), (300, 400), (224, 224)])
def test_boxes_have_the_area_and_aspect_of_random_resized_crop(size):
    width, height = size
    found = np.array([random_box(width, height, (0.9, 1.0), keyed_rng(i)) for i in range(2000)])
    left, top, right, bottom = found.T
    assert (found == found.round()).all()
    assert ((left >= 0) & (top >= 0) & (right <= width) & (bottom <= height)).all()
    areas, ratios = (right - left) * (bottom - top) / (width * height), (right - left) / (bottom - top)
    assert (areas > 0.89).all()
    assert ((ratios > 0.74) & (ratios < 1.34)).all()
    # Uniform in area, before boxes that do not fit are drawn again, which favours small ones.
    assert 0.9 < np.quantile(areas, 0.05) < np.quantile(areas, 0.5) < 0.96


@pytest.mark.parametrize(("size", "box"), [((900, 100), (383, 0, 516, 100)), ((100, 900), (0, 383, 100, 516))])
def test_an_image_too_narrow_for_any_box_is_cropped_in_the_middle(size, box):
    assert random_box(*size, (0.9, 1.0), keyed_rng(0)) == box


def test_a_smaller_area_range_gives_uniform_areas():
    areas = [
        (b[2] - b[0]) * (b[3] - b[1]) / 1000**2
        for b in (random_box(1000, 1000, (0.2, 0.5), keyed_rng(i)) for i in range(2000))
    ]
    assert math.isclose(np.mean(areas), 0.35, abs_tol=0.01)
    assert math.isclose(np.var(areas), 0.3**2 / 12, rel_tol=0.1)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "none of the accepted formats"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "none of the accepted formats"),
        (encoded(Image.new("RGB", (8, 8)), "TIFF"), "none of the accepted formats"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "none of the accepted formats"),
        (encoded(smooth(64, 64), "JPEG")[:-200], "a damaged image"),
        (encoded(smooth(64, 64), "PNG")[:-200], "a damaged image"),
        (encoded(smooth(64, 64), "WEBP")[:-200], "a damaged image"),
        (encoded(Image.new("P", (1, 1)), "GIF"), "too small or too narrow"),
        (encoded(Image.new("L", (3000, 5))), "too small or too narrow"),
    ],
    ids=["empty", "html", "tiff", "eps", "cut jpeg", "cut png", "cut webp", "tracking pixel", "strip"],
)
def test_what_is_no_whole_web_image_is_a_bad_sample(data, reason):
    for look in (check_image, lambda data: decode_image(data, 4)):
        with pytest.raises(BadSampleError, match=reason):
            look(data)


@pytest.mark.parametrize("side", [3000, 60_000])
def test_a_huge_image_is_refused_from_its_header(side):
    one_row = encoded(Image.new("L", (side, 1)))
    bomb = one_row[:20] + side.to_bytes(4, "big") + one_row[24:]  # the header's height
    bomb = bomb[:29] + zlib.crc32(bomb[12:29]).to_bytes(4, "big") + bomb[33:]
    with pytest.raises(BadSampleError, match="too many pixels"):
        decode_image(bomb, 4, max_pixels=8_000_000)
