"""The embedded corpus: procedural scenes told as interleaved documents and as caption pairs.

It is made once, deterministically, and stored as ordinary shards that are read like anybody's data. A document tells,
sentence by sentence, what the next picture holds and what the last one held. Position, size and clutter vary, so raw
pixels say little about a shape, and the text before a picture predicts it only through its content: what the
contrastive loss needs. ``python -m lcl_ds.data.demo OUT`` makes it by hand.
"""

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from webdataset import TarWriter

from lcl_ds.data.demo.scenes import (
    COLOURS,
    OBJECT_COUNTS,
    SHAPES,
    Item,
    Rng,
    Scene,
    pick,
    render_scene,
    sample_scene,
)
from lcl_ds.data.own_tokenizer import train_tokenizer
from lcl_ds.errors import UserError
from lcl_ds.files import only_one

VERSION = 2
"""Of the content; another version is another corpus and is built again."""
SPLITS = {"train-documents": 0, "train-pairs": 1, "heldout-documents": 2}
DEFAULTS = {
    "seed": 0,
    "documents": 3000,
    "pairs": 3000,
    "heldout_documents": 1000,
    "image_size": 32,
    "shard_size": 500,
}
VOCABULARY = 448
JPEG_QUALITY = 92

BEFORE = (
    "next comes {scene} .",
    "now look at {scene} .",
    "here is {scene} .",
    "the next picture shows {scene} .",
    "then i found {scene} .",
)
AFTER = ("it was {scene} .", "above you see {scene} .", "that was {scene} .")
DETAILS = ("the {shape} is {texture} .", "its fill is {texture} .")
COUNTED = ("there were {count} things in it .", "i counted {count} .")
FILLER = (
    "it rained all day .",
    "we had tea at four .",
    "the train was late again .",
    "nobody was at home .",
    "my brother wrote a letter .",
    "the sea was calm .",
    "a dog barked twice .",
    "the shop had closed early .",
)
NUMBERS = {1: "one", 2: "two", 3: "three"}


