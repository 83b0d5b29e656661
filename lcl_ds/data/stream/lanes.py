"""Draw the endless deterministic stream of rows, in independent lanes.

The global stream's n-th group of rows comes from lane ``n % lanes``. A lane owns every ``lanes``-th block of a
permutation that is drawn for each epoch, shuffles samples inside a window of blocks, packs a window of documents into
rows and gathers rows into groups of about as many images each. Nothing random is stored: every draw is a function of
(seed, purpose, lane, counter), so a lane's position is a few integers plus the addresses of documents that wait for a
row and of rows that wait for a group, and the stream is the same for any number of ranks and workers.

At any time all lanes together hold samples that were drawn and are not yet in a returned row, so a sample may come that
much early or late in an epoch. Blocks, windows, pools and, where it is not set, the number of lanes shrink with the
corpus, so that this stays below one epoch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import Any

import numpy as np

from lcl_ds.data.documents import BadSampleError, Document, read_document
from lcl_ds.data.images import decode_image
from lcl_ds.data.native import Encoded, encode_document, image_cost, with_grids
from lcl_ds.data.sequences import DocumentView, Sequencer, View
from lcl_ds.data.settings import default_of
from lcl_ds.data.shards.source import Blocks, Source
from lcl_ds.data.stream.mixing import Mixture, change_steps, spread_samples
from lcl_ds.data.stream.packing import PackedSequence, Row, choose_group, pack
from lcl_ds.data.stream.skips import Skips, reason_of
from lcl_ds.data.stream.stalls import StallWatch
from lcl_ds.errors import UserError
from lcl_ds.grids import Grid, NativeResolution, cut_patches
from lcl_ds.tokens import TextTokenizer, TokenSequence

SOURCE, EPOCH, WINDOW, ROWS, SEQUENCES, CROP, IMAGE = range(7)
"""Purposes of keyed draws."""

DISSOLVED_FRACTION = 1 / 4
"""Of the rows of a window, the emptiest ones: their pieces are carried into the next window."""
MAX_CARRIES = 2
"""How often a piece may be carried into the next window."""

MEASURED_SAMPLES = 500
"""Samples of a source, spread over it, whose tokens and images are counted."""
PRIOR_ROWS = 2000
"""Rows of a lane that weigh as much as the count of the measured samples."""

MOST_LANES = 64
"""Lanes where their number is not set and the corpus is not small."""
WINDOWS_PER_EPOCH = 4
"""Windows, of packing and of shuffling, that a lane's draws of an epoch are cut into, at least."""
GOOD_WINDOW_ROWS = 16
"""Rows of a window that pack well; the number of lanes is chosen so that no window need be smaller."""
LEAST_WINDOW_ROWS = 2
"""Rows that a window fills even where it then holds more of an epoch than it should."""

LaneState = dict[str, Any]
"""JSON, as of the last time a window was packed: samples drawn (``draws``), ``cursors`` per source, ``carried``
documents, the ``pool`` of waiting rows, ``packed`` rows and images and ``rows`` returned so far; and, since then, the
rows returned (``emitted``) and the draws that were left out of that window because they were ``excluded``. What waits
was made for images of ``image_tokens``."""


def measure_sizes(sources: Sequence[Source], settings: "LaneSettings", tokenizer: TextTokenizer) -> np.ndarray:
    """Measure mean tokens and images of a sample of each source, float64 [sources, 2]; bad samples are passed over.

    Where images keep their aspect ratio, their tokens are counted instead of images.
    """
    sequencer = sequencer_of(settings, tokenizer)
    sizes = []
    for source in sources:
        total, numbers = np.zeros(2), spread_samples(source, MEASURED_SAMPLES)
        for number in numbers:
            try:
                document = read_document(source, number, settings.max_text_bytes)
                encoded = encoded_of(source, number, document, settings, sequencer, keyed_rng(number))
            except (BadSampleError, OSError):
                continue
            for tokens in encoded.sequences:
                total += np.array([len(tokens.input_ids), image_cost(tokens, encoded.grids)])
        sizes.append(total / len(numbers))
    return np.stack(sizes) + np.array([1e-9, 0.0])  # a source of nothing but bad samples: no division by 0


