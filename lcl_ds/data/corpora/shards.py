"""Shards as lcl_ds writes them, and caption pairs as img2dataset writes them (LAION, CC3M, CC12M, ...).

img2dataset's tars hold ``000000000.jpg``, ``.txt`` (the caption) and ``.json`` with ``url``, ``caption``, ``key``,
``status``, ``error_message``, ``width``, ``height``, ``original_width``, ``original_height``, ``exif`` and ``sha256``.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lcl_ds.data.corpora.record import (
    Draft,
    RawDocument,
    ReadOptions,
    labels_among,
    list_of,
    parse_object,
    read_each,
    string_or_none,
)
from lcl_ds.data.corpora.tars import Members, read_tar
from lcl_ds.data.documents import IMAGE_SUFFIXES, BadSampleError, number_or_none, whole_number

PARALLEL = ("matched_text_index", "matched_sim", "labels")
"""Lists that a document may have beside its texts and images."""


def read_shard(path: Path, options: ReadOptions) -> Iterator[RawDocument]:
    """Read the interleaved documents and caption pairs of a tar.

    Raises:
        UserError: the file cannot be read.
    """
    return read_each(read_tar(path), partial(_read_sample, options=options))


def _read_sample(key: str, members: Members, options: ReadOptions) -> RawDocument:
    try:
        record = parse_object(members["json"]) if "json" in members else {}
    except BadSampleError:
        if "txt" not in members:
            raise
        record = {}  # text and image of a pair do not depend on it
    read = _read_document if "texts" in record else _read_pair
    return read(key, record, members, options)


def _read_pair(key: str, record: dict[str, Any], members: Members, options: ReadOptions) -> RawDocument:
    if record.get("status", "success") != "success":
        raise BadSampleError("a caption pair whose download had failed")
    caption = members["txt"].decode("utf-8") if "txt" in members else record.get("caption")
    draft = Draft(key, options, string_or_none(record.get("url")))
    draft.add_text(caption)
    if any(suffix in members for suffix in IMAGE_SUFFIXES):
        draft.add_image(partial(_member, members, *IMAGE_SUFFIXES), labels=labels_among(record))
    return draft.finish_pair()


def _read_document(key: str, record: dict[str, Any], members: Members, options: ReadOptions) -> RawDocument:
    texts, names = list_of(record, "texts"), list_of(record, "images")
    if len(texts) != len(names):
        raise BadSampleError("lists 'texts' and 'images' of different length")
    draft = Draft(key, options, string_or_none(record.get("url")))
    matched, similarity, labels = (_parallel(record, name, len(texts), draft) for name in PARALLEL)
    positions: dict[int, int | None] = {}
    matches: dict[int, int] = {}
    for number, (text, name, match, sim, label) in enumerate(
        zip(texts, names, matched, similarity, labels, strict=True)
    ):
        positions[number] = draft.add_text(text)
        if name is not None:
            of_image = labels_among(label) if isinstance(label, dict) else None
            position = draft.add_image(partial(_member, members, name), number_or_none(sim), of_image)
            wanted = whole_number(match)
            if match is not None and (wanted is None or not 0 <= wanted < len(texts)):
                draft.skips.append("a 'matched_text_index' that is not a position in 'texts'")
            elif position is not None and wanted is not None:
                matches[position] = wanted
    for position, wanted in matches.items():
        draft.matched_text_index[position] = positions.get(wanted)
    return draft.finish()


def _parallel(record: dict[str, Any], key: str, length: int, draft: Draft) -> list[Any]:
    """Read a list that a record may lack; one that is not parallel to its texts is left out."""
    values = record.get(key)
    if isinstance(values, list) and len(values) == length:
        return values
    if values is not None:
        draft.skips.append(f"a list {key!r} that is not parallel to 'texts'")
    return [None] * length


def _member(members: Members, *suffixes: Any) -> bytes:
    for suffix in suffixes:
        if isinstance(suffix, str) and suffix.lower() in members:
            return members[suffix.lower()]
    raise BadSampleError("an image that is not there")
