"""The data side measured: decoding and loading against other pipelines, packing against other layouts."""

import io
import json
import resource
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.table import Table

from lcl_ds.assembly import lane_settings
from lcl_ds.bench.native import measure_native, show_native
from lcl_ds.bench.words import Words, add_member
from lcl_ds.config import Config, load_config, recipe_path
from lcl_ds.data.corpus import open_data
from lcl_ds.data.images import random_box
from lcl_ds.data.shards.shard import index_shard
from lcl_ds.data.shards.source import Source
from lcl_ds.data.stream.lanes import Lane, LaneSettings
from lcl_ds.data.stream.loader import BatchLoader
from lcl_ds.models.build import build_model
from lcl_ds.models.encoders import IMAGE_MEAN, IMAGE_STD
from lcl_ds.objectives import build_objective
from lcl_ds.objectives.base import local_normalizers
from lcl_ds.tokens import TextTokenizer

SIZE = 224
CROP_SCALE = 0.9, 1.0
LEAST_DOCUMENTS = 2000
"""Fewer would be all start and end."""
CONTEXT, IMAGE_TOKENS, RANKS, ROWS_PER_RANK = 2048, 49, 8, 4


def measure_data(
    folder: Path, images: int, documents: int, repeats: int, seed: int, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """All figures; shards are made in ``folder``, ``overrides`` change the demo recipe."""
    shard = photo_shard(folder / "photos.tar", images, seed)
    return {
        "loading": compare_loading(shard, images, repeats),
        "demo": compare_with_training(repeats, overrides),
        "packing": [compare_packing(folder, name, documents, seed) for name in LENGTHS],
        "native": measure_native(folder, documents, repeats, seed),
    }


def photo_shard(path: Path, count: int, seed: int) -> Path:
    """Pairs as img2dataset writes them, JPEGs of 512 to 1024 pixels a side with detail at all scales."""
    rng = np.random.default_rng(seed)
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            width, height = (int(side) for side in rng.integers(512, 1025, size=2))
            picture = np.zeros((height, width, 3), dtype=np.float32)
            for cells in (4, 16, 64, 256):
                noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
                picture += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), np.float32) / cells**0.5
            picture *= 255 / picture.max()
            buffer = io.BytesIO()
            Image.fromarray(picture.astype(np.uint8)).save(buffer, "JPEG", quality=90)
            add_member(tar, f"{number:09d}.jpg", buffer.getvalue())
            add_member(tar, f"{number:09d}.txt", b"a photo of something with a caption of ordinary length")
    return path


def compare_loading(shard: Path, images: int, repeats: int) -> dict[str, Any]:
    """Images per second of one process, decoded, cropped and batched; the best of ``repeats`` passes each."""
    torch.set_num_threads(1)
    methods: dict[str, Callable[[], Iterator[int]]] = {
        "lcl_ds": lambda: _ours(shard),
        "webdataset + Pillow": lambda: _webdataset(shard, normalise=False),
        "webdataset + Pillow + normalise (open_clip's steps)": lambda: _webdataset(shard, normalise=True),
    }
    seconds = {name: float("inf") for name in methods}
    for _ in range(repeats):
        for name, method in methods.items():
            started, done = time.perf_counter(), 0
            for count in method():
                done += count
                if done >= images:
                    break
            seconds[name] = min(seconds[name], (time.perf_counter() - started) * images / done)
    return {
        name: {"images_per_s": images / s, "ours_is_faster_by": s / seconds["lcl_ds"]} for name, s in seconds.items()
    }


def _ours(shard: Path) -> Iterator[int]:
    settings = LaneSettings(
        lanes=1,
        data_seed=0,
        augmentation_seed=0,
        row_tokens=512,
        row_images=8,
        image_tokens=IMAGE_TOKENS,
        image_size=SIZE,
        pack_window=32,
    )
    for batch in BatchLoader([Source("photos", [index_shard(shard)])], settings, Words(), 4):  # type: ignore[arg-type]
        yield batch.image_count


