"""Procedural scenes that are harder to tell apart than those of the demo: sixteen shapes, ten textures, three sizes.

Some shapes differ in a detail alone (a star and a sun, a ring and a frame), textures in frequency or kind. Colours vary
around their names and any colour comes with any shape and texture, so that colour says nothing of either. Plain small
objects and a cluttered background distract.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lcl_ds.data.demo.scenes import COLOURS, Array, Rng, pick, pixel_centres
from lcl_ds.data.demo.scenes import SHAPES as PLAIN_SHAPES
from lcl_ds.data.demo.scenes import distance as plain_distance

SIZES = {"small": (0.20, 0.22), "medium": (0.28, 0.31), "large": (0.37, 0.42)}
"""Radius of the main object as fractions of the picture's side."""
DISTRACTOR_RADIUS = (0.07, 0.09)
WANDER = 0.06
"""How far the main object lies from the middle at most, across and down."""
DISTRACTORS = (0, 1, 2)


@dataclass(frozen=True)
class Look:
    """What the labels are about and the sentences tell: the main object and how many others there are."""

    shape: str
    texture: str
    colour: str
    size: str
    others: int

    def labels(self) -> dict[str, str | int]:
        """Return the evaluation labels."""
        return {
            "shape": self.shape,
            "texture": self.texture,
            "colour": self.colour,
            "size": self.size,
            "count": 1 + self.others,
        }


def sample_look(rng: Rng, shared: dict[str, str] | None = None) -> Look:
    """Draw the content of a picture, every value equally likely; ``shared`` are values that a document's have alike."""
    values: dict[str, str] = {
        "shape": pick(rng, SHAPES),
        "texture": pick(rng, TEXTURES),
        "colour": pick(rng, tuple(COLOURS)),
        "size": pick(rng, tuple(SIZES)),
    }
    return Look(**(values | (shared or {})), others=pick(rng, DISTRACTORS))


def _polygon(corners: int, u: Array, v: Array) -> Array:
    angles = 2 * math.pi * (np.arange(corners) + 0.5) / corners
    sides = [math.sin(angle) * u + math.cos(angle) * v for angle in angles]
    return np.maximum.reduce(sides) - 0.97 * math.cos(math.pi / corners)


def _rays(points: int, inner: float, u: Array, v: Array) -> Array:
    """Measure the distance to a star of so many points of length 1.05; ``inner`` is the radius between them."""
    part, outer = 2 * math.pi / points, 1.05
    angle = np.abs((np.arctan2(u, v) + part / 2) % part - part / 2)
    radius = np.hypot(u, v)
    edge = np.array([inner * math.sin(part / 2), inner * math.cos(part / 2) - outer])
    normal = np.array([-edge[1], edge[0]]) / np.hypot(*edge)
    return normal[0] * radius * np.sin(angle) + normal[1] * (radius * np.cos(angle) - outer)


def _oval(u: Array, v: Array) -> Array:
    return 0.6 * (np.hypot(u, v / 0.6) - 1.05)


def _diamond(u: Array, v: Array) -> Array:
    return 0.55 * (np.abs(u) / 0.65 + np.abs(v) / 1.08 - 1)


def _arrow(u: Array, v: Array) -> Array:
    head = np.maximum(0.05 - v, 0.72 * np.abs(u) + 0.69 * (v - 1.0))
    shaft = np.maximum(np.abs(u) - 0.27, np.abs(v + 0.45) - 0.5)
    return np.minimum(head, shaft)


def _frame(u: Array, v: Array) -> Array:
    return np.abs(np.maximum(np.abs(u), np.abs(v)) - 0.64) - 0.21


def _dome(u: Array, v: Array) -> Array:
    return np.maximum(np.hypot(u, v + 0.45) - 1.0, -v - 0.45)


_DISTANCES: dict[str, Callable[[Array, Array], Array]] = {
    **{name: functools.partial(plain_distance, name) for name in PLAIN_SHAPES},
    "oval": _oval,
    "diamond": _diamond,
    "pentagon": functools.partial(_polygon, 5),
    "hexagon": functools.partial(_polygon, 6),
    "sun": functools.partial(_rays, 9, 0.7),
    "arrow": _arrow,
    "frame": _frame,
    "dome": _dome,
}
"""Signed distances, negative inside, of shapes about one unit in radius; v grows upwards."""
SHAPES = tuple(_DISTANCES)


def _stripes(period: float, turn: float, u: Array, v: Array, rng: Rng) -> Array:
    return np.cos(2 * math.pi * (math.cos(turn) * u + math.sin(turn) * v) / period + rng.uniform(0, 2 * math.pi))


def _checks(u: Array, v: Array, rng: Rng) -> Array:
    return 2 * np.cos(2 * math.pi * u / 0.25) * np.cos(2 * math.pi * v / 0.25)


def _dots(u: Array, v: Array, rng: Rng) -> Array:
    return np.cos(2 * math.pi * u / 0.14) + np.cos(2 * math.pi * v / 0.14) - 0.7


def _rings(u: Array, v: Array, rng: Rng) -> Array:
    return np.cos(2 * math.pi * np.hypot(u, v) / 0.14)


def _speckles(u: Array, v: Array, rng: Rng) -> Array:
    return rng.standard_normal(np.broadcast_shapes(u.shape, v.shape), np.float32) - 0.3


