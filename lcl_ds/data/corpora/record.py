"""What every reader of a published format yields, and how outside records are taken apart."""

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

from lcl_ds.data.corpora.local_images import LocalImages
from lcl_ds.data.documents import MAX_TEXT_BYTES, PAIR_FACTS, TOO_MUCH_TEXT, BadSampleError, text_bytes
from lcl_ds.data.images import MAX_PIXELS, check_image
from lcl_ds.errors import UserError
from lcl_ds.files import printable

logger = logging.getLogger(__name__)

Record = TypeVar("Record")
Labels = dict[str, str | int | float | bool]
"""Of one image, by name; evaluation predicts them and training never reads them."""

IMAGE_MEMBERS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
"""Format to the suffix of a shard's member."""
MAX_LINE_BYTES = 1 << 26


@dataclass(frozen=True)
class ReadOptions:
    """What readers need besides the file.

    MMC4's rule is that of the published code: of the images whose similarity with their sentence reaches the threshold
    one per sentence is drawn, and the first six in reading order are kept.
    """

    images: LocalImages = field(default_factory=LocalImages)
    """Where images lie that a format names by file or URL."""
    min_similarity: float = 0.24
    """MMC4: least ``matched_sim`` of an image."""
    images_per_sentence: int = 1
    """MMC4: images drawn for one sentence."""
    max_images: int | None = None
    """Images kept of a document; None: 6 in MMC4, all elsewhere."""
    min_images: int = 1
    """A document with fewer is left out."""
    max_text_bytes: int = MAX_TEXT_BYTES
    """A document with more text is left out."""
    max_image_pixels: int = MAX_PIXELS
    names: tuple[str, ...] = ()
    """Files of the folder that is read, where the input is one; see :mod:`lcl_ds.data.corpora.inputs`."""
    image_columns: tuple[str, ...] = ()
    """Tables: columns of images; empty: the first one with a usual name."""
    text_columns: tuple[str, ...] = ()
    """Tables: columns of texts; empty: the first one with a usual name."""
    caption: str | None = None
    """Of images that have no text: their caption, with labels in braces; empty: they have labels alone."""
    seed: int = 0
    """MMC4: of the draw among several images of a sentence."""


@dataclass(frozen=True)
class RawDocument:
    """A document of any format; parallel lists in reading order. At each position either the text or the image is None.

    A record that could not be used is one without texts and images whose ``skips`` say why.
    """

    key: str
    """Name in its input file, for messages and to find it again."""
    texts: tuple[str | None, ...] = ()
    images: tuple[bytes | None, ...] = ()
    """Encoded files."""
    matched_text_index: tuple[int | None, ...] = ()
    """Per image, the position in ``texts`` of the sentence it belongs to, where the corpus says so."""
    matched_sim: tuple[float | None, ...] = ()
    """Per image, CLIP similarity with that sentence, where the corpus has it."""
    labels: tuple[Labels | None, ...] = ()
    """Per image, what is known of it and is no text to train on, where the corpus has it."""
    url: str | None = None
    skips: tuple[str, ...] = ()
    """A reason for every image, text or document that was left out."""
    is_pair: bool = False
    """One image and its caption."""


Reader = Callable[[Path, ReadOptions], Iterator[RawDocument]]
"""Yields the records of one file; raises UserError when the file as a whole cannot be read."""


def read_each(
    records: Iterable[tuple[str, Record | BadSampleError]], read: Callable[[str, Record], RawDocument]
) -> Iterator[RawDocument]:
    """Yield a document, or the reason why there is none, for every record: a bad record costs itself alone.

    Every reader of a format goes through here, so a value that nobody thought of does not end a build.

    Args:
        records: keys and raw records; an error instead of a record is the reason why there is none.
        read: makes a document of a record.

    Raises:
        UserError: the file as a whole cannot be read.
        OSError: the machine cannot do what is asked; the record is not to blame.
    """
    for key, record in records:
        yield _read_one(printable(key), record, read)


