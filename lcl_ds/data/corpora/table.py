"""Tables whose rows name images and texts: CSV, TSV, and lines of JSON.

A row with one image and one text becomes a caption pair. One with more becomes a document, its parts in the order of
the columns; two parallel lists of which at each position one is null keep that order, and of several captions of one
image the first comes before it and the others after it. What the other columns hold are the labels of its images.
"""

import codecs
import csv
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from lcl_ds.data.corpora.local_images import NOT_THERE, read_plain_file
from lcl_ds.data.corpora.record import (
    MAX_LINE_BYTES,
    Draft,
    Labels,
    RawDocument,
    ReadOptions,
    caption_of,
    labels_among,
    numbered_lines,
    parse_json,
    parse_object,
    read_each,
    reading,
    string_or_none,
)
from lcl_ds.data.documents import BadSampleError
from lcl_ds.errors import UserError
from lcl_ds.files import printable

IMAGE_COLUMNS = ("image", "images", "image_path", "file_name", "filename", "filepath", "file", "path", "img")
URL_COLUMNS = ("image_url", "url")
"""Of images that a folder of ``--images`` holds by their URL; taken where no column has a name of the others."""
TEXT_COLUMNS = ("caption", "captions", "text", "texts", "title", "description", "sentence", "sentences", "alt_text")
DELIMITERS = ",;\t|"

Row = dict[str, Any]
Find = Callable[[Any], bytes]
"""An image's bytes by what a row holds in its place; raises BadSampleError where there are none."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold what."""

    images: tuple[str, ...]
    texts: tuple[str, ...]


def columns_among(names: Collection[str], options: ReadOptions) -> Columns:
    """Choose the columns that the user names, else the first of each kind that has a usual name."""
    images = options.image_columns or _first_usual(names, (*IMAGE_COLUMNS, *URL_COLUMNS))
    return Columns(images, options.text_columns or _first_usual(names, TEXT_COLUMNS))


def _first_usual(names: Collection[str], usual: Sequence[str]) -> tuple[str, ...]:
    small = {name.strip().lower(): name for name in reversed([*names])}
    return next(((small[name],) for name in usual if name in small), ())


def read_csv(path: Path, options: ReadOptions) -> Iterator[RawDocument]:
    """Read a table whose first line names its columns; commas, semicolons, tabs or bars part them.

    Raises:
        UserError: the file cannot be read, names no column of images, or none of its images is there.
    """
    return _read_table(path, csv_rows(path, partial(_check_header, path, options=options)), options)


def read_json_lines(path: Path, options: ReadOptions) -> Iterator[RawDocument]:
    """Read lines of JSON objects, or a list of them in a ``.json``.

    Raises:
        UserError: the file cannot be read, or none of its images is there.
    """
    return _read_table(path, _json_rows(path), options)


def _read_table(
    path: Path, rows: Iterator[tuple[str, Row | BadSampleError]], options: ReadOptions
) -> Iterator[RawDocument]:
    images = replace(options.images, folders=(path.parent, *options.images.folders))
    finder = _Finder(path.parent, replace(options, images=images))

    known: set[str] = set()

    def read(key: str, row: Row) -> RawDocument:
        known.update(row)
        return read_row(key, row, columns_among(row, options), options, finder.find)

    yield from read_each(rows, read)
    if known and (missing := [name for name in (*options.image_columns, *options.text_columns) if name not in known]):
        raise UserError(f"{path}: no row has {missing[0]!r}; there are {', '.join(map(printable, sorted(known)[:20]))}")
    if finder.names and not finder.found:
        places = ", ".join(str(folder) for folder in images.folders)
        raise UserError(
            f"{path}: none of the {finder.names} images that it names is there, the first {printable(finder.first)!r}; "
            f"they were looked for below {places}: correct the paths, or name their folder with --images"
        )


