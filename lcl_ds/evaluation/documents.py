"""Held-out documents, decoded once."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from lcl_ds.data.documents import read_document, read_labels
from lcl_ds.data.images import decode_image
from lcl_ds.data.packing import PackedSequence
from lcl_ds.data.shards import Source, expand_paths, index_shard
from lcl_ds.tokens import TextTokenizer, encode_sequence


@dataclass(frozen=True)
class HeldOut:
    """Documents as sequences, and their images with labels."""

    sequences: list[PackedSequence]
    pixels: np.ndarray
    """uint8 [images, 3, H, W], documents in order."""
    labels: list[dict[str, Any]]
    """Per image; empty where a document has none."""
    document_of_image: np.ndarray
    """int64 [images]."""
    document_count: int


def read_held_out(
    paths: str | list[str],
    tokenizer: TextTokenizer,
    image_tokens: int,
    image_size: int,
    row_tokens: int,
    row_images: int,
    max_documents: int,
) -> HeldOut:
    """Read evaluation shards; a damaged sample is an error here, for figures must not depend on what was skipped.

    Raises:
        UserError: a shard is missing or unreadable.
        BadSampleError: a sample is damaged.
    """
    source = Source("held-out", [index_shard(path) for path in expand_paths(paths)])
    sequences, pixels, labels, owner = [], [], [], []
    count = min(max_documents, len(source))
    for number in range(count):
        document = read_document(source, number)
        decoded = [decode_image(source.read(number, suffix), image_size) for suffix in document.images]
        pieces = encode_sequence(
            document.segments, tokenizer.encode, tokenizer.vocabulary, image_tokens, row_tokens, row_images
        )
        for piece in pieces:
            shown = np.stack([decoded[slot.image] for slot in piece.slots]) if piece.slots else None
            empty = np.zeros((0, 3, image_size, image_size), np.uint8)
            sequences.append(PackedSequence(document.key, piece, empty if shown is None else shown))
        given = read_labels(source, number)
        pixels += decoded
        labels += [label or {} for label in given] if given else [{}] * len(decoded)
        owner += [number] * len(decoded)
    return HeldOut(sequences, np.stack(pixels), labels, np.array(owner), count)
