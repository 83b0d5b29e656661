"""Parquet files of parallel lists ``texts`` and ``images``: OBELICS, OmniCorpus and the HTML part of MINT-1T.

At each position either the text or the image URL is null. OBELICS keeps ``general_metadata`` as a JSON string; in
OmniCorpus it is a struct, and ``metadata`` a list of structs, one per image, whose ``img_url_sha`` may name the file.
The files hold URLs, not pixels: images come from :class:`lcl_ds.data.corpora.local_images.LocalImages`.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lcl_ds.data.corpora.parquet import Row, parquet_rows, value_of
from lcl_ds.data.corpora.record import (
    Draft,
    RawDocument,
    ReadOptions,
    list_of,
    parse_object,
    read_each,
    string_or_none,
)
from lcl_ds.data.documents import BadSampleError

CONTENT = ("texts", "images")
FACTS = {"url": (), "metadata": ("img_url_sha",), "general_metadata": ("url",)}
"""Further columns, and what is read of those that are structs: the rest may hold values that no Python object has."""


def read_parallel_lists(path: Path, options: ReadOptions) -> Iterator[RawDocument]:
    """Read the documents of a Parquet file.

    Raises:
        UserError: pyarrow is not installed, or the file cannot be read.
    """
    return read_each(parquet_rows(path, _is_wanted), partial(_read_row, options=options))


def _is_wanted(column: str) -> bool:
    """Say whether values are read; ``column`` is a path such as ``metadata.list.element.img_url_sha``."""
    first, *rest = column.split(".")
    return first in CONTENT or (first in FACTS and (not rest or rest[-1] in FACTS[first]))


def _read_row(key: str, row: Row, options: ReadOptions) -> RawDocument:
    record = {name: value_of(row, name) for name in CONTENT}
    texts, images = list_of(record, "texts"), list_of(record, "images")
    if len(texts) != len(images):
        raise BadSampleError("lists 'texts' and 'images' of different length")
    url, metadata, about = (_value_or_none(row, name) for name in FACTS)
    about = about.get("url") if isinstance(about, dict) else None
    draft = Draft(key, options, string_or_none(about) or string_or_none(url))
    digests = _digests(metadata, images)
    for position, (text, image) in enumerate(zip(texts, images, strict=True)):
        if image is not None:
            draft.add_image(partial(options.images.find, None, image, digests.get(position)))
        draft.add_text(text)
    return draft.finish()


def _value_or_none(row: Row, name: str) -> Any:
    """Read a value that the document can do without; structs may be written as JSON."""
    try:
        value = value_of(row, name)
        return parse_object(value) if name != "url" and isinstance(value, str) else value
    except Exception:  # of no kind that Python has, or no JSON: it costs no text and no image
        return None


def _digests(metadata: Any, images: list[Any]) -> dict[int, str]:
    """Read the hashes that the corpus itself gives of the URLs of its images, by position."""
    if not isinstance(metadata, list):
        return {}
    positions = [position for position, image in enumerate(images) if image is not None]
    if len(metadata) == len(images):
        positions = list(range(len(images)))
    entries = [entry.get("img_url_sha") if isinstance(entry, dict) else None for entry in metadata]
    return {position: digest for position, digest in zip(positions, entries, strict=False) if isinstance(digest, str)}
