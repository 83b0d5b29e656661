"""Held-out documents, decoded once."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from lcl_ds.data.documents import read_document, read_labels
from lcl_ds.data.images import decode_image
from lcl_ds.data.packing import PackedSequence
from lcl_ds.data.shards import Source, expand_paths, index_shard
from lcl_ds.data.views import Encoder, View


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


def read_held_out(paths: str | list[str], view: View, encoder: Encoder, image_size: int, max_documents: int) -> HeldOut:
    """Read evaluation shards; a damaged sample is an error here, for figures must not depend on what was skipped.

    Args:
        view: how documents become sequences; whatever it draws depends on the document's number alone.

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
        for piece in view.encode(document, encoder, np.random.default_rng(number)):
            shown = np.stack([decoded[image] for image in piece.images]) if piece.images else None
            empty = np.zeros((0, 3, image_size, image_size), np.uint8)
            sequences.append(PackedSequence(document.key, piece, empty if shown is None else shown))
        given = read_labels(source, number)
        pixels += decoded
        labels += [label or {} for label in given] if given else [{}] * len(decoded)
        owner += [number] * len(decoded)
    return HeldOut(sequences, np.stack(pixels), labels, np.array(owner), count)
