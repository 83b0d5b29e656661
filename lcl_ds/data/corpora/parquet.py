"""Rows of Parquet and Arrow files, which pyarrow reads; it is an optional dependency."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lcl_ds.data.corpora.record import reading
from lcl_ds.errors import UserError

ROWS = 64
"""Read at a time."""

Row = Any
"""A record batch of one row: pyarrow is not installed everywhere."""
ARROW_FILE = b"ARROW1"


def parquet_rows(path: Path, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a Parquet file, each with a key.

    Args:
        is_wanted: says whether a column is read; its path is such as ``metadata.list.element.img_url_sha``.

    Raises:
        UserError: pyarrow is not installed, or the file cannot be read.
    """
    try:
        from pyarrow import parquet
    except ImportError:
        raise _missing(path, "parquet") from None
    # Given a path, pyarrow would take some of them for URLs and could not take those that are not UTF-8.
    with reading(path, "parquet"), path.open("rb") as opened, parquet.ParquetFile(opened) as file:
        columns = [column.path for column in file.schema if is_wanted(column.path)]

        def batches() -> Iterator[Any]:
            for group in range(file.num_row_groups):  # across groups pyarrow cannot read lists of every type
                yield from file.iter_batches(batch_size=ROWS, row_groups=[group], columns=columns)

        yield from _rows_of(path, batches())


def arrow_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield the rows of an Arrow file, as `datasets` saves them, each with a key.

    Raises:
        UserError: pyarrow is not installed, or the file cannot be read.
    """
    try:
        from pyarrow import ipc
    except ImportError:
        raise _missing(path, "Arrow") from None
    with reading(path, "Arrow"), path.open("rb") as file:
        is_file = file.read(len(ARROW_FILE)) == ARROW_FILE
        file.seek(0)
        if is_file:
            opened = ipc.open_file(file)
            yield from _rows_of(path, (opened.get_batch(number) for number in range(opened.num_record_batches)))
        else:
            yield from _rows_of(path, iter(ipc.open_stream(file)))


def _missing(path: Path, kind: str) -> UserError:
    return UserError(f"{path}: reading {kind} needs pyarrow: pip install 'lcl_ds[parquet]'")


def _rows_of(path: Path, batches: Iterator[Any]) -> Iterator[tuple[str, Row]]:
    number = 0
    for batch in batches:
        for row in range(batch.num_rows):
            yield f"{path.name}:{number}", batch.slice(row, 1)
            number += 1


def value_of(row: Row, name: str) -> Any:
    """Return a row's value as a Python object; None where there is no such column."""
    return row.column(name)[0].as_py() if name in row.schema.names else None
