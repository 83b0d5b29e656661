"""Index a WebDataset tar once, and keep beside the shard where its members lie.

Starting on many thousand shards then reads a few small pieces of each. Nothing in a shard is ever unpickled or used as
a path. A kept index is believed only where its hashes agree; otherwise it is made again.
"""

import errno
import hashlib
import json
import logging
import os
import struct
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from lcl_ds.data.shards.storage import (
    DEFAULT_CACHE,
    INDEX_SUFFIX,
    cached_name,
    error_text,
    is_command,
    is_remote,
    materialise,
    name_of,
    open_file,
    read_range,
    size_of,
)
from lcl_ds.data.shards.tar_members import (
    BLOCK,
    CUT,
    MAX_MEMBER_BYTES,
    PROBLEMS,
    SCATTERED,
    TWICE,
    BrokenTarError,
    Member,
    member_place,
    members_of,
)
from lcl_ds.errors import UserError
from lcl_ds.files import write_whole

__all__ = ["BLOCK", "MAX_MEMBER_BYTES", "Sample", "Shard", "ShardIndex", "index_shard", "member_place", "scan_shard"]

logger = logging.getLogger(__name__)

INDEX_VERSION = 2
MARK = "lcl_ds"
"""The entry of an index file's header that makes it one of ours."""
MAX_HEADER_BYTES = 1 << 20
OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)


@dataclass(frozen=True)
class Sample:
    """One sample of a shard: where its members lie."""

    key: str
    parts: dict[str, tuple[int, int]]
    """Suffix (``json``, ``000.jpg``) to (offset, size) in bytes."""
    problem: str = ""
    """Why it cannot be used, one of ``PROBLEMS``; empty: it can be."""


@dataclass(frozen=True)
class ShardIndex:
    """Offsets of one shard with N samples and M members."""

    suffixes: tuple[str, ...]
    """Every suffix that occurs, once."""
    first: np.ndarray
    """uint32 [N + 1], each sample's first member; the last entry is M."""
    suffix: np.ndarray
    """uint32 [M], number of the suffix."""
    offset: np.ndarray
    """int64 [M], bytes."""
    size: np.ndarray
    """uint32 [M], bytes."""
    header: np.ndarray
    """uint32 [M], hash of name and size in the member's own header."""
    keys: np.ndarray
    """uint8, all keys in UTF-8, one after the other."""
    key_end: np.ndarray
    """uint32 [N], where each key ends."""
    problem: np.ndarray
    """uint8 [N], number in ``PROBLEMS``; 0: the sample can be used."""

    def sample(self, number: int) -> Sample:
        start = int(self.key_end[number - 1]) if number else 0
        key = self.keys[start : self.key_end[number]].tobytes().decode("utf-8", "surrogateescape")
        members = slice(*self.first[number : number + 2].tolist())
        places = zip(self.offset[members].tolist(), self.size[members].tolist(), strict=True)
        parts = dict(zip([self.suffixes[s] for s in self.suffix[members].tolist()], places, strict=True))
        return Sample(key, parts, PROBLEMS[self.problem[number]])

    def member(self, number: int, suffix: str) -> tuple[int, int, int]:
        """Return offset, size and header hash of one member.

        Raises:
            KeyError: the sample has no such member.
        """
        for member in range(*self.first[number : number + 2].tolist()):
            if self.suffixes[self.suffix[member]] == suffix:
                return int(self.offset[member]), int(self.size[member]), int(self.header[member])
        raise KeyError(suffix)


@dataclass(frozen=True)
class Scan:
    """What the headers of a whole tar say."""

    index: ShardIndex
    layout: str
    """Hash of name and layout."""
    broken: BrokenTarError | None
    """Why the tar could not be read to its end; its samples up to there are in the index."""
    tars: int
    """How many are joined end to end."""


