"""Find and read shards: local files, any URL that fsspec opens, and streams of ``pipe:`` commands.

A location is a string. Commands run only because the user wrote them into the settings: a list of shards, which may
come from elsewhere, must not name any, and nothing that is read from a shard ever becomes a location.
"""

import codecs
import errno
import glob
import hashlib
import io
import logging
import os
import posixpath
import re
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import braceexpand
import fsspec

from lcl_ds.errors import UserError
from lcl_ds.files import PARTIAL, REMEDIES, only_one, writing

logger = logging.getLogger(__name__)

DEFAULT_CACHE = Path("~/.cache/lcl_ds")
"""For what cannot lie beside a shard: indices of remote shards, files made of ``pipe:`` streams."""
LIST_SUFFIX = ".txt"
"""Of a file that lists shards, one a line, relative to where it lies."""
INDEX_SUFFIX = ".index"
COMMAND = "pipe:"
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::[A-Za-z][A-Za-z0-9+.-]*)*://")
OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
"""Errors of a process, or a machine, that has too many files open."""
DOWNLOAD = "download the shard, or read it through pipe:COMMAND"
TRIES = 4
FIRST_PAUSE_S = 0.5
REMOTE_BLOCK = 1 << 18
"""Bytes fetched at a time while headers are read front to back."""
REMOTE_GAP = 1 << 14
"""Bytes between two ranges that are fetched along rather than asked for one by one."""


def expand_paths(paths: str | Path | Sequence[str | Path]) -> list[str]:
    """Find what paths, globs, braces, URLs, ``pipe:`` commands and lists of shards name; sorted, each once.

    What exists under the very name that was given is that file or folder, whatever characters its name contains. A file
    that several names lead to is taken once, under the first of them.

    Raises:
        UserError: a pattern matches nothing or cannot be read; names it.
    """
    locations: set[str] = set()
    for pattern in [paths] if isinstance(paths, (str, Path)) else paths:
        for single in _without_braces(str(pattern)):
            if single.endswith(LIST_SUFFIX) and not is_command(single):
                locations.update(_listed(single))
            else:
                locations.update(_matches(single))
    return _each_file_once(sorted(locations))


def _each_file_once(locations: list[str]) -> list[str]:
    """Leave out locations of a file that an earlier one leads to, with a warning."""
    kept: dict[str, str] = {}
    for location in locations:
        file = location if is_remote(location) or is_command(location) else os.path.realpath(location)
        if file in kept:
            logger.warning("data path %s: it is the same file as %s and is taken once", location, kept[file])
        kept.setdefault(file, location)
    return list(kept.values())


def _without_braces(pattern: str) -> Iterator[str]:
    """Yield the pattern's alternatives; braces in its beginning, as far as that exists, are names."""
    if is_command(pattern) or (is_remote(pattern) and not os.path.exists(pattern)):
        exists, rest = "", pattern
    else:
        exists, rest = _existing_part(pattern)
        if not rest or ("{" in rest and _globbed(exists, rest)):
            yield _plain(pattern)
            return
    try:
        for alternative in braceexpand.braceexpand(rest):
            yield exists + alternative
    except ValueError as error:
        if not is_command(pattern):
            raise UserError(
                f"data path {pattern}: no such file, and its braces cannot be read ({error}); correct the path"
            ) from error
        yield pattern


def _existing_part(path: str) -> tuple[str, str]:
    """Split a path behind its longest beginning that exists."""
    if os.path.exists(path):
        return path, ""
    cut = path.rfind("/")
    while cut > 0 and not os.path.isdir(path[: cut + 1]):
        cut = path.rfind("/", 0, cut)
    return path[: cut + 1], path[cut + 1 :]


def _matches(pattern: str) -> list[str]:
    """List what one pattern without braces names. Raises: UserError when it is nothing."""
    if is_command(pattern):
        return [pattern]
    if is_remote(pattern) and not os.path.exists(pattern):
        matches = _remote_matches(pattern)
    else:
        exists, rest = _existing_part(pattern)
        if not rest:
            return [_plain(exists)]
        matches = [_plain(match) for match in _globbed(exists, rest)]
        if not matches:
            _check_readable(pattern, exists or ".")
    matches = [match for match in matches if not match.endswith(INDEX_SUFFIX)]
    if not matches:
        raise UserError(f"data path {pattern}: no such file")
    return matches


def _globbed(folder: str, pattern: str) -> list[str]:
    """List what a pattern matches in a folder; brackets are names where that matches something."""
    if not glob.has_magic(pattern):
        return []
    return glob.glob(glob.escape(folder) + pattern.replace("[", "[[]")) or glob.glob(glob.escape(folder) + pattern)