def _clouds(u: Array, v: Array, rng: Rng) -> Array:
    angles = rng.uniform(0, 2 * math.pi, 5)
    phases = rng.uniform(0, 2 * math.pi, 5)
    periods = rng.uniform(0.22, 0.4, 5)
    waves = [
        np.cos(2 * math.pi * (math.cos(a) * u + math.sin(a) * v) / period + phase)
        for a, phase, period in zip(angles, phases, periods, strict=True)
    ]
    return np.sum(waves, 0) / 2


def _nothing(u: Array, v: Array, rng: Rng) -> Array:
    return np.full(np.broadcast_shapes(u.shape, v.shape), -9.0, np.float32)


_PATTERNS: dict[str, Callable[[Array, Array, Rng], Array]] = {
    "plain": _nothing,
    "striped": functools.partial(_stripes, 0.17, 0.0),
    "barred": functools.partial(_stripes, 0.17, math.pi / 2),
    "slanted": functools.partial(_stripes, 0.17, math.pi / 4),
    "pinstriped": functools.partial(_stripes, 0.09, 0.0),
    "checked": _checks,
    "dotted": _dots,
    "ringed": _rings,
    "speckled": _speckles,
    "cloudy": _clouds,
}
"""Where the second ink lies (above zero); u and v are fractions of the picture's side, turned with the pattern."""
TEXTURES = tuple(_PATTERNS)


def render_look(look: Look, rng: Rng, image_size: int) -> Array:
    """Draw a picture of ``look``, anti-aliased, as a uint8 RGB array [image_size, image_size, 3].

    What the sentences do not tell comes from ``rng``: places, angles, inks, the others and the background.
    """
    x, y = pixel_centres(image_size)
    canvas = _background(rng, image_size)
    radius = float(rng.uniform(*SIZES[look.size]))
    at = 0.5 + rng.uniform(-WANDER, WANDER, 2)
    for _ in range(look.others):
        _draw_other(canvas, rng, at, radius, look.colour, image_size)
    dx, dy = x - at[0], at[1] - y
    angle = float(rng.uniform(-0.2, 0.2))
    cos, sin = math.cos(angle) / radius, math.sin(angle) / radius
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    cover = np.clip(0.5 - _DISTANCES[look.shape](u, v) * (radius * image_size), 0, 1)
    first, second = _inks(look.colour, rng)
    turn, scale = float(rng.uniform(-0.2, 0.2)), float(rng.uniform(0.88, 1.14))
    cos, sin = math.cos(turn) / scale, math.sin(turn) / scale
    pattern = _PATTERNS[look.texture](cos * dx + sin * dy, cos * dy - sin * dx, rng)
    mask = np.clip(0.5 + 1.5 * pattern, 0, 1)[..., None]
    ink = first + mask * (second - first)
    canvas += cover[..., None] * (ink - canvas)
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)


def _inks(colour: str, rng: Rng) -> tuple[Array, Array]:
    """Mix the two inks of an object: the colour itself, off by a little, and a dark shade of it."""
    first = np.clip(np.array(COLOURS[colour], np.float32) * rng.uniform(0.75, 1.0) + rng.uniform(-0.07, 0.07, 3), 0, 1)
    return first.astype(np.float32), (first * rng.uniform(0.3, 0.5)).astype(np.float32)


def _draw_other(canvas: Array, rng: Rng, main: Array, radius: float, colour: str, image_size: int) -> None:
    """Draw a small plain object of another colour into ``canvas``, as clear of the main one as 12 tries allow."""
    x, y = pixel_centres(image_size)
    small = float(rng.uniform(*DISTRACTOR_RADIUS))
    tried = rng.uniform(small, 1 - small, (12, 2))
    at = tried[int(np.argmax(np.minimum(np.hypot(*(tried - main).T) - radius - small, 0.02)))]
    paint = np.array(COLOURS[pick(rng, [name for name in COLOURS if name != colour])], np.float32)
    shape = pick(rng, PLAIN_SHAPES)
    u, v = (x - at[0]) / small, (at[1] - y) / small
    cover = np.clip(0.5 - plain_distance(shape, u, v) * (small * image_size), 0, 1)[..., None]
    canvas += cover * (paint * rng.uniform(0.75, 1.0) - canvas)


def _background(rng: Rng, image_size: int) -> Array:
    """Draw a dull gradient with stains, lines and noise, float32 [image_size, image_size, 3]."""
    x, y = pixel_centres(image_size)
    angle, base = rng.uniform(0, 2 * math.pi), rng.uniform(0.08, 0.22)
    grey = base + 0.1 * (math.cos(angle) * (x - 0.5) + math.sin(angle) * (y - 0.5))
    for angle, offset, tone in rng.uniform((0, -0.45, -0.1), (2 * math.pi, 0.45, 0.1), (4, 3)):
        across = np.abs(math.cos(angle) * (x - 0.5) + math.sin(angle) * (y - 0.5) - offset)
        grey = grey + tone * np.clip(1.3 - across * image_size, 0, 1)
    for left, top, wide, tone in rng.uniform((0, 0, 0.05, -0.12), (1, 1, 0.2, 0.12), (3, 4)):
        grey = grey + tone * np.clip((wide - np.hypot(x - left, y - top)) * image_size / 3, 0, 1)
    tint = rng.uniform(-0.08, 0.08, 3)
    noise = rng.standard_normal((image_size, image_size, 3), np.float32)
    return (grey[..., None] + tint + 0.04 * noise).astype(np.float32)
