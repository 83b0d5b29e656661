"""Keep the index of a shard as a file beside it, and believe such a file only where its hashes agree.

Starting on many thousand shards then reads a few small pieces of each. Nothing in an index is ever unpickled or used as
a path. It belongs to a tar when name, size, some headers and the end mark agree; a file that is damaged, of another
version or of another tar counts as none, and a file that is not ours is never replaced.
"""

import hashlib
import json
import logging
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from lcl_ds.data.shards.index import ShardIndex
from lcl_ds.data.shards.scan import Scan
from lcl_ds.data.shards.storage import (
    INDEX_SUFFIX,
    OUT_OF_DESCRIPTORS,
    cached_name,
    error_text,
    is_remote,
    name_of,
    read_range,
    read_ranges,
    size_of,
)
from lcl_ds.data.shards.tar_members import BLOCK
from lcl_ds.errors import UserError
from lcl_ds.files import write_whole

logger = logging.getLogger(__name__)

INDEX_VERSION = 2
MARK = "lcl_ds"
"""The entry of an index file's header that makes it one of ours."""
MAX_HEADER_BYTES = 1 << 20
HEAD_BYTES = 1 << 12
"""What is read of an index at first: the header of an ordinary one fits in."""


def sidecars_of(path: str, cache: Path) -> tuple[str, ...]:
    """List where the index of a shard may lie, best first."""
    beside = path + INDEX_SUFFIX
    try:
        folder = cache.expanduser()
    except RuntimeError:  # there is no home folder
        return (beside,)
    return beside, str(folder / cached_name(path if is_remote(path) else os.path.abspath(path), INDEX_SUFFIX))


def read_facts(path: str, size: int, sidecar: str) -> dict[str, Any] | None:
    """Read what a kept index says of its tar; None when it is gone, damaged or belongs to another tar.

    Args:
        path: the tar.
        size: of the tar, in bytes.
        sidecar: the file with the index.

    Returns:
        Among others ``samples``, their number, and ``layout``, the hash of the tar's name and layout.
    """
    try:
        head = read_range(sidecar, 0, HEAD_BYTES)
        (length,) = struct.unpack("<Q", head[:8])
        if 8 + length > len(head):
            head = read_range(sidecar, 0, 8 + min(length, MAX_HEADER_BYTES))
        facts = _facts(head[8 : 8 + length])
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
    return facts


def load_index(sidecar: str, layout: str) -> ShardIndex | None:
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


def keep_index(scan: Scan, path: str, sidecars: Sequence[str]) -> str | None:
    """Write the index to the first file that can be written, and return it; another program's file is left alone."""
    arrays = {name: value for name, value in vars(scan.index).items() if isinstance(value, np.ndarray)}
    arrays["suffixes"] = np.frombuffer(json.dumps(scan.index.suffixes).encode(), dtype=np.uint8)
    size, probed = size_of(path), _positions_to_probe(scan.index)
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
    for sidecar in sidecars:
        if is_remote(sidecar):
            continue
        try:
            if not _may_replace(sidecar):
                logger.warning(
                    "%s: it is not an index of ours and stays as it is; the index is kept elsewhere", sidecar
                )
                continue
            Path(sidecar).parent.mkdir(parents=True, exist_ok=True)
            write_whole(Path(sidecar), data, sync=False)  # many thousands, each with its hash
        except OSError as error:  # a folder for reading only, a full disk: the next sidecar, or memory
            logger.debug("%s: the index cannot be kept there: %s", sidecar, error_text(error))
            continue
        return sidecar
    return None


def remove_index(sidecar: str) -> None:
    """Remove a kept index, as far as that is possible; another program's file is left alone."""
    try:
        if not is_remote(sidecar) and _may_replace(sidecar):
            Path(sidecar).unlink(missing_ok=True)
    except OSError as error:
        logger.debug("%s: the index cannot be removed: %s", sidecar, error_text(error))


def _may_replace(sidecar: str) -> bool:
    """Say whether there is nothing, an index of any version, or what is left of one."""
    if not os.path.lexists(sidecar):
        return True
    if not os.path.isfile(sidecar):
        return False
    head = read_range(sidecar, 0, 4096)
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


def _positions_to_probe(index: ShardIndex) -> list[int]:
    """Say where the first, the middle and the last header lie, and the block behind the last member."""
    last = len(index.offset) - 1
    behind = int(index.offset[last]) + -(-int(index.size[last]) // BLOCK) * BLOCK
    return [*(int(index.offset[member]) - BLOCK for member in sorted({0, last // 2, last})), behind]


def _probe(path: str, positions: Sequence[int], size: int) -> str:
    """Hash some headers and the tar's end."""
    ranges = [(position, position + BLOCK) for position in positions]
    digest = hashlib.sha256()
    for piece in read_ranges(path, [*ranges, (max(0, size - 2 * BLOCK), size)]):
        digest.update(piece)
    return digest.hexdigest()[:32]
