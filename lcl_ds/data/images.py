"""Decode images to square uint8 pixels."""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from lcl_ds.data.documents import BadSampleError
from lcl_ds.data.settings import default_of

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Formats that are opened; Pillow would also run PostScript and read multi-page files."""
MAX_PIXELS: int = default_of("max_image_pixels")
Image.MAX_IMAGE_PIXELS = None  # our own limit is a setting, and is checked before anything is decoded
MIN_SIDE = 3
"""Smaller images are tracking pixels."""
MAX_ASPECT = 20
"""Longer strips are rules and borders."""
CROP_RATIOS = (3 / 4, 4 / 3)
CROP_TRIES = 10
ORIENTATION = 0x0112
"""EXIF tag."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its EXIF orientation; 1 is upright."""

JPEG_START, PNG_START = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
EXIF_START = b"Exif\0\0"
JPEG_NOTES = frozenset((*range(0xE1, 0xEE), 0xEF, 0xFE))
"""JPEG segments that no pixel depends on: EXIF, profiles, previews, comments. JFIF and Adobe tell the colour space."""
JPEG_LEAST_BYTES = {0xE0: 16, 0xEE: 14}
"""Least size of the JFIF and Adobe segments; a shorter one says nothing, and Pillow fails on it."""
JPEG_SCAN = 0xDA
PNG_TRANSPARENCY, PNG_EXIF = b"tRNS", b"eXIf"

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class ImageFacts:
    """What an image's header says."""

    format: str
    width: int
    height: int


