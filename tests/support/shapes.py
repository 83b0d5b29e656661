"""A corpus whose pictures have ten aspect ratios."""

import io
import json

import numpy as np
from PIL import Image

from tests.support.tars import write_tar

ASPECTS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16), (2, 1), (1, 2), (5, 1))
"""Widths by heights."""


def photo(rng, aspect, format="JPEG", side=48, **options):
    """An encoded picture of that aspect ratio, its pixels as many as those of a square of ``side``."""
    ratio = (aspect[0] / aspect[1]) ** 0.5
    size = max(3, round(side * ratio)), max(3, round(side / ratio))
    noise = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    noise.resize(size, Image.Resampling.BICUBIC).save(buffer, format, **options)
    return buffer.getvalue()


def write_shapes(path, documents=60, seed=0, most_images=3):
    """A shard of documents with up to so many pictures, some with none, each picture of any of ``ASPECTS``."""
    rng = np.random.default_rng(seed)
    members = []
    for number in range(documents):
        texts, images, pictures = [], [], []
        for _ in range(int(rng.integers(most_images + 1))):
            texts += [f"a picture of {rng.integers(100)} things", None]
            images += [None, f"{len(pictures):03d}.jpg"]
            pictures.append(photo(rng, ASPECTS[rng.integers(len(ASPECTS))]))
        texts.append("the end of it")
        images.append(None)
        members.append((f"{number:05d}.json", json.dumps({"texts": texts, "images": images}).encode()))
        members += [(f"{number:05d}.{i:03d}.jpg", data) for i, data in enumerate(pictures)]
    return write_tar(path, members)
