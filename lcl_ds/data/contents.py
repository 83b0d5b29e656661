"""Measure what is in shards, without training on them: kinds of samples, lengths, sizes of images, labels."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lcl_ds.data.corpora.record import labels_among
from lcl_ds.data.documents import MAX_TEXT_BYTES, BadSampleError, Document, read_document, read_labels, text_bytes
from lcl_ds.data.images import check_image
from lcl_ds.data.shards.source import Source
from lcl_ds.data.shards.storage import size_of
from lcl_ds.data.stream.mixing import spread_samples
from lcl_ds.data.stream.skips import reason_of
from lcl_ds.tokens import IMAGE_OVERHEAD, TextTokenizer

BYTES_PER_TOKEN = 4
"""Of English text, about; used where no tokenizer is named."""
MEASURED_SAMPLES = 20_000
"""Samples that are read, spread over all shards; of more the figures are estimates."""
PASSAGE_OVERHEAD = 2
"""Tokens around a document: ``<sot>`` and ``<eot>``."""


@dataclass
class Contents:
    """What some shards hold, as far as it was measured."""

    shards: int
    samples: int
    bytes: int
    measured: int
    """Samples that were read; the figures below are of them."""
    documents: int = 0
    pairs: int = 0
    text_tokens: list[int] = field(default_factory=list)
    """Of each document or pair."""
    images: list[int] = field(default_factory=list)
    """Of each document or pair."""
    text_bytes: int = 0
    announced: int = 0
    """Images that text of their document precedes, or will precede: of a caption pair both orders are shown."""
    short_sides: list[int] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    labels: dict[str, Counter[str]] = field(default_factory=dict)
    """By name, how many images have each value."""
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def scale(self) -> float:
        """How many samples one of those that were measured stands for."""
        return self.samples / max(1, self.measured)

    def lengths(self, image_tokens: int) -> np.ndarray:
        """Count the tokens of every document, float64 [N]."""
        texts, images = np.array(self.text_tokens, float), np.array(self.images, float)
        return texts + images * (image_tokens + IMAGE_OVERHEAD) + PASSAGE_OVERHEAD

    def held_by(self, row_tokens: int, image_tokens: int) -> float:
        """Say which fraction of the documents a row holds whole."""
        lengths = self.lengths(image_tokens)
        return float((lengths <= row_tokens).mean()) if len(lengths) else 0.0


def measure(
    source: Source,
    tokenizer: TextTokenizer | None = None,
    most: int = MEASURED_SAMPLES,
    max_text_bytes: int = MAX_TEXT_BYTES,
) -> Contents:
    """Read samples spread over all shards and say what is in them.

    Args:
        tokenizer: counts tokens; None: they are estimated from bytes.
        most: samples that are read.

    Raises:
        UserError: a shard changed since it was indexed.
    """
    numbers = spread_samples(source, most)
    size = sum(size_of(shard.path) for shard in source.shards)
    contents = Contents(len(source.shards), len(source), size, len(numbers))
    for number in numbers:
        try:
            document = read_document(source, number, max_text_bytes)
        except (BadSampleError, OSError) as problem:
            contents.left_out[reason_of(problem)] += 1
            continue
        _add_document(contents, document, tokenizer)
        _add_images(contents, source, number, document)
    return contents


def texts_of(source: Source, most: int = MEASURED_SAMPLES) -> Iterator[str]:
    """Yield the text of samples spread over all shards, joined by document."""
    for number in spread_samples(source, most):
        try:
            document = read_document(source, number)
        except (BadSampleError, OSError):
            continue
        yield " ".join(_texts(document))


def _texts(document: Document) -> list[str]:
    return [segment for segment in document.segments if isinstance(segment, str)]


def _add_document(contents: Contents, document: Document, tokenizer: TextTokenizer | None) -> None:
    texts = _texts(document)
    size = text_bytes(texts)
    count: Callable[[str], int] = (lambda text: len(tokenizer.encode(text))) if tokenizer else _estimate
    contents.documents += not document.is_pair
    contents.pairs += document.is_pair
    contents.text_bytes += size
    contents.text_tokens.append(sum(map(count, texts)))
    contents.images.append(len(document.images))
    has_text = False
    for segment in document.segments:
        has_text |= isinstance(segment, str)
        contents.announced += has_text and not isinstance(segment, str)


def _estimate(text: str) -> int:
    return -(-len(text.encode()) // BYTES_PER_TOKEN)


def _add_images(contents: Contents, source: Source, number: int, document: Document) -> None:
    labels: Sequence[dict[str, Any]] = read_labels(source, number, document) or [{} for _ in document.images]
    for suffix, of_image in zip(document.images, labels, strict=True):
        try:
            facts = check_image(source.read(number, suffix), decode=False)
        except (BadSampleError, OSError) as problem:
            contents.left_out[reason_of(problem)] += 1
            continue
        contents.short_sides.append(min(facts.width, facts.height))
        contents.formats[facts.format] += 1
        for name, value in labels_among(of_image).items():
            contents.labels.setdefault(name, Counter())[str(value)] += 1
    if document.missing_images:
        contents.left_out["an image that is not there"] += document.missing_images
