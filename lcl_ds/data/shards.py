"""WebDataset tars as random-access collections: an index of offsets instead of a stream.

A shard's headers are read once; afterwards a sample's parts are read with ``os.pread``, so any sample costs the same
and the position in the data is a number. Nothing in a shard is ever unpickled or used as a path.
"""

import glob
import hashlib
import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import braceexpand

from lcl_ds.errors import UserError

MAX_MEMBER_BYTES = 1 << 28
"""A larger member is refused: no image or text of a document is 256 MiB."""


@dataclass(frozen=True)
class Sample:
    """One sample of a shard: where its members lie."""

    key: str
    parts: dict[str, tuple[int, int]]
    """Suffix (``json``, ``000.jpg``) to (offset, size) in bytes."""


@dataclass(frozen=True)
class Shard:
    """One indexed tar."""

    path: Path
    samples: tuple[Sample, ...]

    def fingerprint(self) -> str:
        """Hash of name and layout; differs when samples were added, removed, renamed or resized."""
        digest = hashlib.sha256(self.path.name.encode())
        for sample in self.samples:
            digest.update(repr((sample.key, sorted(sample.parts.items()))).encode())
        return digest.hexdigest()[:16]


def expand_paths(paths: str | Sequence[str]) -> list[Path]:
    """Files named by paths, globs and braces, sorted.

    Raises:
        UserError: a pattern matches nothing; names it.
    """
    found: set[str] = set()
    for pattern in [paths] if isinstance(paths, str) else paths:
        for single in braceexpand.braceexpand(pattern):
            matches = glob.glob(single) if glob.has_magic(single) else [single] if os.path.exists(single) else []
            if not matches:
                raise UserError(f"data path {single}: no such file")
            found.update(matches)
    return [Path(path) for path in sorted(found)]


def index_shard(path: Path) -> Shard:
    """Read a tar's headers.

    Members of a sample are neighbours that share the name up to the first dot (the WebDataset convention).

    Raises:
        UserError: not a readable, complete, plain tar; names the file and what is wrong.
    """
    samples: list[Sample] = []
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                _add_member(samples, member, size)
            end = tar.offset
        with path.open("rb") as file:
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ValueError("it ends without the tar end mark, so its last sample may be incomplete")
    except (OSError, tarfile.TarError, ValueError) as error:
        raise UserError(f"shard {path}: cannot be read: {error}") from error
    if not samples:
        raise UserError(f"shard {path}: it holds no samples")
    return Shard(path, tuple(samples))


def _add_member(samples: list[Sample], member: tarfile.TarInfo, file_size: int) -> None:
    if not member.isreg():
        return
    if member.sparse is not None or member.size > MAX_MEMBER_BYTES:
        raise ValueError(f"member {member.name!r} is sparse or larger than {MAX_MEMBER_BYTES} bytes")
    if member.offset_data + member.size > file_size:
        raise ValueError(f"it is cut inside member {member.name!r}")
    folder, _, name = member.name.rpartition("/")
    stem, _, suffix = name.partition(".")
    if not stem:
        return
    key = f"{folder}/{stem}" if folder else stem
    if not samples or samples[-1].key != key:
        samples.append(Sample(key, {}))
    if suffix.lower() in samples[-1].parts:
        raise ValueError(f"sample {key!r} has two members with the suffix {suffix!r}")
    samples[-1].parts[suffix.lower()] = (member.offset_data, member.size)


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
        self._samples = [(number, sample) for number, shard in enumerate(self.shards) for sample in shard.samples]
        self.blocks: list[tuple[int, int]] = []
        start = 0
        for shard in self.shards:
            end = start + len(shard.samples)
            self.blocks += [(i, min(i + block_samples, end)) for i in range(start, end, block_samples)]
            start = end
        self._files: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self._samples)

    def sample(self, number: int) -> Sample:
        return self._samples[number][1]

    def where(self, number: int) -> str:
        """``shard: key`` of a sample, for messages."""
        shard, sample = self._samples[number]
        return f"{self.shards[shard].path}: {sample.key}"

    def read(self, number: int, suffix: str) -> bytes:
        """One member's bytes.

        Raises:
            KeyError: the sample has no such member.
            OSError: reading failed.
        """
        shard, sample = self._samples[number]
        offset, size = sample.parts[suffix]
        # Loader processes are forked: descriptors are kept per process so that none is shared or leaked.
        handle = self._files.get((os.getpid(), shard))
        if handle is None:
            handle = os.open(self.shards[shard].path, os.O_RDONLY)
            self._files[os.getpid(), shard] = handle
        data = os.pread(handle, size, offset)
        if len(data) != size:
            raise OSError(f"{self.where(number)}: the shard became shorter while it was being read")
        return data

    def fingerprint(self) -> dict[str, str]:
        """Shard name to layout hash."""
        return {f"{self.name}/{shard.path.name}": shard.fingerprint() for shard in self.shards}
