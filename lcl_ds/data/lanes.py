"""The endless deterministic stream of rows, in independent lanes.

The global stream's row n comes from lane ``n % lanes``. A lane owns every ``lanes``-th block of a permutation drawn
anew each epoch, shuffles samples inside a window of blocks and packs a window of documents into rows. Nothing random
is stored: every draw is a function of (seed, purpose, lane, counter), so a lane's position is a few integers plus the
documents carried over from the last window, and the stream is the same for any ranks x workers that divide the number
of lanes.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lcl_ds.data.documents import MAX_TEXT_BYTES, BadSampleError, Document, read_document
from lcl_ds.data.images import decode_image
from lcl_ds.data.packing import PackedSequence, Row, pack
from lcl_ds.data.shards import Source
from lcl_ds.data.skips import Skips
from lcl_ds.data.views import DocumentView, Encoder, View
from lcl_ds.tokens import TextTokenizer, TokenSequence

SOURCE, EPOCH, WINDOW, ROWS, SEQUENCES, CROP, IMAGE = range(7)
"""Purposes of keyed draws."""

CARRIED_SHARE = 4
"""One row in this many, the emptiest, is dissolved into the next window ..."""
MAX_CARRIES = 2
"""... so often at most for any piece."""

LaneState = dict[str, Any]
"""JSON: ``draws``, ``cursors`` per source, ``carried`` documents, ``emitted`` rows of the current window."""


def keyed_rng(*key: int) -> np.random.Generator:
    """A generator that depends on ``key`` alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


@dataclass(frozen=True)
class LaneSettings:
    """What the rows of every lane depend on."""

    lanes: int
    data_seed: int
    augmentation_seed: int
    row_tokens: int
    row_images: int
    image_tokens: int
    image_size: int
    pack_window: int = 128
    shuffle_blocks: int = 4
    view: View = field(default_factory=DocumentView)
    crop_scale: tuple[float, float] = (0.9, 1.0)
    max_image_pixels: int = 89_000_000
    max_text_bytes: int = MAX_TEXT_BYTES
    max_bad_share: float = 0.5


@dataclass(frozen=True)
class _Piece:
    """A sequence waiting for a row: which draw of the lane it came from and which piece of that document it is."""

    source: int
    sample: int
    draw: int
    piece: int
    carries: int
    """Windows it has been carried over."""
    document: Document
    tokens: TokenSequence

    def address(self) -> list[int]:
        return [self.source, self.sample, self.draw, self.piece, self.carries]


