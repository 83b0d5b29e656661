"""Multimodal C4: sentences, and images matched to them by CLIP similarity.

``docs_shard_{i}_v2.jsonl.zip`` holds one JSON object a line: ``url``, ``text_list`` and ``image_info``, a list of
``image_name``, ``raw_url``, ``matched_text_index`` and ``matched_sim`` (github.com/allenai/mmc4). Images lie apart,
named ``image_name``. OpenFlamingo's tars hold the same objects as ``<uuid>.json`` with each image in ``image_base64``.
"""

import base64
import random
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lcl_ds.data.corpora.record import (
    Draft,
    RawDocument,
    ReadOptions,
    list_of,
    numbered_lines,
    parse_object,
    read_each,
    reading,
    string_or_none,
)
from lcl_ds.data.corpora.tars import Members, read_tar
from lcl_ds.data.documents import BadSampleError, number_or_none, whole_number

MAX_IMAGES = 6
"""As published."""

Entry = dict[str, Any]
"""One of ``image_info``."""
FindImage = Callable[[Entry], bytes]
"""An image's bytes by its entry; raises BadSampleError where there are none."""


def read_mmc4(path: Path, options: ReadOptions) -> Iterator[RawDocument]:
    """Read a ``.jsonl.zip`` (or unzipped ``.jsonl``); images are found by name, or by URL where there is no name.

    Raises:
        UserError: the file cannot be read.
    """

    def find(entry: Entry) -> bytes:
        return options.images.find(entry.get("image_name"), entry.get("raw_url"))

    return read_each(_lines(path), partial(_read_record, find=find, options=options))


def read_mmc4_tar(path: Path, options: ReadOptions) -> Iterator[RawDocument]:
    """Read the documents of a tar that OpenFlamingo's conversion wrote.

    Raises:
        UserError: the file cannot be read.
    """

    def read(key: str, members: Members) -> RawDocument:
        if "json" not in members:
            raise BadSampleError("a sample without json")
        return _read_record(key, members["json"], _from_base64, options)

    return read_each(read_tar(path), read)


def _lines(path: Path) -> Iterator[tuple[str, bytes | BadSampleError]]:
    with reading(path, "lines of JSON, zipped or not"), path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            yield from numbered_lines(path, file)
            return
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if name.endswith(".jsonl"):
                    with archive.open(name) as member:
                        yield from numbered_lines(path, member)


def _from_base64(entry: Entry) -> bytes:
    text = entry.get("image_base64")
    if not isinstance(text, str) or not text:
        raise BadSampleError("an image that is not there")  # its download had failed
    if text.startswith(("b'", 'b"')):
        text = text[2:-1].replace("\\n", "")  # the conversion script wrote Python's notation of bytes
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        raise BadSampleError("an image whose base64 is damaged") from None


def _read_record(key: str, line: bytes, find: FindImage, options: ReadOptions) -> RawDocument:
    record = parse_object(line)
    sentences, entries = list_of(record, "text_list"), list_of(record, "image_info")
    draft = Draft(key, options, string_or_none(record.get("url")))
    by_sentence = _by_sentence(entries, len(sentences), draft)
    rng = random.Random(f"{options.seed}/{key}")
    for number, sentence in enumerate(sentences):
        images = _draw(by_sentence.get(number, []), find, draft, rng)
        position = draft.add_text(sentence)
        for image in images:
            draft.matched_text_index[image] = position
    return draft.finish(MAX_IMAGES)


def _by_sentence(entries: list[Any], sentences: int, draft: Draft) -> dict[int, list[tuple[Entry, float]]]:
    """Group the entries whose similarity reaches the threshold, each with it, by the number of their sentence."""
    by_sentence: dict[int, list[tuple[Entry, float]]] = {}
    for entry in entries:
        entry = entry if isinstance(entry, dict) else {}
        index, similarity = whole_number(entry.get("matched_text_index")), number_or_none(entry.get("matched_sim"))
        if index is None or similarity is None or not 0 <= index < sentences:
            draft.skips.append("an image matched to no sentence")
        elif similarity < draft.options.min_similarity:
            draft.skips.append("an image below the similarity threshold")
        else:
            by_sentence.setdefault(index, []).append((entry, similarity))
    return by_sentence


def _draw(entries: list[tuple[Entry, float]], find: FindImage, draft: Draft, rng: random.Random) -> list[int]:
    """Draw the images of one sentence and return their positions; an image that is not there makes room for another."""
    positions: list[int] = []
    for entry, similarity in rng.sample(entries, len(entries)):
        if len(positions) == draft.options.images_per_sentence:
            draft.skips.append("a further image of a sentence")
            continue
        position = draft.add_image(partial(find, entry), similarity)
        if position is not None:
            positions.append(position)
    return positions