def _webdataset(shard: Path, normalise: bool) -> Iterator[int]:
    """RandomResizedCrop with Pillow as torchvision does it, text tokenised, batches of 32."""
    rng, words = np.random.default_rng(0), Words()
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))

    def picture(image: Image.Image) -> torch.Tensor:
        box = random_box(*image.size, CROP_SCALE, rng)
        cropped = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)
        pixels = np.asarray(cropped).transpose(2, 0, 1)
        return torch.from_numpy((pixels / np.float32(255) - mean) / std if normalise else pixels.copy())

    dataset = (
        webdataset.WebDataset(str(shard), shardshuffle=False)
        .shuffle(64)
        .decode("pil")
        .to_tuple("jpg", "txt")
        .map_tuple(picture, words.encode)
        .batched(32, partial=True)
    )
    for pictures, _ in dataset:
        yield len(pictures)


def compare_with_training(repeats: int, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Images per second of the demo's loader alone and of its training step, one process each."""
    config = load_config(recipe_path("demo"), list(overrides))
    data = open_data(config.data)
    loader = BatchLoader(data.sources, lane_settings(config), data.tokenizer, config.train.global_batch_rows)
    batches = [next(loader) for _ in range(8)]  # the first ones open every lane
    started = time.perf_counter()
    loaded = sum(next(loader).image_count for _ in range(20 * repeats))
    loading = loaded / (time.perf_counter() - started)
    return {"loader_images_per_s": loading, "training_images_per_s": _training_speed(config, data.tokenizer, batches)}


def _training_speed(config: Config, tokenizer: TextTokenizer, batches: list[Any]) -> float:
    torch.set_num_threads(1)
    model = build_model(config.model, tokenizer.vocabulary.size, config.data.longest_document, seed=0)
    objective = build_objective(model, config.objective, seed=0)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-4)
    started = done = 0.0
    for number, batch in enumerate(batches):
        if number == 2:  # warm
            started, done = time.perf_counter(), 0.0
        objective(batch, *local_normalizers(objective, batch))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        done += batch.image_count
    return done / (time.perf_counter() - started)


def resident_memory(documents: int, every: int, overrides: Sequence[str] = ()) -> list[tuple[int, float]]:
    """(documents, MiB of resident memory) of this process while it makes the demo's rows."""
    config = load_config(recipe_path("demo"), list(overrides))
    data = open_data(config.data)
    loader = BatchLoader(data.sources, lane_settings(config), data.tokenizer, config.train.global_batch_rows)
    taken: list[tuple[int, float]] = []
    seen = 0
    while seen < documents:
        seen += next(loader).document_count
        if seen >= every * (len(taken) + 1):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            taken.append((seen, pages * resource.getpagesize() / 2**20))
    return taken


@dataclass(frozen=True)
class Lengths:
    """Text tokens (a log-normal) and images of documents."""

    text_log_mean: float
    text_log_std: float
    images: Callable[[np.random.Generator], int]


LENGTHS = {
    "MMC4-like": Lengths(5.8, 0.9, lambda rng: min(6, 1 + int(rng.poisson(3.2)))),
    "OBELICS-like": Lengths(6.3, 1.1, lambda rng: min(30, int(rng.geometric(0.4)))),
}


def length_shard(path: Path, lengths: Lengths, count: int, seed: int) -> Path:
    """Documents of these lengths, images spread evenly over the text; the images' bytes are never decoded."""
    rng = np.random.default_rng(seed)
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            words = int(np.clip(rng.lognormal(lengths.text_log_mean, lengths.text_log_std), 20, 20_000))
            pictures = lengths.images(rng)
            parts = np.array_split(np.arange(words), pictures + 1)
            texts: list[str | None] = []
            images: list[str | None] = []
            for picture, part in enumerate(parts):
                texts += [" ".join("w" * len(part)), None]
                images += [None, f"{picture:03d}.jpg" if picture < pictures else None]
            add_member(tar, f"{number:06d}.json", json.dumps({"texts": texts, "images": images}).encode())
            for picture in range(pictures):
                add_member(tar, f"{number:06d}.{picture:03d}.jpg", b"x")
    return path


