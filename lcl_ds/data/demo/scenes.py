"""Procedural scenes, their pictures and the sentences told about them.

A scene holds one large object and up to two small ones on a cluttered background. Everything is drawn from a
`numpy.random.Generator` that the caller keys, so the same key always gives the same scene, picture and words.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Array = np.ndarray
Rng = np.random.Generator
T = TypeVar("T")

COLOURS = {
    "red": (0.90, 0.12, 0.12),
    "orange": (1.00, 0.52, 0.05),
    "yellow": (0.98, 0.92, 0.15),
    "green": (0.12, 0.68, 0.18),
    "cyan": (0.15, 0.85, 0.90),
    "blue": (0.12, 0.22, 0.92),
    "purple": (0.65, 0.15, 0.80),
    "white": (0.98, 0.98, 0.98),
}
TEXTURES = ("solid", "striped", "dotted")
OBJECT_COUNTS = (1, 2, 3)


@dataclass(frozen=True)
class Item:
    """One object. Lengths are fractions of the picture's side, y grows downwards, the angle is in radians."""

    shape: str
    colour: str
    texture: str
    x: float
    y: float
    radius: float
    angle: float
    brightness: float


@dataclass(frozen=True)
class Scene:
    """A picture's content: `items[0]` is the large object, the others are small; `clutter` seeds the background."""

    items: tuple[Item, ...]
    clutter: int

    @property
    def large(self) -> Item:
        """Return the largest object, which the labels are about."""
        return self.items[0]

    @property
    def small(self) -> tuple[Item, ...]:
        """Return the small objects: none, one or two."""
        return self.items[1:]

    def labels(self) -> dict[str, str | int | None]:
        """Return the evaluation labels: colour and shape of the large object, colour of the small one where there is
        exactly one, and how many objects the picture holds."""
        small_colour = self.small[0].colour if len(self.small) == 1 else None
        large = self.large
        return {"colour": large.colour, "shape": large.shape, "small_colour": small_colour, "count": len(self.items)}


def pick(rng: Rng, options: Sequence[T]) -> T:
    """Pick one of `options`, all equally likely (`Generator.choice` is ten times slower and returns numpy types)."""
    return options[int(rng.integers(len(options)))]


def sample_scene(rng: Rng) -> Scene:
    """Draw a scene: 15 % hold the large object alone, 60 % one small object beside it, 25 % two.

    No two objects share a colour, so "the blue one" is never ambiguous, and objects do not overlap.
    """
    colours = [list(COLOURS)[i] for i in rng.permutation(len(COLOURS))]
    items: list[Item] = []
    for i in range(1 + int(np.searchsorted((0.15, 0.75), rng.random()))):
        radius = float(rng.uniform(0.20, 0.28) if i == 0 else rng.uniform(0.105, 0.135))
        x, y = _free_centre(rng, radius, items)
        items.append(
            Item(
                shape=pick(rng, SHAPES),
                colour=colours[i],
                texture=pick(rng, TEXTURES) if i == 0 else "solid",
                x=x,
                y=y,
                radius=radius,
                angle=float(rng.uniform(-0.6, 0.6)),
                brightness=float(rng.uniform(0.8, 1.0)),
            )
        )
    return Scene(tuple(items), clutter=int(rng.integers(2**32)))


def _free_centre(rng: Rng, radius: float, taken: list[Item]) -> tuple[float, float]:
    """Find a centre that keeps clear of the objects `taken`, or the clearest of the 24 positions tried."""
    tried = rng.uniform(radius, 1 - radius, (24, 2))
    room = np.full(len(tried), np.inf)
    for item in taken:
        room = np.minimum(room, np.hypot(tried[:, 0] - item.x, tried[:, 1] - item.y) - item.radius - radius)
    best = int(np.argmax(np.minimum(room, 0.03)))  # capped: the first with enough room, not the farthest one
    return float(tried[best, 0]), float(tried[best, 1])


# Signed distances, negative inside, of shapes about one unit in radius; v grows upwards. Only the zero line has to be
# exact: anti-aliasing looks at half a pixel on either side of it.


def _circle(u: Array, v: Array) -> Array:
    return np.hypot(u, v) - 0.95


def _square(u: Array, v: Array) -> Array:
    return np.maximum(np.abs(u), np.abs(v)) - 0.82


def _triangle(u: Array, v: Array) -> Array:
    return np.maximum(-v, 0.866 * np.abs(u) + 0.5 * v) - 0.56


