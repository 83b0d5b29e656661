"""Token sequences into rows, and rows into a batch."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lcl_ds.batch import Batch
from lcl_ds.tokens import TokenSequence, Vocabulary, labels_of


def pack(lengths: Sequence[int], images: Sequence[int], row_tokens: int, row_images: int) -> list[list[int]]:
    """Best fit by decreasing length under two budgets.

    Args:
        lengths: tokens of each sequence, each at most ``row_tokens``.
        images: images of each sequence, each at most ``row_images``.

    Returns:
        Rows of sequence numbers, fullest first.
    """
    free: list[tuple[int, int]] = []  # (free tokens, row), sorted
    rows: list[list[int]] = []
    row_image_count: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(free, (lengths[number], -1))
        while at < len(free) and row_image_count[free[at][1]] + images[number] > row_images:
            at += 1
        if at < len(free):
            room, row = free.pop(at)
        else:
            room, row = row_tokens, len(rows)
            rows.append([])
            row_image_count.append(0)
        rows[row].append(number)
        row_image_count[row] += images[number]
        bisect.insort(free, (room - lengths[number], row))
    return [rows[row] for _, row in free]


@dataclass(frozen=True)
class PackedSequence:
    """One sequence of a row with its pixels."""

    key: str
    tokens: TokenSequence
    pixels: np.ndarray
    """uint8 [images, 3, H, W], in the order of ``tokens.slots``."""


@dataclass(frozen=True)
class Row:
    """One packed row."""

    sequences: tuple[PackedSequence, ...]
    skipped_samples: int = 0


def collate(rows: Sequence[Row], row_tokens: int, image_size: int, vocabulary: Vocabulary, context_rule: str) -> Batch:
    """Lay rows side by side; see :class:`lcl_ds.batch.Batch` for what comes out.

    Padding is a document of its own without labels.

    Args:
        context_rule: ``text_before``: an image counts when text of its sequence precedes it; ``reference``: when its
            ``<soi>`` is not the first token of its sequence, as in the published code, where each has a row.
    """
    shape = len(rows), row_tokens
    input_ids = np.full(shape, vocabulary.eot, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    labels: list[np.ndarray] = []
    label_positions: list[np.ndarray] = []
    image_positions: list[int] = []
    pair_images: list[int] = []
    pixels: list[np.ndarray] = []
    for r, row in enumerate(rows):
        start = 0
        for sequence in row.sequences:
            ids = sequence.tokens.input_ids
            end, offset = start + len(ids), r * row_tokens + start
            input_ids[r, start:end] = ids
            position_ids[r, start:end] = np.arange(len(ids))
            positions, following = labels_of(ids, vocabulary)
            label_positions.append(positions + offset)
            labels.append(following)
            for slot in sequence.tokens.slots:
                if slot.has_context if context_rule == "text_before" else slot.position > 1:
                    pair_images.append(len(image_positions))
                image_positions.append(offset + slot.position)
            pixels.append(sequence.pixels)
            start = end
        position_ids[r, start:] = np.arange(row_tokens - start)
    image_count = len(image_positions)
    if image_count == 0:
        pixels = [np.full((1, 3, image_size, image_size), 127, dtype=np.uint8)]
        image_positions = [len(rows) * row_tokens]
    sequences = [sequence for row in rows for sequence in row.sequences]
    positions_tensor = torch.tensor(image_positions, dtype=torch.int64)
    pair_tensor = torch.tensor(pair_images, dtype=torch.int64)
    bounds = np.append(np.flatnonzero(position_ids == 0), position_ids.size).astype(np.int32)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=torch.from_numpy(bounds),
        max_seqlen=int(np.diff(bounds).max()),
        images=torch.from_numpy(np.concatenate(pixels)),
        image_positions=positions_tensor,
        pair_images=pair_tensor,
        pair_positions=positions_tensor[pair_tensor] - 1,
        label_positions=torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *label_positions])),
        labels=torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *labels])),
        image_count=image_count,
        document_count=len(sequences),
        token_count=sum(len(sequence.tokens.input_ids) for sequence in sequences),
        skipped_samples=sum(row.skipped_samples for row in rows),
        keys=tuple(sequence.key for sequence in sequences),
    )
