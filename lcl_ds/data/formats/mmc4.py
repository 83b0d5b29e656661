"""Multimodal C4: sentences, and images matched to them by CLIP similarity.

``docs_shard_{i}_v2.jsonl.zip`` holds one JSON object a line: ``url``, ``text_list`` and ``image_info``, a list of
``image_name``, ``raw_url``, ``matched_text_index`` and ``matched_sim`` (github.com/allenai/mmc4). Images lie apart,
named ``image_name``. OpenFlamingo's tars hold the same objects as ``<uuid>.json`` with each image in ``image_base64``.
"""

import base64
import binascii
import random
import zipfile
import zlib
from collections.abc import Callable, Iterator
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
from lcl_ds.data.formats.tars import read_tar
from lcl_ds.errors import UserError

MAX_IMAGES = 6
"""As published."""
MAX_LINE_BYTES = 1 << 26

FindImage = Callable[[dict[str, Any]], bytes | None]
"""An image's bytes by its entry in ``image_info``."""


def read_mmc4(path: Path, options: ReadOptions) -> Iterator[SourceDocument]:
    """Documents of a ``.jsonl.zip`` (or unzipped ``.jsonl``) with images by name, or by URL where there is no name.

    Raises:
        UserError: the file cannot be read.
    """

    def find(entry: dict[str, Any]) -> bytes | None:
        name, url = entry.get("image_name"), entry.get("raw_url")
        data = options.images.by_name(name) if isinstance(name, str) else None
        return options.images.by_url(url) if data is None and isinstance(url, str) else data

    for number, line in enumerate(_lines(path)):
        if line.strip():
            yield _read_record(f"{path.name}:{number}", line, find, options)


def read_mmc4_tar(path: Path, options: ReadOptions) -> Iterator[SourceDocument]:
    """Documents of a tar that OpenFlamingo's conversion wrote.

    Raises:
        UserError: the file cannot be read.
    """
    for key, parts in read_tar(path):
        if isinstance(parts, BadSampleError):
            yield left_out(key, parts.reason)
        elif "json" not in parts:
            yield left_out(key, "a sample without json")
        else:
            yield _read_record(key, parts["json"], _from_base64, options)


def _lines(path: Path) -> Iterator[bytes]:
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                while line := file.readline(MAX_LINE_BYTES):
                    yield line
            return
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".jsonl"):
                    with archive.open(name) as member:
                        while line := member.readline(MAX_LINE_BYTES):
                            yield line
    except (OSError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _from_base64(entry: dict[str, Any]) -> bytes | None:
    text = entry.get("image_base64")
    if not isinstance(text, str):
        return None  # its download had failed
    if text.startswith(("b'", 'b"')):
        text = text[2:-1]  # the conversion script wrote Python's notation of bytes
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return b""


def _read_record(key: str, line: bytes, find: FindImage, options: ReadOptions) -> SourceDocument:
    try:
        record = parse_object(line)
        sentences, entries = list_of(record, "text_list"), list_of(record, "image_info")
    except BadSampleError as problem:
        return left_out(key, problem.reason)
    draft = Draft(key, options, string_or_none(record.get("url")))
    by_sentence = _by_sentence(entries, len(sentences), draft)
    rng = random.Random(f"{options.seed}/{key}")
    for number, sentence in enumerate(sentences):
        images = _draw(by_sentence.get(number, []), find, draft, rng)
        place = draft.add_text(sentence)
        for image in images:
            draft.matched_text_index[image] = place
    return draft.finish(MAX_IMAGES)


def _by_sentence(entries: list[Any], sentences: int, draft: Draft) -> dict[int, list[dict[str, Any]]]:
    """Entries whose similarity reaches the threshold, by the number of their sentence."""
    found: dict[int, list[dict[str, Any]]] = {}
    for entry in entries:
        entry = entry if isinstance(entry, dict) else {}
        index, similarity = entry.get("matched_text_index"), entry.get("matched_sim")
        if not (isinstance(index, int) and 0 <= index < sentences and isinstance(similarity, int | float)):
            draft.skips.append("an image matched to no sentence")
        elif not similarity >= draft.options.min_similarity:
            draft.skips.append("an image below the similarity threshold")
        else:
            found.setdefault(index, []).append(entry)
    return found


def _draw(entries: list[dict[str, Any]], find: FindImage, draft: Draft, rng: random.Random) -> list[int]:
    """Places of the images drawn for one sentence; one that cannot be had makes room for another."""
    places: list[int] = []
    for entry in rng.sample(entries, len(entries)):
        if len(places) == draft.options.images_per_sentence:
            draft.skips.append("a further image of a sentence")
            continue
        place = draft.add_image(find(entry), float(entry["matched_sim"]))
        places += [] if place is None else [place]
    return places
