"""Turn documents into token sequences: each kind of objective has its own view of the same shards.

A view says what a document's sequences are. They carry with them which positions bear generation loss and where the
decoder's state is read about an image. Whatever a view draws comes from the generator it is handed, so a document gives
the same sequences when a run is continued.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol

import numpy as np

from lcl_ds.data.documents import BadSampleError, Document
from lcl_ds.tokens import IMAGE_OVERHEAD, ImageSlot, TokenSequence, Vocabulary, encode_sequence, labels_of

Pass = Literal["text", "caption", "match"]


@dataclass(frozen=True)
class Sequencer:
    """Text to ids, and the budgets of a row."""

    encode: Callable[[str], list[int]]
    vocabulary: Vocabulary
    image_tokens: int
    """Of every image; of the largest where they differ."""
    max_tokens: int
    max_images: int
    max_image_tokens: int | None = None
    """Of all images of a sequence together."""
    own_image_tokens: tuple[int, ...] | None = None
    """Of each image of the document that is being encoded, where they differ."""

    def tokens_of(self, image: int) -> int:
        """Count the tokens of one of the document's images."""
        return self.image_tokens if self.own_image_tokens is None else self.own_image_tokens[image]

    def sequences(self, segments: Sequence[str | int]) -> list[TokenSequence]:
        """Encode segments within the budgets; see :func:`lcl_ds.tokens.encode_sequence`."""
        sizes = self.image_tokens if self.own_image_tokens is None else self.own_image_tokens
        return encode_sequence(
            segments, self.encode, self.vocabulary, sizes, self.max_tokens, self.max_images, self.max_image_tokens
        )


class View(Protocol):
    """What the data side needs to know of an objective."""

    readout_names: ClassVar[tuple[str, ...]]
    """Names of the readouts that every batch has, also where they are empty."""

    def encode(self, document: Document, sequencer: Sequencer, rng: np.random.Generator) -> list[TokenSequence]:
        """Make the sequences of one document. Raises: BadSampleError when there is nothing in it for the objective."""
        ...

    def without_images(self, tokens: TokenSequence, lost: Sequence[int], sequencer: Sequencer) -> TokenSequence | None:
        """Take images that could not be decoded out of a sequence; None: nothing is left of it."""
        ...


@dataclass(frozen=True)
class DocumentView:
    """Whole documents in reading order; the next token is predicted, and each image from what precedes it.

    Args:
        context_rule: ``text_before``: an image makes a contrastive pair when text of its sequence precedes it;
            ``reference``: when its ``<soi>`` is not the first token of its sequence, as in the published code.
        image_first_probability: fraction of caption pairs whose image precedes its text.
    """

    context_rule: Literal["text_before", "reference"] = "text_before"
    image_first_probability: float = 0.5
    readout_names: ClassVar[tuple[str, ...]] = ("context",)

    def encode(self, document: Document, sequencer: Sequencer, rng: np.random.Generator) -> list[TokenSequence]:
        segments = document.segments
        if document.is_pair and rng.random() < self.image_first_probability:
            segments = segments[::-1]
        return [self.annotate(tokens, sequencer.vocabulary) for tokens in sequencer.sequences(segments)]

    def without_images(self, tokens: TokenSequence, lost: Sequence[int], sequencer: Sequencer) -> TokenSequence | None:
        left = without_images(tokens, lost, sequencer.tokens_of)
        return self.annotate(left, sequencer.vocabulary) if len(left.input_ids) > 2 else None

    def annotate(self, tokens: TokenSequence, vocabulary: Vocabulary) -> TokenSequence:
        """Say which tokens carry generation loss, and where each image's context is read."""
        positions, labels = labels_of(tokens.input_ids, vocabulary)
        return replace(tokens, label_positions=positions, labels=labels, readouts=self._readouts(tokens))

    def _readouts(self, tokens: TokenSequence) -> dict[str, tuple[tuple[int, int], ...]]:
        """Find the ``<soi>`` before each image that has context."""
        if self.context_rule == "text_before":
            announced = [slot for slot in tokens.slots if slot.has_context]
        else:
            announced = [slot for slot in tokens.slots if slot.position > 1]
        return {"context": tuple((slot.position - 1, slot.image) for slot in announced)}


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
            ids, vocabulary = tokens.input_ids, sequencer.vocabulary
            hidden = (ids < vocabulary.text_size) & (rng.random(len(ids)) < self.text_share)
            (positions,) = np.nonzero(hidden)
            covered = np.where(hidden, vocabulary.image, ids)
            masked.append(replace(tokens, input_ids=covered, label_positions=positions, labels=ids[positions]))
        return masked

    def without_images(self, tokens: TokenSequence, lost: Sequence[int], sequencer: Sequencer) -> TokenSequence | None:
        left = without_images(tokens, lost, sequencer.tokens_of)  # no label stands in an image, so all stay
        return replace(left, readouts=self._readouts(left)) if len(left.input_ids) > 2 else None


