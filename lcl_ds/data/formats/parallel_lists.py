"""Parquet files of parallel lists ``texts`` and ``images``: OBELICS, OmniCorpus and the HTML part of MINT-1T.

In each place one of text and image URL is null. OBELICS keeps ``general_metadata`` as a JSON string; OmniCorpus as a
struct, with ``metadata`` a list of structs, one per image, whose ``img_url_sha`` may name the file. The files hold
URLs, not pixels: images come from :class:`lcl_ds.data.formats.local_images.LocalImages`.
"""

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
from lcl_ds.errors import UserError

COLUMNS = ("texts", "images", "metadata", "general_metadata", "url")
ROWS = 64
"""Read at a time."""


def read_parallel_lists(path: Path, options: ReadOptions) -> Iterator[SourceDocument]:
    """Documents of a parquet file.

    Raises:
        UserError: pyarrow is not installed, or the file cannot be read.
    """
    for number, record in enumerate(_rows(path)):
        key = f"{path.name}:{number}"
        try:
            if record is None:
                raise BadSampleError("text that is not UTF-8")
            yield _read_record(key, record, options)
        except BadSampleError as problem:
            yield left_out(key, problem.reason)


def _rows(path: Path) -> Iterator[dict[str, Any] | None]:
    """Records; None where one has text that is not UTF-8."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow: pip install 'lcl_ds[parquet]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in COLUMNS if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=ROWS, columns=columns):
                for row in range(batch.num_rows):
                    try:
                        (record,) = batch.slice(row, 1).to_pylist()
                    except UnicodeDecodeError:
                        record = None
                    yield record
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as parquet: {error}") from error


def _read_record(key: str, record: dict[str, Any], options: ReadOptions) -> SourceDocument:
    texts, images = list_of(record, "texts"), list_of(record, "images")
    if len(texts) != len(images):
        raise BadSampleError("lists 'texts' and 'images' of different length")
    about = record.get("general_metadata")
    if isinstance(about, str):
        about = parse_object(about)
    about = about if isinstance(about, dict) else {}
    draft = Draft(key, options, string_or_none(about.get("url")) or string_or_none(record.get("url")))
    digests = _digests(record.get("metadata"), images)
    for place, (text, url) in enumerate(zip(texts, images, strict=True)):
        if url is not None:
            draft.add_image(options.images.by_url(url, digests.get(place)) if isinstance(url, str) else None)
        draft.add_text(text)
    return draft.finish()


def _digests(metadata: Any, images: list[Any]) -> dict[int, str]:
    """By place, the source's own hash of an image's URL."""
    if not isinstance(metadata, list):
        return {}
    places = [place for place, image in enumerate(images) if image is not None]
    if len(metadata) == len(images):
        places = list(range(len(images)))
    entries = [entry.get("img_url_sha") if isinstance(entry, dict) else None for entry in metadata]
    return {place: digest for place, digest in zip(places, entries, strict=False) if isinstance(digest, str)}
