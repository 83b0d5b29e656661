"""WebDataset tars as random-access collections: samples by number instead of a stream.

A sample's parts are read by offset, so any sample costs the same and the position in the data is a number.
"""

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import IO, Any, overload

import numpy as np

from lcl_ds.data.shard_index import BLOCK, Sample, Shard, ShardIndex, index_shard
from lcl_ds.data.storage import expand_paths, is_remote, name_of, open_file, read_range
from lcl_ds.errors import UserError

__all__ = ["Sample", "Shard", "Source", "expand_paths", "index_shard"]

OPEN_SHARDS = 256
"""Shards whose index and descriptor a source keeps at hand."""


class Blocks(Sequence[tuple[int, int]]):
    """(first, end) sample of every block of neighbours; blocks do not cross shards.

    Args:
        counts: samples of each shard.
        size: samples of a block; the last one of a shard may have fewer.
    """

    def __init__(self, counts: np.ndarray, size: int):
        self.size = size
        self.sample_end = np.cumsum(counts)
        self.block_end = np.cumsum(-(-counts // size))

    def __len__(self) -> int:
        return int(self.block_end[-1]) if len(self.block_end) else 0

    @overload
    def __getitem__(self, number: int) -> tuple[int, int]: ...
    @overload
    def __getitem__(self, number: slice) -> list[tuple[int, int]]: ...
    def __getitem__(self, number: int | slice) -> tuple[int, int] | list[tuple[int, int]]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(number)
        shard = int(np.searchsorted(self.block_end, number, side="right"))
        blocks_before, samples_before = (
            int(ends[shard - 1]) if shard else 0 for ends in (self.block_end, self.sample_end)
        )
        first = samples_before + (number - blocks_before) * self.size
        return first, min(first + self.size, int(self.sample_end[shard]))


class Source:
    """All samples of some shards, by number, in blocks of neighbours.

    Args:
        name: in logs, keys and fingerprints.
        shards: indexed tars.
        weight: share of draws, constant or by the step from which on it holds.
        block_samples: neighbours that are shuffled together.
    """

    def __init__(
        self, name: str, shards: Sequence[Shard], weight: float | Mapping[int, float] = 1.0, block_samples: int = 16
    ):
        self.name = name
        self.weight = weight
        self.shards = list(shards)
        self.blocks = Blocks(np.array([shard.sample_count for shard in self.shards], dtype=np.int64), block_samples)
        self._ends = self.blocks.sample_end
        self._open: OrderedDict[int, tuple[IO[bytes] | None, ShardIndex]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def sample(self, number: int) -> Sample:
        shard, place = self._locate(number)
        return self._opened(shard)[1].sample(place)

    def where(self, number: int) -> str:
        """``shard: key`` of a sample, for messages."""
        return f"{self.shards[self._locate(number)[0]].path}: {self.sample(number).key}"

    def read(self, number: int, suffix: str) -> bytes:
        """One member's bytes.

        Raises:
            KeyError: the sample has no such member.
            OSError: reading failed.
            UserError: the shard is no longer the one that was indexed.
        """
        shard, place = self._locate(number)
        file, index = self._opened(shard)
        offset, size = index.parts(place)[suffix]
        # Loader processes share the descriptor they were forked with; pread moves no position.
        start, end = offset - BLOCK, offset + size
        data = os.pread(file.fileno(), end - start, start) if file else read_range(self.shards[shard].path, start, end)
        if _size_in_header(data) != size:
            raise UserError(f"shard {self.shards[shard].path}: it changed while it was in use; restore it and resume")
        if len(data) != end - start:
            raise OSError(f"{self.where(number)}: the shard became shorter while it was being read")
        return data[BLOCK:]

    def fingerprint(self) -> dict[str, str]:
        """Shard name to layout hash."""
        return {f"{self.name}/{name_of(shard.path)}": shard.fingerprint() for shard in self.shards}

    def _locate(self, number: int) -> tuple[int, int]:
        """Shard of a sample and its place there."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number - (int(self._ends[shard - 1]) if shard else 0)

    def _opened(self, number: int) -> tuple[IO[bytes] | None, ShardIndex]:
        """Descriptor (None: a remote shard) and index of a shard; the least used ones are put away."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard = self.shards[number]
        opened = None if is_remote(shard.path) else open_file(shard.path), shard.load_index()
        self._open[number] = opened
        if len(self._open) > OPEN_SHARDS:
            file, _ = self._open.popitem(last=False)[1]
            if file:
                file.close()
        return opened


def _size_in_header(block: bytes) -> int | None:
    """The size field of a member's tar header."""
    try:
        return int(block[124:136].rstrip(b" \0"), 8)
    except ValueError:
        return None
