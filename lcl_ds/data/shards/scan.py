"""Read all headers of a WebDataset tar once, and collect its members into samples: the index of a shard.

Members of a sample are neighbours that share the name up to the first dot (the WebDataset convention). A sample whose
members were torn apart, or that has two members of one suffix, stays in the index, with the reason why it cannot be
used.
"""

import hashlib
from array import array
from dataclasses import dataclass

import numpy as np

from lcl_ds.data.shards.index import ShardIndex
from lcl_ds.data.shards.storage import name_of, open_file, size_of
from lcl_ds.data.shards.tar_members import (
    CUT,
    MAX_MEMBER_BYTES,
    PROBLEMS,
    SCATTERED,
    TWICE,
    BrokenTarError,
    Member,
    members_of,
)


@dataclass(frozen=True)
class Scan:
    """What the headers of a whole tar say: the result of :func:`scan_shard`."""

    index: ShardIndex
    layout: str
    """Hash of name and layout."""
    broken: BrokenTarError | None
    """Why the tar could not be read to its end; its samples up to there are in the index."""
    tars: int
    """How many are joined end to end."""


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
        ranges = sorted((suffix, (member.offset, member.size)) for suffix, member in run.members.items())
        shown = (run.key, ranges, run.problem) if run.problem else (run.key, ranges)
        self.digest.update(repr(shown).encode("utf-8", "surrogateescape"))
        if not self._belongs_to_an_earlier_one(run):
            self._append(run)

    def _belongs_to_an_earlier_one(self, run: _Run) -> bool:
        """Say whether a key that occurred before is the same sample in pieces; then that sample cannot be used.

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
