"""Read the members of a WebDataset tar, header by header, and say where and why the tar cannot be read on.

Two things are kept apart: a member that cannot be used costs its own sample, and a tar that breaks off costs what
follows, of which only the number of bytes is known.
"""

import tarfile
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import IO

MAX_MEMBER_BYTES = 1 << 28
"""A larger member is refused: no image or text of a document is 256 MiB."""
MAX_NAME_BYTES = 1 << 20
"""A larger header with a long name is taken for damage."""
BLOCK = tarfile.BLOCKSIZE
CHUNK = 1 << 16
LONGEST_USUAL_PADDING = 20 * BLOCK + 2 * BLOCK
"""Zeros at the end of a tar in bytes: the end mark, and what fills up tar's usual record of 20 blocks."""
RECORDS = [BLOCK << power for power in range(13)]
"""Other sizes of records that writers are set to, up to 2 MiB."""

SPARSE = "a member stored as a sparse file"
TOO_LARGE = f"a member larger than {MAX_MEMBER_BYTES >> 20} MiB"
TWICE = "a sample with two members of one suffix"
SCATTERED = "a sample whose members are not neighbours in the tar (sort the tar's members by name)"
CUT = "a tar that is cut short or damaged"
PROBLEMS = ("", SPARSE, TOO_LARGE, TWICE, SCATTERED, CUT)
"""Why a sample cannot be used, by the number that an index keeps; 0: it can be."""

NO_END_MARK = "it is cut short: it ends without the tar end mark, so its last sample may be incomplete"
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
"""First bytes of compressed files."""
_NOT_A_TAR = {
    **{
        start: f"it is compressed with {name}; unpack it, because samples are read from where they lie in the tar"
        for start, name in COMPRESSED.items()
    },
    b"PK\x03\x04": "it is a zip archive, not a tar",
    b"PAR1": "it is a Parquet file, not a tar; make shards of it with python -m lcl_ds.data build",
    b"version https://git-lfs": "it is a Git LFS pointer; fetch the file itself with git lfs pull",
    b"<": "it is an HTML or XML page, not a tar",
    b"{": "it is JSON, not a tar",
}
_DAMAGE = (tarfile.TarError, ValueError, OverflowError, RecursionError)
"""What tarfile raises on bytes that are no proper headers."""


@dataclass(frozen=True)
class Member:
    """One file of a tar."""

    key: str
    suffix: str
    offset: int
    """Of its first byte in the file."""
    size: int
    """Bytes."""
    header: int
    """See :func:`header_hash`."""
    problem: str = ""
    """Why its sample cannot be used, one of ``PROBLEMS``."""


class BrokenTarError(ValueError):
    """A tar that cannot be read on.

    Args:
        sentence: what is wrong.
        unread: bytes in which there may be further samples.
        is_tar: whether anything of it is a tar.
    """

    def __init__(self, sentence: str, unread: int = 0, is_tar: bool = True):
        self.sentence, self.unread, self.is_tar = sentence, unread, is_tar
        super().__init__(sentence)


class UnusableMemberError(ValueError):
    """A member that cannot be used, in a tar that can be read on."""


def header_hash(block: bytes) -> int:
    """Return the CRC-32 of the name and size fields of a member's header block, by which a member is recognised."""
    return zlib.crc32(block[:100] + block[124:136] + block[345:500])


class _Headers:
    """What tarfile sees of a file: it reads headers alone, so that a larger piece is a size that would mislead it."""

    def __init__(self, file: IO[bytes]):
        self.file, self.tell, self.seek = file, file.tell, file.seek

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_NAME_BYTES + BLOCK:
            raise ValueError(f"a header of {size} bytes")
        return self.file.read(size)


def members_of(file: IO[bytes], size: int) -> Iterator[Member | None]:
    """Yield members in the order of the file, and None at each end mark, because tars may be joined end to end.

    Raises:
        BrokenTarError: the file cannot be read on; a member that is cut was handed out before, with ``CUT``.
        OSError: reading failed.
    """
    position: int | None = 0
    while position is not None:
        end = yield from _members_of_archive(file, position, size)
        yield None
        position = _after_zeros(file, end, size)
    _check_padding(size - end, size)


