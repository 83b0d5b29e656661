"""Where shards lie: local files, any URL that fsspec opens, and streams of ``pipe:`` commands.

A location is a string. Commands run only because the user wrote them into the settings: a list of shards, which may
come from elsewhere, must not name any, and nothing that is read from a shard ever becomes a location.
"""

import glob
import hashlib
import io
import os
import posixpath
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import braceexpand
import fsspec

from lcl_ds.errors import UserError
from lcl_ds.files import only_one

DEFAULT_CACHE = Path("~/.cache/lcl_ds")
"""For what cannot lie beside a shard: indices of remote shards, files made of ``pipe:`` streams."""
LIST_SUFFIX = ".txt"
"""Of a file that lists shards, one a line, relative to where it lies."""
INDEX_SUFFIX = ".index"
TRIES = 4
FIRST_PAUSE_S = 0.5
REMOTE_BLOCK = 1 << 18
"""Bytes fetched at a time while headers are read."""


def expand_paths(paths: str | Path | Sequence[str | Path]) -> list[str]:
    """Locations named by paths, globs, braces, URLs, ``pipe:`` commands and lists of shards; sorted, each once.

    Raises:
        UserError: a pattern matches nothing; names it.
    """
    found: set[str] = set()
    for pattern in [paths] if isinstance(paths, (str, Path)) else paths:
        for single in braceexpand.braceexpand(str(pattern)):
            if single.endswith(LIST_SUFFIX) and not single.startswith("pipe:"):
                found.update(_listed(single))
            else:
                found.update(_matches(single))
    return sorted(found)


def _matches(pattern: str) -> list[str]:
    if pattern.startswith("pipe:"):
        return [pattern]
    if is_remote(pattern) and not glob.has_magic(pattern):
        return [pattern]  # whether it exists shows when it is indexed, without a request of its own
    if is_remote(pattern):
        filesystem, path = _resolve(pattern)
        matches = [filesystem.unstrip_protocol(match) for match in filesystem.glob(path)]
    elif glob.has_magic(pattern):
        matches = glob.glob(pattern)
    else:
        matches = [pattern] if os.path.exists(pattern) else []
    matches = [match for match in matches if not match.endswith(INDEX_SUFFIX)]
    if not matches:
        raise UserError(f"data path {pattern}: no such file")
    return matches


def _listed(location: str) -> list[str]:
    lines = read_all(location).decode("utf-8").split("\n")
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not names:
        raise UserError(f"data path {location}: it lists no shards")
    commands = [name for name in names if name.startswith("pipe:")]
    if commands:
        raise UserError(
            f"data path {location}: it lists the command {commands[0]!r}; name commands in data.shards alone"
        )
    folder = posixpath.dirname(location)
    return [name if is_remote(name) else posixpath.join(folder, name) for name in names]


def is_remote(location: str) -> bool:
    """Whether fsspec reads it."""
    return "://" in location


def name_of(location: str) -> str:
    """Last part of a location, by which it goes in fingerprints."""
    return posixpath.basename(location)


def size_of(location: str) -> int:
    """Bytes. Raises: OSError."""
    if not is_remote(location):
        return os.stat(location).st_size
    filesystem, path = _resolve(location)
    return int(_retried(location, lambda: filesystem.size(path)))


def read_range(location: str, start: int, end: int) -> bytes:
    """Bytes ``start`` to ``end``; fewer where the file ends before. Raises: OSError."""
    if not is_remote(location):
        with open(location, "rb") as file:
            return os.pread(file.fileno(), end - start, start)
    filesystem, path = _resolve(location)
    return bytes(_retried(location, lambda: filesystem.cat_file(path, start=start, end=end)))


def read_all(location: str) -> bytes:
    """A whole small file.

    Raises:
        UserError: it is not there or cannot be read.
    """
    try:
        return read_range(location, 0, size_of(location))
    except OSError as error:
        raise UserError(f"data path {location}: cannot be read: {error}") from error


def open_file(location: str) -> IO[bytes]:
    """For reading front to back with seeks. Raises: OSError."""
    if not is_remote(location):
        return open(location, "rb")
    return io.BufferedReader(_RemoteFile(location), REMOTE_BLOCK)


class _RemoteFile(io.RawIOBase):
    """A remote file read in ranges, each tried again when it fails."""

    def __init__(self, location: str):
        self.location, self.size, self.position = location, size_of(location), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        end = min(self.position + len(buffer), self.size)
        data = read_range(self.location, self.position, end) if end > self.position else b""
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def cached_name(location: str, suffix: str) -> str:
    """Name for something about a location in the cache folder."""
    return hashlib.sha256(location.encode()).hexdigest()[:32] + suffix


def materialise(command: str, cache: Path) -> str:
    """The output of ``pipe:COMMAND`` as a file in the cache folder, made once by one process while others wait.

    Raises:
        UserError: the command failed.
    """
    path = cache.expanduser() / cached_name(command, ".tar")
    with only_one(path):
        if not path.exists():
            partial = path.with_suffix(".partial")
            with partial.open("wb") as file:
                done = subprocess.run(command.removeprefix("pipe:"), shell=True, stdout=file, check=False)
            if done.returncode:
                partial.unlink()
                raise UserError(f"data path {command}: the command ended with exit code {done.returncode}")
            partial.replace(path)
    return str(path)


def _resolve(location: str) -> tuple[Any, str]:
    """fsspec's filesystem and the path in it; fsspec keeps one instance per process and address.

    Raises:
        UserError: no driver for such addresses is installed.
    """
    try:
        filesystem, path = fsspec.core.url_to_fs(location)
    except (ImportError, ValueError) as error:
        raise UserError(f"data path {location}: {error}") from error
    return filesystem, path


def _retried(location: str, action: Any) -> Any:
    """The action's result after up to four tries; drivers raise errors of many kinds, all become OSError."""
    for attempt in range(TRIES):
        try:
            return action()
        except FileNotFoundError:
            raise
        except Exception as error:
            if attempt == TRIES - 1:
                raise OSError(f"{location}: {type(error).__name__}: {error}") from error
            time.sleep(FIRST_PAUSE_S * 2**attempt)
    raise AssertionError