@dataclass(frozen=True)
class Shard:
    """One indexed tar."""

    path: str
    sample_count: int
    layout: str
    """Hash of name and layout."""
    sidecars: tuple[str, ...] = ()
    """Where the index may lie, read when it is needed ..."""
    index: ShardIndex | None = field(default=None, repr=False)
    """... or the index itself, where there is no place to keep it."""
    copied: str | None = None
    """When the output of a command was kept as this file, for the log; None: it is no such copy."""

    def fingerprint(self) -> str:
        """Return the hash of name and layout: it differs when samples were added, removed, renamed or resized."""
        return self.layout

    def load_index(self) -> ShardIndex:
        """Load the index, or make it again where the kept one is gone or damaged.

        Raises:
            OSError: neither the index nor the shard can be read.
            UserError: the shard is no longer the one that was indexed.
        """
        if self.index is not None:
            return self.index
        for sidecar in self.sidecars:
            index = _load(sidecar, self.layout)
            if index is not None:
                return index
        scan = scan_shard(self.path)
        if scan.broken or scan.layout != self.layout:
            raise self.changed()
        kept = _keep(scan, self.path, self.sidecars)
        logger.warning(
            "shard %s: its index was gone or damaged and was made again (%s)", self.path, kept or "in memory"
        )
        return scan.index

    def changed(self) -> UserError:
        """Return the error for a shard that changed, and remove its index, so that the next start makes it again."""
        for sidecar in self.sidecars:
            _remove(sidecar)
        return UserError(
            f"shard {self.path}: it changed while it was in use or since it was indexed; restore it and resume, or "
            "start a new run"
        )


class EmptyShardError(UserError):
    """A tar without samples."""


class BrokenShardError(UserError):
    """A tar that cannot be read to its end; ``shard`` has the samples up to there."""

    def __init__(self, shard: Shard, broken: BrokenTarError):
        self.shard, self.broken = shard, broken
        rescue = "copy it again, or keep its whole samples with python -m lcl_ds.data build" if broken.is_tar else ""
        super().__init__(f"shard {shard.path}: cannot be read: {broken.sentence}" + f"; {rescue}" * bool(rescue))


def index_shard(path: str | Path, cache: Path = DEFAULT_CACHE, rescan: bool = False) -> Shard:
    """Open a shard with its index, which is found beside it or in the cache, or made by reading the tar's headers.

    Members of a sample are neighbours that share the name up to the first dot (the WebDataset convention). A kept index
    counts as that of the tar when its hash, name, size, some headers and the end mark agree; every read then looks at
    the member's own header.

    Args:
        path: a local path, a URL, or ``pipe:COMMAND``, whose output is kept in ``cache``.
        cache: folder for what cannot be kept beside the shard.
        rescan: read all headers even if there is an index; run a command again even if its output was kept.

    Raises:
        EmptyShardError: it holds no samples.
        BrokenShardError: it is not a complete, plain tar.
        UserError: it cannot be read; names the file and what is wrong.
    """
    path = str(path)
    if is_command(path):
        return _index_output(path, cache, rescan)
    sidecars = _sidecars(path, cache)
    try:
        size = size_of(path)
        for sidecar in () if rescan else sidecars:
            found = _kept(path, size, sidecar, sidecars)
            if found is not None:
                return found
        scan = scan_shard(path)
        count = len(scan.index.key_end)
        if scan.broken:
            raise BrokenShardError(Shard(path, count, scan.layout, index=scan.index), scan.broken)
        if count == 0:
            raise EmptyShardError(f"shard {path}: it holds no samples")
        if scan.tars > 1:
            logger.warning("shard %s: it is %d tars joined end to end, which are all read", path, scan.tars)
        kept = _keep(scan, path, sidecars)
    except OSError as error:
        raise UserError(f"shard {path}: cannot be read: {error_text(error)}") from error
    return Shard(path, count, scan.layout, sidecars, None if kept else scan.index)


def _index_output(command: str, cache: Path, again: bool) -> Shard:
    """Open the shard that a command writes; a kept copy that fails is made again."""
    copy, is_new = materialise(command, cache, _check_tar, again)
    try:
        shard = index_shard(copy, cache, rescan=is_new)
    except EmptyShardError:
        raise
    except UserError:
        if is_new:
            raise
        logger.warning("shard %s: the copy of its output is damaged, so the command is run again", command)
        copy, is_new = materialise(command, cache, _check_tar, again=True)
        shard = index_shard(copy, cache)
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(os.stat(copy).st_mtime))
    return Shard(shard.path, shard.sample_count, shard.layout, shard.sidecars, shard.index, None if is_new else made)


def _check_tar(path: str) -> None:
    """Check that a file is a whole tar. Raises: ValueError when it is not."""
    broken = scan_shard(path).broken
    if broken:
        raise broken


def _sidecars(path: str, cache: Path) -> tuple[str, ...]:
    """List where the index of a shard may lie, best first."""
    beside = path + INDEX_SUFFIX
    try:
        folder = cache.expanduser()
    except RuntimeError:  # there is no home folder
        return (beside,)
    return beside, str(folder / cached_name(path if is_remote(path) else os.path.abspath(path), INDEX_SUFFIX))