def _members_of_archive(file: IO[bytes], start: int, size: int) -> Generator[Member, None, int]:
    """Yield members up to the end mark, whose position is returned."""
    file.seek(start)
    position = start
    try:
        tar = tarfile.TarFile(fileobj=_Headers(file))  # type: ignore[arg-type]
        for member in iter(tar.next, None):
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
            if member.size < 0 or tar.offset <= max(position, member.offset):
                raise ValueError("a header that leads back")
            position = tar.offset
            placed = _placed(member, size, file)
            if placed is not None:
                yield placed
            if position - BLOCK >= size or (placed is not None and placed.problem == CUT):
                there = max(0, size - member.offset_data)
                raise BrokenTarError(
                    f"it is cut: the file ends inside member {member.name!r}, after {there} of {member.size} bytes"
                )
            if position > size:
                raise BrokenTarError(NO_END_MARK)
    except BrokenTarError:
        raise
    except _DAMAGE as error:
        if position == 0:
            raise BrokenTarError(_what_it_is(file, size), is_tar=False) from error
    return _check_end_mark(file, start, position, size)


def _check_end_mark(file: IO[bytes], start: int, position: int, size: int) -> int:
    """Find the end mark, which is at ``position`` if there is one."""
    file.seek(position)
    block = file.read(BLOCK)
    if block == bytes(BLOCK):
        return position
    if len(block) < BLOCK and not block.strip(b"\0"):
        raise BrokenTarError(NO_END_MARK)
    unread = size - position
    if position == start > 0:
        raise BrokenTarError(f"{unread} bytes after its end mark are not a tar and were not read", unread)
    if len(block) < BLOCK:
        raise BrokenTarError(f"it is cut: the file ends inside the header at byte {position}")
    raise BrokenTarError(
        f"the header at byte {position} is damaged; {unread} bytes from there on were not read", unread
    )


def _check_padding(zeros: int, size: int) -> None:
    """Tell the padding of a tar to whole records from a lost tail, as of a download that was not finished."""
    if zeros > LONGEST_USUAL_PADDING and not any(size % r == 0 and zeros <= r + 2 * BLOCK for r in RECORDS):
        raise BrokenTarError(f"{zeros} zero bytes follow its end mark, so that its tail seems to be lost", zeros)


def _placed(member: tarfile.TarInfo, file_size: int, file: IO[bytes]) -> Member | None:
    """Make a member of a sample; None for what is not one."""
    problem = ""
    try:
        placed = key_and_suffix_of(member, file_size)
    except UnusableMemberError:
        problem = SPARSE if member.sparse is not None else TOO_LARGE
        placed = key_and_suffix(member.name)
    except ValueError:
        problem = CUT
        placed = key_and_suffix(member.name)
    if placed is None:
        return None
    file.seek(member.offset_data - BLOCK)
    return Member(*placed, member.offset_data, member.size, header_hash(file.read(BLOCK)), problem)


def key_and_suffix_of(member: tarfile.TarInfo, file_size: int) -> tuple[str, str] | None:
    """Return key and suffix of a tar's member; None for what is not a file.

    Raises:
        UnusableMemberError: sparse or too large; what follows can be read.
        ValueError: cut off; nothing follows.
    """
    if not member.isreg():
        return None
    if member.sparse is not None:
        raise UnusableMemberError(f"member {member.name!r} is a sparse file")
    if member.offset_data + member.size > file_size:
        raise ValueError(f"it is cut inside member {member.name!r}")
    if member.size > MAX_MEMBER_BYTES:
        raise UnusableMemberError(f"member {member.name!r} is larger than {MAX_MEMBER_BYTES} bytes")
    return key_and_suffix(member.name)


def key_and_suffix(name: str) -> tuple[str, str] | None:
    """Split a member's name at the first dot behind its folders; None where that dot comes first."""
    folder, _, name = name.rpartition("/")
    stem, _, suffix = name.partition(".")
    if not stem:
        return None
    return (f"{folder}/{stem}" if folder else stem), suffix.lower()


def _after_zeros(file: IO[bytes], position: int, size: int) -> int | None:
    """Find the first byte from ``position`` on that is not zero; None when there is none."""
    file.seek(position)
    while position < size:
        chunk = file.read(CHUNK)
        if not chunk:
            return None
        rest = chunk.lstrip(b"\0")
        if rest:
            return position + len(chunk) - len(rest)
        position += len(chunk)
    return None


def _what_it_is(file: IO[bytes], size: int) -> str:
    """Say what a file is that does not begin with a tar header."""
    if size == 0:
        return "it is empty (0 bytes)"
    file.seek(0)
    head = file.read(BLOCK).lstrip()
    sentences = (sentence for start, sentence in _NOT_A_TAR.items() if head.startswith(start))
    return next(sentences, "it is not a tar: it does not begin with a tar header")
