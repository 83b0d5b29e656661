"""Encoded images to square uint8 pixels."""

import io
import math
import struct
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lcl_ds.data.documents import BadSampleError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Formats that are opened; Pillow would also run PostScript and read multi-page files."""
MAX_PIXELS = 89_000_000
MIN_SIDE = 3
"""Smaller images are tracking pixels."""
MAX_ASPECT = 20
"""Longer strips are rules and borders."""
CROP_RATIOS = (3 / 4, 4 / 3)
CROP_TRIES = 10
ORIENTATION = 0x0112
"""EXIF tag."""

DAMAGE = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError, struct.error)
"""What Pillow's readers raise on damaged bytes; caught around its calls alone."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class ImageFacts:
    """What an image's header says."""

    format: str
    width: int
    height: int


def decode_image(
    data: bytes,
    size: int,
    crop_scale: tuple[float, float] = (1.0, 1.0),
    rng: np.random.Generator | None = None,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Decode, turn upright and crop to a square.

    The first frame of an animation is taken, transparent pixels show white, and a JPEG much larger than needed is
    decoded at a half, a quarter or an eighth of its size, which the DCT gives away for free.

    Args:
        data: a file's bytes.
        size: side of the result in pixels.
        crop_scale: area range of the random crop (aspect 3/4 to 4/3, as in torchvision's RandomResizedCrop).
        rng: source of the crop; None takes the central square.
        max_pixels: larger images are refused from their header, before memory is spent.

    Returns:
        uint8 [3, size, size], RGB.

    Raises:
        BadSampleError: damaged, of another format, or of a size that no picture has.
    """
    image = open_image(data, max_pixels)
    orientation = _orientation(image)
    width, height = image.size if orientation < 5 else image.size[::-1]
    box = _central_square(width, height) if rng is None else random_box(width, height, crop_scale, rng)
    rgb = _decode(image, orientation, shrink=min((box[2] - box[0]) / size, (box[3] - box[1]) / size))
    across, down = rgb.width / width, rgb.height / height
    scaled = box[0] * across, box[1] * down, box[2] * across, box[3] * down
    pixels = rgb.resize((size, size), Image.Resampling.BICUBIC, box=scaled, reducing_gap=2.0)
    return np.ascontiguousarray(np.asarray(pixels).transpose(2, 0, 1))


def check_image(data: bytes, max_pixels: int = MAX_PIXELS, decode: bool = True) -> ImageFacts:
    """What an image is, after everything was read that :func:`decode_image` would read.

    Args:
        decode: False looks at the header alone.

    Raises:
        BadSampleError: :func:`decode_image` would refuse it.
    """
    image = open_image(data, max_pixels)
    facts = ImageFacts(image.format or "", *image.size)
    if decode:
        _decode(image, _orientation(image), shrink=8)
    return facts


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image of which only the header was read.

    Raises:
        BadSampleError: of another format, or of a size that no picture has.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise BadSampleError("an image in none of the accepted formats") from None
    except Image.DecompressionBombError:
        raise BadSampleError("an image with too many pixels") from None
    except DAMAGE:
        raise BadSampleError("a damaged image") from None
    _check_size(image, max_pixels)
    return image


def page_of(data: bytes, number: int, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """One page of a multi-page TIFF as RGB.

    Raises:
        BadSampleError: there is no such page, it is damaged, or of a size that no picture has.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=("TIFF",))
        image.seek(number)
    except (*DAMAGE, Image.DecompressionBombError):
        raise BadSampleError("a page that is not there or damaged") from None
    _check_size(image, max_pixels)
    return _decode(image, orientation=1, shrink=1)


def _check_size(image: Image.Image, max_pixels: int) -> None:
    short, long = sorted(image.size)
    if short * long > max_pixels:
        raise BadSampleError("an image with too many pixels")
    if short < MIN_SIDE or long > MAX_ASPECT * short:
        raise BadSampleError("an image too small or too narrow")


def _decode(image: Image.Image, orientation: int, shrink: float) -> Image.Image:
    """RGB pixels, upright, each side divided by at most ``shrink``."""
    try:
        if image.format == "JPEG" and shrink >= 2:
            image.draft("RGB", (math.ceil(image.width / shrink), math.ceil(image.height / shrink)))
        image.load()
        if orientation != 1:
            image = ImageOps.exif_transpose(image)
        return _to_rgb(image)
    except DAMAGE:
        raise BadSampleError("a damaged image") from None


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where none can be read."""
    if "exif" not in image.info:
        return 1
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except DAMAGE:
        return 1
    return value if value in range(1, 9) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow clips 16-bit grey to white instead of scaling it.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        # Transparent pixels may hide any colour: show them on white, as a browser does.
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image)
        image = canvas
    return image.convert("RGB")


def _central_square(width: int, height: int) -> Box:
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(width: int, height: int, scale: tuple[float, float], rng: np.random.Generator) -> Box:
    """A box as torchvision's RandomResizedCrop draws it: area in ``scale``, aspect 3/4 to 4/3, whole pixels.

    Ten tries to fit it into the image; then the largest central box of an allowed aspect.
    """
    low, high = CROP_RATIOS
    for _ in range(CROP_TRIES):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * high)), min(height, round(width / low))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