class _Finder:
    """Finds images by the paths and URLs of a table, which is the user's own: its paths may lead anywhere."""

    def __init__(self, folder: Path, options: ReadOptions):
        self.folder, self.options = folder, options
        self.names, self.found, self.first = 0, 0, ""

    def find(self, value: Any) -> bytes:
        value = value.get("path") if isinstance(value, dict) else value
        if not isinstance(value, str):
            raise BadSampleError("an image that is no path")
        if is_url(value):
            return self.options.images.find(None, value)
        self.first = self.first or value
        self.names += 1
        data = self._by_path(value.strip())
        self.found += 1
        return data

    def _by_path(self, value: str) -> bytes:
        problem = BadSampleError(NOT_THERE)
        for name in spellings(value):
            data = read_plain_file(self.folder / name)
            if data is not None:
                return data
            try:
                return self.options.images.find(name, None)
            except BadSampleError as reason:
                problem = reason
        raise problem


def is_url(value: str) -> bool:
    return value.strip().lower().startswith(("http://", "https://"))


def spellings(name: str) -> list[str]:
    """List the ways in which other systems write a name: umlauts of one sign or two, backslashes between folders."""
    names = [name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))]
    return [*dict.fromkeys([*names, *(name.replace("\\", "/") for name in names)])]


def csv_rows(path: Path, check: Callable[[list[str]], object]) -> Iterator[tuple[str, Row | BadSampleError]]:
    """Yield the lines of a table, each with a key, by the columns that its first line names.

    Commas, semicolons, tabs or bars part them, in UTF-8 or UTF-16; a line that is none of the table is a problem.

    Args:
        check: is given the columns before the first line is read; it may raise UserError.

    Raises:
        UserError: the file cannot be read.
    """
    csv.field_size_limit(MAX_LINE_BYTES)
    with reading(path, "a table"), path.open("rb") as file:
        is_wide = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding, errors = ("utf-16", "strict") if is_wide else ("utf-8-sig", "surrogateescape")
    with reading(path, "a table"), path.open(encoding=encoding, errors=errors, newline="") as file:
        first = file.readline()
        counts = {sign: first.count(sign) for sign in DELIMITERS}
        delimiter = max(DELIMITERS, key=counts.__getitem__)
        lines = csv.reader(chain([first], file), delimiter=delimiter, strict=True)
        header = [name.strip() for name in next(lines, [])]
        check(header)
        while True:
            key = f"{path.name}:{lines.line_num + 1}"
            try:
                cells = next(lines)
            except StopIteration:
                return
            except csv.Error as error:  # the next line may be whole again
                yield key, BadSampleError(f"a line that is none of a table ({error})")
                continue
            if len(cells) > len(header):
                yield key, BadSampleError("a line with more cells than the first one (quote texts that hold commas)")
            elif cells:
                yield key, dict(zip(header, cells, strict=False))


def _check_header(path: Path, header: list[str], options: ReadOptions) -> None:
    """Refuse a first line that does not name the columns. Raises: UserError, names those that it has."""
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise UserError(f"{path}: its first line names the column {twice!r} twice; give each a name of its own")
    check_columns(path, header, columns_among(header, options), options)


