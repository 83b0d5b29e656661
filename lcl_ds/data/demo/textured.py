"""The harder embedded corpus: pictures whose shapes and textures must be told apart, with text that may not fit them.

Like the demo it is made once, deterministically, and stored as ordinary shards. The images of a document may have their
colour, texture or shape in common, so that neither alone says which image a context announces. A sentence before an
image tells some of its attributes, sentences after it the others. Sets of shards share the pictures:

- ``documents``: the documents; ``heldout-documents``: others, with labels, for evaluation.
- ``pairs``: each image of the documents with the sentence that describes it, as img2dataset writes pairs;
  ``heldout-pairs``: those of the held-out documents.
- ``mismatch20-documents``, ``mismatch20-pairs``: the same where a fifth of the images is described as another picture.

``python -m lcl_ds.data.demo OUT --textured`` makes it by hand, ``data.textured`` of a recipe when it is missing.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from webdataset import TarWriter

from lcl_ds.data.demo.corpus import FILLER, NUMBERS, replace_folder
from lcl_ds.data.demo.scenes import COLOURS, Rng, pick
from lcl_ds.data.demo.textured_scenes import DISTRACTORS, SHAPES, SIZES, TEXTURES, Look, render_look, sample_look
from lcl_ds.data.own_tokenizer import train_tokenizer
from lcl_ds.data.settings import TexturedSettings
from lcl_ds.errors import UserError
from lcl_ds.files import only_one, write_whole

VERSION = 1
"""Of the content; another version is another corpus and is built again."""
KIND = "textured"
SPLITS = {"documents": 0, "heldout-documents": 1}
DOCUMENTS_PER_SHARD = 500
VOCABULARY = 448
JPEG_QUALITY = 90
THEMES = (None, None, "colour", "texture", "shape")
"""What the images of a document have alike, all equally likely."""
IMAGES = (2, 3, 4)
TOLD = {"size": 0.5, "colour": 0.6, "texture": 0.8, "shape": 0.8}
"""Probability that the sentence before an image tells an attribute."""

BEFORE = ("next comes {} .", "now look at {} .", "here is {} .", "the next picture shows {} .", "then i found {} .")
AFTER = ("it was {} .", "above you see {} .", "that was {} .")
DETAILS = {
    "size": ("it was {} .", "one would call it {} ."),
    "colour": ("it was {} .", "somebody had painted it {} ."),
    "texture": ("it was {} .", "its fill is {} ."),
    "shape": ("it was a {} .", "it had the form of a {} ."),
}
COUNTED = ("there were {} things in it .", "i counted {} .")


@dataclass(frozen=True)
class Told:
    """An image of a document and what is said about it."""

    look: Look
    described: Look
    """Another picture's where the text is mismatched."""
    before: tuple[str, ...]
    after: tuple[str, ...]
    matched: int
    """Which of ``before + after`` describes the image."""

    @property
    def sentence(self) -> str:
        return (self.before + self.after)[self.matched]