def _star(u: Array, v: Array) -> Array:
    fifth = 2 * math.pi / 5
    angle = np.abs((np.arctan2(u, v) + fifth / 2) % fifth - fifth / 2)  # folded onto half of one of the five points
    radius = np.hypot(u, v)
    inner, outer = 0.48, 1.12
    edge = np.array([inner * math.sin(fifth / 2), inner * math.cos(fifth / 2) - outer])
    normal = np.array([-edge[1], edge[0]]) / np.hypot(*edge)
    return normal[0] * radius * np.sin(angle) + normal[1] * (radius * np.cos(angle) - outer)


def _cross(u: Array, v: Array) -> Array:
    u, v = np.abs(u), np.abs(v)
    return np.maximum(np.maximum(u, v) - 1.0, np.minimum(u, v) - 0.32)


def _ring(u: Array, v: Array) -> Array:
    return np.abs(np.hypot(u, v) - 0.76) - 0.24


def _crescent(u: Array, v: Array) -> Array:
    return np.maximum(np.hypot(u, v) - 1.0, 0.82 - np.hypot(u - 0.55, v))


def _heart(u: Array, v: Array) -> Array:
    u, a = np.abs(u), 0.82  # a square on its corner, and a disc on each of its upper sides
    return np.minimum((u + np.abs(v) - a) * 0.707, np.hypot(u - a / 2, v - a / 2) - a * 0.707)


_DISTANCES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "crescent": _crescent,
    "heart": _heart,
}
SHAPES = tuple(_DISTANCES)


def distance(shape: str, u: Array, v: Array) -> Array:
    """Measure signed distances to a shape, in units of its radius."""
    return _DISTANCES[shape](u, v)


def render_scene(scene: Scene, image_size: int = 32) -> Array:
    """Draw `scene`, anti-aliased, as a uint8 RGB array [image_size, image_size, 3]."""
    x, y = pixel_centres(image_size)
    canvas = _background(scene.clutter, image_size)
    for item in scene.items:
        cos, sin = math.cos(item.angle) / item.radius, math.sin(item.angle) / item.radius
        dx, dy = x - item.x, item.y - y
        u, v = cos * dx + sin * dy, cos * dy - sin * dx
        cover = np.clip(0.5 - distance(item.shape, u, v) * (item.radius * image_size), 0, 1)
        paint = np.array(COLOURS[item.colour], np.float32) * item.brightness
        ink = paint if item.texture == "solid" else paint * _shade(item.texture, u, v)[..., None]
        canvas += cover[..., None] * (ink - canvas)
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)


@functools.lru_cache(maxsize=4)
def pixel_centres(image_size: int) -> tuple[Array, Array]:
    """Return x [1, image_size] and y [image_size, 1] of the pixels' centres as fractions of the side."""
    centres = (np.arange(image_size, dtype=np.float32) + 0.5) / image_size
    return centres[None, :], centres[:, None]


def _shade(texture: str, u: Array, v: Array) -> Array:
    """Compute the brightness of a striped or dotted fill: darker bands or spots, soft enough for small pictures."""
    wave = np.cos(6.5 * u) if texture == "striped" else np.cos(6.5 * u) + np.cos(6.5 * v) - 0.9
    return 1 - 0.7 * np.clip(0.5 + 2 * wave, 0, 1)


def _background(seed: int, image_size: int) -> Array:
    """Draw a dull gradient with noise and a few faint lines, float32 [image_size, image_size, 3]."""
    rng = np.random.Generator(np.random.Philox(seed))
    x, y = pixel_centres(image_size)
    angle, base = rng.uniform(0, 2 * math.pi), rng.uniform(0.3, 0.55)
    grey = base + 0.12 * (math.cos(angle) * (x - 0.5) + math.sin(angle) * (y - 0.5))
    for angle, offset, tone in rng.uniform((0, -0.4, -0.12), (2 * math.pi, 0.4, 0.12), (4, 3)):
        across = np.abs(math.cos(angle) * (x - 0.5) + math.sin(angle) * (y - 0.5) - offset)
        grey = grey + tone * np.clip(1.2 - across * image_size, 0, 1)
    tint = rng.uniform(-0.04, 0.04, 3)
    noise = rng.standard_normal((image_size, image_size, 3), np.float32)
    return (grey[..., None] + tint + 0.03 * noise).astype(np.float32)