def check_columns(path: Path, names: Collection[str], columns: Columns, options: ReadOptions) -> None:
    """Refuse a table in which no column holds images, or none holds texts and no captions are made.

    Raises:
        UserError: names the columns that it has.
    """
    there = ", ".join(map(printable, [*names][:20])) or "none"
    if missing := [name for name in (*options.image_columns, *options.text_columns) if name not in names]:
        raise UserError(f"{path}: it has no column {missing[0]!r}; there are {there}")
    if not columns.images:
        raise UserError(
            f"{path}: no column has a usual name of images ({', '.join(IMAGE_COLUMNS[:4])}, ...); there are {there}: "
            "say which one it is with --image-column NAME"
        )
    if not columns.texts and options.caption is None:
        raise UserError(
            f"{path}: no column has a usual name of texts ({', '.join(TEXT_COLUMNS[:4])}, ...); there are {there}: say "
            "which one it is with --text-column NAME, or make captions with --caption 'a photo of a {label}'"
        )


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with reading(path, "lines of JSON"):
        if path.suffix.lower() != ".json":
            with path.open("rb") as file:
                for key, line in numbered_lines(path, file):
                    yield key, line if isinstance(line, BadSampleError) else _object_or_reason(line)
            return
        try:
            records = parse_json(path.read_bytes())
        except BadSampleError as problem:
            raise UserError(f"{path}: {problem.reason}") from None
        if not isinstance(records, list):
            raise UserError(f"{path}: a list of objects is expected, found {type(records).__name__}")
        for number, record in enumerate(records):
            is_object = isinstance(record, dict)
            yield f"{path.name}:{number}", record if is_object else BadSampleError("json that is not an object")


def _object_or_reason(line: bytes) -> Row | BadSampleError:
    try:
        return parse_object(line)
    except BadSampleError as problem:
        return problem


def read_row(key: str, row: Row, columns: Columns, options: ReadOptions, find: Find) -> RawDocument:
    """Make a caption pair or a document of one row.

    Args:
        find: gives an image's bytes by what stands in the row.
    """
    draft = Draft(key, options, None if "url" in columns.images else string_or_none(row.get("url")))
    more = {name: value for name, value in row.items() if name not in (*columns.images, *columns.texts)}
    own = row.get("labels")
    labels = labels_among({**more, **own} if isinstance(own, dict) else more)
    parallel = _parallel(row, columns)
    parts = _parts(row, columns) if parallel is None else parallel
    if options.caption and not columns.texts:
        parts = [_Part(caption_of(options.caption, labels), False), *parts]
    for part in parts:
        if part.is_image:
            of_image = labels_among(part.labels) if isinstance(part.labels, dict) else labels
            draft.add_image(partial(find, part.value), labels=of_image, decode=True)
        else:
            draft.add_text(part.value)
    images = sum(part.is_image for part in parts)
    is_document = parallel is not None or images > 1 or len(parts) - images > 1 or options.caption == ""
    return draft.finish() if is_document else draft.finish_pair()


@dataclass(frozen=True)
class _Part:
    """An image or a text of a row, by what stands there."""

    value: Any
    is_image: bool
    labels: Labels | None = None
    """Its own ones, where the row has a list of them."""


def _parts(row: Row, columns: Columns) -> list[_Part]:
    """Put the parts of a row into reading order."""
    parts = [
        _Part(value, name in columns.images)
        for name in row
        if name in columns.images or name in columns.texts
        for value in (row[name] if isinstance(row[name], list) else [row[name]])
        if not (value is None or (isinstance(value, str) and not value.strip()))
    ]
    texts = [part for part in parts if not part.is_image]
    if len(columns.texts) == 1 and len(texts) > 1 and len(parts) == len(texts) + 1:
        (image,) = (part for part in parts if part.is_image)
        return [texts[0], image, *texts[1:]]
    return parts


def _parallel(row: Row, columns: Columns) -> list[_Part] | None:
    """Read two lists of which at each position one is null, as in our own shards; None where there are none."""
    if len(columns.images) != 1 or len(columns.texts) != 1:
        return None
    images, texts = row.get(columns.images[0]), row.get(columns.texts[0])
    if not isinstance(images, list) or not isinstance(texts, list) or len(images) != len(texts):
        return None
    if not images or any((image is None) == (text is None) for image, text in zip(images, texts, strict=True)):
        return None
    labels = row.get("labels")
    labels = labels if isinstance(labels, list) and len(labels) == len(images) else [None] * len(images)
    return [
        _Part(image, True, label) if text is None else _Part(text, False)
        for image, text, label in zip(images, texts, labels, strict=True)
    ]
