"""Data sets of Hugging Face with the bytes of their images: Parquet files, and what `datasets` saves to disk.

An image is a struct of ``bytes`` and ``path``, or bytes alone. A class that is kept as a number gets its name from the
features that the file's schema describes.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from lcl_ds.data.corpora.parquet import Row, arrow_rows, parquet_rows, value_of
from lcl_ds.data.corpora.record import RawDocument, ReadOptions, read_each
from lcl_ds.data.corpora.table import Columns, check_columns, columns_among, is_url, read_row
from lcl_ds.data.documents import BadSampleError


def read_huggingface(path: Path, options: ReadOptions) -> Iterator[RawDocument]:
    """Read the rows of one file.

    Raises:
        UserError: pyarrow is not installed, the file cannot be read, or it has no column of images.
    """
    rows = arrow_rows(path) if path.suffix == ".arrow" else parquet_rows(path, lambda column: True)
    images = replace(options.images, folders=(path.parent, *options.images.folders))
    return read_each(_checked(path, rows, options), partial(_read_row, options=replace(options, images=images)))


def _checked(path: Path, rows: Iterator[tuple[str, Row]], options: ReadOptions) -> Iterator[tuple[str, Row]]:
    for number, (key, row) in enumerate(rows):
        if number == 0:
            check_columns(path, row.schema.names, _columns(row.schema, options), options)
        yield key, row


def _columns(schema: Any, options: ReadOptions) -> Columns:
    """Choose the columns: of images by their type, where the user names none."""
    columns = columns_among(schema.names, options)
    typed = tuple(field.name for field in schema if _is_image(field.type))
    return columns if options.image_columns or not typed else replace(columns, images=typed)


def _is_image(kind: Any) -> bool:
    from pyarrow import types

    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
    if types.is_struct(kind):
        return {"bytes", "path"} <= {kind.field(number).name for number in range(kind.num_fields)}
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _read_row(key: str, row: Row, options: ReadOptions) -> RawDocument:
    columns = _columns(row.schema, options)
    values = {name: _value(row, name, name in (*columns.images, *columns.texts)) for name in row.schema.names}
    for name, classes in _classes(_features(row.schema)).items():
        number = values.get(name)
        if isinstance(number, int) and 0 <= number < len(classes):
            values[name] = classes[number]
    return read_row(key, values, columns, options, partial(_find, options=options))


def _value(row: Row, name: str, is_content: bool) -> Any:
    """Read a value; one that no Python object can hold is missed only in a column of images or texts."""
    try:
        return value_of(row, name)
    except Exception:
        if is_content:
            raise
        return None


def _find(value: Any, options: ReadOptions) -> bytes:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise BadSampleError("an image without bytes or path")
    return options.images.find(None, value) if is_url(value) else options.images.find(value, None)


def _features(schema: Any) -> str:
    return (schema.metadata or {}).get(b"huggingface", b"{}").decode("utf-8", "replace")


@lru_cache
def _classes(features: str) -> dict[str, list[str]]:
    """Read the names of the classes of every column that holds classes."""
    try:
        described = json.loads(features)["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    columns = described.items() if isinstance(described, dict) else ()
    return {
        name: list(map(str, feature["names"]))
        for name, feature in columns
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and isinstance(feature.get("names"), list)
    }