def decode_image(
    data: bytes,
    size: int | tuple[int, int],
    crop_scale: tuple[float, float] = (1.0, 1.0),
    rng: np.random.Generator | None = None,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Decode, turn upright and crop to a square, or to the image's own aspect ratio.

    The first frame of an animation is taken, transparent pixels show white, and a JPEG much larger than needed is
    decoded at a half, a quarter or an eighth of its size, which costs less than the whole.

    Args:
        data: a file's bytes.
        size: side of the result in pixels, or height and width of what the whole image is resized to.
        crop_scale: area range of the random crop (aspect 3/4 to 4/3, as in torchvision's RandomResizedCrop; of the
            image's own where it is kept).
        rng: draws the crop; None takes the central square, or the whole image.
        max_pixels: larger images are refused from their header, before memory is spent.

    Returns:
        uint8 [3, height, width], RGB.

    Raises:
        BadSampleError: damaged, of another format, or of a size that no picture has.
    """
    image = open_image(data, max_pixels)
    orientation = _orientation(image)
    width, height = image.size if orientation < 5 else image.size[::-1]
    rows, columns = (size, size) if isinstance(size, int) else size
    aspect = 1.0 if isinstance(size, int) else width / height
    if rng is not None:
        box = random_box(width, height, crop_scale, rng, aspect)
    else:
        box = _central_square(width, height) if isinstance(size, int) else (0.0, 0.0, width, height)
    rgb = _decode(image, orientation, shrink=min((box[2] - box[0]) / columns, (box[3] - box[1]) / rows))
    across, down = rgb.width / width, rgb.height / height
    scaled = box[0] * across, box[1] * down, box[2] * across, box[3] * down
    pixels = rgb.resize((columns, rows), Image.Resampling.BICUBIC, box=scaled, reducing_gap=2.0)
    return np.ascontiguousarray(np.asarray(pixels).transpose(2, 0, 1))


def upright_size(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Read the width and height in pixels of an upright image from its header.

    Raises:
        BadSampleError: of another format, or of a size that no picture has.
    """
    image = open_image(data, max_pixels)
    width, height = image.size
    return (height, width) if _orientation(image) >= 5 else (width, height)


def check_image(data: bytes, max_pixels: int = MAX_PIXELS, decode: bool = True) -> ImageFacts:
    """Read everything of an image that :func:`decode_image` would read, and return what it is.

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
    """Open an image and read only its header; its EXIF block is in ``info``.

    Raises:
        BadSampleError: of another format, or of a size that no picture has.
    """
    pixels, exif = _without_notes(data)
    with _damage_as("a damaged image"):
        # Pillow takes a JPEG that holds a second picture for a format of its own; the first one is that of the page.
        is_jpeg = pixels.startswith(JPEG_START)
        image = JpegImageFile(io.BytesIO(pixels)) if is_jpeg else Image.open(io.BytesIO(pixels), formats=FORMATS)
    if exif:
        image.info["exif"] = EXIF_START + exif
    _check_size(image, max_pixels)
    return image


def page_of(data: bytes, number: int, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode one page of a multi-page TIFF as RGB.

    Raises:
        BadSampleError: there is no such page, it is damaged, or of a size that no picture has.
    """
    with _damage_as("a page that is not there or damaged"):
        image = Image.open(io.BytesIO(data), formats=("TIFF",))
        image.seek(number)
    _check_size(image, max_pixels)
    return _decode(image, orientation=1, shrink=1)


@contextmanager
def _damage_as(reason: str) -> Iterator[None]:
    """Turn any error of Pillow into a bad sample: on damaged bytes its readers raise errors of any kind.

    Raises:
        BadSampleError: for any of them.
    """
    try:
        yield
    except UnidentifiedImageError:
        raise BadSampleError("an image in none of the accepted formats") from None
    except MemoryError:
        raise BadSampleError("an image that does not fit into memory") from None
    except Exception:
        raise BadSampleError(reason) from None


def _without_notes(data: bytes) -> tuple[bytes, bytes]:
    """Take out of a JPEG or PNG what no pixel depends on; the EXIF block, which tells the orientation, is returned too.

    Texts, colour profiles and previews of any size or kind then reach no reader that could fail on them. Where the
    structure is damaged the rest is left as it is; what is of another format stays untouched.
    """
    if data.startswith(JPEG_START):
        return _jpeg_without_notes(data)
    if data.startswith(PNG_START):
        return _png_without_notes(data)
    return data, b""


def _jpeg_without_notes(data: bytes) -> tuple[bytes, bytes]:
    kept, exif = [data[:2]], []
    at = 2
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        if data[at + 1] == 0xFF:  # fill bytes
            at += 1
            continue
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        end = at + 2 + length
        if marker == JPEG_SCAN or length < 2 or end > len(data):
            break
        if marker not in JPEG_NOTES and length >= JPEG_LEAST_BYTES.get(marker, 2):
            kept.append(data[at:end])
        elif marker == 0xE1 and data.startswith(EXIF_START, at + 4):
            exif.append(data[at + 4 + len(EXIF_START) : end])
        at = end
    return b"".join([*kept, data[at:]]), b"".join(exif)


def _png_without_notes(data: bytes) -> tuple[bytes, bytes]:
    kept, exif = [data[: len(PNG_START)]], b""
    at = len(PNG_START)
    while at + 12 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 12 + length
        if end > len(data):
            break
        if kind[:1].isupper() or kind == PNG_TRANSPARENCY:  # upper case: no decoder may pass it over
            kept.append(data[at:end])
        elif kind == PNG_EXIF:
            exif = data[at + 8 : end - 4]
        at = end
    return b"".join([*kept, data[at:]]), exif


def _check_size(image: Image.Image, max_pixels: int) -> None:
    short, long = sorted(image.size)
    if short * long > max_pixels:
        raise BadSampleError("an image with too many pixels")
    if short < MIN_SIDE or long > MAX_ASPECT * short:
        raise BadSampleError("an image too small or too narrow")


def _decode(image: Image.Image, orientation: int, shrink: float) -> Image.Image:
    """RGB pixels, upright, each side divided by at most ``shrink``."""
    with _damage_as("a damaged image"):
        if image.format == "JPEG" and shrink >= 2:
            image.draft("RGB", (math.ceil(image.width / shrink), math.ceil(image.height / shrink)))
        image.load()
        rgb = _to_rgb(image)
        return rgb.transpose(TURNS[orientation]) if orientation in TURNS else rgb


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where none can be read."""
    if "exif" not in image.info:
        return 1
    exif = Image.Exif()
    try:
        exif.load(image.info["exif"])
        value = exif.get(ORIENTATION)
        return int(value) if value in TURNS else 1
    except Exception:  # EXIF that cannot be read costs no picture
        return 1


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


def random_box(
    width: int, height: int, scale: tuple[float, float], rng: np.random.Generator, aspect: float = 1.0
) -> Box:
    """Draw a box as torchvision's RandomResizedCrop does: area in ``scale``, aspect 3/4 to 4/3, whole pixels.

    It tries ten times to fit the box into the image, and then takes the largest central box of an allowed aspect.

    Args:
        aspect: width by height that the box's is a multiple of.
    """
    low, high = CROP_RATIOS
    for _ in range(CROP_TRIES):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(low), math.log(high))) * aspect
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * high * aspect)), min(height, round(width / (low * aspect)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