class Lane:
    """One lane; ``next_row`` never ends.

    Args:
        sources: where samples come from.
        settings: shared by all lanes.
        number: this lane, ``0 .. settings.lanes - 1``.
        tokenizer: text to ids.
        state: from an earlier :meth:`state`, to continue exactly there.
        skips: where to count what is left out, for the lanes of one process.
    """

    def __init__(
        self,
        sources: list[Source],
        settings: LaneSettings,
        number: int,
        tokenizer: TextTokenizer,
        state: LaneState | None = None,
        skips: Skips | None = None,
    ):
        self._skips = skips or Skips(settings.max_bad_share)
        self._pending_skips = 0
        self.sources, self.settings, self.number = sources, settings, number
        self._encoder = Encoder(
            tokenizer.encode, tokenizer.vocabulary, settings.image_tokens, settings.row_tokens, settings.row_images
        )
        weights = np.array([source.weight for source in sources])
        self._source_edges = np.cumsum(weights / weights.sum())
        state = state or {"draws": 0, "cursors": [[0, 0] for _ in sources], "carried": [], "emitted": 0}
        self._draws: int = state["draws"]
        self._cursors: list[list[int]] = [list(cursor) for cursor in state["cursors"]]
        self._carried = [self._piece_at(*address) for address in state["carried"]]
        self._windows: dict[int, tuple[int, np.ndarray]] = {}
        self._permutations: dict[int, tuple[int, np.ndarray]] = {}
        self._rows: list[list[_Piece]] = []
        self._emitted = 0
        self._window_state = state
        if state["emitted"]:
            self._fill_window()
            self._emitted = state["emitted"]
        self._pending_skips = 0

    def state(self) -> LaneState:
        """Position after the last row returned."""
        return {**self._window_state, "emitted": self._emitted}

    def next_row(self) -> Row:
        """The lane's next row, pixels decoded."""
        while self._emitted >= len(self._rows):
            self._fill_window()
        pieces = self._rows[self._emitted]
        self._emitted += 1
        sequences = []
        for piece in pieces:
            sequence = self._with_pixels(piece)
            sequences += [sequence] if sequence is not None else []
        row = Row(tuple(sequences), self._pending_skips)
        self._pending_skips = 0
        return row

    def _fill_window(self) -> None:
        self._window_state = {
            "draws": self._draws,
            "cursors": [list(cursor) for cursor in self._cursors],
            "carried": [piece.address() for piece in self._carried],
            "emitted": 0,
        }
        pieces = list(self._carried)
        for _ in range(self.settings.pack_window):
            source, draw = self._draw_source(), self._draws
            sample = self._next_sample(source)
            self._draws += 1
            try:
                pieces += self._pieces(source, sample, draw)
                self._skips.good()
            except (BadSampleError, OSError) as problem:
                self._leave_out(self.sources[source], sample, problem)
        packed = pack(
            [len(piece.tokens.input_ids) for piece in pieces],
            [len(piece.tokens.images) for piece in pieces],
            self.settings.row_tokens,
            self.settings.row_images,
        )
        # A piece of an awkward length must not wait for ever.
        free = [row for row in packed if all(pieces[i].carries < MAX_CARRIES for i in row)]
        dissolved = free[-max(1, len(packed) // CARRIED_SHARE) :] if len(packed) > 1 else []
        kept = [row for row in packed if row not in dissolved]
        self._carried = [replace(pieces[i], carries=pieces[i].carries + 1) for row in dissolved for i in row]
        order = keyed_rng(self.settings.data_seed, ROWS, self.number, self._draws).permutation(len(kept))
        self._rows = [[pieces[i] for i in kept[row]] for row in order]
        self._emitted = 0

    def _draw_source(self) -> int:
        if len(self.sources) == 1:
            return 0
        draw = keyed_rng(self.settings.data_seed, SOURCE, self.number, self._draws).random()
        return min(int(np.searchsorted(self._source_edges, draw, side="right")), len(self.sources) - 1)

    def _next_sample(self, source: int) -> int:
        window, offset = self._cursors[source]
        samples = self._window_samples(source, window)
        if offset == len(samples):
            window, offset = window + 1, 0
            samples = self._window_samples(source, window)
        self._cursors[source] = [window, offset + 1]
        return int(samples[offset])

    def _window_samples(self, source: int, window: int) -> np.ndarray:
        """Samples of the lane's next ``shuffle_blocks`` blocks, shuffled."""
        cached = self._windows.get(source)
        if cached is None or cached[0] != window:
            first = window * self.settings.shuffle_blocks
            blocks = [self._block(source, i) for i in range(first, first + self.settings.shuffle_blocks)]
            samples = np.concatenate([np.arange(*block) for block in blocks])
            keyed_rng(self.settings.data_seed, WINDOW, source, self.number, window).shuffle(samples)
            cached = self._windows[source] = window, samples
        return cached[1]

    def _block(self, source: int, index: int) -> tuple[int, int]:
        """The lane's ``index``-th block over all epochs."""
        blocks = self.sources[source].blocks
        epoch, place = divmod(index * self.settings.lanes + self.number, len(blocks))
        cached = self._permutations.get(source)
        if cached is None or cached[0] != epoch:
            permutation = keyed_rng(self.settings.data_seed, EPOCH, source, epoch).permutation(len(blocks))
            cached = self._permutations[source] = epoch, permutation
        return blocks[cached[1][place]]

    def _pieces(self, source: int, sample: int, draw: int) -> list[_Piece]:
        document = read_document(self.sources[source], sample, self.settings.max_text_bytes)
        for _ in range(document.missing_images):
            self._leave_out(self.sources[source], sample, BadSampleError("an image that is not there"))
        rng = keyed_rng(self.settings.augmentation_seed, SEQUENCES, self.number, draw)
        sequences = self.settings.view.encode(document, self._encoder, rng)
        if not sequences:
            raise BadSampleError("a document without tokens")
        return [_Piece(source, sample, draw, i, 0, document, tokens) for i, tokens in enumerate(sequences)]

    def _piece_at(self, source: int, sample: int, draw: int, piece: int, carries: int) -> _Piece:
        return replace(self._pieces(source, sample, draw)[piece], carries=carries)

    def _with_pixels(self, piece: _Piece) -> PackedSequence | None:
        """The piece with its images decoded, as far as they can be; None when nothing is left."""
        settings, source = self.settings, self.sources[piece.source]
        pixels, seeds, lost = [], [], []
        for image in piece.tokens.images:
            key = settings.augmentation_seed, self.number, piece.draw, image
            rng = keyed_rng(key[0], CROP, *key[1:])
            try:
                data = source.read(piece.sample, piece.document.images[image])
                pixels.append(
                    decode_image(data, settings.image_size, settings.crop_scale, rng, settings.max_image_pixels)
                )
                seeds.append(int(keyed_rng(key[0], IMAGE, *key[1:]).integers(1 << 63)))
            except (BadSampleError, OSError) as problem:
                lost.append(image)
                self._leave_out(source, piece.sample, problem)
            else:
                self._skips.good()
        tokens = settings.view.without_images(piece.tokens, lost, settings.image_tokens) if lost else piece.tokens
        if tokens is None:
            return None
        shape = (0, 3, settings.image_size, settings.image_size)
        stacked = np.stack(pixels) if pixels else np.zeros(shape, dtype=np.uint8)
        return PackedSequence(piece.document.key, tokens, stacked, tuple(seeds))

    def _leave_out(self, source: Source, sample: int, problem: BadSampleError | OSError) -> None:
        self._pending_skips += 1
        self._skips.bad(source, sample, problem)
