"""Open a shard: a tar with its index, which is loaded where one is kept and made where there is none.

A shard is a local file, a URL, or the output of a command, which is kept as a file. Opening reads little; the index
itself is loaded when a sample is asked for, and made again where the kept one is gone or damaged.
"""

import logging
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from lcl_ds.data.shards.index import ShardIndex
from lcl_ds.data.shards.index_file import keep_index, load_index, read_facts, remove_index, sidecars_of
from lcl_ds.data.shards.scan import scan_shard
from lcl_ds.data.shards.storage import DEFAULT_CACHE, error_text, is_command, materialise, size_of
from lcl_ds.data.shards.tar_members import BrokenTarError
from lcl_ds.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """One indexed tar."""

    path: str
    sample_count: int
    layout: str
    """Hash of name and layout."""
    sidecars: tuple[str, ...] = ()
    """Where the index may lie; it is read when it is needed."""
    index: ShardIndex | None = field(default=None, repr=False)
    """The index itself, where it cannot be kept in a file."""
    kept_in: str | None = None
    """Which of the sidecars held the index when the shard was opened; None: none of them, or another process knows."""
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
            index = load_index(sidecar, self.layout)
            if index is not None:
                return index
        scan = scan_shard(self.path)
        if scan.broken or scan.layout != self.layout:
            raise self.refuse_changed()
        kept = keep_index(scan, self.path, self.sidecars)
        logger.warning(
            "shard %s: its index was gone or damaged and was made again (%s)", self.path, kept or "in memory"
        )
        return scan.index

    def refuse_changed(self) -> UserError:
        """Remove the index of a shard that changed, so that the next start makes it again; returns the error."""
        for sidecar in self.sidecars:
            remove_index(sidecar)
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
        problem = f"shard {shard.path}: cannot be read: {broken.sentence}"
        if broken.is_tar:
            problem += "; copy it again, or keep its whole samples with python -m lcl_ds.data build"
        super().__init__(problem)


def index_shard(path: str | Path, cache: Path = DEFAULT_CACHE, rescan: bool = False) -> Shard:
    """Open a shard with its index, which is found beside it or in the cache, or made by reading the tar's headers.

    A kept index is believed where it agrees with the tar; every later read still looks at the member's own header.

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
    sidecars = sidecars_of(path, cache)
    try:
        size = size_of(path)
        for sidecar in () if rescan else sidecars:
            facts = read_facts(path, size, sidecar)
            if facts is not None:
                return Shard(path, facts["samples"], facts["layout"], sidecars, kept_in=sidecar)
        scan = scan_shard(path)
        count = len(scan.index.key_end)
        if scan.broken:
            raise BrokenShardError(Shard(path, count, scan.layout, index=scan.index), scan.broken)
        if count == 0:
            raise EmptyShardError(f"shard {path}: it holds no samples")
        if scan.tars > 1:
            logger.warning("shard %s: it is %d tars joined end to end, which are all read", path, scan.tars)
        kept = keep_index(scan, path, sidecars)
    except IsADirectoryError:
        raise UserError(f"shard {path}: it is a folder; name its shards, as in '{path.rstrip('/')}/*.tar'") from None
    except OSError as error:
        raise UserError(f"shard {path}: cannot be read: {error_text(error)}") from error
    return Shard(path, count, scan.layout, sidecars, None if kept else scan.index, kept)


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
    return replace(shard, copied=None if is_new else made)


def _check_tar(path: str) -> None:
    """Check that a file is a whole tar. Raises: ValueError when it is not."""
    broken = scan_shard(path).broken
    if broken:
        raise broken
