"""Tars of other people, read from front to back; what is damaged costs what is damaged, not the rest."""

import tarfile
from collections.abc import Iterator
from pathlib import Path

from lcl_ds.data.documents import BadSampleError
from lcl_ds.data.shard_index import member_place
from lcl_ds.errors import UserError

Parts = dict[str, bytes]


def read_tar(path: Path) -> Iterator[tuple[str, Parts | BadSampleError]]:
    """Samples of a WebDataset tar: key and members by suffix, or why a sample cannot be used.

    A tar that is cut short ends with such a reason: its last sample may lack members, so it is not used.

    Raises:
        UserError: the file is not there or no tar.
    """
    try:
        size = path.stat().st_size
        file = path.open("rb")
        tar = tarfile.TarFile(fileobj=file)
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{path}: cannot be read as a tar: {error}") from error
    with file, tar:
        key: str | None = None
        parts: Parts | BadSampleError = {}
        while True:
            try:
                member = tar.next()
                placed = None if member is None else member_place(member, size)
            except (OSError, tarfile.TarError, ValueError):
                yield key or path.name, BadSampleError("a tar that is cut short or damaged")
                return
            if member is None:
                break
            if placed is None:
                continue
            if placed[0] != key:
                if key is not None:
                    yield key, parts
                key, parts = placed[0], {}
            if isinstance(parts, dict) and placed[1] in parts:
                parts = BadSampleError("a sample with two members of one suffix")
            opened = tar.extractfile(member)
            if isinstance(parts, dict) and opened is not None:
                parts[placed[1]] = opened.read()
        file.seek(tar.offset)
        complete = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
        if key is not None:
            yield key, parts if complete else BadSampleError("a tar that is cut short or damaged")
        elif not complete:
            yield path.name, BadSampleError("a tar that is cut short or damaged")