def _check_readable(pattern: str, folder: str) -> None:
    """Refuse a folder that cannot be listed, which glob takes for an empty one. Raises: UserError."""
    try:
        os.listdir(folder)
    except OSError as error:
        raise UserError(f"data path {pattern}: {folder} cannot be listed: {error_text(error)}") from error


def _plain(path: str) -> str:
    """Write a local path so that it cannot be taken for anything else."""
    return f"./{path}" if SCHEME.match(path) or path.startswith(COMMAND) else path


def _remote_matches(pattern: str) -> list[str]:
    """List what a URL with stars matches on its server."""
    if not glob.has_magic(pattern):
        return [pattern]  # indexing it shows whether it exists, without a request only for that
    filesystem, path = _resolve(pattern)
    try:
        if _retried(pattern, lambda: filesystem.exists(path)):
            return [pattern]
        matches = _retried(pattern, lambda: filesystem.glob(path))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"data path {pattern}: cannot be read: {error_text(error)}") from error
    return [filesystem.unstrip_protocol(match) for match in matches]


def _listed(location: str) -> list[str]:
    """Read the locations that a list of shards names."""
    names = []
    for number, line in enumerate(_lines_of(location), start=1):
        name = _listed_name(location, line, number)
        if name is not None:
            names.append(name)
    if not names:
        raise UserError(f"data path {location}: it lists no shards")
    return names


def _listed_name(location: str, line: str, number: int) -> str | None:
    """Read the location that a line names; None for an empty line or a comment."""
    folder = posixpath.dirname(location)
    if not is_remote(location):
        # Spaces at the ends, and #, "pipe:" and "s3://" at the start, belong to the name where there is such a file.
        exact = posixpath.join(folder, line)
        if line.strip() and os.path.exists(exact):
            return _plain(exact)
    name = line.strip()
    if not name or name.startswith("#"):
        return None
    if name.startswith(COMMAND):
        raise UserError(
            f"data path {location}: it lists the command {name!r}; commands can be named in data.shards only"
        )
    if "\0" in name or any("\udc80" <= sign <= "\udcff" for sign in name):
        raise UserError(
            f"data path {location}: line {number} is not UTF-8, and there is no such file; save it as UTF-8"
        )
    return name if is_remote(name) else posixpath.join(folder, name)


def _lines_of(location: str) -> list[str]:
    """Read the lines of a list of shards: UTF-8, or UTF-16 with its mark; other bytes are kept, as in file names."""
    data = read_all(location)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = data.decode("utf-16", "replace")
    else:
        text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
    return text.replace("\r\n", "\n").split("\n")


def is_command(location: str) -> bool:
    """Say whether a shell runs it to get a shard: it is named so and no file of that name exists."""
    return location.startswith(COMMAND) and not os.path.exists(location)


def is_remote(location: str) -> bool:
    """Say whether fsspec reads it: it is named like a URL. :func:`expand_paths` writes existing files otherwise."""
    return SCHEME.match(location) is not None


def name_of(location: str) -> str:
    """Return the last name of a location. The hash of a layout has it, so that a renamed shard is another one."""
    return posixpath.basename(location)


def size_of(location: str) -> int:
    """Return the size of a location in bytes.

    Raises:
        OSError: it is not there or out of reach.
        UserError: a server does not tell the size, or it is a stream, which might never end.
    """
    if not is_remote(location):
        status = os.stat(location)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise UserError(f"{location}: is not a plain file; write its content to a file and name that")
        return status.st_size
    filesystem, path = _resolve(location)
    size = _retried(location, lambda: filesystem.size(path))
    if size is None:
        raise UserError(f"data path {location}: its server does not tell the size; {DOWNLOAD}")
    return int(size)


def read_range(location: str, start: int, end: int) -> bytes:
    """Read the bytes from ``start`` to ``end``; fewer where the file ends earlier.

    Raises:
        OSError: it is not there or out of reach.
        UserError: a server knows no ranges.
    """
    if not is_remote(location):
        with open(location, "rb", opener=_open_without_waiting) as file:
            return os.pread(file.fileno(), end - start, start)
    filesystem, path = _resolve(location)
    data = bytes(_retried(location, lambda: filesystem.cat_file(path, start=start, end=end)))
    if len(data) > end - start:
        raise UserError(
            f"data path {location}: its server does not support byte ranges ({end - start} bytes were asked for, "
            f"{len(data)} came); {DOWNLOAD}"
        )
    return data


