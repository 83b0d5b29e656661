"""Decoding, cropping and what is refused."""

import io

import numpy as np
import pytest
from PIL import Image

from lcl_ds.data.documents import BadSampleError
from lcl_ds.data.images import decode_image
from lcl_ds.data.lanes import keyed_rng


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


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


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
def test_every_mode_becomes_rgb(mode):
    image = Image.new("RGB", (10, 10), (200, 200, 200)).convert(mode)
    assert decode_image(encoded(image, "JPEG" if mode == "CMYK" else "PNG"), 4).shape == (3, 4, 4)


def test_transparent_pixels_are_white_and_16_bit_grey_is_scaled():
    assert (decode_image(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0))), 4) == 255).all()
    grey = Image.fromarray(np.full((4, 4), 128 << 8, dtype=np.uint16))
    assert (decode_image(encoded(grey), 4) == 128).all()


@pytest.mark.parametrize(
    "data",
    [b"", b"<html>", encoded(Image.new("RGB", (64, 64)), "JPEG")[:300], encoded(Image.new("RGB", (8, 8)), "TIFF")],
    ids=["empty", "html", "truncated", "tiff"],
)
def test_what_is_no_whole_web_image_is_a_bad_sample(data):
    with pytest.raises(BadSampleError):
        decode_image(data, 4)


def test_a_huge_image_is_refused_from_its_header():
    with pytest.raises(BadSampleError, match="too many pixels"):
        decode_image(encoded(Image.new("L", (3000, 3000))), 4, max_pixels=1000)
