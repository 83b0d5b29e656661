"""Turn documents of any format into samples of our shards, and write them with webdataset's own writer.

A caption pair becomes what img2dataset writes, every other document a ``.json`` with parallel lists and its images.
Equal documents give equal bytes, and :func:`hash_document` says whether two documents are equal.
"""

import hashlib
import json
from typing import IO, Any

import numpy as np
from webdataset import TarWriter

from lcl_ds.data.corpora.record import IMAGE_MEMBERS, RawDocument
from lcl_ds.data.documents import document_of
from lcl_ds.data.images import check_image

HASH_COLUMNS = 3
"""Numbers of 64 bits that :func:`hash_document` gives."""


def shard_writer(file: IO[bytes]) -> TarWriter:
    """Open webdataset's writer of samples whose members are bytes; times and owners would make two builds differ."""
    return TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False)


def checked_members(document: RawDocument, key: str, max_text_bytes: int) -> dict[str, bytes]:
    """Make the members of a sample, and check that training's own reader takes them.

    Raises:
        BadSampleError: it would refuse them.
    """
    members = to_members(document, key)
    sizes = {suffix: len(data) for suffix, data in members.items()}
    document_of(key, sizes, members.__getitem__, max_text_bytes)
    return members


def to_members(document: RawDocument, key: str) -> dict[str, bytes]:
    """Turn a document into the members of a sample, by suffix; a caption pair becomes what img2dataset writes."""
    members: dict[str, bytes] = {}
    names: list[str | None] = []
    for image in document.images:
        if image is None:
            names.append(None)
            continue
        suffix = IMAGE_MEMBERS[check_image(image, decode=False).format]
        name = suffix if document.is_pair else f"{len(members):03d}.{suffix}"
        names.append(name)
        members[name] = image
    about: dict[str, Any] = {"source_key": document.key, "url": document.url}
    if document.is_pair:
        caption = next(text for text in document.texts if text is not None)
        labels = next((of_image for of_image in document.labels if of_image), {})
        record = {**labels, **about, "caption": caption, "key": key, "status": "success"}
        return {**members, "json": _dump(record), "txt": caption.encode()}
    record = {**about, "texts": document.texts, "images": names}
    if any(match is not None for match in document.matched_text_index):
        record["matched_text_index"] = document.matched_text_index
    if any(similarity is not None for similarity in document.matched_sim):
        record["matched_sim"] = document.matched_sim
    if any(document.labels):
        record["labels"] = document.labels
    return {**members, "json": _dump(record)}


def _dump(record: dict[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode()


def hash_document(document: RawDocument) -> bytes:
    """Hash a document to three little-endian numbers of 64 bits.

    The first two depend on its texts and images in their order: equal documents have equal ones. The third depends on
    its images alone, where it has any, and decides whether it is held out: an image with several captions, one in each
    document, is either trained on or held out.
    """
    content, side = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=8)
    has_images = any(image is not None for image in document.images)
    for text, image in zip(document.texts, document.images, strict=True):
        data = image if text is None else text.encode()
        assert data is not None
        content.update((b"i" if text is None else b"t") + len(data).to_bytes(8, "little") + data)
        if not has_images or text is None:
            side.update(len(data).to_bytes(8, "little") + data)
    return content.digest() + side.digest()


def is_held_out(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Say which documents are held out, when about this fraction of all is: bool [...].

    Args:
        hashes: uint64 [..., 3] of :func:`hash_document`.
    """
    return hashes[..., 2] < np.float64(fraction) * 2.0**64
