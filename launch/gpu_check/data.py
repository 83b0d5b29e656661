"""Data for a speed check at full size: ``python -m launch.gpu_check.data OUT`` writes shards and a tokenizer.

Pictures and sentences are the demo corpus's, at the size and in the proportions of web documents. The tokenizer is the
demo's few hundred entries plus unused ones, as many as give the published vocabulary of 49,411 with the control tokens.
No text ever produces an unused entry: only the sizes matter for speed, and nothing here says how well a model learns.
"""

import argparse
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from webdataset import TarWriter

from lcl_ds.data.demo.corpus import FILLER, JPEG_QUALITY, build_demo, make_document
from lcl_ds.data.demo.scenes import render_scene
from lcl_ds.tokens import CONTROL_TOKENS

VOCABULARY = 49_411
"""Rows of the decoder's embedding and of the head, control tokens included."""
SENTENCES_PER_IMAGE = (3, 18)
"""Fewest and most sentences of filler after a picture. So a picture of 196 tokens comes with some 130 of text."""


def extend_tokenizer(folder: Path, text_size: int) -> None:
    """Give the BPE tokenizer in ``folder`` entries that no merge leads to, until it has ``text_size``."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    for number in range(len(vocabulary), text_size):
        vocabulary[f"unused {number}"] = number  # byte-level BPE writes a space in another way: no clash
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def write_shard(path: Path, documents: int, image_size: int) -> None:
    """Interleaved documents with pictures of ``image_size`` pixels."""
    # No encoder: all members are bytes.
    with TarWriter(str(path), mtime=0, encoder=False) as writer:
        for index in range(documents):
            writer.write(_sample(index, image_size))


def _sample(index: int, image_size: int) -> dict[str, Any]:
    texts, scenes, _ = make_document(0, "train-documents", index)
    rng = np.random.default_rng(index)
    record: dict[str, list[str | None]] = {"texts": [], "images": []}
    pictures: dict[str, bytes] = {}
    for text, scene in zip(texts, scenes, strict=True):
        if scene is not None:
            name = f"{len(pictures):03d}.jpg"
            pictures[name] = _jpeg(render_scene(scene, image_size))
            record["texts"].append(None)
            record["images"].append(name)
        for sentence in [text] if scene is None else _filler(rng):
            record["texts"].append(sentence)
            record["images"].append(None)
    return {"__key__": f"{index:06d}", "json": json.dumps(record).encode(), **pictures}


def _filler(rng: np.random.Generator) -> Iterator[str]:
    for number in rng.integers(0, len(FILLER), rng.integers(*SENTENCES_PER_IMAGE, endpoint=True)):
        yield FILLER[number]


def _jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def build(out_dir: Path, documents: int, image_size: int) -> None:
    """Write ``documents.tar`` and ``tokenizer/`` into ``out_dir``, which must not exist yet.

    The tokenizer is trained on the demo's own text, as the demo's is; its other files lie beside it in ``demo/``.
    """
    out_dir.mkdir(parents=True)
    build_demo(out_dir / "demo", documents=200, pairs=200, heldout_documents=0, image_size=8)
    (out_dir / "demo" / "tokenizer").rename(out_dir / "tokenizer")
    extend_tokenizer(out_dir / "tokenizer", VOCABULARY - len(CONTROL_TOKENS))
    write_shard(out_dir / "documents.tar", documents, image_size)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the data of launch/recipes/gpu_check.yaml.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--image_size", type=int, default=256, help="side of the pictures; the recipe crops to 224")
    arguments = parser.parse_args(argv)
    build(arguments.out, arguments.documents, arguments.image_size)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
