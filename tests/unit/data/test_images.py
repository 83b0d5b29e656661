"""Decoding, cropping and what is refused; expected pixels are computed with NumPy alone."""

import io
import math
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from lcl_ds.data.corpora.record import IMAGE_MEMBERS
from lcl_ds.data.documents import IMAGE_SUFFIXES, BadSampleError
from lcl_ds.data.images import FORMATS, ORIENTATION, _decode, check_image, decode_image, open_image, random_box
from lcl_ds.data.stream.lanes import keyed_rng

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


def near(actual, expected, tolerance):
    return all(
        abs(a - b) <= tolerance for f, e in zip(actual, expected, strict=True) for a, b in zip(f, e, strict=True)
    )


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
    actual = centres(decode_image(encoded(palette, transparency=0), SIDE))
    assert actual == [(255, 255, 255), GREEN] * 2
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


def exif_with(orientation, tag, kind, count, raw):
    """A big-endian EXIF block of an orientation and one further tag, byte by byte."""
    entries = sorted([(ORIENTATION, 3, 1, struct.pack(">H", orientation)), (tag, kind, count, raw)])
    start, values = struct.pack(">H", 2), b""
    for number, type_, length, value in entries:
        held = struct.pack(">L", 8 + 2 + 24 + 4 + len(values)) if len(value) > 4 else value.ljust(4, b"\0")
        values += value if len(value) > 4 else b""
        start += struct.pack(">HHL", number, type_, length) + held
    return b"Exif\0\0MM\0*" + struct.pack(">L", 8) + start + struct.pack(">L", 0) + values


ODD_TAGS = {
    "a fraction for a count": (0x0103, 5, 1, struct.pack(">LL", 1, 3)),
    "text for a count": (0x0103, 2, 4, b"abc\0"),
    "a negative width": (0x0100, 9, 1, struct.pack(">l", -5)),
    "a resolution that is no number": (0x011A, 12, 1, struct.pack(">d", float("nan"))),
    "a resolution over zero": (0x011A, 5, 1, struct.pack(">LL", 1, 0)),
    "a block that leads to itself": (0x8769, 4, 1, struct.pack(">L", 8)),
    "a value behind the end": (0x010E, 2, 1 << 30, struct.pack(">L", 1 << 30) + b"x"),
    "a kind that is not defined": (0x010E, 99, 3, b"abc"),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("tag", ODD_TAGS.values(), ids=ODD_TAGS)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "MPO"])
def test_an_odd_exif_tag_turns_no_picture_and_costs_none(format, tag, orientation):
    exif = exif_with(orientation, *tag)
    options = {"exif": exif} if format == "PNG" else {"quality": 95, "subsampling": 0, "exif": exif}
    data = encoded(Image.fromarray(PICTURE), format, **options)
    expected = centres(UPRIGHT[orientation](PICTURE).transpose(2, 0, 1))
    assert near(centres(decode_image(data, SIDE)), expected, 3)
    check_image(data)


def two_pictures(first, **options):
    """A JPEG in which a second picture follows, as phones write it."""
    return encoded(first, "MPO", save_all=True, append_images=[Image.new("RGB", first.size)], **options)


def test_of_a_jpeg_with_two_pictures_the_first_is_taken_at_a_fraction_of_its_size():
    data = two_pictures(Image.fromarray(PICTURE), quality=95, subsampling=0)
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert near(centres(decode_image(data, SIDE)), [RED, GREEN, BLUE, GREY], 3)
    assert check_image(data).format == "JPEG"
    assert _decode(open_image(two_pictures(smooth(800, 1000))), 1, shrink=800 / 224).size == (500, 400)


def test_every_format_that_is_decoded_can_be_written_to_a_shard():
    assert set(IMAGE_MEMBERS) == set(FORMATS)
    assert set(IMAGE_MEMBERS.values()) <= set(IMAGE_SUFFIXES)


def chunk(kind, data):
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def segment(marker, data):
    return bytes([0xFF, marker]) + (len(data) + 2).to_bytes(2, "big") + data


