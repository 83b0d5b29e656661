"""Batches of images that keep their aspect ratio."""

import numpy as np

from lcl_ds.batch import Batch
from lcl_ds.config import Config
from lcl_ds.data.documents import Document
from lcl_ds.data.native import with_grids
from lcl_ds.data.sequences import DocumentView, Sequencer
from lcl_ds.data.stream.packing import PackedSequence, Row, collate
from lcl_ds.grids import Grid, NativeResolution, cut_patches, kept_count
from lcl_ds.objectives import view_of
from tests.support.small import IMAGE_SIZE, ROW_TOKENS, VOCABULARY

PATCH, LARGEST = 8, 6
"""Of the small towers, and the patches of an image at most; a square has 4."""
NATIVE = ("model.vision.resolution=native", f"model.vision.max_image_tokens={LARGEST}")
NATIVE_WAYS = ((0, "clip_vision_model"), (2, "siglip_vision_model"), (3, "clip_vision_model"), (3, "dinov2"))
"""ZeRO stages and families whose gradients are compared."""
SQUARE = (IMAGE_SIZE // PATCH, IMAGE_SIZE // PATCH)


def grids_of(shapes, dropout=0.0) -> list[Grid]:
    """Grids of so many rows and columns."""
    return [Grid(rows, columns, kept_count(rows * columns, dropout)) for rows, columns in shapes]


def pictures(shapes, seed=0) -> list[np.ndarray]:
    """Noise, uint8 [3, H, W], for each of ``shapes``."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (3, rows * PATCH, columns * PATCH), dtype=np.uint8) for rows, columns in shapes]


def native_sequence(segments, shapes, seed=0, dropout=0.0) -> PackedSequence:
    """A document whose words become one token per letter, with images of these shapes."""
    document = Document(f"test/{seed}", tuple(segments), tuple(f"{number}.jpg" for number in range(len(shapes))))
    (sequence,) = sequences_of(document, DocumentView(), grids_of(shapes, dropout), seed)
    return sequence


def sequences_of(document, view, grids, seed) -> list[PackedSequence]:
    """What a view makes of a document whose images are noise in these grids."""
    encode = lambda text: [ord(letter) % 60 for letter in text]  # noqa: E731
    sequencer = with_grids(Sequencer(encode, VOCABULARY, LARGEST, ROW_TOKENS, 9), grids)
    patches = [cut_patches(image, PATCH) for image in pictures([grid[:2] for grid in grids], seed)]
    sequences = []
    for tokens in view.encode(document, sequencer, np.random.default_rng(seed)):
        pixels = np.concatenate([np.zeros((0, 3, PATCH, PATCH), np.uint8), *(patches[i] for i in tokens.images)])
        seeds, own = tuple(seed + i for i in tokens.images), tuple(grids[i] for i in tokens.images)
        sequences.append(PackedSequence(document.key, tokens, pixels, seeds, grids=own))
    return sequences


def native_batch(*rows: list[PackedSequence], names=DocumentView.readout_names) -> Batch:
    native = NativeResolution(PATCH, LARGEST, LARGEST)
    return collate([Row(tuple(row)) for row in rows], ROW_TOKENS, IMAGE_SIZE, VOCABULARY, names, native)


def native_documents(config: Config, dropout: float = 0.0) -> Batch:
    """Three rows of one document with an image of its own shape each, as the objective of ``config`` sees them."""
    view, rows = view_of(config.objective, image_first_probability=0.5), []
    for number, (text, shape) in enumerate([("abc", (1, 5)), ("ef", (2, 3)), ("hi", (2, 2))]):
        document = Document(f"test/{number}", (text, 0, "d"), ("0.jpg",))
        rows.append(sequences_of(document, view, grids_of([shape], dropout), number))
    return native_batch(*rows, names=view.readout_names)


def rows_of_rank(case: str, rank: int) -> list[list[PackedSequence]]:
    """Two rows; on the first rank images of many shapes, on the second the same, squares alone or none at all."""
    seed = 10 * rank
    if case == "none" and rank == 1:
        return [[native_sequence(["abcdefgh"], [], seed)], [native_sequence(["ijklm"], [], seed + 1)]]
    shapes = [SQUARE] * 4 if case == "squares" and rank == 1 else [(1, 5), (3, 2), SQUARE, (1, 1)]
    return [
        [native_sequence(["abc", 0, "de", 1], shapes[:2], seed)],
        [native_sequence(["fg", 0, "h"], shapes[2:3], seed + 2), native_sequence(["ij", 0], shapes[3:], seed + 3)],
    ]
