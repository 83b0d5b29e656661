"""Encode interleaved documents: control tokens and the grammar of a sequence.

A document becomes ``<sot> text <soi> <img>*N <eoi> text ... <eot>`` (paper, section 3; published ``interleaved.py``),
where N is the number of image tokens. The five control ids stand behind the tokenizer's own vocabulary, so no text can
ever produce one: a literal ``<start_of_image>`` in web text is encoded as ordinary characters.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

CONTROL_TOKENS = ("<start_of_text>", "<end_of_text>", "<image>", "<start_of_image>", "<end_of_image>")
IMAGE_OVERHEAD = 2
"""Tokens around an image's own: ``<soi>`` and ``<eoi>``."""


@dataclass(frozen=True)
class Vocabulary:
    """Ids of text (``0 .. text_size - 1``) and of the control tokens that follow them."""

    text_size: int

    @property
    def sot(self) -> int:
        return self.text_size

    @property
    def eot(self) -> int:
        return self.text_size + 1

    @property
    def image(self) -> int:
        return self.text_size + 2

    @property
    def soi(self) -> int:
        return self.text_size + 3

    @property
    def eoi(self) -> int:
        return self.text_size + 4

    @property
    def size(self) -> int:
        return self.text_size + len(CONTROL_TOKENS)


class TextTokenizer:
    """Any Hugging Face fast tokenizer, used for plain text only.

    Special tokens of the tokenizer itself (``<|endoftext|>`` and the like) are not recognised in text either.

    Args:
        name_or_path: a folder with ``tokenizer.json`` or a name that transformers resolves.
        fetches: whether a name may be looked up on a hub; False: only on this machine.

    Raises:
        ValueError: the tokenizer cannot be loaded or has no fast implementation.
    """

    def __init__(self, name_or_path: str | Path, *, fetches: bool = True):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(name_or_path), local_files_only=not fetches, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"no tokenizer at {name_or_path}: {str(error).splitlines()[0]}") from error
        if not tokenizer.is_fast:
            raise ValueError(f"tokenizer {name_or_path} has no fast implementation; convert it to tokenizer.json first")
        self._backend = tokenizer.backend_tokenizer
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocabulary = Vocabulary(text_size=len(tokenizer))

    def encode(self, text: str) -> list[int]:
        """Encode ``text`` without any special token."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def difference_to(self, tokenizer_json: Path) -> str | None:
        """Name a token to which another tokenizer gives another id; None where there is none, or no such file."""
        if not tokenizer_json.is_file():
            return None
        ours, theirs = self._backend.get_vocab(), Tokenizer.from_file(str(tokenizer_json)).get_vocab()
        other = [(number, token) for token, number in ours.items() if theirs.get(token, number) != number]
        return f"{min(other)[1]!r} is {min(other)[0]} here and {theirs[min(other)[1]]} there" if other else None

    def with_control_tokens(self) -> Tokenizer:
        """Copy the tokenizer and let the copy know the control tokens, by name, under the ids they have here.

        Raises:
            ValueError: a control token's name is a token of the tokenizer's own.
        """
        copy = Tokenizer.from_str(self._backend.to_str())
        copy.encode_special_tokens = False
        copy.add_special_tokens(list(CONTROL_TOKENS))
        for number, name in enumerate(CONTROL_TOKENS, start=self.vocabulary.text_size):
            if copy.token_to_id(name) != number:
                raise ValueError(f"the tokenizer has a token {name} of its own")
        return copy

    def decode(self, ids: Sequence[int]) -> str:
        """Write ``ids`` as text; control tokens are written by name."""
        names = dict(enumerate(CONTROL_TOKENS, start=self.vocabulary.text_size))
        words: list[str] = []
        for is_control, run in groupby(ids, names.__contains__):
            if is_control:
                words += map(names.__getitem__, run)
            else:
                words.append(self._backend.decode([int(token) for token in run]))
        return " ".join(words)


@dataclass(frozen=True)
class ImageSlot:
    """Where one image stands in a token sequence."""

    image: int
    """Which of the document's images it is."""
    position: int
    """Index of its first image token; ``<soi>`` stands one before."""
    has_context: bool
    """Whether text of the same sequence precedes it, so that it takes part in the contrastive loss."""