MUCH = b"x" * (3 << 20)
PNG_NOTES = {
    "a text": chunk(b"tEXt", b"k\0" + MUCH),
    "a packed text": chunk(b"zTXt", b"k\0\0" + zlib.compress(MUCH)),
    "a text packed in an unknown way": chunk(b"zTXt", b"k\0\7abc"),
    "an international text": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(MUCH)),
    "many texts": chunk(b"tEXt", b"k\0" + MUCH) * 23,
    "a profile": chunk(b"iCCP", b"k\0\0" + zlib.compress(MUCH)),
    "half a profile": chunk(b"iCCP", b"k\0"),
    "half a resolution": chunk(b"pHYs", b"\0"),
    "half a gamma": chunk(b"gAMA", b"\0"),
    "half an animation": chunk(b"acTL", b"\0"),
    "a frame outside": chunk(b"fcTL", b"\0" * 4 + b"\xff" * 22),
    "a text with a wrong sum": chunk(b"tEXt", b"k\0abc")[:-1] + b"\0",
}
JPEG_NOTES = {
    "a profile": b"".join(segment(0xE2, b"ICC_PROFILE\0" + bytes([i, 60]) + MUCH[:60_000]) for i in range(1, 61)),
    "half a profile": segment(0xE2, b"ICC_PROFILE\0"),
    "Photoshop's, cut off": segment(0xED, b"Photoshop 3.0\x008BIM\4\4"),
    "a second picture that is not there": segment(0xE2, b"MPF\0MM\0*\0\0\0\x08\0\1\xb0\1\0\4\0\0\0\1\0\0\0\2"),
    "a preview": segment(0xE2, b"FPXR\0" + MUCH[:60_000]),
    "a comment": segment(0xFE, MUCH[:60_000]) * 50,
    "EXIF of rubbish": segment(0xE1, b"Exif\0\0" + b"\xff" * 99),
    "half an Adobe mark": segment(0xEE, b"Adobe"),
    "half a JFIF mark": segment(0xE0, b"JFIF"),
    "filling before half an Adobe mark": b"\xff\xff" + segment(0xEE, b"Adobe"),
}


@pytest.mark.parametrize("notes", PNG_NOTES.values(), ids=PNG_NOTES)
@pytest.mark.parametrize("is_behind", [False, True], ids=["before the pixels", "behind the pixels"])
def test_no_note_of_a_png_costs_the_picture(notes, is_behind):
    data = encoded(Image.fromarray(PICTURE))
    at = len(data) - 12 if is_behind else data.index(b"IDAT") - 4
    data = data[:at] + notes + data[at:]
    assert centres(decode_image(data, SIDE)) == [RED, GREEN, BLUE, GREY]
    check_image(data)


@pytest.mark.parametrize("notes", JPEG_NOTES.values(), ids=JPEG_NOTES)
def test_no_note_of_a_jpeg_costs_the_picture(notes):
    data = encoded(Image.fromarray(PICTURE), "JPEG", quality=95, subsampling=0)
    noted = data[:20] + notes + data[20:]  # behind JFIF
    assert (decode_image(noted, SIDE) == decode_image(data, SIDE)).all()
    check_image(noted)


@pytest.mark.parametrize("error", [ZeroDivisionError, RecursionError, AssertionError, MemoryError])
def test_whatever_a_decoder_raises_is_one_bad_sample(error, monkeypatch):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr(JpegImageFile, "load", broken)
    with pytest.raises(BadSampleError):
        decode_image(encoded(smooth(64, 64), "JPEG"), 16)


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
    actual = decode_image(encoded(image, "JPEG", quality=95), size).transpose(1, 2, 0)
    assert np.abs(actual - expected).mean() < 1.5
    assert np.abs(actual - expected).max() < 30


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
    actual = np.array([random_box(width, height, (0.9, 1.0), keyed_rng(i)) for i in range(2000)])
    left, top, right, bottom = actual.T
    assert (actual == actual.round()).all()
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


def test_the_limit_of_pixels_is_the_one_that_is_set_and_no_other():
    side = 14_000  # more pixels than Pillow takes by itself
    one_row = encoded(Image.new("L", (side, 1)))
    large = one_row[:20] + side.to_bytes(4, "big") + one_row[24:]  # the header's height
    large = large[:29] + zlib.crc32(large[12:29]).to_bytes(4, "big") + large[33:]
    assert check_image(large, max_pixels=side * side, decode=False).height == side
    with pytest.raises(BadSampleError, match="too many pixels"):
        check_image(large, max_pixels=side * side - 1, decode=False)