@dataclass(frozen=True)
class PairView:
    """Single images with one text each, told to the decoder in one or more passes that do not see each other.

    Pairs of an interleaved document are its images with their matched sentences (the paper's "MMC4-Pair"; see
    :meth:`Document.image_texts`). The passes of one pair stand in one row, so one call of the decoder runs them all:

    - ``text``: ``<sot> text <eot>``; readout ``context`` at ``<eot>``: the text's contrastive feature.
    - ``caption``: ``<sot> <soi> image <eoi> text <eot>``; carries generation loss; readout ``matched`` at ``<eot>``.
    - ``match``: the same ids for another image to be put in; readout ``mismatched`` at ``<eot>``.

    Text is cut to what a row holds.
    """

    passes: tuple[Pass, ...]
    readout_names: ClassVar[tuple[str, ...]] = ("context", "matched", "mismatched")

    def encode(self, document: Document, sequencer: Sequencer, rng: np.random.Generator) -> list[TokenSequence]:
        image_texts = document.image_texts()
        if not image_texts:
            raise BadSampleError("no image with text to pair it with")
        if self._room(sequencer.image_tokens, sequencer) < 1:
            raise ValueError(f"a row of {sequencer.max_tokens} tokens cannot hold a pair in {len(self.passes)} passes")
        return [
            self._pair(sequencer.encode(text)[: self._room(sequencer.tokens_of(image), sequencer)], image, sequencer)
            for text, image in image_texts
        ]

    def _room(self, image_tokens: int, sequencer: Sequencer) -> int:
        """Count the tokens of text that a pair may have."""
        with_image = sum(name != "text" for name in self.passes)
        block = image_tokens + IMAGE_OVERHEAD
        return (sequencer.max_tokens - with_image * block) // len(self.passes) - 2

    def _pair(self, text: list[int], image: int, sequencer: Sequencer) -> TokenSequence:
        vocabulary = sequencer.vocabulary
        picture = [vocabulary.soi, *[vocabulary.image] * sequencer.tokens_of(image), vocabulary.eoi]
        names: dict[Pass, str] = {"text": "context", "caption": "matched", "match": "mismatched"}
        ids: list[int] = []
        starts, slots, readouts = [], [], {}
        label_positions = labels = np.zeros(0, np.int64)
        for name in self.passes:
            starts.append(len(ids))
            if name != "text":
                slots.append(ImageSlot(image, len(ids) + 2, has_context=False))
            passage = [vocabulary.sot, *(picture if name != "text" else []), *text, vocabulary.eot]
            if name == "caption":
                positions, following = labels_of(np.array(passage, dtype=np.int64), vocabulary)
                keep = following != vocabulary.soi  # it always follows <sot> here
                label_positions, labels = positions[keep] + len(ids), following[keep]
            ids += passage
            readouts[names[name]] = ((len(ids) - 1, image),)
        return TokenSequence(
            input_ids=np.array(ids, dtype=np.int64),
            slots=tuple(slots),
            images=(image,),
            starts=tuple(starts),
            label_positions=label_positions,
            labels=labels,
            readouts=readouts,
        )

    def without_images(self, tokens: TokenSequence, lost: Sequence[int], sequencer: Sequencer) -> TokenSequence | None:
        return None


def without_images(tokens: TokenSequence, lost: Sequence[int], tokens_of: Callable[[int], int]) -> TokenSequence:
    """Take the images in ``lost`` and the tokens around them out of a sequence; text stays.

    Args:
        tokens_of: counts the tokens of an image.
    """
    keep = np.ones(len(tokens.input_ids), dtype=bool)
    slots = []
    removed = 0
    for slot in tokens.slots:
        if slot.image in lost:
            count = tokens_of(slot.image)
            keep[slot.position - 1 : slot.position + count + 1] = False
            removed += count + IMAGE_OVERHEAD
        else:
            slots.append(ImageSlot(slot.image, slot.position - removed, slot.has_context))
    stays = keep[tokens.label_positions]
    return replace(
        tokens,
        input_ids=tokens.input_ids[keep],
        slots=tuple(slots),
        images=tuple(image for image in tokens.images if image not in lost),
        label_positions=(np.cumsum(keep) - 1)[tokens.label_positions[stays]],
        labels=tokens.labels[stays],
    )