def sizes_by_image_tokens(
    sources: Sequence[Source], settings: "LaneSettings", tokenizer: TextTokenizer
) -> Callable[[int], np.ndarray]:
    """Let lanes share what :func:`measure_sizes` finds where an image has so many tokens; it is measured once."""

    @cache
    def sizes(image_tokens: int) -> np.ndarray:
        return measure_sizes(sources, replace(settings, image_tokens=image_tokens), tokenizer)

    return sizes


def draws_per_epoch(sources: Sequence[Source], mixture: Mixture, step: int) -> float:
    """Count the samples that are drawn from all sources at ``step`` until the first source has been read once."""
    fractions = mixture.fractions(step)
    return min(len(source) / fraction for source, fraction in zip(sources, fractions, strict=True) if fraction > 0)


def choose_lanes(sources: Sequence[Source], settings: "LaneSettings", tokenizer: TextTokenizer) -> int:
    """Choose as many lanes as suit the corpus: a power of two up to 64, whatever the number of ranks."""
    mixture = Mixture(sources, settings.mix_by)
    windows = min(draws_per_epoch(sources, mixture, step) for step in change_steps(sources)) / settings.pack_window
    if windows < MOST_LANES * WINDOWS_PER_EPOCH:
        tokens, images = mixture.fractions(0) @ measure_sizes(sources, settings, tokenizer)
        rows = settings.pack_window * max(tokens / settings.row_tokens, images / settings.image_budget)
        windows *= max(1.0, rows / GOOD_WINDOW_ROWS)  # smaller ones, where a whole one has more rows than it needs
    lanes = MOST_LANES
    while lanes > 1 and windows < lanes * WINDOWS_PER_EPOCH:
        lanes //= 2
    return lanes


def sequencer_of(settings: "LaneSettings", tokenizer: TextTokenizer) -> Sequencer:
    """Make the sequencer for the budgets of ``settings``."""
    longest = settings.document_tokens or settings.row_tokens
    return Sequencer(
        tokenizer.encode,
        tokenizer.vocabulary,
        settings.image_tokens,
        longest,
        max_images=settings.row_images if settings.native is None else settings.row_tokens,
        max_image_tokens=settings.row_image_tokens,
    )


def encoded_of(
    source: Source,
    number: int,
    document: Document,
    settings: "LaneSettings",
    sequencer: Sequencer,
    rng: np.random.Generator,
) -> Encoded:
    """Encode one document as ``settings`` say. Raises: BadSampleError, see :func:`encode_document`."""
    pixels = settings.max_image_pixels
    return encode_document(source, number, document, settings.view, sequencer, rng, settings.native, pixels)


def keyed_rng(*key: int) -> np.random.Generator:
    """Make a generator that depends on ``key`` alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


@lru_cache(maxsize=8)
def epoch_order(seed: int, source: int, epoch: int, blocks: int) -> np.ndarray:
    """Draw the order of a source's blocks in one epoch; all lanes of a process share it."""
    return keyed_rng(seed, EPOCH, source, epoch).permutation(blocks)