def _read_one(key: str, record: Record | BadSampleError, read: Callable[[str, Record], RawDocument]) -> RawDocument:
    try:
        if isinstance(record, BadSampleError):
            raise record
        return read(key, record)
    except BadSampleError as problem:
        return left_out(key, problem.reason)
    except (UserError, OSError, MemoryError):
        raise
    except UnicodeDecodeError:
        return left_out(key, "text that is not UTF-8")
    except Exception as error:
        logger.debug("%s: left out", key, exc_info=True)
        return left_out(key, f"a value of an unforeseen kind ({type(error).__name__})")


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn any error of a library that reads a file into a sentence; damaged bytes give errors of any kind.

    Raises:
        UserError: for any of them; names the file.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        first_line = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: cannot be read as {kind}: {first_line}") from error


def numbered_lines(path: Path, file: IO[bytes]) -> Iterator[tuple[str, bytes | BadSampleError]]:
    """Yield lines that are not blank, with file name and number; for one that is too long, the reason."""
    for number, line in enumerate(iter(partial(file.readline, MAX_LINE_BYTES), b"")):
        is_whole = len(line) < MAX_LINE_BYTES or line.endswith(b"\n")
        while not is_whole:
            rest = file.readline(MAX_LINE_BYTES)
            is_whole = len(rest) < MAX_LINE_BYTES or rest.endswith(b"\n")
            line = b""
        if not line:
            yield f"{path.name}:{number}", BadSampleError(f"a line of more than {MAX_LINE_BYTES >> 20} MiB")
        elif line.strip():
            yield f"{path.name}:{number}", line


@dataclass
class Draft:
    """A document being put together, position by position."""

    key: str
    options: ReadOptions
    url: str | None = None
    texts: list[str | None] = field(default_factory=list)
    images: list[bytes | None] = field(default_factory=list)
    matched_text_index: list[int | None] = field(default_factory=list)
    matched_sim: list[float | None] = field(default_factory=list)
    labels: list[Labels | None] = field(default_factory=list)
    skips: list[str] = field(default_factory=list)

    def add_text(self, text: Any) -> int | None:
        """Add a text as it is; null and blank text is not an error.

        Returns:
            Its position, None when it was left out.
        """
        if text is None:
            return None
        if not isinstance(text, str):
            self.skips.append("a text that is not a string")
        elif not is_unicode(text):
            self.skips.append("a text that is not valid Unicode")
        elif text.strip():
            return self._add(text, None)
        return None

    def add_image(
        self,
        find: Callable[[], bytes],
        similarity: float | None = None,
        labels: Labels | None = None,
        decode: bool = False,
    ) -> int | None:
        """Add an image if it is there and is one.

        Args:
            find: gives its bytes; raises BadSampleError where it cannot.
            labels: of the image; see :func:`labels_among`.
            decode: whether its pixels are read too, which takes longer; else its header alone.

        Returns:
            Its position, None when it was left out.
        """
        try:
            data = find()
            check_image(data, self.options.max_image_pixels, decode)
        except BadSampleError as problem:
            self.skips.append(problem.reason)
            return None
        return self._add(None, data, similarity, labels)

    def _add(
        self,
        text: str | None,
        image: bytes | None,
        similarity: float | None = None,
        labels: Labels | None = None,
    ) -> int:
        self.texts.append(text)
        self.images.append(image)
        self.matched_text_index.append(None)
        self.matched_sim.append(similarity)
        self.labels.append(labels or None)
        return len(self.texts) - 1

    def finish(self, max_images: int | None = None) -> RawDocument:
        """Return the document, or a record of why there is none."""
        limit = self.options.max_images if self.options.max_images is not None else max_images
        if limit is not None:
            self._keep_images(limit)
        count = sum(image is not None for image in self.images)
        if not self.texts:
            return self._left_out("a document without text and images")
        if text_bytes(text for text in self.texts if text is not None) > self.options.max_text_bytes:
            return self._left_out(TOO_MUCH_TEXT)
        if count < self.options.min_images:
            return self._left_out("a document with too few images")
        return RawDocument(
            self.key,
            tuple(self.texts),
            tuple(self.images),
            tuple(self.matched_text_index),
            tuple(self.matched_sim),
            tuple(self.labels),
            self.url,
            tuple(self.skips),
        )

    def finish_pair(self) -> RawDocument:
        """Return the caption pair, or a record of why there is none."""
        if len(self.texts) == 2:
            pair = self.finish()
            return replace(pair, is_pair=bool(pair.texts))
        if any(text is not None for text in self.texts):
            reason = "a caption without an image"
        else:
            reason = "an image without a caption" if self.texts else "neither an image nor a caption"
        return RawDocument(self.key, skips=tuple(self.skips) or (reason,), url=self.url)

    def _keep_images(self, limit: int) -> None:
        """Drop the images beyond the limit; what points to a later position moves along."""
        kept, seen = [], 0
        for position, image in enumerate(self.images):
            seen += image is not None
            if image is None or seen <= limit:
                kept.append(position)
        moved = {position: number for number, position in enumerate(kept)}
        self.texts = [self.texts[i] for i in kept]
        self.images = [self.images[i] for i in kept]
        self.matched_sim = [self.matched_sim[i] for i in kept]
        self.labels = [self.labels[i] for i in kept]
        matches = [self.matched_text_index[i] for i in kept]
        self.matched_text_index = [None if match is None else moved[match] for match in matches]

    def _left_out(self, reason: str) -> RawDocument:
        return RawDocument(self.key, skips=(*self.skips, reason), url=self.url)


