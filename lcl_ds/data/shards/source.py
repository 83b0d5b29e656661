"""Read WebDataset tars as random-access collections: samples by number instead of a stream.

A sample's members are read by offset, so any sample costs the same and the position in the data is a number.
"""

import os
import resource
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import IO, Any, TypeVar, overload

import numpy as np

from lcl_ds.data.shards.index import Sample, ShardIndex
from lcl_ds.data.shards.shard import Shard
from lcl_ds.data.shards.storage import OUT_OF_DESCRIPTORS, error_text, is_remote, open_file, read_range
from lcl_ds.data.shards.tar_members import BLOCK, header_hash
from lcl_ds.errors import UserError
from lcl_ds.files import printable

OPEN_SHARDS = 256
"""Most shards whose index and descriptor a process keeps open."""

T = TypeVar("T")


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


@dataclass
class Opened:
    """What is kept of a shard that is being read: its index, and its descriptor once a member was read."""

    index: ShardIndex
    file: IO[bytes] | None = None

    def descriptor(self, path: str) -> int:
        """Open the shard if it is not open, and return its descriptor. Raises: OSError."""
        if self.file is None:
            self.file = AT_HAND.with_descriptors(lambda: open_file(path), path)
        return self.file.fileno()

    def close(self) -> bool:
        """Close the descriptor; False where there was none."""
        if self.file is None:
            return False
        self.file.close()
        self.file = None
        return True