@dataclass(frozen=True)
class LaneSettings:
    """What the rows of every lane depend on: settings of the data under their own names, and what others add."""

    lanes: int
    """0: as many as suit the corpus; the loader fills it in."""
    data_seed: int
    augmentation_seed: int
    row_tokens: int
    row_images: int
    image_tokens: int
    image_size: int
    native: NativeResolution | None = None
    """How grids of images are chosen that keep their aspect ratio; None: all are squares."""
    row_image_tokens: int | None = None
    """Largest number of image tokens in a row where images keep their aspect ratio, instead of ``row_images``."""
    document_tokens: int | None = default_of("document_tokens")
    rows_per_step: int = 1
    """Rows of one optimizer step: what turns a row's number into the step that weights of sources depend on."""
    mix_by: str = default_of("mix_by")
    group_rows: int = default_of("group_rows")
    row_pool: int = default_of("row_pool")
    pack_window: int = default_of("pack_window")
    block_samples: int = default_of("block_samples")
    shuffle_blocks: int = default_of("shuffle_blocks")
    view: View = field(default_factory=DocumentView)
    crop_scale: tuple[float, float] = default_of("crop_scale")
    max_image_pixels: int = default_of("max_image_pixels")
    max_text_bytes: int = default_of("max_text_bytes")
    max_bad_share: float = default_of("max_bad_share")
    stall_seconds: float = default_of("stall_seconds")
    excluded: frozenset[str] = frozenset()
    """Documents to leave out, by :meth:`Source.key_in_shard`. One that waits for a row already when its exclusion
    begins is taken out of the row when that is made, so that no row that is packed changes otherwise."""

    @property
    def image_budget(self) -> int:
        """Return how many images a row may hold, or image tokens where images keep their aspect ratio."""
        return self.row_images if self.row_image_tokens is None else self.row_image_tokens


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
    pieces: int
    """Of the document, this one included."""
    grids: tuple[Grid | None, ...] = ()
    """Of the document's images, where they keep their aspect ratio."""

    @property
    def image_cost(self) -> int:
        """Count what the row's budget of images is charged."""
        return image_cost(self.tokens, self.grids)

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
        skips: where to count what is left out, for all lanes of a process.
    """

    def __init__(
        self,
        sources: list[Source],
        settings: LaneSettings,
        number: int,
        tokenizer: TextTokenizer,
        state: LaneState | None = None,
        skips: Skips | None = None,
        sizes: Callable[[int], np.ndarray] | None = None,
        watch: StallWatch | None = None,
    ):
        self._watch = watch
        self._sizes: np.ndarray | None = None
        if settings.group_rows > 1:
            sizes = sizes or sizes_by_image_tokens(sources, settings, tokenizer)
            self._sizes = sizes(settings.image_tokens)
        self._skips = skips or Skips(settings.max_bad_share)
        self._pending_skips = 0
        self.sources, self.settings, self.number = sources, settings, number
        self._sequencer = sequencer_of(settings, tokenizer)
        self._mixture = Mixture(sources, settings.mix_by)
        self._changes = change_steps(sources)
        self._blocks = [self._blocks_of(source) for source in sources]
        self._windows: dict[int, tuple[int, np.ndarray]] = {}
        new = {"draws": 0, "cursors": [[0, 0] for _ in sources], "carried": [], "pool": [], "packed": [0, 0], "rows": 0}
        state = state or {**new, "emitted": 0}
        if state.get("image_tokens", settings.image_tokens) != settings.image_tokens:
            state = {**new, **self._next_documents(state, tokenizer, sizes), "emitted": 0}
        self._draws: int = state["draws"]
        self._cursors: list[list[int]] = [list(cursor) for cursor in state["cursors"]]
        self._carried = [self._piece_at(*address) for address in state["carried"]]
        self._pool = [[self._piece_at(*address) for address in row] for row in state["pool"]]
        self._packed: list[int] = list(state["packed"])
        self._rows_returned: int = state["rows"]
        self._group: list[list[_Piece]] = []
        self._emitted = 0
        self._excluded_draws: list[int] = []
        self._last_useful_draw = self._draws
        self._window_state = state
        if state["emitted"]:
            self._fill_window(state.get("excluded", []))
            for _ in range(state["emitted"]):
                self._next_pieces()
        self._pending_skips = 0

    def _next_documents(
        self, state: LaneState, tokenizer: TextTokenizer, sizes: Callable[[int], np.ndarray] | None
    ) -> LaneState:
        """Say where a lane goes on when images have another number of tokens than in ``state``.

        Rows that wait were made for the old one, and their pieces are no pieces of the new sequences, so the lane goes
        on with the next samples: at most a window and a pool of them are passed over.
        """
        settings = replace(self.settings, image_tokens=state["image_tokens"])
        before = Lane(self.sources, settings, self.number, tokenizer, state, sizes=sizes)
        return {"draws": before._draws, "cursors": before._cursors, "rows": before._rows_returned}

    def state(self) -> LaneState:
        """Return the position after the last row returned."""
        return {**self._window_state, "emitted": self._emitted, "excluded": list(self._excluded_draws)}

    @property
    def rows_returned(self) -> int:
        """Count the rows that were returned so far, over all starts."""
        return self._rows_returned

    def skip_row(self) -> None:
        """Pass over the next row: it is packed, because the following ones depend on it, but not decoded."""
        self._next_pieces()
        self._pending_skips = 0  # they are counted where the row is used
        if self._watch:
            self._watch.end()

    def next_row(self) -> Row:
        """Return the lane's next row with its pixels decoded."""
        pieces = self._next_pieces()
        sequences = []
        for piece in pieces:
            sequence = self._with_pixels(piece)
            if sequence is not None:
                sequences.append(sequence)
        if self._watch:
            self._watch.end()
        row = Row(tuple(sequences), self._pending_skips)
        self._pending_skips = 0
        return row

    def _next_pieces(self) -> list[_Piece]:
        """Take the next row of the current group, or the first of the next one."""
        size = self.settings.group_rows
        if not self._group:
            # A group is chosen from a full pool; rows that go alone need none.
            while len(self._pool) < (self._pool_rows() if size > 1 else 1):
                self._fill_window()
            images = [sum(piece.image_cost for piece in row) for row in self._pool]
            chosen = choose_group(images, size, self._images_per_row())
            self._group = [self._pool[i] for i in chosen]
            self._pool = [row for i, row in enumerate(self._pool) if i not in chosen]
        self._emitted += 1
        self._rows_returned += 1
        return self._group.pop(0)

    def _pool_rows(self) -> int:
        """Say how many rows a group is chosen from: at most a quarter of the lane's epoch, but at least two groups."""
        assert self._sizes is not None
        tokens, images = self._mixture.fractions(self._step) @ self._sizes
        rows_per_draw = max(tokens / self.settings.row_tokens, images / self.settings.image_budget)
        quarter = int(self._epoch_draws(self._step) * rows_per_draw / WINDOWS_PER_EPOCH)
        return min(self.settings.row_pool, max(quarter, 2 * self.settings.group_rows))

    def _epoch_draws(self, step: int) -> float:
        """Count the samples that this lane draws until the first source has been read once."""
        return draws_per_epoch(self.sources, self._mixture, step) / self.settings.lanes

    def _images_per_row(self) -> float:
        """Estimate the images of a row in the long run: what the sources promise, then more and more what was packed.

        Lanes must agree from the start; otherwise ranks would differ by what each lane happened to see first.
        """
        rows, images = self._packed
        if self._sizes is None:
            return images / rows
        tokens_per_sample, images_per_sample = self._mixture.fractions(self._step) @ self._sizes
        expected = self.settings.row_tokens * images_per_sample / tokens_per_sample
        return (expected * PRIOR_ROWS + images) / (PRIOR_ROWS + rows)

    @property
    def _step(self) -> int:
        """Say which optimizer step the next row belongs to."""
        return self._step_of(self._rows_returned)

    def _step_of(self, row: int) -> int:
        """Say which optimizer step the lane's ``row``-th row belongs to."""
        return row * self.settings.lanes // self.settings.rows_per_step

    def _rows_until_change(self, row: int) -> float:
        """Count the rows from ``row`` on that belong to steps before the sources' weights change next."""
        step = self._step_of(row)
        changes = [change for change in self._changes if change > step]
        return changes[0] * self.settings.rows_per_step / self.settings.lanes - row if changes else math.inf

    def _fill_window(self, excluded_draws: list[int] | None = None) -> None:
        """Draw and pack a window of documents; its rows join the pool.

        Args:
            excluded_draws: of a window that is packed again, what was excluded then; None: what is excluded now.
        """
        self._window_state = {
            "draws": self._draws,
            "cursors": [list(cursor) for cursor in self._cursors],
            "carried": [piece.address() for piece in self._carried],
            "pool": [[piece.address() for piece in row] for row in self._pool],
            "packed": list(self._packed),
            "rows": self._rows_returned,
            "emitted": 0,
            "image_tokens": self.settings.image_tokens,
        }
        self._emitted = 0
        pieces = [*self._carried, *self._draw_window(excluded_draws)]
        packed = pack(
            [len(piece.tokens.input_ids) for piece in pieces],
            [piece.image_cost for piece in pieces],
            self.settings.row_tokens,
            self.settings.image_budget,
        )
        # A piece of an awkward length must not wait forever.
        free = [row for row in packed if all(pieces[i].carries < MAX_CARRIES for i in row)]
        dissolved = free[-max(1, int(len(packed) * DISSOLVED_FRACTION)) :] if len(packed) > 1 else []
        kept = [row for row in packed if row not in dissolved]
        self._carried = [replace(pieces[i], carries=pieces[i].carries + 1) for row in dissolved for i in row]
        order = keyed_rng(self.settings.data_seed, ROWS, self.number, self._draws).permutation(len(kept))
        self._pool += [[pieces[i] for i in kept[row]] for row in order]
        self._packed[0] += len(kept)
        self._packed[1] += sum(pieces[i].image_cost for row in kept for i in row)

    def _draw_window(self, excluded_draws: list[int] | None) -> list[_Piece]:
        """Draw the pieces of the next samples.

        They are ``pack_window`` samples, or fewer where the lane draws little in an epoch or where the sources'
        weights change before the rows are returned.

        Raises:
            UserError: everything is excluded.
        """
        first_row = self._rows_returned + len(self._pool)
        step, most = self._step_of(first_row), self._rows_until_change(first_row)
        enough = self._epoch_draws(step) / WINDOWS_PER_EPOCH
        rows, pieces = self._rows_filled_by(self._carried), list[_Piece]()
        self._excluded_draws = []
        for drawn in range(self.settings.pack_window):
            if rows >= most or (drawn >= enough and rows >= LEAST_WINDOW_ROWS):
                break
            source, draw = self._draw_source(step), self._draws
            sample = self._next_sample(source)
            self._draws += 1
            try:
                if self._is_excluded(source, sample) if excluded_draws is None else draw in excluded_draws:
                    self._excluded_draws.append(draw)
                    self._leave_out_excluded(source, sample)
                    continue
                added = self._pieces(source, sample, draw)
                self._skips.good()
            except (BadSampleError, OSError) as problem:
                self._leave_out(self.sources[source], sample, problem)
            else:
                pieces += added
                rows += self._rows_filled_by(added)
                self._last_useful_draw = draw
        everything = 4 * sum(map(len, self.sources)) / self.settings.lanes + self.settings.pack_window
        if self.settings.excluded and self._draws - self._last_useful_draw > everything:
            raise UserError("data.exclude: names every document that is drawn; nothing would be left to train on")
        return pieces

    def _is_excluded(self, source: int, sample: int) -> bool:
        if not self.settings.excluded:
            return False
        key = self.sources[source].key_in_shard(sample, self.sources[source].sample(sample).key)
        return key in self.settings.excluded

    def _leave_out_excluded(self, source: int, sample: int) -> None:
        self._pending_skips += 1
        self._skips.excluded(self.sources[source], sample)

    def _rows_filled_by(self, pieces: Sequence[_Piece]) -> float:
        """Say how many rows pieces need, without padding."""
        tokens = sum(len(piece.tokens.input_ids) for piece in pieces)
        images = sum(piece.image_cost for piece in pieces)
        return max(tokens / self.settings.row_tokens, images / self.settings.image_budget)

    def _draw_source(self, step: int) -> int:
        if len(self.sources) == 1:
            return 0
        draw = keyed_rng(self.settings.data_seed, SOURCE, self.number, self._draws).random()
        return self._mixture.choose(step, draw)

    def _next_sample(self, source: int) -> int:
        window, offset = self._cursors[source]
        samples = self._window_samples(source, window)
        if offset == len(samples):
            window, offset = window + 1, 0
            samples = self._window_samples(source, window)
        self._cursors[source] = [window, offset + 1]
        return int(samples[offset])

    def _window_samples(self, source: int, window: int) -> np.ndarray:
        """Shuffle the samples of the lane's next ``shuffle_blocks`` blocks."""
        cached = self._windows.get(source)
        if cached is None or cached[0] != window:
            first = window * self.settings.shuffle_blocks
            blocks = [self._block(source, i) for i in range(first, first + self.settings.shuffle_blocks)]
            samples = np.concatenate([np.arange(*block) for block in blocks])
            keyed_rng(self.settings.data_seed, WINDOW, source, self.number, window).shuffle(samples)
            cached = self._windows[source] = window, samples
        return cached[1]

    def _blocks_of(self, source: Source) -> Blocks:
        """Cut a source into blocks, so small that a lane's draws of an epoch fill a few shuffling windows."""
        settings = self.settings
        fitting = len(source) // (settings.lanes * settings.shuffle_blocks * WINDOWS_PER_EPOCH)
        return source.blocks(max(1, min(settings.block_samples, fitting)))

    def _block(self, source: int, index: int) -> tuple[int, int]:
        """Find the lane's ``index``-th block over all epochs."""
        blocks = self._blocks[source]
        epoch, position = divmod(index * self.settings.lanes + self.number, len(blocks))
        return blocks[int(epoch_order(self.settings.data_seed, source, epoch, len(blocks))[position])]

    def _pieces(self, source: int, sample: int, draw: int) -> list[_Piece]:
        if self._watch:
            self._watch.begin(self.sources[source], sample)
        document = read_document(self.sources[source], sample, self.settings.max_text_bytes)
        for _ in range(document.missing_images):
            self._leave_out(self.sources[source], sample, BadSampleError("an image that is not there"))
        rng = keyed_rng(self.settings.augmentation_seed, SEQUENCES, self.number, draw)
        encoded = encoded_of(self.sources[source], sample, document, self.settings, self._sequencer, rng)
        for problem in encoded.problems:
            self._leave_out(self.sources[source], sample, problem)
        if not encoded.sequences:
            raise BadSampleError("a document without tokens")
        count, grids = len(encoded.sequences), encoded.grids
        return [
            _Piece(source, sample, draw, i, 0, document, tokens, count, grids)
            for i, tokens in enumerate(encoded.sequences)
        ]

    def _piece_at(self, source: int, sample: int, draw: int, piece: int, carries: int) -> _Piece:
        """Make a piece again that waited when the position was saved.

        Raises:
            UserError: its document can no longer be read as it was.
        """
        try:
            pieces, problem = self._pieces(source, sample, draw), "its text has changed"
        except (BadSampleError, OSError) as error:
            pieces, problem = [], reason_of(error)
        if piece >= len(pieces):
            raise UserError(
                f"shard {self.sources[source].where(sample)}: a document that waits for its row cannot be read as it "
                f"was when the position was saved: {problem}; restore the shard and resume, or start a new run"
            )
        return replace(pieces[piece], carries=carries)

    def _with_pixels(self, piece: _Piece) -> PackedSequence | None:
        """Decode the images of a piece, as far as they can be; None when nothing is left or it is excluded."""
        settings, source = self.settings, self.sources[piece.source]
        document_key = source.key_in_shard(piece.sample, piece.document.key.removeprefix(f"{source.name}/"))
        if document_key in settings.excluded:
            if piece.piece == 0:
                self._leave_out_excluded(piece.source, piece.sample)
            return None
        pixels, seeds, lost = [], [], []
        if self._watch:
            self._watch.begin(source, piece.sample)
        for image in piece.tokens.images:
            key = settings.augmentation_seed, self.number, piece.draw, image
            rng = keyed_rng(key[0], CROP, *key[1:])
            try:
                data = source.read(piece.sample, piece.document.images[image])
                pixels.append(self._decode(data, piece.grids[image] if piece.grids else None, rng))
                seeds.append(int(keyed_rng(key[0], IMAGE, *key[1:]).integers(1 << 63)))
            except (BadSampleError, OSError) as problem:
                lost.append(image)
                self._leave_out(source, piece.sample, problem)
            else:
                self._skips.good()
        tokens = piece.tokens
        if lost:
            left = settings.view.without_images(tokens, lost, with_grids(self._sequencer, piece.grids))
            if left is None:
                return None
            tokens = left
        side = settings.image_size if settings.native is None else settings.native.patch_size
        laid = np.concatenate([np.zeros((0, 3, side, side), dtype=np.uint8), *pixels])
        grids = tuple(grid for image in tokens.images if piece.grids and (grid := piece.grids[image]))
        return PackedSequence(document_key, tokens, laid, tuple(seeds), (piece.piece, piece.pieces), grids)

    def _decode(self, data: bytes, grid: Grid | None, rng: np.random.Generator) -> np.ndarray:
        """Decode an image, uint8 [1, 3, H, W], or its patches [N, 3, P, P] where it has a grid.

        Raises:
            BadSampleError: see :func:`decode_image`.
        """
        settings = self.settings
        if settings.native is None or grid is None:
            return decode_image(data, settings.image_size, settings.crop_scale, rng, settings.max_image_pixels)[None]
        patch = settings.native.patch_size
        size = grid.rows * patch, grid.columns * patch
        return cut_patches(decode_image(data, size, settings.crop_scale, rng, settings.max_image_pixels), patch)

    def _leave_out(self, source: Source, sample: int, problem: BadSampleError | OSError) -> None:
        self._pending_skips += 1
        self._skips.bad(source, sample, problem)