def left_out(key: str, reason: str) -> RawDocument:
    """Make the result of a record that could not be used at all."""
    return RawDocument(key, skips=(reason,))


def is_unicode(text: str) -> bool:
    """Say whether text can be encoded; JSON may hold halves of surrogate pairs."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def parse_json(data: bytes | str) -> Any:
    """Parse a JSON value. Bytes that are not UTF-8 and overlong numbers cost only the text or number that holds them.

    Raises:
        BadSampleError: it is not one.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise BadSampleError("json that cannot be parsed") from None
    except ValueError:
        pass
    try:
        text = data if isinstance(data, str) else data.decode(json.detect_encoding(data), "surrogateescape")
        return json.loads(text, parse_int=_integer)
    except (ValueError, RecursionError):
        raise BadSampleError("json that cannot be parsed") from None


def _integer(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:  # Python makes no int of more than 4300 digits
        return float(digits)


def parse_object(data: bytes | str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        BadSampleError: it is not one.
    """
    record = parse_json(data)
    if not isinstance(record, dict):
        raise BadSampleError("json that is not an object")
    return record


def list_of(record: dict[str, Any], key: str) -> list[Any]:
    """Return a record's list.

    Raises:
        BadSampleError: it has none by that name.
    """
    value = record.get(key)
    if not isinstance(value, list):
        raise BadSampleError(f"a record without the list {key!r}")
    return value


def labels_among(values: dict[str, Any]) -> Labels:
    """Choose what can be labels: strings, numbers and truth values, but for what img2dataset itself notes."""
    return {
        name: value
        for name, value in values.items()
        if isinstance(name, str) and name not in PAIR_FACTS and is_unicode(name) and _is_label(value)
    }


def caption_of(template: str, labels: Labels) -> str:
    """Fill the labels that a caption names in braces into it; underscores become spaces.

    Raises:
        BadSampleError: the image has no such label.
    """
    caption = template
    for name in re.findall(r"\{([^{}]+)\}", template):
        if name not in labels:
            raise BadSampleError("an image without a label that its caption needs")
        caption = caption.replace(f"{{{name}}}", str(labels[name]).replace("_", " "))
    return caption


def _is_label(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip()) and is_unicode(value)
    return isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))


def string_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) and is_unicode(value) else None