def _rng(seed: int, split: str, index: int) -> Rng:
    """Make a generator of one sample alone, so that content depends on neither order nor count."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, SPLITS[split], index))))


def _small(rng: Rng, items: tuple[Item, ...]) -> str:
    words = [f"a small {item.colour} {item.shape}" for item in items]
    return f" {pick(rng, ('next to', 'with', 'near'))} {' and '.join(words)}" if words else " alone"


def describe(scene: Scene, rng: Rng) -> str:
    """Write a phrase that names everything in a scene."""
    return f"a large {scene.large.colour} {scene.large.shape}{_small(rng, scene.small)}"


def _told_after(scene: Scene, rng: Rng, was_described: bool) -> Iterator[str]:
    """Yield sentences after a picture: what it was if nobody said so before, and facts that only it tells."""
    if not was_described or rng.random() < 0.15:
        yield pick(rng, AFTER).format(scene=describe(scene, rng))
    elif rng.random() < 0.6:
        yield pick(rng, DETAILS).format(shape=scene.large.shape, texture=scene.large.texture)
    if rng.random() < 0.25:
        yield pick(rng, COUNTED).format(count=NUMBERS[len(scene.items)])


def make_document(seed: int, split: str, index: int) -> tuple[list[str | None], list[Scene | None], list[int | None]]:
    """Make parallel lists in reading order: sentences, scenes, and the position of the sentence that describes each.

    At each position either the sentence or the scene is None.
    """
    rng = _rng(seed, split, index)
    texts: list[str | None] = []
    scenes: list[Scene | None] = []
    matched: list[int | None] = []

    def say(sentence: str) -> None:
        texts.append(sentence)
        scenes.append(None)
        matched.append(None)

    for _ in range(int(rng.integers(2, 5))):
        scene = sample_scene(rng)
        described = rng.random() < 0.9
        if rng.random() < 0.25:
            say(pick(rng, FILLER))
        if described:
            say(pick(rng, BEFORE).format(scene=describe(scene, rng)))
        texts.append(None)
        scenes.append(scene)
        matched.append(len(texts) - 2 if described else len(texts))
        for sentence in _told_after(scene, rng, described):
            say(sentence)
    return texts, scenes, matched


def make_pair(seed: int, index: int) -> tuple[str, Scene]:
    """Make a caption and its scene."""
    rng = _rng(seed, "train-pairs", index)
    scene = sample_scene(rng)
    sentences = [f"{describe(scene, rng)} .", *_told_after(scene, rng, was_described=True)]
    return " ".join(sentences), scene


def build_demo(
    out_dir: Path,
    *,
    seed: int = DEFAULTS["seed"],
    documents: int = DEFAULTS["documents"],
    pairs: int = DEFAULTS["pairs"],
    heldout_documents: int = DEFAULTS["heldout_documents"],
    image_size: int = DEFAULTS["image_size"],
    shard_size: int = DEFAULTS["shard_size"],
) -> None:
    """Write shards, tokenizer and manifest; the same arguments give the same bytes.

    Args:
        out_dir: a folder that does not exist yet.
        documents, pairs, heldout_documents: samples of each kind.
        image_size: side of the pictures in pixels.
        shard_size: samples per tar.
    """
    out_dir.mkdir(parents=True)
    counts = {"train-documents": documents, "train-pairs": pairs, "heldout-documents": heldout_documents}
    shards = {}
    for split, count in counts.items():
        for start in range(0, count, shard_size):
            path = out_dir / f"{split}-{start // shard_size:06d}.tar"
            indices = range(start, min(start + shard_size, count))
            _write_shard(path, (_sample(seed, split, index, image_size) for index in indices))
            shards[path.name] = {
                "samples": len(indices),
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
    train_tokenizer(_training_text(seed, documents, pairs), out_dir / "tokenizer", VOCABULARY)
    parameters = {
        "version": VERSION,
        "seed": seed,
        "documents": documents,
        "pairs": pairs,
        "heldout_documents": heldout_documents,
        "image_size": image_size,
        "shard_size": shard_size,
    }
    labels = {"colour": list(COLOURS), "shape": SHAPES, "count": OBJECT_COUNTS}
    manifest = {**parameters, "labels": labels, "shards": shards}
    (out_dir / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def ensure_demo(out_dir: Path) -> Path:
    """Build the default corpus at ``out_dir`` if it is missing or of another version.

    Any number of processes may ask at once: one builds, the others wait.

    Raises:
        UserError: the folder holds something else; it is left alone.
    """
    if _is_current(out_dir):
        return out_dir
    with only_one(out_dir):
        if not _is_current(out_dir):
            if out_dir.exists() and _manifest(out_dir) is None:
                raise UserError(f"data.demo: {out_dir} exists and is not a demo corpus; name a new folder or null")
            replace_folder(out_dir, build_demo)
    return out_dir


def replace_folder(folder: Path, build: Callable[[Path], None]) -> None:
    """Let ``build`` make a folder beside ``folder`` that takes its place when it is whole."""
    partial, old = (folder.parent / f".{folder.name}.{name}" for name in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    build(partial)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _manifest(out_dir: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((out_dir / "manifest.json").read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return manifest if isinstance(manifest, dict) and "heldout_documents" in manifest else None


def _is_current(out_dir: Path) -> bool:
    manifest = _manifest(out_dir) or {}
    return all(manifest.get(key) == value for key, value in {"version": VERSION, **DEFAULTS}.items())


def _sample(seed: int, split: str, index: int, image_size: int) -> dict[str, Any]:
    """Make one sample as webdataset's writer takes it: ``__key__`` and members by suffix."""
    if split == "train-pairs":
        return _pair_sample(seed, index, image_size)
    texts, scenes, matched = make_document(seed, split, index)
    pictures: dict[str, bytes] = {}
    names: list[str | None] = []
    for scene in scenes:
        names.append(None if scene is None else f"{len(pictures):03d}.jpg")
        if scene is not None:
            pictures[f"{len(pictures):03d}.jpg"] = _jpeg(scene, image_size)
    labels = [None if scene is None else scene.labels() for scene in scenes]
    record = {"texts": texts, "images": names, "matched_text_index": matched, "labels": labels}
    return {"__key__": f"{split}-{index:06d}", "json": json.dumps(record).encode(), **pictures}


def _pair_sample(seed: int, index: int, image_size: int) -> dict[str, Any]:
    """Make a sample as img2dataset writes it."""
    key = f"{index:09d}"
    caption, scene = make_pair(seed, index)
    picture = _jpeg(scene, image_size)
    record: dict[str, Any] = {
        "url": f"demo://{key}",
        "caption": caption,
        "key": key,
        "status": "success",
        "error_message": None,
        "width": image_size,
        "height": image_size,
        "original_width": image_size,
        "original_height": image_size,
        "exif": "{}",
        "sha256": hashlib.sha256(picture).hexdigest(),
    }
    return {"__key__": key, "jpg": picture, "json": json.dumps(record).encode(), "txt": caption.encode()}


def _jpeg(scene: Scene, image_size: int) -> bytes:
    buffer = io.BytesIO()
    # Full chroma: at this size colour would not survive the usual halving.
    Image.fromarray(render_scene(scene, image_size)).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def _write_shard(path: Path, samples: Iterable[dict[str, Any]]) -> None:
    # No encoder: all members are bytes. A fixed time, or two builds would differ.
    with TarWriter(str(path), mtime=0, encoder=False) as writer:
        for sample in samples:
            writer.write(sample)


def _training_text(seed: int, documents: int, pairs: int) -> Iterator[str]:
    for index in range(min(documents, 1000)):
        yield " ".join(text for text in make_document(seed, "train-documents", index)[0] if text)
    for index in range(min(pairs, 1000)):
        yield make_pair(seed, index)[0]
