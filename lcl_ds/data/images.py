"""Encoded images to square uint8 pixels."""

import io
import math

import numpy as np
from PIL import Image, UnidentifiedImageError

from lcl_ds.data.documents import BadSampleError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Formats that are opened; Pillow would also run PostScript and read multi-page files."""


def decode_image(
    data: bytes,
    size: int,
    crop_scale: tuple[float, float] = (1.0, 1.0),
    rng: np.random.Generator | None = None,
    max_pixels: int = 89_000_000,
) -> np.ndarray:
    """Decode and crop to a square.

    Args:
        data: a file's bytes.
        size: side of the result in pixels.
        crop_scale: area range of the random crop (aspect 3/4 to 4/3, as in RandomResizedCrop).
        rng: source of the crop; None takes the central square.
        max_pixels: larger images are refused from their header, before memory is spent.

    Returns:
        uint8 [3, size, size], RGB.

    Raises:
        BadSampleError: damaged, of another format, or too large.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > max_pixels:
            raise BadSampleError("an image with too many pixels")
        box = _central_square(*image.size) if rng is None else _random_box(*image.size, crop_scale, rng)
        rgb = _to_rgb(image)
        pixels = rgb.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadSampleError(f"an image that cannot be decoded ({type(error).__name__})") from None
    return np.ascontiguousarray(np.asarray(pixels).transpose(2, 0, 1))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow clips 16-bit grey to white instead of scaling it.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        # Transparent pixels may hide any colour: show them on white, as a browser does.
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image)
        image = canvas
    return image.convert("RGB")


def _central_square(width: int, height: int) -> tuple[float, float, float, float]:
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _random_box(
    width: int, height: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[float, float, float, float]:
    area, log_ratio, across, down = rng.random(4)
    target = width * height * (scale[0] + (scale[1] - scale[0]) * area)
    ratio = math.exp((2 * log_ratio - 1) * math.log(4 / 3))
    w, h = min(math.sqrt(target * ratio), width), min(math.sqrt(target / ratio), height)
    left, top = (width - w) * across, (height - h) * down
    return left, top, left + w, top + h
