"""How a document becomes token sequences: one view of the same shards for each kind of objective.

A view says what a document's sequences are, what carries the generation loss in them, and where the decoder's state is
read about an image. Whatever it draws comes from the generator it is handed, so a document gives the same sequences
when a run is continued.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol

import numpy as np

from lcl_ds.data.documents import BadSampleError, Document
from lcl_ds.tokens import IMAGE_OVERHEAD, ImageSlot, TokenSequence, Vocabulary, encode_sequence, labels_of

Positions = np.ndarray
Pass = Literal["text", "caption", "match"]


@dataclass(frozen=True)
class Sequencer:
    """Text to ids, and the budgets of a row."""

    encode: Callable[[str], list[int]]
    vocabulary: Vocabulary
    image_tokens: int
    max_tokens: int
    max_images: int

    def sequences(self, segments: Sequence[str | int]) -> list[TokenSequence]:
        """See :func:`lcl_ds.tokens.encode_sequence`."""
        return encode_sequence(
            segments, self.encode, self.vocabulary, self.image_tokens, self.max_tokens, self.max_images
        )


class View(Protocol):
    """What the data side needs to know of an objective."""

    readout_names: ClassVar[tuple[str, ...]]
    """Names of the readings that every batch has, be they empty."""

    def encode(self, document: Document, sequencer: Sequencer, rng: np.random.Generator) -> list[TokenSequence]:
        """Sequences of one document. Raises: BadSampleError when there is nothing in it for the objective."""
        ...

    def without_images(self, tokens: TokenSequence, lost: Sequence[int], image_tokens: int) -> TokenSequence | None:
        """A sequence some of whose images could not be decoded; None: nothing is left of it."""
        ...

    def labels(self, tokens: TokenSequence, vocabulary: Vocabulary) -> tuple[Positions, np.ndarray]:
        """Positions that carry generation loss, and the ids to be predicted there."""
        ...

    def readouts(self, tokens: TokenSequence) -> dict[str, list[tuple[int, int]]]:
        """By name, (position, document's image) of states that are read about an image."""
        ...


@dataclass(frozen=True)
class DocumentView:
    """Whole documents in reading order; the next token is predicted, and each image from what precedes it.

    Args:
        context_rule: ``text_before``: an image makes a contrastive pair when text of its sequence precedes it;
            ``reference``: when its ``<soi>`` is not the first token of its sequence, as in the published code.
        image_first_probability: share of image-text pairs whose image precedes its text.
    """

    context_rule: Literal["text_before", "reference"] = "text_before"
    image_first_probability: float = 0.5
    readout_names: ClassVar[tuple[str, ...]] = ("pairs",)

    def encode(self, document: Document, sequencer: Sequencer, rng: np.random.Generator) -> list[TokenSequence]:
        segments = document.segments
        if document.is_pair and rng.random() < self.image_first_probability:
            segments = segments[::-1]
        return sequencer.sequences(segments)

    def without_images(self, tokens: TokenSequence, lost: Sequence[int], image_tokens: int) -> TokenSequence | None:
        left = without_images(tokens, lost, image_tokens)
        return left if len(left.input_ids) > 2 else None

    def labels(self, tokens: TokenSequence, vocabulary: Vocabulary) -> tuple[Positions, np.ndarray]:
        return labels_of(tokens.input_ids, vocabulary)

    def readouts(self, tokens: TokenSequence) -> dict[str, list[tuple[int, int]]]:
        counts = [s for s in tokens.slots if (s.has_context if self.context_rule == "text_before" else s.position > 1)]
        return {"pairs": [(slot.position - 1, slot.image) for slot in counts]}


@dataclass(frozen=True)
class MaskedView(DocumentView):
    """Whole documents some of whose text tokens are hidden and predicted in place.

    A hidden token is replaced by ``<image>``: outside an image's slot that id is used for nothing else.

    Args:
        text_share: probability of a text token to be hidden.
    """

    text_share: float = 0.5

    def encode(self, document: Document, sequencer: Sequencer, rng: np.random.Generator) -> list[TokenSequence]:
        masked = []
        for tokens in super().encode(document, sequencer, rng):
            ids = tokens.input_ids
            hidden = (ids < sequencer.vocabulary.text_size) & (rng.random(len(ids)) < self.text_share)
            masked.append(
                replace(tokens, input_ids=np.where(hidden, sequencer.vocabulary.image, ids), original_ids=ids)
            )
        return masked

    def labels(self, tokens: TokenSequence, vocabulary: Vocabulary) -> tuple[Positions, np.ndarray]:
        assert tokens.original_ids is not None
        positions = np.nonzero(tokens.input_ids != tokens.original_ids)[0]
        return positions, tokens.original_ids[positions]


@dataclass(frozen=True)
class PairView:
    """Single images with one text each, told to the decoder in one or more passes that do not see each other.

    Pairs of an interleaved document are its images with their matched sentences (the paper's "MMC4-Pair"; see
    :meth:`Document.pairs`). The passes of one pair stand in one row, so one call of the decoder runs them all:

    - ``text``: ``<sot> text <eot>``; reading ``pairs`` at ``<eot>``: the text's contrastive feature.
    - ``caption``: ``<sot> <soi> image <eoi> text <eot>``; carries generation loss; reading ``matched`` at ``<eot>``.
    - ``match``: the same ids for another image to be put in; reading ``mismatched`` at ``<eot>``.

    Text is cut to what a row holds.
    """

    passes: tuple[Pass, ...]
    readout_names: ClassVar[tuple[str, ...]] = ("pairs", "matched", "mismatched")

    def encode(self, document: Document, sequencer: Sequencer, rng: np.random.Generator) -> list[TokenSequence]:
        pairs = document.pairs()
        if not pairs:
            raise BadSampleError("no image with text to pair it with")
        with_image = sum(name != "text" for name in self.passes)
        block = sequencer.image_tokens + IMAGE_OVERHEAD
        room = (sequencer.max_tokens - with_image * block) // len(self.passes) - 2
        if room < 1:
            raise ValueError(f"a row of {sequencer.max_tokens} tokens cannot hold a pair in {len(self.passes)} passes")
        return [self._pair(sequencer.encode(text)[:room], image, sequencer) for text, image in pairs]

    def _pair(self, text: list[int], image: int, sequencer: Sequencer) -> TokenSequence:
        vocabulary = sequencer.vocabulary
        picture = [vocabulary.soi, *[vocabulary.image] * sequencer.image_tokens, vocabulary.eoi]
        ids: list[int] = []
        starts, slots = [], []
        for name in self.passes:
            starts.append(len(ids))
            if name != "text":
                slots.append(ImageSlot(image, len(ids) + 2, has_context=False))
            ids += [vocabulary.sot, *(picture if name != "text" else []), *text, vocabulary.eot]
        return TokenSequence(np.array(ids, dtype=np.int64), tuple(slots), (image,), tuple(starts))

    def without_images(self, tokens: TokenSequence, lost: Sequence[int], image_tokens: int) -> TokenSequence | None:
        return None

    def labels(self, tokens: TokenSequence, vocabulary: Vocabulary) -> tuple[Positions, np.ndarray]:
        empty = np.zeros(0, dtype=np.int64)
        for name, start, end in self._spans(tokens):
            if name == "caption":
                positions, labels = labels_of(tokens.input_ids[start:end], vocabulary)
                keep = labels != vocabulary.soi  # it always follows <sot> here
                return positions[keep] + start, labels[keep]
        return empty, empty

    def readouts(self, tokens: TokenSequence) -> dict[str, list[tuple[int, int]]]:
        reading: dict[Pass, str] = {"text": "pairs", "caption": "matched", "match": "mismatched"}
        return {reading[name]: [(end - 1, tokens.images[0])] for name, _, end in self._spans(tokens)}

    def _spans(self, tokens: TokenSequence) -> list[tuple[Pass, int, int]]:
        ends = (*tokens.starts[1:], len(tokens.input_ids))
        return list(zip(self.passes, tokens.starts, ends, strict=True))


def without_images(tokens: TokenSequence, lost: Sequence[int], image_tokens: int) -> TokenSequence:
    """The sequence without the images in ``lost`` and the tokens around them; text stays."""
    keep = np.ones(len(tokens.input_ids), dtype=bool)
    slots = []
    removed = 0
    for slot in tokens.slots:
        if slot.image in lost:
            keep[slot.position - 1 : slot.position + image_tokens + 1] = False
            removed += image_tokens + IMAGE_OVERHEAD
        else:
            slots.append(ImageSlot(slot.image, slot.position - removed, slot.has_context))
    return replace(
        tokens,
        input_ids=tokens.input_ids[keep],
        slots=tuple(slots),
        images=tuple(image for image in tokens.images if image not in lost),
        original_ids=None if tokens.original_ids is None else tokens.original_ids[keep],
    )
