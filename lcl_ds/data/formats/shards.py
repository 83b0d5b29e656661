"""Shards as lcl_ds writes them, and image-text pairs as img2dataset writes them (LAION, CC3M, CC12M, ...).

img2dataset's tars hold ``000000000.jpg``, ``.txt`` (the caption) and ``.json`` with ``url``, ``caption``, ``key``,
``status``, ``error_message``, ``width``, ``height``, ``original_width``, ``original_height``, ``exif`` and ``sha256``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lcl_ds.data.documents import IMAGE_SUFFIXES, BadSampleError
from lcl_ds.data.formats.record import (
    Draft,
    ReadOptions,
    SourceDocument,
    left_out,
    list_of,
    parse_object,
    string_or_none,
)
from lcl_ds.data.formats.tars import Parts, read_tar


def read_shard(path: Path, options: ReadOptions) -> Iterator[SourceDocument]:
    """Interleaved documents and pairs of a tar.

    Raises:
        UserError: the file cannot be read.
    """
    for key, parts in read_tar(path):
        try:
            if isinstance(parts, BadSampleError):
                raise parts
            record = parse_object(parts["json"]) if "json" in parts else {}
            read = _read_document if "texts" in record else _read_pair
            yield read(key, record, parts, options)
        except BadSampleError as problem:
            yield left_out(key, problem.reason)


def _read_pair(key: str, record: dict[str, Any], parts: Parts, options: ReadOptions) -> SourceDocument:
    if record.get("status", "success") != "success":
        raise BadSampleError("a pair whose download had failed")
    try:
        caption = parts["txt"].decode("utf-8") if "txt" in parts else record.get("caption")
    except UnicodeDecodeError:
        raise BadSampleError("text that is not UTF-8") from None
    draft = Draft(key, options, string_or_none(record.get("url")))
    draft.add_text(caption)
    draft.add_image(next((parts[suffix] for suffix in IMAGE_SUFFIXES if suffix in parts), None))
    pair = draft.finish()
    if len(pair.texts) == 2:
        return SourceDocument(**{**vars(pair), "is_pair": True})
    reason = () if pair.skips else ("a pair without text or image",)
    return SourceDocument(key, skips=pair.skips + reason, url=pair.url)


def _read_document(key: str, record: dict[str, Any], parts: Parts, options: ReadOptions) -> SourceDocument:
    texts, names = list_of(record, "texts"), list_of(record, "images")
    matched = record.get("matched_text_index", [None] * len(names))
    similarity = record.get("matched_sim", [None] * len(names))
    lists = (texts, names, matched, similarity)
    if not all(isinstance(values, list) and len(values) == len(texts) for values in lists):
        raise BadSampleError("lists 'texts' and 'images' of different length")
    draft = Draft(key, options, string_or_none(record.get("url")))
    places: dict[int, int | None] = {}
    matches: dict[int, Any] = {}
    for number, (text, name, match, sim) in enumerate(zip(*lists, strict=True)):
        places[number] = draft.add_text(text)
        if name is not None:
            data = parts.get(name.lower()) if isinstance(name, str) else None
            place = draft.add_image(data, float(sim) if type(sim) in (int, float) else None)
            if place is not None and type(match) is int:
                matches[place] = match
    for place, match in matches.items():
        draft.matched_text_index[place] = places.get(match)
    return draft.finish()