def _rng(settings: TexturedSettings, split: str, *numbers: int) -> Rng:
    """Make a generator of one thing alone, so that content depends on neither order nor count."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((settings.seed, SPLITS[split], *numbers))))


def describe(look: Look, told: set[str], rng: Rng) -> str:
    """Write a phrase with the attributes that are to be told."""
    noun = look.shape if "shape" in told else "thing"
    words = [getattr(look, name) for name in ("size", "colour", "texture") if name in told]
    if not words:
        return f"a {noun}"
    return pick(
        rng,
        (
            f"a {' '.join(words)} {noun}",
            f"a {noun} , {' and '.join(words)}",
            f"a {noun} that is {' , '.join(words[::-1])}",
        ),
    )


def tell(look: Look, described: Look, rng: Rng, silent: float, is_bare: bool = False) -> Told:
    """Draw what is said before and after an image.

    Args:
        silent: probability that what precedes it says nothing of it.
        is_bare: whether nothing at all precedes it.
    """
    # All draws are made in any case: what is said of one picture changes nothing of how another is told.
    told = {name for name, probability in TOLD.items() if rng.random() < probability}
    if len(told) < 2:
        told = {"texture", "shape"}
    before = [pick(rng, FILLER)] if rng.random() < 0.2 else []
    if rng.random() < silent or is_bare:
        sentence = pick(rng, AFTER).format(describe(described, told, rng))
        quiet = () if is_bare else tuple(before or [pick(rng, FILLER)])
        return Told(look, described, quiet, (sentence,), len(quiet))
    before.append(pick(rng, BEFORE).format(describe(described, told, rng)))
    after = [
        pick(rng, DETAILS[name]).format(getattr(described, name))
        for name in TOLD
        if rng.random() < 0.6 and name not in told
    ]
    if rng.random() < 0.3:
        after.append(pick(rng, COUNTED).format(NUMBERS[1 + described.others]))
    return Told(look, described, tuple(before), tuple(after), len(before) - 1)


def make_document(settings: TexturedSettings, split: str, index: int, mismatch: float = 0.0) -> list[Told]:
    """Make the images of a document and what is said about each, in reading order.

    Args:
        mismatch: fraction of images that are described as another picture. Pictures do not depend on it, and who is
            mismatched at a small fraction is so at a larger one.
    """
    rng = _rng(settings, split, index)
    theme = pick(rng, THEMES)
    shared = {} if theme is None else {theme: getattr(sample_look(rng), theme)}
    looks = [sample_look(rng, shared) for _ in range(pick(rng, IMAGES))]
    is_bare = rng.random() < settings.bare
    document = []
    for number, look in enumerate(looks):
        chance = _rng(settings, split, index, number, 1)
        is_other, other = chance.random() < mismatch, sample_look(chance)
        words = _rng(settings, split, index, number, 2)
        document.append(tell(look, other if is_other else look, words, settings.silent, is_bare and not number))
    return document


def _picture(settings: TexturedSettings, split: str, index: int, number: int, look: Look) -> bytes:
    buffer = io.BytesIO()
    pixels = render_look(look, _rng(settings, split, index, number, 3), settings.image_size)
    # Full chroma: at this size colour would not survive the usual halving.
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


@dataclass(frozen=True)
class ShardSet:
    """Shards with one kind of samples."""

    split: str
    pairs: bool = False
    mismatch: float = 0.0

    @property
    def name(self) -> str:
        """Begin the names of its files."""
        level = f"mismatch{100 * self.mismatch:g}-" if self.mismatch else ""
        return level + (self.split.replace("documents", "pairs") if self.pairs else self.split)


def wanted_sets(settings: TexturedSettings) -> list[ShardSet]:
    """List what a recipe with these settings reads: training samples, and what it is evaluated on."""
    held_out = [ShardSet("heldout-documents"), ShardSet("heldout-documents", pairs=True)]
    return [ShardSet("documents", settings.pairs, settings.mismatch), *held_out]


def samples_of(settings: TexturedSettings, of: ShardSet, index: int) -> Iterator[dict[str, Any]]:
    """Yield the samples that a set has of one document, as webdataset's writer takes them."""
    document = make_document(settings, of.split, index, of.mismatch)
    pictures = [_picture(settings, of.split, index, n, told.look) for n, told in enumerate(document)]
    if of.pairs:
        for number, (told, picture) in enumerate(zip(document, pictures, strict=True)):
            facts = {**told.look.labels(), "mismatched": told.described is not told.look}
            key = f"{index:07d}{number:02d}"
            yield {"__key__": key, "jpg": picture, "json": _json(facts), "txt": told.sentence.encode()}
        return
    texts: list[str | None] = []
    images: list[str | None] = []
    matched: list[int | None] = []
    labels: list[dict[str, Any] | None] = []
    for number, told in enumerate(document):
        entries = [*told.before, None, *told.after]
        sentence = len(texts) + told.matched + (told.matched >= len(told.before))
        for text in entries:
            is_image = text is None
            texts.append(text)
            images.append(f"{number:03d}.jpg" if is_image else None)
            matched.append(sentence if is_image else None)
            labels.append(told.look.labels() if is_image else None)
    mismatched = [told.described is not told.look for told in document]
    lists = {"texts": texts, "images": images, "matched_text_index": matched, "labels": labels}
    record = _json({**lists, "mismatched": mismatched})
    members = {f"{number:03d}.jpg": picture for number, picture in enumerate(pictures)}
    yield {"__key__": f"{of.split}-{index:07d}", "json": record, **members}


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _write_shard(folder: Path, settings: TexturedSettings, of: ShardSet, documents: range) -> tuple[str, Any]:
    """Write the samples of some documents; returns the shard's name and facts for the manifest."""
    path = folder / f"{of.name}-{documents.start // DOCUMENTS_PER_SHARD:06d}.tar"
    count = 0
    # No encoder: all members are bytes. A fixed time, or two builds would differ.
    with TarWriter(str(path), mtime=0, encoder=False) as writer:
        for index in documents:
            for sample in samples_of(settings, of, index):
                writer.write(sample)
                count += 1
    data = path.read_bytes()
    return path.name, {"samples": count, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def build_set(folder: Path, settings: TexturedSettings, of: ShardSet) -> dict[str, Any]:
    """Write the shards of a set into ``folder``, several at a time; the same settings give the same bytes.

    Returns:
        What the manifest says of it.
    """
    count = settings.heldout_documents if of.split.startswith("heldout") else settings.documents
    parts = [range(s, min(s + DOCUMENTS_PER_SHARD, count)) for s in range(0, count, DOCUMENTS_PER_SHARD)]
    write = partial(_write_shard, folder, settings, of)
    workers = min(len(parts), os.cpu_count() or 1)
    if workers < 2 or len(parts) < 5:  # to start processes would take longer
        return dict(map(write, parts))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        return dict(pool.map(write, parts))


def build_textured(folder: Path, settings: TexturedSettings, sets: list[ShardSet] | None = None) -> None:
    """Write tokenizer, sets and manifest into a folder that does not exist yet.

    Args:
        sets: None: those that a recipe with these settings reads.
    """
    folder.mkdir(parents=True)
    texts = (
        " ".join(
            sentence for told in make_document(settings, "documents", index) for sentence in told.before + told.after
        )
        for index in range(min(settings.documents, 1000))
    )
    train_tokenizer(texts, folder / "tokenizer", VOCABULARY)
    manifest = {**identity_of(settings), "labels": LABELS, "sets": {}}
    for of in sets or wanted_sets(settings):
        manifest["sets"][of.name] = build_set(folder, settings, of)
    _write_manifest(folder, manifest)


LABELS = {
    "shape": list(SHAPES),
    "texture": list(TEXTURES),
    "colour": list(COLOURS),
    "size": list(SIZES),
    "count": [1 + others for others in DISTRACTORS],
}


def identity_of(settings: TexturedSettings) -> dict[str, Any]:
    """Say which corpus it is: what all of its sets have in common."""
    chosen = {"seed", "documents", "heldout_documents", "image_size", "silent", "bare"}
    return {"kind": KIND, "version": VERSION, **settings.model_dump(include=chosen)}


def ensure_textured(settings: TexturedSettings) -> Path:
    """Make the corpus, or the sets of it that are missing; one of other settings or version is made anew.

    Any number of processes may ask at once: one builds, the others wait.

    Raises:
        UserError: the folder holds something else; it is left alone.
    """
    folder = Path(settings.folder)
    if not _missing_sets(folder, settings):
        return folder
    with only_one(folder):
        manifest = _manifest(folder)
        if manifest is None and folder.exists():
            raise UserError(
                f"data.textured.folder: {folder} exists and is not this corpus; name a new folder or set "
                "data.textured=null"
            )
        if manifest is None or any(manifest.get(key) != value for key, value in identity_of(settings).items()):
            replace_folder(folder, lambda partial_folder: build_textured(partial_folder, settings))
            return folder
        for of in _missing_sets(folder, settings):
            manifest["sets"][of.name] = build_set(folder, settings, of)
            _write_manifest(folder, manifest)
    return folder


def _missing_sets(folder: Path, settings: TexturedSettings) -> list[ShardSet]:
    manifest = _manifest(folder)
    wanted = wanted_sets(settings)
    if manifest is None or any(manifest.get(key) != value for key, value in identity_of(settings).items()):
        return wanted
    return [of for of in wanted if of.name not in manifest["sets"]]


def _manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("kind") == KIND else None


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_whole(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")