def compare_packing(folder: Path, name: str, documents: int, seed: int) -> dict[str, Any]:
    """Padding, and the images of the fullest of eight ranks over their mean, of three layouts of one corpus."""
    shard = index_shard(length_shard(folder / f"{name}.tar", LENGTHS[name], documents, seed))
    settings = LaneSettings(
        lanes=RANKS,
        data_seed=seed,
        augmentation_seed=seed,
        row_tokens=CONTEXT,
        row_images=24,
        image_tokens=IMAGE_TOKENS,
        image_size=8,
        group_rows=ROWS_PER_RANK,
    )

    rows = documents // 4 // (RANKS * ROWS_PER_RANK) * RANKS * ROWS_PER_RANK

    def rows_of(settings: LaneSettings) -> list[Any]:
        lanes = [Lane([Source(name, [shard])], settings, n, Words()) for n in range(RANKS)]  # type: ignore[arg-type]
        return [lanes[n // settings.group_rows % RANKS]._next_pieces() for n in range(rows)]

    pieces = [piece for row in rows_of(replace(settings, group_rows=1)) for piece in row]
    sizes = [(len(piece.tokens.input_ids), len(piece.tokens.images)) for piece in pieces]
    np.random.default_rng(seed).shuffle(sizes)
    layouts = {
        "ours": [_size(row) for row in rows_of(settings)],
        "greedy, in the order of the stream": _greedy(sizes, settings),
        f"one document a row, padded to {CONTEXT}": sizes,
    }
    return {"lengths": name, "layouts": {layout: _figures(found) for layout, found in layouts.items()}}


def _size(pieces: Any) -> tuple[int, int]:
    return sum(len(p.tokens.input_ids) for p in pieces), sum(len(p.tokens.images) for p in pieces)


def _greedy(sizes: list[tuple[int, int]], settings: LaneSettings) -> list[tuple[int, int]]:
    """Rows filled until the next piece does not fit."""
    rows = [(0, 0)]
    for tokens, images in sizes:
        full = rows[-1][0] + tokens > settings.row_tokens or rows[-1][1] + images > settings.row_images
        before = (0, 0) if full else rows.pop()
        rows.append((before[0] + tokens, before[1] + images))
    return rows


def _figures(rows: list[tuple[int, int]]) -> dict[str, float]:
    tokens, images = np.array(rows).T
    whole = len(images) // (RANKS * ROWS_PER_RANK) * RANKS * ROWS_PER_RANK
    ranks = images[:whole].reshape(-1, RANKS, ROWS_PER_RANK).sum(2)
    return {
        "padding": 1 - tokens.mean() / CONTEXT,
        "images_max_over_mean": float((ranks.max(1) / ranks.mean(1)).mean()),
    }


def draw_memory(taken: list[tuple[int, float]], folder: Path) -> Path:
    """Memory against documents as a PNG."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    axis = figure.subplots()
    axis.plot([documents for documents, _ in taken], [mib for _, mib in taken])
    axis.set_xlabel("documents")
    axis.set_ylabel("resident memory, MiB")
    axis.set_ylim(bottom=0)
    path = folder / "data_memory.png"
    figure.savefig(path, dpi=120)
    return path


def show_data(console: Console, figures: dict[str, Any]) -> None:
    """The figures as tables."""
    table = Table(title=f"JPEGs of 512 to 1024 px to {SIZE} px, one process", title_justify="left")
    for column in ("pipeline", "images/s", "ours is faster by"):
        table.add_column(column, justify="left" if column == "pipeline" else "right")
    for name, row in figures["loading"].items():
        table.add_row(name, f"{row['images_per_s']:.0f}", f"{row['ours_is_faster_by']:.2f}")
    console.print(table)
    demo = figures["demo"]
    ratio = demo["loader_images_per_s"] / demo["training_images_per_s"]
    console.print(
        f"demo: the loader makes {demo['loader_images_per_s']:.0f} images/s, a training process takes "
        f"{demo['training_images_per_s']:.0f}: {ratio:.1f} times",
        highlight=False,
    )
    title = f"rows of {CONTEXT} tokens, {ROWS_PER_RANK} to each of {RANKS} ranks"
    table = Table(title=title, title_justify="left")
    for column in ("lengths", "layout", "padding", "images, max/mean over ranks"):
        table.add_column(column, justify="right" if column[0] in "pi" else "left")
    for corpus in figures["packing"]:
        for layout, row in corpus["layouts"].items():
            table.add_row(corpus["lengths"], layout, f"{row['padding']:.2%}", f"{row['images_max_over_mean']:.3f}")
    console.print(table)
    show_native(console, figures["native"])