class AtHand:
    """Keeps the indices and descriptors of all sources of this process open; the least recently used are closed."""

    def __init__(self) -> None:
        self._opened: OrderedDict[tuple[int, int], Opened] = OrderedDict()
        """By source and number of the shard."""

    def get(self, source: "Source", number: int) -> Opened | None:
        opened = self.look(source, number)
        if opened is not None:
            self._opened.move_to_end((id(source), number))
        return opened

    def look(self, source: "Source", number: int) -> Opened | None:
        """Return what is open, for another thread: nothing changes."""
        return self._opened.get((id(source), number))

    def put(self, source: "Source", number: int, opened: Opened) -> None:
        self._opened[id(source), number] = opened
        self._keep(most_open_shards())

    def with_descriptors(self, action: Callable[[], T], path: str) -> T:
        """Return the action's result; where no descriptor is free, open shards are closed for it.

        Raises:
            UserError: there are none left to close.
        """
        while True:
            try:
                return action()
            except OSError as error:
                if error.errno not in OUT_OF_DESCRIPTORS:
                    raise
                if not any(opened.file for opened in list(self._opened.values())):
                    raise UserError(f"shard {path}: cannot be opened: {error_text(error)}") from error
                self._keep(len(self._opened) // 2)

    def put_away_with(self, source: "Source") -> None:
        """Close a source's shards when the source is deleted."""
        weakref.finalize(source, self._put_away, id(source)).atexit = False

    def _put_away(self, source: int) -> None:
        for key in list(self._opened):  # a copy: sources may go at any time, in any thread
            if key[0] == source:
                self._opened.pop(key).close()

    def _keep(self, count: int) -> None:
        while len(self._opened) > count:
            self._opened.popitem(last=False)[1].close()


AT_HAND = AtHand()


def most_open_shards() -> int:
    """Say how many shards this process keeps open: a quarter of the descriptors it may have, others need some too."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return OPEN_SHARDS if limit == resource.RLIM_INFINITY else max(1, min(OPEN_SHARDS, limit // 4))


class Source:
    """All samples of some shards, by number.

    Args:
        name: in logs, keys and fingerprints.
        shards: indexed tars.
        weight: of its draws relative to the other sources, constant or by the step from which on it holds.
    """

    def __init__(self, name: str, shards: Sequence[Shard], weight: float | Mapping[int, float] = 1.0):
        self.name = name
        self.weight = weight
        self.shards = list(shards)
        self._ends = np.cumsum(np.array([shard.sample_count for shard in self.shards], dtype=np.int64))
        AT_HAND.put_away_with(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        AT_HAND.put_away_with(self)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def blocks(self, size: int) -> Blocks:
        """Cut all samples into blocks of ``size`` neighbours."""
        return Blocks(np.diff(self._ends, prepend=0), size)

    def sample(self, number: int) -> Sample:
        """Say where a sample's members lie.

        Raises:
            OSError: neither the index nor the shard can be read.
            UserError: the shard is no longer the one that was indexed.
        """
        shard, number_in_shard = self._locate(number)
        return self._opened(shard).index.sample(number_in_shard)

    def shard_of(self, number: int) -> Shard:
        """Return the shard that holds a sample."""
        return self.shards[self._locate(number)[0]]

    def where(self, number: int, is_read: bool = True) -> str:
        """Name a sample in messages: ``shard: key``, or ``shard: sample 7`` where its key is out of reach.

        Args:
            is_read: False: only what is in memory, so that it never waits for a disk.
        """
        shard, number_in_shard = self._locate(number)
        path = printable(self.shards[shard].path)
        opened = AT_HAND.look(self, shard)
        if opened is None and is_read:
            try:
                opened = self._opened(shard)
            except (OSError, UserError):
                return f"{path}: sample {number_in_shard}"
        if opened is None:
            return f"{path}: sample {number_in_shard}"
        return f"{path}: {printable(opened.index.sample(number_in_shard).key)}"

    def read(self, number: int, suffix: str, most: int | None = None) -> bytes:
        """Read one member's bytes.

        Args:
            most: of them, from the first on.

        Raises:
            KeyError: the sample has no such member.
            OSError: reading failed.
            UserError: the shard is no longer the one that was indexed.
        """
        shard, number_in_shard = self._locate(number)
        offset, size, header = self._opened(shard).index.member(number_in_shard, suffix)
        size = size if most is None else min(size, most)
        data = self._read_range(shard, offset - BLOCK, offset + size)
        path = self.shards[shard].path
        if header_hash(data[:BLOCK]) != header:
            if len(data) < BLOCK and is_remote(path):
                raise OSError(f"{path}: the server sent {len(data)} of {BLOCK + size} bytes")
            raise self.shards[shard].refuse_changed()
        if len(data) != BLOCK + size:
            raise OSError(f"{self.where(number)}: the shard became shorter while it was being read")
        return data[BLOCK:]

    def fingerprint(self) -> dict[str, str]:
        """Return the layout hash of every shard, in order, by its path below the folder that all have in common."""
        return {f"{self.name}/{name}": shard.fingerprint() for name, shard in self.named_shards()}

    def named_shards(self) -> list[tuple[str, Shard]]:
        """List the shards, in order, with their paths below the folder that all have in common."""
        return list(zip(self._shard_names, self.shards, strict=True))

    def key_in_shard(self, number: int, key: str) -> str:
        """Name a sample such that no other sample of the run has the name: ``source/shard/key``.

        Args:
            key: of the sample, which other shards may have as well.
        """
        return f"{self.name}/{self._shard_names[self._locate(number)[0]]}/{key}"

    @cached_property
    def _shard_names(self) -> list[str]:
        return names_below_common_folder([shard.path for shard in self.shards])

    def _locate(self, number: int) -> tuple[int, int]:
        """Find the shard of a sample and its number there."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number - (int(self._ends[shard - 1]) if shard else 0)

    def _opened(self, number: int) -> Opened:
        opened = AT_HAND.get(self, number)
        if opened is None:
            shard = self.shards[number]
            opened = Opened(AT_HAND.with_descriptors(shard.load_index, shard.path))
            AT_HAND.put(self, number, opened)
        return opened

    def _read_range(self, number: int, start: int, end: int) -> bytes:
        path = self.shards[number].path
        if is_remote(path):
            return read_range(path, start, end)
        opened = self._opened(number)
        try:
            # Loader processes share the descriptor they were forked with; pread moves no position.
            return os.pread(opened.descriptor(path), end - start, start)
        except OSError:
            # A descriptor may outlive its file, as after a server's restart, while the path can be opened again.
            if not opened.close():
                raise
            return os.pread(opened.descriptor(path), end - start, start)


def names_below_common_folder(locations: Sequence[str]) -> list[str]:
    """Name shards by their paths below the deepest folder that holds them all: the same wherever that folder lies.

    A shard that is named twice gets a number.
    """
    paths = [(location if is_remote(location) else os.path.abspath(location)).split("/") for location in locations]
    folders = [steps[:-1] for steps in paths]
    both = zip(min(folders, default=[]), max(folders, default=[]), strict=False)
    common = sum(1 for _ in takewhile(lambda steps: steps[0] == steps[1], both))
    names = ["/".join(steps[common:]) for steps in paths]
    earlier = Counter[str]()
    for number, name in enumerate(names):
        earlier[name] += 1
        if earlier[name] > 1:
            names[number] = f"{name}#{earlier[name]}"
    return names
