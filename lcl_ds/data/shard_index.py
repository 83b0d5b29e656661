"""Where the members of a WebDataset tar lie: an index made once and kept beside the shard.

Starting on many thousand shards then reads a few small pieces of each. Nothing in a shard is ever unpickled or used as
a path.
"""

import hashlib
import json
import struct
import tarfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from lcl_ds.data.storage import (
    DEFAULT_CACHE,
    INDEX_SUFFIX,
    cached_name,
    is_remote,
    materialise,
    name_of,
    open_file,
    read_range,
    size_of,
)
from lcl_ds.errors import UserError
from lcl_ds.files import write_whole

MAX_MEMBER_BYTES = 1 << 28
"""A larger member is refused: no image or text of a document is 256 MiB."""
INDEX_VERSION = 1
BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Sample:
    """One sample of a shard: where its members lie."""

    key: str
    parts: dict[str, tuple[int, int]]
    """Suffix (``json``, ``000.jpg``) to (offset, size) in bytes."""


@dataclass(frozen=True)
class ShardIndex:
    """Offsets of one shard with N samples and M members."""

    suffixes: tuple[str, ...]
    """Every suffix that occurs, once."""
    first: np.ndarray
    """uint32 [N + 1], each sample's first member; the last entry is M."""
    suffix: np.ndarray
    """uint16 [M], number of the suffix."""
    offset: np.ndarray
    """int64 [M], bytes."""
    size: np.ndarray
    """uint32 [M], bytes."""
    keys: np.ndarray
    """uint8, all keys in UTF-8, one after the other."""
    key_end: np.ndarray
    """uint32 [N], where each key ends."""

    def sample(self, number: int) -> Sample:
        start = int(self.key_end[number - 1]) if number else 0
        key = self.keys[start : self.key_end[number]].tobytes().decode("utf-8", "surrogateescape")
        return Sample(key, self.parts(number))

    def parts(self, number: int) -> dict[str, tuple[int, int]]:
        """See :class:`Sample`."""
        members = slice(*self.first[number : number + 2].tolist())
        places = zip(self.offset[members].tolist(), self.size[members].tolist(), strict=True)
        return dict(zip([self.suffixes[s] for s in self.suffix[members].tolist()], places, strict=True))


@dataclass(frozen=True)
class Shard:
    """One indexed tar."""

    path: str
    sample_count: int
    layout: str
    """Hash of name and layout."""
    sidecar: str | None = None
    """Location of the index, read when it is needed ..."""
    index: ShardIndex | None = None
    """... or the index itself, where there is no place to keep it."""

    def fingerprint(self) -> str:
        """Hash of name and layout; differs when samples were added, removed, renamed or resized."""
        return self.layout

    def load_index(self) -> ShardIndex:
        """Raises: UserError when the index was removed since the start."""
        if self.index is not None:
            return self.index
        assert self.sidecar is not None
        try:
            return _parse_index(read_range(self.sidecar, 0, size_of(self.sidecar)))[1]
        except (OSError, ValueError) as error:
            raise UserError(f"shard {self.path}: its index {self.sidecar} is gone or damaged; start again") from error


def index_shard(path: str | Path, cache: Path = DEFAULT_CACHE, rescan: bool = False) -> Shard:
    """A shard with its index, taken from beside it or from the cache, or made by reading the tar's headers.

    Members of a sample are neighbours that share the name up to the first dot (the WebDataset convention). A kept index
    counts as that of the tar when name, size, some headers and the end mark agree; every read then looks at the
    member's own header.

    Args:
        path: a local path, a URL, or ``pipe:COMMAND``, whose output is kept in ``cache``.
        cache: folder for what cannot be kept beside the shard.
        rescan: read all headers even if there is an index.

    Raises:
        UserError: not a readable, complete, plain tar; names the file and what is wrong.
    """
    path = str(path)
    if path.startswith("pipe:"):
        path = materialise(path, cache)
    cached = str(cache.expanduser() / cached_name(path, INDEX_SUFFIX))
    try:
        size = size_of(path)
        for sidecar in () if rescan else (path + INDEX_SUFFIX, cached):
            found = _kept(path, size, sidecar)
            if found is not None:
                return found
        facts, index = _scan(path, size)
    except (OSError, tarfile.TarError, ValueError) as error:
        raise UserError(f"shard {path}: cannot be read: {error}") from error
    if facts["samples"] == 0:
        raise UserError(f"shard {path}: it holds no samples")
    places = [cached] if is_remote(path) else [path + INDEX_SUFFIX, cached]
    kept = _keep(facts, index, places)
    return Shard(path, facts["samples"], facts["layout"], kept, None if kept else index)


def _kept(path: str, size: int, sidecar: str) -> Shard | None:
    """The shard by its kept index; None when there is none or it is another tar's."""
    try:
        (length,) = struct.unpack("<Q", read_range(sidecar, 0, 8))
        facts = _facts(read_range(sidecar, 8, 8 + min(length, 1 << 20)))
    except (OSError, ValueError, struct.error):
        return None
    same = [facts.get(key) for key in ("version", "name", "size")] == [INDEX_VERSION, name_of(path), size]
    if not same or facts["probe"] != _probe(path, facts["probed"], size):
        return None
    return Shard(path, facts["samples"], facts["layout"], sidecar)


