"""Read held-out documents, which are tried before training and evaluated after it."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lcl_ds.assembly import lane_settings
from lcl_ds.config import Config
from lcl_ds.data.documents import BadSampleError, Document, read_document, read_labels
from lcl_ds.data.images import decode_image
from lcl_ds.data.sequences import Sequencer
from lcl_ds.data.shards.shard import index_shard
from lcl_ds.data.shards.source import Source
from lcl_ds.data.shards.storage import expand_paths
from lcl_ds.data.stream.lanes import LaneSettings, sequencer_of
from lcl_ds.data.stream.packing import PackedSequence
from lcl_ds.data.stream.skips import reason_of
from lcl_ds.errors import UserError
from lcl_ds.models.build import image_size, tokens_per_image
from lcl_ds.objectives import objective_module, view_of
from lcl_ds.tokens import TextTokenizer, TokenSequence

TEST_EVERY = 3
"""Every third document tests the probes and the others train them: images of one document stay on one side."""

UNUSABLE_LABELS = "json with 'labels' that are not an object or null for each of 'images'"

Labels = dict[str, Any]
"""Of one image; empty where it has none."""


@dataclass
class HeldOut:
    """What was read from held-out documents: pixels and labels for probes, sequences for retrieval."""

    sequences: list[PackedSequence] = field(default_factory=list)
    """Empty where the objective has no contrastive pairs."""
    pixels: list[np.ndarray] = field(default_factory=list)
    """uint8 [3, H, W] each, documents in order."""
    labels: list[Labels] = field(default_factory=list)
    """Per image."""
    is_test: list[bool] = field(default_factory=list)
    """Per image, whether it tests the probes."""
    document_count: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """How many documents, images and labels could not be used, by reason."""


class HeldOutReader:
    """The held-out samples of a run and the one way of reading them.

    Args:
        config: of the run; ``evaluation.shards`` must be set.
        with_sequences: make sequences also where the objective has no contrastive pairs, for its other losses.

    Raises:
        UserError: a shard is missing or unreadable, or rows cannot hold what the evaluation shows.
    """

    def __init__(self, config: Config, tokenizer: TextTokenizer, with_sequences: bool = False):
        assert config.evaluation.shards is not None
        self.config = config
        cache = Path(config.data.cache)
        try:
            shards = [index_shard(path, cache) for path in expand_paths(config.evaluation.shards)]
        except UserError as error:
            raise UserError([f"evaluation.shards: {problem}" for problem in error.problems]) from None
        self.source = Source("held-out", shards)
        count = min(config.evaluation.max_documents, len(self.source))
        self.numbers: list[int] = np.linspace(0, len(self.source) - 1, count).round().astype(int).tolist()
        """Samples that are read, spread over all shards."""
        # A caption pair is shown text first, since an image that precedes its text is announced by nothing; but where
        # losses are wanted, as in training, or no text would be read that follows an image.
        self.view = view_of(config.objective, config.data.image_first_probability if with_sequences else 0.0)
        self.has_pairs = "contrastive_loss" in objective_module(config.objective.name).Objective.losses
        self.image_size = image_size(config.model)
        self.tokens_per_image = tokens_per_image(config.model)
        self.rows: LaneSettings | None = None
        """None: the decoder is not needed."""
        self._sequencer: Sequencer | None = None
        self.vocabulary = tokenizer.vocabulary
        if self.has_pairs or with_sequences:
            self.rows = self._row_settings()
            self._sequencer = sequencer_of(self.rows, tokenizer)

    def _row_settings(self) -> LaneSettings:
        try:
            return lane_settings(self.config, training=False)
        except UserError as error:
            raise self._too_small(self.numbers[0], str(error)) from None

    def _too_small(self, number: int, problem: str) -> UserError:
        return UserError(
            f"evaluation.shards: {self.source.where(number)}: {problem}; the evaluation shows every patch of a square, "
            "also where model.vision.patch_dropout or max_image_tokens leaves training fewer; raise data.row_tokens or "
            "set evaluation.shards=null"
        )

    def document(self, number: int) -> tuple[Document, list[Labels] | None]:
        """Read one document without its pixels, and the labels of its images; None: labels that cannot be used.

        Raises:
            BadSampleError, OSError: it cannot be read.
        """
        document = read_document(self.source, number, self.config.data.max_text_bytes)
        return document, read_labels(self.source, number, document)

    def samples(self) -> Iterator[tuple[int, bool]]:
        """Yield the number of each sample that is read, and whether it tests the probes."""
        for position, number in enumerate(self.numbers):
            yield number, position % TEST_EVERY == 0

    def read(self, number: int, is_test: bool, held_out: HeldOut) -> None:
        """Add one sample to ``held_out``, as far as it can be used; what cannot is counted there.

        Raises:
            UserError: no row can hold it, or the shard changed.
        """
        try:
            document, labels = self.document(number)
        except (BadSampleError, OSError) as problem:
            held_out.left_out[reason_of(problem)] += 1
            return
        if labels is None:
            held_out.left_out[UNUSABLE_LABELS] += 1
            labels = [{}] * len(document.images)
        pixels = self.pixels(number, document, held_out.left_out, range(len(document.images)))
        if not pixels:
            if not document.images and not document.missing_images:
                held_out.left_out["a document without images"] += 1
            return
        held_out.document_count += 1
        held_out.pixels += pixels.values()
        held_out.labels += [labels[image] for image in pixels]
        held_out.is_test += [is_test] * len(pixels)
        try:
            for piece in self.pieces(number, document):
                held_out.sequences += self.with_pixels(document.key, piece, pixels)
        except BadSampleError as problem:
            held_out.left_out[reason_of(problem)] += 1

    def pixels(
        self, number: int, document: Document, left_out: Counter[str], images: Iterable[int]
    ) -> dict[int, np.ndarray]:
        """Decode some images of a document, by their numbers; those that cannot be decoded are counted."""
        pixels = {}
        if document.missing_images:
            left_out["an image that is not there"] += document.missing_images
        for image in images:
            try:
                data = self.source.read(number, document.images[image])
                pixels[image] = decode_image(data, self.image_size, max_pixels=self.config.data.max_image_pixels)
            except (BadSampleError, OSError) as problem:
                left_out[reason_of(problem)] += 1
        return pixels

    def pieces(self, number: int, document: Document) -> list[TokenSequence]:
        """Make the sequences of one document; none where the decoder is not needed. Draws depend on its number alone.

        Raises:
            BadSampleError: there is nothing in it for the objective.
            UserError: no row can hold it.
        """
        if self._sequencer is None:
            return []
        try:
            return self.view.encode(document, self._sequencer, np.random.default_rng(number))
        except ValueError as error:
            raise self._too_small(number, str(error)) from error

    def pair_count(self, pieces: Iterable[TokenSequence]) -> int:
        """Count the contrastive pairs in them."""
        return sum(len(tokens.readouts["context"]) for tokens in pieces) if self.has_pairs else 0

    def with_pixels(self, key: str, piece: TokenSequence, pixels: dict[int, np.ndarray]) -> list[PackedSequence]:
        """Take the images that could not be decoded out of a sequence; nothing where nothing is left of it."""
        lost = [image for image in piece.images if image not in pixels]
        assert self._sequencer is not None  # it made the piece
        tokens = self.view.without_images(piece, lost, self._sequencer) if lost else piece
        if tokens is None:
            return []
        empty = np.zeros((0, 3, self.image_size, self.image_size), np.uint8)
        return [PackedSequence(key, tokens, np.stack([pixels[i] for i in tokens.images]) if tokens.images else empty)]

    def read_all(self) -> HeldOut:
        """Read all samples.

        Raises:
            UserError: see :meth:`read`.
        """
        held_out = HeldOut()
        for number, is_test in self.samples():
            self.read(number, is_test, held_out)
        return held_out
