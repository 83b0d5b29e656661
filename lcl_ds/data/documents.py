"""Turn samples of a shard into documents, of which there is one type."""

import json
import math
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lcl_ds.data.settings import default_of
from lcl_ds.data.shards.source import Source

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
MAX_TEXT_BYTES: int = default_of("max_text_bytes")
"""Limit of all texts of a document together, in UTF-8; what has more is not a document but a dump."""
JSON_PER_TEXT = 16
"""A ``.json`` member may be this many times as large as the longest text: names, escapes and lists take room too."""

PAIR_FACTS = frozenset(
    ("url", "caption", "key", "status", "error_message", "exif", "sha256", "md5", "source_key")  # of a download
) | {"width", "height", "original_width", "original_height"}
"""What the ``.json`` of a caption pair says of its download; every other key is a label."""

TOO_MUCH_TEXT = "a document with too much text"


class BadSampleError(Exception):
    """A sample that cannot be used; ``reason`` is a short phrase by which such samples are counted."""

    def __init__(self, reason: str):
        self.reason = reason
        super().__init__(reason)


@dataclass(frozen=True)
class Document:
    """Text and images in reading order.

    ``segments`` holds text (str) and images (int, index into ``images``); ``images`` holds member suffixes. Pixels
    are read only when the document's row is made.
    """

    key: str
    segments: tuple[str | int, ...]
    images: tuple[str, ...]
    matches: tuple[int | None, ...] = ()
    """Per image, the segment whose text describes it, where the record says so."""
    is_pair: bool = False
    """Whether it is a caption pair."""
    missing_images: int = 0
    """Images that the record names and the sample lacks."""

    def image_texts(self) -> list[tuple[str, int]]:
        """Give each image one text: its matched one, else the nearest before it, else the nearest after it.

        Images of a document without text are left out.
        """
        texts = [position for position, segment in enumerate(self.segments) if isinstance(segment, str)]
        image_texts = []
        for position, image in enumerate(self.segments):
            if isinstance(image, str) or not texts:
                continue
            match = self.matches[image] if self.matches else None
            if match is None:
                match = max((before for before in texts if before < position), default=texts[0])
            image_texts.append((str(self.segments[match]), image))
        return image_texts


def read_document(source: Source, number: int, max_text_bytes: int = MAX_TEXT_BYTES) -> Document:
    """Read the document of one sample of a shard; see :func:`document_of`.

    Raises:
        BadSampleError: there is no document, or it is damaged.
    """
    sample = source.sample(number)
    if sample.problem:
        raise BadSampleError(sample.problem)
    sizes = {suffix: size for suffix, (_, size) in sample.members.items()}
    key = f"{source.name}/{sample.key}"
    return document_of(key, sizes, lambda suffix: source.read(number, suffix), max_text_bytes)


def document_of(
    key: str, sizes: Mapping[str, int], read: Callable[[str], bytes], max_text_bytes: int = MAX_TEXT_BYTES
) -> Document:
    """Read a sample as a document.

    It is an interleaved one (``.json`` with parallel ``texts`` and ``images`` lists, as in OBELICS, where images name
    member suffixes) or a caption pair as img2dataset writes it (``.jpg`` and ``.txt``).

    A document may hold a third parallel list, ``matched_text_index`` (the name is MMC4's): per image the index in
    ``texts`` of the sentence that describes it.

    Args:
        sizes: bytes of each member, by suffix.
        read: gives a member's bytes.
        max_text_bytes: of all texts together, in UTF-8.

    Raises:
        BadSampleError: it is neither, or is damaged.
    """
    if sizes.get("txt", 0) > max_text_bytes:
        raise BadSampleError(TOO_MUCH_TEXT)
    if "txt" in sizes:
        return _read_pair(key, sizes, read)
    if "json" not in sizes:
        raise BadSampleError("neither a document (.json) nor a caption pair (.txt and image)")
    if sizes["json"] > JSON_PER_TEXT * max_text_bytes:
        raise BadSampleError("json that is too large")
    record = _load_json(read("json"))
    texts, images = record.get("texts"), record.get("images")
    if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
        raise BadSampleError("json without parallel lists 'texts' and 'images'")
    matched = record.get("matched_text_index")
    matched = [None] * len(images) if matched is None else matched
    if not isinstance(matched, list) or len(matched) != len(images):
        raise BadSampleError("json with a list 'matched_text_index' that is not parallel to 'images'")
    segments: list[str | int] = []
    suffixes: list[str] = []
    positions: dict[int | None, int] = {}
    wanted: list[int | None] = []
    missing = 0
    for number, (text, image, match) in enumerate(zip(texts, images, matched, strict=True)):
        if text is not None and not isinstance(text, str):
            raise BadSampleError("a text that is not a string")
        if text is not None and text.strip():
            positions[number] = len(segments)
            segments.append(_valid(text))
        if _has_image(sizes, image):
            segments.append(len(suffixes))
            suffixes.append(image.lower())
            wanted.append(whole_number(match))
        elif image is not None:
            missing += 1
    if not segments:
        raise BadSampleError("a document without text and images")
    if text_bytes(segment for segment in segments if isinstance(segment, str)) > max_text_bytes:
        raise BadSampleError(TOO_MUCH_TEXT)
    matches = tuple(positions.get(number) for number in wanted)
    return Document(key, tuple(segments), tuple(suffixes), matches, missing_images=missing)


