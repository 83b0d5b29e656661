"""Say where every sample and member of a shard lies: the index that is kept of a tar, as it is used in memory.

:class:`ShardIndex` holds a whole shard in a few arrays, so that the indices of many shards fit in memory;
:class:`Sample` is what it says of one sample. ``scan.py`` makes an index, ``index_file.py`` keeps it beside the shard.
"""

from dataclasses import dataclass

import numpy as np

from lcl_ds.data.shards.tar_members import PROBLEMS


@dataclass(frozen=True)
class Sample:
    """One sample of a shard: where its members lie."""

    key: str
    members: dict[str, tuple[int, int]]
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
        """Say where the members of one sample lie."""
        start = int(self.key_end[number - 1]) if number else 0
        key = self.keys[start : self.key_end[number]].tobytes().decode("utf-8", "surrogateescape")
        own = slice(*self.first[number : number + 2].tolist())
        suffixes = [self.suffixes[s] for s in self.suffix[own].tolist()]
        ranges = zip(self.offset[own].tolist(), self.size[own].tolist(), strict=True)
        return Sample(key, dict(zip(suffixes, ranges, strict=True)), PROBLEMS[self.problem[number]])

    def member(self, number: int, suffix: str) -> tuple[int, int, int]:
        """Return offset, size and header hash of one member.

        Raises:
            KeyError: the sample has no such member.
        """
        for member in range(*self.first[number : number + 2].tolist()):
            if self.suffixes[self.suffix[member]] == suffix:
                return int(self.offset[member]), int(self.size[member]), int(self.header[member])
        raise KeyError(suffix)
