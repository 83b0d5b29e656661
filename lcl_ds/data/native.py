"""Encode documents whose images keep their aspect ratio: how many tokens an image has is read from its header."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lcl_ds.data.documents import BadSampleError, Document
from lcl_ds.data.images import JPEG_START, upright_size
from lcl_ds.data.sequences import Sequencer, View
from lcl_ds.data.shards.source import Source
from lcl_ds.grids import Grid, NativeResolution
from lcl_ds.tokens import TokenSequence

HEADER_BYTES = 1 << 16
"""What is read of a JPEG to learn its size; a longer header is read with the whole file. In other formats what says how
an image is turned may stand behind its pixels."""
NO_GRID = Grid(1, 1, 1)
"""Stands for the grid of an image that is taken out again because it cannot be used."""


@dataclass(frozen=True)
class Encoded:
    """What a view makes of one document."""

    sequences: list[TokenSequence]
    grids: tuple[Grid | None, ...] = ()
    """Of each of its images where they keep their aspect ratio; None: it cannot be used."""
    problems: tuple[BadSampleError | OSError, ...] = ()
    """Of those images."""


def encode_document(
    source: Source,
    number: int,
    document: Document,
    view: View,
    sequencer: Sequencer,
    rng: np.random.Generator,
    native: NativeResolution | None,
    max_pixels: int,
) -> Encoded:
    """Make the sequences of one document; where its images keep their aspect ratio, without those of a bad header.

    Raises:
        BadSampleError: there is nothing in it for the objective.
    """
    if native is None:
        return Encoded(view.encode(document, sequencer, rng))
    grids: list[Grid | None] = []
    problems: list[BadSampleError | OSError] = []
    for suffix in document.images:
        try:
            grids.append(_grid(source, number, suffix, native, max_pixels))
        except (BadSampleError, OSError) as problem:
            grids.append(None)
            problems.append(problem)
    own = with_grids(sequencer, grids)
    sequences = []
    for tokens in view.encode(document, own, rng):
        lost = [image for image in tokens.images if grids[image] is None]
        left = view.without_images(tokens, lost, own) if lost else tokens
        if left is not None:
            sequences.append(left)
    return Encoded(sequences, tuple(grids), tuple(problems))


def with_grids(sequencer: Sequencer, grids: Sequence[Grid | None]) -> Sequencer:
    """Let a sequencer know how many tokens each image of a document has; unchanged where there are no grids."""
    if not grids:
        return sequencer
    return replace(sequencer, own_image_tokens=tuple((grid or NO_GRID).tokens for grid in grids))


def image_cost(tokens: TokenSequence, grids: Sequence[Grid | None]) -> int:
    """Count what a row's budget of images is charged: images, or their tokens where they have grids."""
    if not grids:
        return len(tokens.images)
    return sum((grids[image] or NO_GRID).tokens for image in tokens.images)


def _grid(source: Source, number: int, suffix: str, native: NativeResolution, max_pixels: int) -> Grid:
    """Read an image's header and choose its grid. Raises: BadSampleError, OSError."""
    data = source.read(number, suffix, HEADER_BYTES)
    if len(data) == HEADER_BYTES:
        if data.startswith(JPEG_START):
            try:
                return native.grid(*upright_size(data, max_pixels))
            except BadSampleError:
                pass  # its header may be longer: the whole file says what is wrong
        data = source.read(number, suffix)
    return native.grid(*upright_size(data, max_pixels))
