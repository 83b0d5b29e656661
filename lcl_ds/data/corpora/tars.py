"""Tars of other people, read from front to back; what is damaged costs what is damaged, not the rest."""

from collections.abc import Iterator
from pathlib import Path
from typing import IO

from lcl_ds.data.documents import BadSampleError
from lcl_ds.data.shards.index import Sample
from lcl_ds.data.shards.scan import scan_shard
from lcl_ds.data.shards.storage import error_text
from lcl_ds.data.shards.tar_members import CUT
from lcl_ds.errors import UserError

Members = dict[str, bytes]


def read_tar(path: Path) -> Iterator[tuple[str, Members | BadSampleError]]:
    """Yield the samples of a WebDataset tar: key and members by suffix, or why a sample cannot be used.

    What is a sample, and whether it can be used, is decided as for training. Where the tar breaks off, the last sample
    may lack members, so it is not used; bytes in which there may be more samples are an entry of their own.

    Raises:
        UserError: the file is not there or is not a tar.
    """
    try:
        scan = scan_shard(str(path))
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a tar: {error_text(error)}") from error
    broken = scan.broken
    if broken and not broken.is_tar:
        raise UserError(f"{path}: cannot be read as a tar: {broken.sentence}")
    is_counted = False
    with file:
        for number in range(len(scan.index.key_end)):
            sample = scan.index.sample(number)
            is_counted |= sample.problem == CUT
            yield sample.key, _members_of(file, sample)
    if broken and broken.unread:
        yield path.name, BadSampleError(broken.sentence)
    elif broken and not is_counted:
        yield path.name, BadSampleError(CUT)


def _members_of(file: IO[bytes], sample: Sample) -> Members | BadSampleError:
    if sample.problem:
        return BadSampleError(sample.problem)
    members = {}
    for suffix, (offset, size) in sample.members.items():
        file.seek(offset)
        members[suffix] = file.read(size)
    return members
