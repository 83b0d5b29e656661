"""The PDF part of MINT-1T: tars of ``<key>.json`` and a multi-page ``<key>.tiff``.

``texts`` and ``images`` are parallel lists; an image is named ``page_<page>_image_<xref>``, and ``image_metadata``
tells the ``page`` and ``xref`` of every page of the TIFF, in order.
"""

import io
from collections.abc import Iterator
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
from lcl_ds.data.corpora.tars import Members, read_tar
from lcl_ds.data.documents import BadSampleError
from lcl_ds.data.images import page_of

JPEG_QUALITY = 95


def read_mint_pdf(path: Path, options: ReadOptions) -> Iterator[RawDocument]:
    """Read the documents of a tar; pages become JPEG files.

    Raises:
        UserError: the file cannot be read.
    """
    return read_each(read_tar(path), partial(_read_sample, options=options))


def _read_sample(key: str, members: Members, options: ReadOptions) -> RawDocument:
    if "json" not in members:
        raise BadSampleError("a sample without json")
    record = parse_object(members["json"])
    texts, names = list_of(record, "texts"), list_of(record, "images")
    if len(texts) != len(names):
        raise BadSampleError("lists 'texts' and 'images' of different length")
    pages = _page_numbers(record.get("image_metadata"))
    tiff = members.get("tiff", members.get("tif"))
    draft = Draft(key, options, string_or_none(record.get("url")))
    for text, name in zip(texts, names, strict=True):
        if name is not None:
            number = pages.get(name) if isinstance(name, str) else None
            draft.add_image(partial(_page, tiff, number, options))
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


def _page(tiff: bytes | None, number: int | None, options: ReadOptions) -> bytes:
    if tiff is None or number is None:
        raise BadSampleError("an image that is not there")
    page = page_of(tiff, number, options.max_image_pixels)
    buffer = io.BytesIO()
    try:
        page.save(buffer, "JPEG", quality=JPEG_QUALITY)
    except (OSError, ValueError):  # no JPEG has a side of more than 65,500 pixels
        raise BadSampleError("a page that cannot be written as JPEG") from None
    return buffer.getvalue()
