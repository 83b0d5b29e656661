"""Keep what the final evaluation shows in pictures: ``evaluation/pictures.json`` of a run folder.

The file is small and holds nothing but numbers, text and compressed images, so whoever reads it trusts nothing in it.
"""

import base64
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from PIL import Image

from lcl_ds.errors import UserError
from lcl_ds.files import write_whole
from lcl_ds.report.figures import RetrievalExample

PICTURES, RETRIEVAL_PICTURE = "evaluation/pictures.json", "plots/retrieval.png"
"""Files of a run folder."""
MOST_SIDE = 160
"""Pixels of the side of an image that is kept; larger ones are made smaller."""
LOSSLESS_SIDE = 64
"""Pixels up to which an image is kept as it is."""
TYPES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg"}


@dataclass(frozen=True)
class Gaze:
    """An image and how much of its pooled feature comes from each of its patches."""

    image: np.ndarray
    """uint8 [H, W, 3]."""
    weights: np.ndarray
    """float [rows, columns] of patches, which sum to one; the mean over the heads of the pooling query."""


@dataclass(frozen=True)
class ShownRetrieval:
    """One context and the images it ranks first, best first, as data URLs."""

    context: str
    images: list[tuple[str, bool]]
    """With whether it is the one that follows the context."""


@dataclass(frozen=True)
class ShownGaze:
    """An image and the map of where the pooling query looks, as data URLs."""

    image: str
    map: str
    peak: float
    """Weight of the patch that counts most."""


@dataclass(frozen=True)
class Pictures:
    """What a page shows."""

    retrieval: list[ShownRetrieval] = field(default_factory=list)
    gazes: list[ShownGaze] = field(default_factory=list)


@dataclass
class Examples:
    """What an evaluation collects to be shown."""

    retrieval: list[RetrievalExample] = field(default_factory=list)
    gazes: list[Gaze] = field(default_factory=list)


def write_pictures(run_dir: Path, step: int, examples: Examples) -> None:
    """Write the file of a run folder, or remove that of an earlier step where there is nothing to show."""
    path = run_dir / PICTURES
    path.unlink(missing_ok=True)
    if not (examples.retrieval or examples.gazes):
        return
    retrieval = [
        {
            "context": example.context,
            "images": [
                {"image": _encoded(image), "correct": bool(correct)}
                for image, correct in zip(example.images, example.correct, strict=True)
            ],
        }
        for example in examples.retrieval
    ]
    gazes = [{"image": _encoded(g.image), "weights": g.weights.round(5).tolist()} for g in examples.gazes]
    path.parent.mkdir(exist_ok=True)
    write_whole(path, json.dumps({"step": step, "retrieval": retrieval, "attention": gazes}) + "\n")


def read_pictures(run_dir: Path, step: int | None) -> Pictures:
    """Read the file of a run folder as a page shows it; nothing where it is missing or of another step.

    Raises:
        UserError: the file is damaged.
    """
    path = run_dir / PICTURES
    if not path.is_file():
        return Pictures()
    try:
        held = json.loads(path.read_bytes())
        if step is None or held["step"] != step:
            return Pictures()
        return Pictures(
            [
                ShownRetrieval(str(row["context"]), [(_url(i["image"]), bool(i["correct"])) for i in row["images"]])
                for row in held["retrieval"]
            ],
            [_gaze(row) for row in held["attention"]],
        )
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        raise UserError(f"{path}: is damaged; remove it, or remove evaluation.json as well to evaluate again") from None


def _gaze(row: dict[str, Any]) -> ShownGaze:
    weights = np.array(row["weights"], dtype=np.float64)
    if weights.ndim != 2 or not weights.size or not np.isfinite(weights).all():
        raise ValueError("no map of weights")
    return ShownGaze(_url(row["image"]), url_of(heat_map(weights)), float(weights.max()))


def heat_map(weights: np.ndarray) -> np.ndarray:
    """Colour weights [rows, columns] by their fraction of the largest: uint8 [rows, columns, 3]."""
    colours: np.ndarray = colormaps["inferno"](weights / max(float(weights.max()), 1e-12), bytes=True)
    return colours[..., :3]


def url_of(image: np.ndarray) -> str:
    """Write uint8 [H, W, 3] into a data URL, without loss."""
    return f"data:image/png;base64,{_base64(Image.fromarray(image), 'PNG')}"


def _url(text: str) -> str:
    """Make a data URL of an image that was kept; raises ValueError where it is none."""
    data = base64.b64decode(text, validate=True)
    kind = next((kind for start, kind in TYPES.items() if data.startswith(start)), None)
    if kind is None:
        raise ValueError("no image")
    return f"data:{kind};base64,{text}"


def _encoded(image: np.ndarray) -> str:
    picture = Image.fromarray(image)
    picture.thumbnail((MOST_SIDE, MOST_SIDE))
    return _base64(picture, "PNG" if max(picture.size) <= LOSSLESS_SIDE else "JPEG")


def _base64(picture: Image.Image, form: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, form, **({"quality": 88} if form == "JPEG" else {"optimize": True}))
    return base64.b64encode(buffer.getvalue()).decode()