def _keep(facts: dict[str, Any], index: ShardIndex, places: list[str]) -> str | None:
    """Write the index to the first place that takes it."""
    arrays = {name: value for name, value in vars(index).items() if isinstance(value, np.ndarray)}
    # One key: several would be written in an order of their own each time.
    data = save(arrays, metadata={"lcl_ds": json.dumps({**facts, "suffixes": index.suffixes})})
    for place in places:
        try:
            Path(place).parent.mkdir(parents=True, exist_ok=True)
            write_whole(Path(place), data)
        except OSError:  # a folder for reading only: the next place, or memory
            continue
        return place
    return None


def _facts(header: bytes) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(json.loads(header)["__metadata__"]["lcl_ds"])
    except (KeyError, TypeError) as error:
        raise ValueError("not an index") from error
    return facts


def _parse_index(data: bytes) -> tuple[dict[str, Any], ShardIndex]:
    try:
        (length,) = struct.unpack("<Q", data[:8])
        facts = _facts(data[8 : 8 + length])
        return facts, ShardIndex(tuple(facts.pop("suffixes")), **load(data))
    except (SafetensorError, struct.error, TypeError) as error:
        raise ValueError("not an index") from error


def _probe(path: str, places: Sequence[int], size: int) -> str:
    """Hash of some headers and of the tar's end."""
    digest = hashlib.sha256()
    for place in places:
        digest.update(read_range(path, place, place + BLOCK))
    digest.update(read_range(path, max(0, size - 2 * BLOCK), size))
    return digest.hexdigest()[:32]


class _Builder:
    """Collects the members of a tar into an index and its fingerprint."""

    def __init__(self, name: str):
        self.digest = hashlib.sha256(name.encode())
        self.numbers: dict[str, int] = {}
        self.first, self.key_end = array("I"), array("I")
        self.suffix, self.offset, self.size = array("H"), array("q"), array("I")
        self.keys = bytearray()
        self.open: Sample | None = None

    def add(self, key: str, suffix: str, offset: int, size: int) -> None:
        """Raises: ValueError when the sample has a member of that suffix already."""
        if self.open is None or self.open.key != key:
            self.close()
            self.open = Sample(key, {})
            self.first.append(len(self.offset))
            self.keys += key.encode("utf-8", "surrogateescape")
            self.key_end.append(len(self.keys))
        if suffix in self.open.parts:
            raise ValueError(f"sample {key!r} has two members with the suffix {suffix!r}")
        self.open.parts[suffix] = offset, size
        self.suffix.append(self.numbers.setdefault(suffix, len(self.numbers)))
        self.offset.append(offset)
        self.size.append(size)

    def close(self) -> None:
        if self.open is not None:
            self.digest.update(
                repr((self.open.key, sorted(self.open.parts.items()))).encode("utf-8", "surrogateescape")
            )

    def index(self) -> ShardIndex:
        self.close()
        self.first.append(len(self.offset))
        return ShardIndex(
            suffixes=tuple(self.numbers),
            first=np.array(self.first),
            suffix=np.array(self.suffix),
            offset=np.array(self.offset),
            size=np.array(self.size),
            keys=np.frombuffer(bytes(self.keys), dtype=np.uint8),
            key_end=np.array(self.key_end),
        )


def _scan(path: str, size: int) -> tuple[dict[str, Any], ShardIndex]:
    builder = _Builder(name_of(path))
    with open_file(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            placed = member_place(member, size)
            if placed is not None:
                builder.add(*placed, member.offset_data, member.size)
        file.seek(tar.offset)
        if file.read(BLOCK) != bytes(BLOCK):
            raise ValueError("it ends without the tar end mark, so its last sample may be incomplete")
    index = builder.index()
    count = len(index.offset)
    probed = [int(index.offset[m]) - BLOCK for m in sorted({0, count // 2, count - 1})] if count else []
    facts = {
        "version": INDEX_VERSION,
        "name": name_of(path),
        "size": size,
        "samples": len(index.key_end),
        "layout": builder.digest.hexdigest()[:16],
        "probed": probed,
        "probe": _probe(path, probed, size),
    }
    return facts, index


def member_place(member: tarfile.TarInfo, file_size: int) -> tuple[str, str] | None:
    """Key and suffix of a tar's member; None for what is no file.

    Raises:
        ValueError: sparse, too large, or cut off.
    """
    if not member.isreg():
        return None
    if member.sparse is not None or member.size > MAX_MEMBER_BYTES:
        raise ValueError(f"member {member.name!r} is sparse or larger than {MAX_MEMBER_BYTES} bytes")
    if member.offset_data + member.size > file_size:
        raise ValueError(f"it is cut inside member {member.name!r}")
    folder, _, name = member.name.rpartition("/")
    stem, _, suffix = name.partition(".")
    if not stem:
        return None
    return (f"{folder}/{stem}" if folder else stem), suffix.lower()