def _read_pair(key: str, sizes: Mapping[str, int], read: Callable[[str], bytes]) -> Document:
    suffix = next((s for s in IMAGE_SUFFIXES if s in sizes), None)
    if suffix is None:
        raise BadSampleError("a caption pair without an image")
    text = _decode_text(read("txt"))
    if not text.strip():
        raise BadSampleError("a caption pair without text")
    return Document(key, (text, 0), (suffix,), is_pair=True)


def text_bytes(texts: Iterable[str]) -> int:
    """Measure the text of a document in bytes of UTF-8, which ``build``, ``check`` and training limit."""
    return sum(len(text.encode("utf-8")) for text in texts)


def number_or_none(value: Any) -> float | None:
    """Return a finite number, also one that was written as a string; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def whole_number(value: Any) -> int | None:
    """Return a whole number, also one written as ``2.0`` or ``"2"``, as some libraries do; None for anything else."""
    number = number_or_none(value)
    return int(number) if number is not None and number.is_integer() else None


def read_labels(source: Source, number: int, document: Document) -> list[dict[str, Any]] | None:
    """Read the evaluation labels of each image of ``document``; training never reads them.

    A document may hold a list ``labels``: for each of its ``images`` an object or null. The labels of a caption
    pair are the keys of its ``.json``, where it has one: img2dataset keeps further columns of its input there.

    Args:
        document: what :func:`read_document` made of the sample; images that the sample lacks are left out.

    Returns:
        An object per image, empty where there are no labels; None where there is anything else.
    """
    sample = source.sample(number)
    if "json" not in sample.members:
        return [{} for _ in document.images]
    try:
        record = _load_json(source.read(number, "json"))
    except BadSampleError:
        return None
    if document.is_pair:
        return [record]
    images = record["images"]
    labels = record.get("labels")
    if labels is None:
        labels = [None] * len(images)
    if not isinstance(labels, list) or len(labels) != len(images):
        return None
    present = [label for label, image in zip(labels, images, strict=True) if _has_image(sample.members, image)]
    if not all(label is None or isinstance(label, dict) for label in present):
        return None
    return [label or {} for label in present]


def _has_image(members: Container[str], image: Any) -> bool:
    """Say whether an entry of ``images`` names a member of the sample."""
    return isinstance(image, str) and image.lower() in members


def _load_json(data: bytes) -> dict[str, Any]:
    try:
        record = json.loads(_decode_text(data))
    except (ValueError, RecursionError):
        raise BadSampleError("json that cannot be parsed") from None
    if not isinstance(record, dict):
        raise BadSampleError("json that is not an object")
    return record


def _valid(text: str) -> str:
    """Refuse halves of surrogate pairs, which JSON may hold and no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadSampleError("text that is not valid Unicode") from None
    return text


def _decode_text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise BadSampleError("text that is not UTF-8") from None