def read_ranges(location: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Read several ranges of one location: a file is opened once, and neighbours come with one request of a server.

    Raises:
        OSError, UserError: as :func:`read_range`.
    """
    if not is_remote(location):
        with open(location, "rb", opener=_open_without_waiting) as file:
            return [os.pread(file.fileno(), end - start, start) for start, end in ranges]
    pieces: dict[tuple[int, int], bytes] = {}
    near: list[tuple[int, int]] = []
    for piece in sorted(set(ranges)):
        if near and piece[0] - max(end for _, end in near) > REMOTE_GAP:
            pieces |= _read_together(location, near)
            near = []
        near.append(piece)
    pieces |= _read_together(location, near)
    return [pieces[piece] for piece in ranges]


def _read_together(location: str, ranges: Sequence[tuple[int, int]]) -> dict[tuple[int, int], bytes]:
    first, last = min(start for start, _ in ranges), max(end for _, end in ranges)
    data = read_range(location, first, last)
    return {(start, end): data[start - first : end - first] for start, end in ranges}


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a file so that a stream of that name gives an error; opened as usual it would wait for a writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def read_all(location: str) -> bytes:
    """Read a whole small file.

    Raises:
        UserError: it is not there or cannot be read.
    """
    try:
        return read_range(location, 0, size_of(location))
    except OSError as error:
        raise UserError(f"data path {location}: cannot be read: {error_text(error)}") from error


def open_file(location: str) -> IO[bytes]:
    """Open a file for reading front to back with seeks. Raises: OSError."""
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
        if len(data) < end - self.position:
            raise OSError(f"{self.location}: the server sent {len(data)} of {end - self.position} bytes")
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def cached_name(location: str, suffix: str) -> str:
    """Make the name under which the cache folder keeps something about a location."""
    return hashlib.sha256(location.encode("utf-8", "surrogateescape")).hexdigest()[:32] + suffix


def copy_of(command: str, cache: Path) -> Path:
    """Name the file that keeps the output of ``pipe:COMMAND``. Raises: RuntimeError where there is no home folder."""
    return cache.expanduser() / cached_name(command, ".tar")


def materialise(
    command: str, cache: Path, check: Callable[[str], None] = lambda path: None, again: bool = False
) -> tuple[str, bool]:
    """Keep the output of ``pipe:COMMAND`` as a file in the cache folder; one process makes it while others wait.

    Args:
        check: looks at the output before it is kept; a ValueError says why it cannot be used.
        again: run the command even if its output was kept.

    Returns:
        The file, and whether it was made just now.

    Raises:
        UserError: the command failed, or its output cannot be used or kept.
    """
    try:
        path = copy_of(command, cache)
        if path.exists() and not again:
            return str(path), False
        with only_one(path):
            is_new = again or not path.exists()  # another process may have made it by now
            if is_new:
                _keep_output(command, path, check)
    except RuntimeError as error:
        raise UserError(
            f"data path {command}: there is no home folder for its output; name one in data.cache"
        ) from error
    except OSError as error:
        raise UserError(
            f"data path {command}: its output cannot be kept in {cache}: {error_text(error)} (data.cache)"
        ) from error
    return str(path), is_new


def _keep_output(command: str, path: Path, check: Callable[[str], None]) -> None:
    """Run a command and put its output in place when it is whole."""
    for left in path.parent.glob(f".{path.name}.*{PARTIAL}"):  # by processes that were killed
        left.unlink(missing_ok=True)
    with writing(path) as file:
        with subprocess.Popen(command.removeprefix(COMMAND), shell=True, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            try:
                shutil.copyfileobj(process.stdout, file, REMOTE_BLOCK)
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            raise UserError(f"data path {command}: the command ended with exit code {process.returncode}")
        file.flush()
        try:
            check(file.name)
        except ValueError as error:
            raise UserError(f"data path {command}: what the command wrote is not kept: {error}") from error


def _resolve(location: str) -> tuple[Any, str]:
    """Find fsspec's filesystem and the path in it; fsspec keeps one instance per process and address.

    Raises:
        UserError: no driver for such addresses is installed.
    """
    try:
        filesystem, path = fsspec.core.url_to_fs(location)
    except (ImportError, ValueError) as error:
        raise UserError(f"data path {location}: {error}") from error
    return filesystem, path


def error_text(error: OSError) -> str:
    """Say what is wrong and what to do, without the path."""
    number = errno.ENOENT if isinstance(error, FileNotFoundError) else error.errno
    return REMEDIES.get(number or 0) or error.strerror or str(error)


def _retried(location: str, action: Any) -> Any:
    """Return the action's result after up to four tries; whatever error a driver raises becomes an OSError."""
    for attempt in range(TRIES):
        try:
            return action()
        except (FileNotFoundError, PermissionError, UserError):  # another try would not help
            raise
        except Exception as error:
            if attempt == TRIES - 1:
                raise OSError(f"{location}: {type(error).__name__}: {error}") from error
            time.sleep(FIRST_PAUSE_S * 2**attempt)
    raise AssertionError