def _kept(path: str, size: int, sidecar: str, sidecars: tuple[str, ...]) -> Shard | None:
    """Open the shard by its kept index; None when there is none, it is damaged or it belongs to another tar."""
    try:
        (length,) = struct.unpack("<Q", read_range(sidecar, 0, 8))
        facts = _facts(read_range(sidecar, 8, 8 + min(length, MAX_HEADER_BYTES)))
    except (ValueError, struct.error, UserError):  # the last: a server that sends a page for what it does not have
        return None
    except OSError as error:
        if error.errno in OUT_OF_DESCRIPTORS:
            raise
        return None
    if [facts["name"], facts["size"]] != [name_of(path), size]:
        return None
    if facts["probe"] != _probe(path, facts["probed"], size):
        return None
    return Shard(path, facts["samples"], facts["layout"], sidecars)


def _load(sidecar: str, layout: str) -> ShardIndex | None:
    """Read a kept index; None when it is gone, damaged or belongs to another tar."""
    try:
        data = read_range(sidecar, 0, size_of(sidecar))
        (length,) = struct.unpack("<Q", data[:8])
        facts = _facts(data[8 : 8 + length])
        arrays = load(data)
        if facts["layout"] != layout or facts["arrays"] != _hash_of_arrays(arrays):
            return None
        suffixes = json.loads(arrays.pop("suffixes").tobytes())
        return ShardIndex(tuple(suffixes), **arrays)
    except (ValueError, SafetensorError, struct.error, KeyError, TypeError, UserError):
        return None
    except OSError as error:
        if error.errno in OUT_OF_DESCRIPTORS:
            raise
        return None


def _keep(scan: Scan, path: str, sidecars: Sequence[str]) -> str | None:
    """Write the index to the first place that takes it, which is returned; another program's file is left alone."""
    arrays = {name: value for name, value in vars(scan.index).items() if isinstance(value, np.ndarray)}
    arrays["suffixes"] = np.frombuffer(json.dumps(scan.index.suffixes).encode(), dtype=np.uint8)
    size, probed = size_of(path), _places_to_probe(scan.index)
    facts = {
        "version": INDEX_VERSION,
        "name": name_of(path),
        "size": size,
        "samples": len(scan.index.key_end),
        "layout": scan.layout,
        "probed": probed,
        "probe": _probe(path, probed, size),
        "arrays": _hash_of_arrays(arrays),
    }
    # One key: several would be written in an order of their own each time.
    data = save(arrays, metadata={MARK: json.dumps({"facts": facts, "hash": _hash_of_facts(facts)})})
    for place in sidecars:
        if is_remote(place):
            continue
        try:
            if not _may_replace(place):
                logger.warning("%s: it is not an index of ours and stays as it is; the index is kept elsewhere", place)
                continue
            Path(place).parent.mkdir(parents=True, exist_ok=True)
            write_whole(Path(place), data, sync=False)  # many thousands, each with its hash
        except OSError as error:  # a folder for reading only, a full disk: the next place, or memory
            logger.debug("%s: the index cannot be kept there: %s", place, error_text(error))
            continue
        return place
    return None


def _remove(place: str) -> None:
    try:
        if not is_remote(place) and _may_replace(place):
            Path(place).unlink(missing_ok=True)
    except OSError as error:
        logger.debug("%s: the index cannot be removed: %s", place, error_text(error))


def _may_replace(place: str) -> bool:
    """Whether there is nothing, an index of any version, or what is left of one."""
    if not os.path.lexists(place):
        return True
    if not os.path.isfile(place):
        return False
    head = read_range(place, 0, 4096)
    return f'"{MARK}"'.encode() in head or not head.strip(b"\0")


def _facts(header: bytes) -> dict[str, Any]:
    """Read what an index's header says of its tar. Raises: ValueError when it is not ours or is damaged."""
    try:
        entry = json.loads(json.loads(header)["__metadata__"][MARK])
        facts: dict[str, Any] = entry["facts"]
        if entry["hash"] != _hash_of_facts(facts) or facts["version"] != INDEX_VERSION:
            raise ValueError("a damaged index, or one of another version")
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError("not an index") from error
    return facts


