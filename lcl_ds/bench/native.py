"""Images that keep their aspect ratio measured against squares of as many tokens: padding, and images per second.

A padded square holds a whole image between blank patches, so of its tokens only those that show something are useful.
"""

import io
import json
import math
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lcl_ds.bench.words import Words, add_member
from lcl_ds.data.shards.shard import index_shard
from lcl_ds.data.shards.source import Source
from lcl_ds.data.stream.lanes import Lane, LaneSettings
from lcl_ds.grids import Grid, NativeResolution, pack_images
from lcl_ds.models.build import build_model
from lcl_ds.models.network import LCLModel
from lcl_ds.models.settings import ModelSettings

ASPECTS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16), (5, 2), (2, 5), (3, 1))
"""Widths by heights, each as often as any other."""
SIDE, PATCH = 224, 16
TOKENS = (SIDE // PATCH) ** 2
"""Of a square, and of the largest image that keeps its aspect ratio."""
IMAGES, WIDTH, LAYERS = 10, 384, 4
"""Of the batch and of the tower."""
CONTEXT = 2048
NATIVE, CROPPED, PADDED, SHOWING = (
    "own aspect ratio, packed",
    "squares, cropped",
    "squares, padded",
    "padded squares that show as much",
)


def measure_native(folder: Path, documents: int, repeats: int, seed: int) -> dict[str, Any]:
    """Padding of rows, and the speed of a vision tower with its pooling, forward and backward."""
    return {"rows": rows_of_aspects(folder, documents, seed), "tower": compare_tower(repeats, seed)}


def rows_of_aspects(folder: Path, documents: int, seed: int) -> dict[str, float]:
    """Padding of rows of documents whose images have all of ``ASPECTS``, in tokens of the decoder."""
    shard = index_shard(aspect_shard(folder / "aspects.tar", documents, seed))
    settings = LaneSettings(
        lanes=1,
        data_seed=seed,
        augmentation_seed=seed,
        row_tokens=CONTEXT,
        row_images=CONTEXT,
        image_tokens=TOKENS,
        image_size=SIDE,
        native=NativeResolution(PATCH, TOKENS, TOKENS),
        row_image_tokens=CONTEXT,
    )
    lane = Lane([Source("aspects", [shard])], settings, 0, Words())  # type: ignore[arg-type]
    pieces = [lane._next_pieces() for _ in range(documents // 4)]
    tokens = sum(len(piece.tokens.input_ids) for row in pieces for piece in row)
    grids = [grid for row in pieces for piece in row for grid in piece.grids if grid]
    return {
        "rows": len(pieces),
        "row_tokens": CONTEXT,
        "padding": 1 - tokens / (len(pieces) * CONTEXT),
        "shapes": len(set(grids)),
        "mean_image_tokens": sum(grid.tokens for grid in grids) / len(grids),
    }


def aspect_shard(path: Path, count: int, seed: int) -> Path:
    """Documents of one to six images and text of log-normal length."""
    rng = np.random.default_rng(seed)
    pictures = []
    for width, height in ASPECTS:
        buffer = io.BytesIO()
        Image.new("RGB", (40 * width, 40 * height), "grey").save(buffer, "JPEG")
        pictures.append(buffer.getvalue())
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            images = min(6, 1 + int(rng.poisson(2)))
            words = rng.lognormal(4, 0.8, images).astype(int) + 1
            names = [f"{image:03d}.jpg" for image in range(images)]
            texts = [text for length in words for text in (" ".join("w" * length), None)]
            record = {"texts": texts, "images": [entry for name in names for entry in (None, name)]}
            add_member(tar, f"{number:06d}.json", json.dumps(record).encode())
            for name in names:
                add_member(tar, f"{number:06d}.{name}", pictures[int(rng.integers(len(pictures)))])
    return path


def compare_tower(repeats: int, seed: int) -> list[dict[str, Any]]:
    """Images per second of the tower and its pooling, forward and backward: the best of ``repeats`` calls each."""
    native = NativeResolution(PATCH, TOKENS, TOKENS)
    grids = [native.grid(*ASPECTS[number % len(ASPECTS)]) for number in range(IMAGES)]
    useful = sum(grid.patches for grid in grids) / IMAGES
    shown = sum(min(aspect) / max(aspect) for aspect in ASPECTS) / len(ASPECTS)
    larger = math.ceil(math.sqrt(useful / shown)) * PATCH
    methods: dict[str, tuple[int, float]] = {  # pixels of a square, useful tokens of an image
        NATIVE: (SIDE, useful),
        CROPPED: (SIDE, TOKENS),
        PADDED: (SIDE, TOKENS * shown),
        SHOWING: (larger, (larger // PATCH) ** 2 * shown),
    }
    steps = {name: _step(name, side, grids, seed) for name, (side, _) in methods.items()}
    seconds = dict.fromkeys(methods, math.inf)
    for attempt in range(1 + repeats):  # the first one warms up
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if attempt:
                seconds[name] = min(seconds[name], time.perf_counter() - started)
    rows = []
    for name, (side, useful_tokens) in methods.items():
        tokens = useful if name == NATIVE else (side // PATCH) ** 2
        rows.append(
            {
                "method": name,
                "tokens_per_image": tokens,
                "padding": 1 - useful_tokens / tokens,
                "images_per_s": IMAGES / seconds[name],
                "useful_tokens_per_s": IMAGES * useful_tokens / seconds[name],
            }
        )
    return rows


def _step(name: str, side: int, grids: Sequence[Grid], seed: int) -> Callable[[], None]:
    """Make one pass over images of noise: what they show changes no time."""
    model = _model(side, native=name == NATIVE)
    rng = torch.Generator().manual_seed(seed)
    seeds = torch.zeros(len(grids), dtype=torch.int64)
    if name == NATIVE:
        packed = pack_images(grids, [])
        pixels = torch.randint(256, (len(packed.row_places), 3, PATCH, PATCH), generator=rng, dtype=torch.uint8)
        return lambda: _backward(model, model.encode_images(pixels, seeds, packed))
    pixels = torch.randint(256, (len(grids), 3, side, side), generator=rng, dtype=torch.uint8)
    return lambda: _backward(model, model.encode_images(pixels, seeds))


def _backward(model: LCLModel, features: tuple[Tensor, Tensor]) -> None:
    sum(part.float().square().mean() for part in features).backward()  # type: ignore[union-attr]
    model.zero_grad(set_to_none=True)


def _model(side: int, native: bool) -> LCLModel:
    vision: dict[str, Any] = {
        "model_type": "clip_vision_model",
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": WIDTH // 64,
        "image_size": side,
        "patch_size": PATCH,
        "hidden_act": "gelu",
        "resolution": "native" if native else "square",
    }
    decoder = {"model_type": "gpt2", "n_embd": 128, "n_layer": 1, "n_head": 2}
    settings = ModelSettings.model_validate({"vision": vision, "decoder": decoder})
    return build_model(settings, 100, CONTEXT, seed=0).train()


def show_native(console: Console, figures: dict[str, Any]) -> None:
    """The figures as a sentence and a table."""
    rows = figures["rows"]
    console.print(
        f"{rows['rows']} rows of {rows['row_tokens']} tokens, images of {rows['shapes']} shapes and "
        f"{rows['mean_image_tokens']:.0f} tokens on average: {rows['padding']:.2%} padding",
        highlight=False,
    )
    title = f"images of ten aspect ratios, at most {TOKENS} tokens, tower forward and backward"
    table = Table(title=title, title_justify="left")
    for column in ("images", "tokens each", "padding", "images/s", "useful tokens/s"):
        table.add_column(column, justify="left" if column == "images" else "right")
    for row in figures["tower"]:
        table.add_row(
            row["method"],
            f"{row['tokens_per_image']:.0f}",
            f"{row['padding']:.0%}",
            f"{row['images_per_s']:.1f}",
            f"{row['useful_tokens_per_s']:,.0f}",
        )
    console.print(table)
