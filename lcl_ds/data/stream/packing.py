"""Pack token sequences into rows, and lay rows side by side as a batch."""

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lcl_ds.batch import Batch, Readouts
from lcl_ds.grids import Grid, NativeResolution, pack_images
from lcl_ds.metrics import SourceCounts
from lcl_ds.tokens import TokenSequence, Vocabulary

LOOK_AHEAD = 8
"""Oldest rows among which a group's middle ones are chosen."""
PREFER_OLDER = 0.01
"""Images by which two rows may miss the wanted sum for each position that they stand nearer to the front."""


def pack(lengths: Sequence[int], images: Sequence[int], row_tokens: int, row_images: int) -> list[list[int]]:
    """Pack sequences into rows: best fit by decreasing length under two budgets.

    Args:
        lengths: tokens of each sequence, each at most ``row_tokens``.
        images: images of each sequence, each at most ``row_images``; or image tokens, both of them.

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


def choose_group(images: Sequence[int], size: int, mean: float) -> list[int]:
    """Choose rows whose images sum to about ``size * mean``.

    The oldest row is always among them, so none waits forever; the next ones are those of the oldest few that leave
    the rest nearest to the mean, and the last two those that come closest together.

    Args:
        images: of the waiting rows, oldest first; at least ``size``.
        size: rows to choose.
        mean: images of a row in the long run.

    Returns:
        Their numbers, in the order of choice.
    """
    waiting = list(range(len(images)))
    chosen = [waiting.pop(0)]
    while len(chosen) < size:
        missing = size * mean - sum(images[i] for i in chosen)
        left = size - len(chosen)
        if left == 2:
            counts = np.array([images[i] for i in waiting])
            distance = np.abs(counts[:, None] + counts - missing)
            distance[np.tril_indices(len(counts))] = np.inf
            age = np.arange(len(counts))
            first, second = divmod(int((distance + PREFER_OLDER * (age[:, None] + age)).argmin()), len(counts))
            chosen += [waiting[first], waiting[second]]
        else:
            near = waiting[:LOOK_AHEAD] if left > 2 else waiting
            best = min(near, key=lambda i: abs(missing - images[i] - (left - 1) * mean))
            waiting.remove(best)
            chosen.append(best)
    return chosen


@dataclass(frozen=True)
class PackedSequence:
    """One sequence of a row with its pixels."""

    key: str
    tokens: TokenSequence
    pixels: np.ndarray
    """uint8 [images, 3, H, W], in the order of ``tokens.images``; where there are ``grids`` the patches of all of them,
    [N, 3, P, P]."""
    image_seeds: tuple[int, ...] = ()
    """One per image; none where nothing is drawn for them."""
    piece: tuple[int, int] = (0, 1)
    """Which of how many pieces of its document it is, counted from 0."""
    grids: tuple[Grid, ...] = ()
    """One per image, where they keep their aspect ratio."""


@dataclass(frozen=True)
class Row:
    """One packed row."""

    sequences: tuple[PackedSequence, ...]
    skipped_samples: int = 0


def collate(
    rows: Sequence[Row],
    row_tokens: int,
    image_size: int,
    vocabulary: Vocabulary,
    readout_names: Sequence[str],
    native: NativeResolution | None = None,
) -> Batch:
    """Lay rows side by side; see :class:`lcl_ds.batch.Batch` for what comes out.

    Args:
        readout_names: those that the batch has, also where no sequence has one.
        native: how the grids of their images were chosen; None: all are squares of ``image_size``.
    """
    input_ids, position_ids = _lay_tokens(rows, row_tokens, vocabulary.eot)
    labels, label_positions = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    slots: list[tuple[int, int]] = []  # (flat position, image of the batch)
    readouts: dict[str, list[tuple[int, int, int]]] = {name: [] for name in readout_names}
    pixels: list[np.ndarray] = []
    grids: list[Grid] = []
    seeds: list[int] = []
    for r, row in enumerate(rows):
        offset = r * row_tokens
        for sequence in row.sequences:
            tokens = sequence.tokens
            label_positions.append(tokens.label_positions + offset)
            labels.append(tokens.labels)
            number = {image: len(seeds) + i for i, image in enumerate(tokens.images)}
            slots += [(offset + slot.position, number[slot.image]) for slot in tokens.slots]
            for name, positions in tokens.readouts.items():
                document = number_of(sequence.key)
                readouts[name] += [(offset + position, number[image], document) for position, image in positions]
            pixels.append(sequence.pixels)
            grids += sequence.grids
            seeds += sequence.image_seeds or (0,) * len(tokens.images)
            offset += len(tokens.input_ids)
    image_count = len(seeds)
    if image_count == 0:
        shape = (1, 3, image_size, image_size)
        if native is not None:
            grids = [native.grid(image_size, image_size)]
            shape = (grids[0].patches, 3, native.patch_size, native.patch_size)
        pixels = [np.full(shape, 127, dtype=np.uint8)]
        slots, seeds = [(len(rows) * row_tokens, 0)], [0]
    images, packed = torch.from_numpy(np.concatenate(pixels)), None
    if native is not None:
        packed = pack_images(grids, slots, beyond=0 if image_count else grids[0].tokens)
        inside = packed.slot_places[packed.slot_places < input_ids.size].numpy()
        assert (input_ids.ravel()[inside] == vocabulary.image).all(), "slots of other lengths"
    sequences = [sequence for row in rows for sequence in row.sequences]
    slot_positions, slot_images = _columns(slots, 2)
    bounds = np.append(np.flatnonzero(position_ids == 0), position_ids.size).astype(np.int32)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=torch.from_numpy(bounds),
        max_seqlen=int(np.diff(bounds).max(initial=0)),
        images=images,
        image_seeds=torch.tensor(seeds, dtype=torch.int64),
        slot_images=slot_images,
        slot_positions=slot_positions,
        readouts={name: Readouts(*_columns(entries, 3)) for name, entries in readouts.items()},
        label_positions=torch.from_numpy(np.concatenate(label_positions)),
        labels=torch.from_numpy(np.concatenate(labels)),
        image_count=image_count,
        document_count=len(sequences),
        token_count=sum(len(sequence.tokens.input_ids) for sequence in sequences),
        token_squares=int(np.square(np.diff(bounds).astype(np.int64)).sum()),
        skipped_samples=sum(row.skipped_samples for row in rows),
        keys=tuple(sequence.key for sequence in sequences),
        pieces=tuple(sequence.piece for sequence in sequences),
        sources=_sources(sequences),
        packed=packed,
    )


def _lay_tokens(rows: Sequence[Row], row_tokens: int, padding: int) -> tuple[np.ndarray, np.ndarray]:
    """Lay the tokens of rows side by side: ids and position ids, int64 [rows, row_tokens] each.

    Padding is cut into documents without labels, none longer than the longest of its row, so that no position runs past
    the decoder's table and a row is the same whatever other rows it is laid beside.
    """
    input_ids = np.full((len(rows), row_tokens), padding, dtype=np.int64)
    position_ids = np.zeros_like(input_ids)
    for ids, positions, row in zip(input_ids, position_ids, rows, strict=True):
        start, longest = 0, 1
        for sequence in row.sequences:
            tokens = sequence.tokens
            longest = max(longest, int(np.diff([*tokens.starts, len(tokens.input_ids)]).max()))
            end = start + len(tokens.input_ids)
            ids[start:end] = tokens.input_ids
            positions[start:end] = _positions(tokens)
            start = end
        positions[start:] = np.arange(row_tokens - start) % longest
    return input_ids, position_ids


def _positions(tokens: TokenSequence) -> np.ndarray:
    """Number every token within its passage."""
    numbers = np.arange(len(tokens.input_ids))
    starts = np.array(tokens.starts)
    return numbers - starts[np.searchsorted(starts, numbers, side="right") - 1]


def _sources(sequences: Sequence[PackedSequence]) -> dict[str, SourceCounts]:
    """Count documents and images by source."""
    images: dict[str, list[int]] = {}
    for sequence in sequences:
        images.setdefault(sequence.key.split("/", 1)[0], []).append(len(sequence.tokens.images))
    return {name: SourceCounts(len(of_source), sum(of_source)) for name, of_source in images.items()}


def number_of(key: str) -> int:
    """Number a document by its key, in 64 bits with a sign: the same in any process, and no other's but by chance."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), signed=True)


def _columns(rows: Sequence[tuple[int, ...]], count: int) -> list[torch.Tensor]:
    return [column.contiguous() for column in torch.tensor(rows, dtype=torch.int64).view(-1, count).unbind(1)]