def _hash_of_facts(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _hash_of_arrays(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape};".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()[:32]


def _places_to_probe(index: ShardIndex) -> list[int]:
    """Where the first, the middle and the last header lie, and the block behind the last member."""
    last = len(index.offset) - 1
    behind = int(index.offset[last]) + -(-int(index.size[last]) // BLOCK) * BLOCK
    return [*(int(index.offset[member]) - BLOCK for member in sorted({0, last // 2, last})), behind]


def _probe(path: str, places: Sequence[int], size: int) -> str:
    """Hash of some headers and of the tar's end."""
    digest = hashlib.sha256()
    for place in places:
        digest.update(read_range(path, place, place + BLOCK))
    digest.update(read_range(path, max(0, size - 2 * BLOCK), size))
    return digest.hexdigest()[:32]


def scan_shard(path: str) -> Scan:
    """Read all headers of a tar, or as many as can be read. Raises: OSError."""
    builder, broken, tars = _Builder(name_of(path)), None, 0
    with open_file(path) as file:
        try:
            for member in members_of(file, size_of(path)):
                if member is None:  # an end mark: what comes next is another tar
                    tars += 1
                    builder.begin_tar()
                else:
                    builder.add(member)
        except BrokenTarError as error:
            broken = error
            builder.break_off()
    return Scan(builder.index(), builder.digest.hexdigest()[:16], broken, tars)


class _Run:
    """Neighbouring members of one key."""

    def __init__(self, key: str):
        self.key, self.problem = key, ""
        self.members: dict[str, Member] = {}

    def add(self, member: Member) -> None:
        if member.suffix in self.members:
            self.problem = self.problem or TWICE
        else:
            self.members[member.suffix] = member
        self.problem = self.problem or member.problem


class _Builder:
    """Collects the members of a tar into an index and its fingerprint."""

    def __init__(self, name: str):
        self.digest = hashlib.sha256(name.encode("utf-8", "surrogateescape"))
        self.numbers: dict[str, int] = {}
        self.first, self.key_end = array("I"), array("I")
        self.suffix, self.size, self.header = array("I"), array("I"), array("I")
        self.offset, self.problem = array("q"), array("B")
        self.keys = bytearray()
        self.open: _Run | None = None
        self.seen: dict[str, tuple[int, frozenset[str]]] = {}
        """Number and suffixes of each key's sample in this tar."""

    def add(self, member: Member) -> None:
        if self.open is None or self.open.key != member.key:
            self.close()
            self.open = _Run(member.key)
        self.open.add(member)

    def begin_tar(self) -> None:
        """Begin a tar: samples do not reach from one tar into the next."""
        self.close()
        self.seen.clear()

    def break_off(self) -> None:
        """Mark the open sample: what it still lacks is not known."""
        if self.open is not None:
            self.open.problem = self.open.problem or CUT

    def close(self) -> None:
        """Make a sample of the open members, or join them to the one they were torn from."""
        run, self.open = self.open, None
        if run is None:
            return
        places = sorted((suffix, (member.offset, member.size)) for suffix, member in run.members.items())
        shown = (run.key, places, run.problem) if run.problem else (run.key, places)
        self.digest.update(repr(shown).encode("utf-8", "surrogateescape"))
        if not self._belongs_to_an_earlier_one(run):
            self._append(run)

    def _belongs_to_an_earlier_one(self, run: _Run) -> bool:
        """Whether a key that occurred before is the same sample in pieces; then that sample cannot be used.

        A key that comes again with the very same suffixes is another sample of that name.
        """
        suffixes = frozenset(run.members)
        number, earlier = self.seen.get(run.key, (None, frozenset[str]()))
        if number is None or (suffixes == earlier and not self.problem[number]):
            self.seen[run.key] = len(self.key_end), suffixes
            return False
        if not self.problem[number]:
            self.problem[number] = PROBLEMS.index(TWICE if suffixes & earlier else SCATTERED)
        return True

    def _append(self, run: _Run) -> None:
        self.first.append(len(self.offset))
        self.keys += run.key.encode("utf-8", "surrogateescape")
        self.key_end.append(len(self.keys))
        self.problem.append(PROBLEMS.index(run.problem))
        for suffix, member in run.members.items():
            self.suffix.append(self.numbers.setdefault(suffix, len(self.numbers)))
            self.offset.append(member.offset)
            self.size.append(min(member.size, MAX_MEMBER_BYTES))  # of one that is larger nothing is read
            self.header.append(member.header)

    def index(self) -> ShardIndex:
        self.close()
        self.first.append(len(self.offset))
        return ShardIndex(
            suffixes=tuple(self.numbers),
            first=np.array(self.first),
            suffix=np.array(self.suffix),
            offset=np.array(self.offset),
            size=np.array(self.size),
            header=np.array(self.header),
            keys=np.frombuffer(bytes(self.keys), dtype=np.uint8),
            key_end=np.array(self.key_end),
            problem=np.array(self.problem),
        )