@dataclass(frozen=True)
class TokenSequence:
    """One document, one piece of a document too long for a row, or one caption pair in several passages."""

    input_ids: np.ndarray
    """int64 [T]."""
    slots: tuple[ImageSlot, ...]
    """Where image tokens stand; an image may have several slots or none."""
    images: tuple[int, ...]
    """The document's images whose pixels are needed, each once."""
    starts: tuple[int, ...] = (0,)
    """Where a passage begins that sees nothing of the passages before it."""
    label_positions: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64 [T'], positions that carry generation loss."""
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64 [T'], the ids to be predicted at the label positions."""
    readouts: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    """By name, (position, document's image) of states of the decoder that an objective reads about an image."""


def encode_sequence(
    segments: Sequence[str | int],
    encode: Callable[[str], list[int]],
    vocabulary: Vocabulary,
    image_tokens: int | Sequence[int],
    max_tokens: int,
    max_images: int,
    max_image_tokens: int | None = None,
) -> list[TokenSequence]:
    """Encode one document as token sequences.

    Args:
        segments: text (str) and images (int: the image's number in its document) in reading order.
        encode: text to ids, without special tokens.
        image_tokens: N, patch tokens of one image; or those of each image by its number.
        max_tokens, max_images, max_image_tokens: budgets of a row. A longer document is cut into several sequences,
            never inside an image, so that nothing is dropped; each piece starts with ``<sot>`` and has only its own
            text as context.

    Returns:
        At least one sequence, each of at most ``max_tokens`` tokens.

    Raises:
        ValueError: a row cannot hold even one image.
    """
    largest = image_tokens if isinstance(image_tokens, int) else max(image_tokens, default=0)
    if largest + IMAGE_OVERHEAD + 2 > max_tokens:
        raise ValueError(f"a row of {max_tokens} tokens cannot hold one image of {largest} tokens plus 4")
    if max_image_tokens is not None and largest > max_image_tokens:
        raise ValueError(f"a row of {max_image_tokens} image tokens cannot hold one image of {largest}")
    pieces: list[TokenSequence] = []
    ids: list[int] = [vocabulary.sot]
    slots: list[ImageSlot] = []
    has_text = False
    in_images = 0

    def close() -> None:
        nonlocal ids, slots, has_text, in_images
        if len(ids) > 1:
            images = tuple(slot.image for slot in slots)
            pieces.append(TokenSequence(np.array([*ids, vocabulary.eot], dtype=np.int64), tuple(slots), images))
        ids, slots, has_text, in_images = [vocabulary.sot], [], False, 0

    for segment in _join_neighbouring_text(segments):
        if isinstance(segment, int):
            count = image_tokens if isinstance(image_tokens, int) else image_tokens[segment]
            too_many = len(slots) == max_images or in_images + count > (max_image_tokens or max_tokens)
            if len(ids) + count + IMAGE_OVERHEAD + 1 > max_tokens or too_many:
                close()
            slots.append(ImageSlot(segment, len(ids) + 1, has_text))
            in_images += count
            ids += [vocabulary.soi, *[vocabulary.image] * count, vocabulary.eoi]
            continue
        text = encode(segment)
        while text:
            room = max_tokens - 1 - len(ids)
            if room == 0:
                close()
                continue
            ids += text[:room]
            text = text[room:]
            has_text = True
    close()
    return pieces


def _join_neighbouring_text(segments: Sequence[str | int]) -> list[str | int]:
    joined: list[str | int] = []
    for segment in segments:
        if isinstance(segment, str):
            if not segment.strip():
                continue
            if joined and isinstance(joined[-1], str):
                joined[-1] = f"{joined[-1]} {segment}"
                continue
        joined.append(segment)
    return joined


def labels_of(input_ids: np.ndarray, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Find positions whose next token carries generation loss, and those next tokens.

    Next tokens that are ``<image>`` or ``<eoi>`` carry none; ``<soi>`` and ``<eot>`` do (published ``lcl_model.py``:
    the decoder learns when an image begins; the ``<eoi>`` position predicts the text after the image).

    Returns:
        positions int64 [T'], labels int64 [T'].
    """
    following = input_ids[1:]
    carries_loss = (following != vocabulary.image) & (following != vocabulary.eoi)
    positions = np.nonzero(carries_loss)[0]
    return positions, following[positions]
