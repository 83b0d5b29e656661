"""The PDF part of MINT-1T: tars of ``<key>.json`` and a multi-page ``<key>.tiff``.

``texts`` and ``images`` are parallel lists; an image is named ``page_<page>_image_<xref>``, and ``image_metadata``
tells the ``page`` and ``xref`` of every page of the TIFF, in order.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lcl_ds.data.documents import BadSampleError
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
from lcl_ds.data.images import page_of

JPEG_QUALITY = 95


def read_mint_pdf(path: Path, options: ReadOptions) -> Iterator[SourceDocument]:
    """Documents of a tar; pages become JPEG files.

    Raises:
        UserError: the file cannot be read.
    """
    for key, parts in read_tar(path):
        try:
            if isinstance(parts, BadSampleError):
                raise parts
            yield _read_sample(key, parts, options)
        except BadSampleError as problem:
            yield left_out(key, problem.reason)


def _read_sample(key: str, parts: Parts, options: ReadOptions) -> SourceDocument:
    if "json" not in parts:
        raise BadSampleError("a sample without json")
    record = parse_object(parts["json"])
    texts, names = list_of(record, "texts"), list_of(record, "images")
    if len(texts) != len(names):
        raise BadSampleError("lists 'texts' and 'images' of different length")
    pages = _page_numbers(record.get("image_metadata"))
    tiff = parts.get("tiff", parts.get("tif"))
    draft = Draft(key, options, string_or_none(record.get("url")))
    for text, name in zip(texts, names, strict=True):
        if name is not None:
            try:
                number = pages.get(name) if isinstance(name, str) else None
                draft.add_image(_page(tiff, number, options) if tiff is not None and number is not None else None)
            except BadSampleError as problem:
                draft.skips.append(problem.reason)
        draft.add_text(text)
    return draft.finish()


def _page_numbers(metadata: Any) -> dict[str, int]:
    """Page of the TIFF by an image's name."""
    entries = metadata if isinstance(metadata, list) else []
    return {
        f"page_{entry.get('page')}_image_{entry.get('xref')}": number
        for number, entry in enumerate(entries)
        if isinstance(entry, dict)
    }


def _page(tiff: bytes, number: int, options: ReadOptions) -> bytes:
    buffer = io.BytesIO()
    page_of(tiff, number, options.max_image_pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
