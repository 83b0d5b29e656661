"""Shards as lcl_ds writes them, and image-text pairs as img2dataset writes them (LAION, CC3M, CC12M, ...).

img2dataset's tars hold ``000000000.jpg``, ``.txt`` (the caption) and ``.json`` with ``url``, ``caption``, ``key``,
``status``, ``error_message``, ``width``, ``height``, ``original_width``, ``original_height``, ``exif`` and ``sha256``.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lcl_ds.data.corpora.record import (
    Draft,
    RawDocument,
    ReadOptions,
    list_of,
    parse_object,
    read_each,
    string_or_none,
)
from lcl_ds.data.corpora.tars import Parts, read_tar
from lcl_ds.data.documents import IMAGE_SUFFIXES, BadSampleError, number_or_none, whole_number


def read_shard(path: Path, options: ReadOptions) -> Iterator[RawDocument]:
    """Read the interleaved documents and caption pairs of a tar.

    Raises:
        UserError: the file cannot be read.
    """
    return read_each(read_tar(path), partial(_read_sample, options=options))


def _read_sample(key: str, parts: Parts, options: ReadOptions) -> RawDocument:
    try:
        record = parse_object(parts["json"]) if "json" in parts else {}
    except BadSampleError:
        if "txt" not in parts:
            raise
        record = {}  # text and image of a pair do not depend on it
    read = _read_document if "texts" in record else _read_pair
    return read(key, record, parts, options)


def _read_pair(key: str, record: dict[str, Any], parts: Parts, options: ReadOptions) -> RawDocument:
    if record.get("status", "success") != "success":
        raise BadSampleError("a pair whose download had failed")
    caption = parts["txt"].decode("utf-8") if "txt" in parts else record.get("caption")
    draft = Draft(key, options, string_or_none(record.get("url")))
    draft.add_text(caption)
    draft.add_image(partial(_member, parts, *IMAGE_SUFFIXES))
    pair = draft.finish()
    if len(pair.texts) == 2:
        return replace(pair, is_pair=True)
    reason = () if pair.skips else ("a pair without text or image",)
    return RawDocument(key, skips=pair.skips + reason, url=pair.url)


def _read_document(key: str, record: dict[str, Any], parts: Parts, options: ReadOptions) -> RawDocument:
    texts, names = list_of(record, "texts"), list_of(record, "images")
    if len(texts) != len(names):
        raise BadSampleError("lists 'texts' and 'images' of different length")
    draft = Draft(key, options, string_or_none(record.get("url")))
    matched, similarity = (_parallel(record, key, len(texts), draft) for key in ("matched_text_index", "matched_sim"))
    places: dict[int, int | None] = {}
    matches: dict[int, int] = {}
    for number, (text, name, match, sim) in enumerate(zip(texts, names, matched, similarity, strict=True)):
        places[number] = draft.add_text(text)
        if name is not None:
            place = draft.add_image(partial(_member, parts, name), number_or_none(sim))
            wanted = whole_number(match)
            if match is not None and (wanted is None or not 0 <= wanted < len(texts)):
                draft.skips.append("a 'matched_text_index' that is not a position in 'texts'")
            elif place is not None and wanted is not None:
                matches[place] = wanted
    for place, wanted in matches.items():
        draft.matched_text_index[place] = places.get(wanted)
    return draft.finish()


def _parallel(record: dict[str, Any], key: str, length: int, draft: Draft) -> list[Any]:
    """Read a list that a record may lack; one that is not parallel to its texts is left out."""
    values = record.get(key)
    if isinstance(values, list) and len(values) == length:
        return values
    if values is not None:
        draft.skips.append(f"a list {key!r} that is not parallel to 'texts'")
    return [None] * length


def _member(parts: Parts, *suffixes: Any) -> bytes:
    for suffix in suffixes:
        if isinstance(suffix, str) and suffix.lower() in parts:
            return parts[suffix.lower()]
    raise BadSampleError("an image that is not there")
