"""Images on disk that documents name by file name or by URL."""

import errno
import hashlib
import json
import os
import sqlite3
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from lcl_ds.data.documents import IMAGE_SUFFIXES, BadSampleError
from lcl_ds.data.shards.tar_members import MAX_MEMBER_BYTES, key_and_suffix_of
from lcl_ds.errors import UserError
from lcl_ds.files import partial_name, printable

NOT_THERE = "an image that is not there"
AMBIGUOUS = "an image whose name fits several files"
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
"""What the system says of a name that no file has."""
STATS = "_stats.json"
"""Ends the names of img2dataset's reports, one for each of its shards."""
UNREADABLE = (errno.EACCES, errno.EPERM, errno.EIO)
"""What the system says of a single file that cannot be read; other errors are of the whole machine."""

SCHEMA = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE tars (number INTEGER PRIMARY KEY, path BLOB, problem TEXT);
CREATE TABLE names (key BLOB, tar INTEGER, offset INTEGER, size INTEGER, PRIMARY KEY (key, tar)) WITHOUT ROWID;
CREATE TABLE urls (digest BLOB PRIMARY KEY, tar INTEGER, offset INTEGER, size INTEGER) WITHOUT ROWID;
CREATE TABLE flat (is_flat INTEGER);
"""
Location = tuple[int, int, int]
"""Number of a tar, offset and size of a member's bytes."""


@dataclass(frozen=True)
class LocalImages:
    """Folders of image files, and tars of images by their index.

    Files are found by their name, or by their URL where they are named by its SHA-256, with or without a suffix. Of
    what img2dataset fetched, as tars or as files, the ``url`` of the ``.json`` beside an image counts too.

    Names are compared whole. Where several hold a file of that name, loose files come before tars, and each in the
    order in which they were named; within a tar the last one counts, as it would after unpacking. Since a tar may have
    been packed further up or further down, a member is also taken where its name ends in the wanted one or the wanted
    one in its name, if no other one fits as well.
    """

    folders: tuple[Path, ...] = ()
    index: Path | None = None
    """Made by :func:`index_images`."""

    def find(self, name: Any, url: Any, digest: str | None = None) -> bytes:
        """Find an image by its file name, else by its URL; a value that is not a string is not a name.

        Args:
            digest: the corpus's own hash of the URL, where it has one, by which files may be named too.

        Raises:
            BadSampleError: it is not there, its name fits several files, or it cannot be read.
        """
        problem = BadSampleError(NOT_THERE)
        try:
            data = self.by_name(name) if isinstance(name, str) else None
        except BadSampleError as ambiguous:
            data, problem = None, ambiguous
        if data is None and isinstance(url, str):
            data = self.by_url(url, digest)
        if data is None:
            raise problem
        return data

    def by_name(self, name: str) -> bytes | None:
        """Find an image by file name, which may contain folders; None when there is none.

        Names come from outside: those that lead out of the folder find nothing.

        Raises:
            BadSampleError: the name fits several files, or the file cannot be read.
        """
        steps = _steps_of(name)
        if not steps:
            return None
        for folder in self.folders:
            data = _read_inside(folder, steps)
            if data is not None:
                return data
        location = self._locate(steps)
        return None if location is None else self._read(location)

    def by_url(self, url: str, digest: str | None = None) -> bytes | None:
        """Find an image by its URL; None when there is none.

        Args:
            digest: see :meth:`find`.

        Raises:
            BadSampleError: the file cannot be read.
        """
        digests = [url_digest(url).encode(), *(_steps_of(digest) if digest else ())]
        for name in digests:
            for folder in self.folders:
                for suffix in (b"", *(f".{suffix}".encode() for suffix in IMAGE_SUFFIXES)):
                    data = _read_inside(folder, (name + suffix,))
                    if data is not None:
                        return data
        rows = self._rows("SELECT tar, offset, size FROM urls WHERE digest = ?", digests[0])
        for name in digests:
            rows = rows or self._rows(
                "SELECT tar, offset, size FROM names WHERE key >= ? AND key < ? ORDER BY tar LIMIT 1",
                name + b".",  # its suffix, or the slash that ends a key without one
                name + b"0",
            )
        return self._read(rows[0]) if rows else None

    def _locate(self, steps: tuple[bytes, ...]) -> Location | None:
        """Find a member of a tar by its name. Raises: BadSampleError when several members fit equally well."""
        key = _key(steps)
        whole = self._rows("SELECT tar, offset, size FROM names WHERE key = ? ORDER BY tar LIMIT 1", key)
        if whole:
            return whole[0]
        longer = self._rows("SELECT DISTINCT key FROM names WHERE key > ? AND key < ? LIMIT 2", key, key[:-1] + b"0")
        if len(longer) > 1:
            raise BadSampleError(AMBIGUOUS)
        if longer:
            return self._locate(tuple(reversed(longer[0][0][:-1].split(b"/"))))
        is_flat = bool(self._rows("SELECT 1 FROM flat WHERE is_flat"))
        # Where there are folders, a name without any is not that of a file in a folder.
        for first in range(1, len(steps) if is_flat else len(steps) - 1):
            shorter = self._rows("SELECT tar, offset, size FROM names WHERE key = ? LIMIT 2", _key(steps[first:]))
            if len(shorter) > 1:
                raise BadSampleError(AMBIGUOUS)
            if shorter:
                return shorter[0]
        return None

    def _rows(self, query: str, *values: bytes) -> list[Any]:
        if self.index is None:
            return []
        try:
            return _database(self.index, os.getpid()).execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise UserError(f"{self.index}: the index of --images cannot be read ({error}); remove it") from error

    def _read(self, location: Location) -> bytes:
        tar, offset, size = location
        ((path,),) = self._rows(f"SELECT path FROM tars WHERE number = {tar:d}")
        with _one_files_errors(), open(path, "rb") as file:
            data = os.pread(file.fileno(), size, offset)
        if len(data) != size:
            raise UserError(f"--images {os.fsdecode(path)}: it became shorter while it was being read; start again")
        return data


@lru_cache
def _database(index: Path, pid: int) -> sqlite3.Connection:
    """Open the index once per process: a connection must not be shared with a forked one, so ``pid`` is an argument."""
    return sqlite3.connect(f"{index.absolute().as_uri()}?mode=ro&immutable=1", uri=True)


def url_digest(url: str) -> str:
    """Hash a URL to the name by which its image is found."""
    return hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()


def open_images(paths: Sequence[Path], work: Path, skip_unreadable: bool = False) -> tuple[LocalImages, list[str]]:
    """Open the images of folders and tars; tars are indexed once into ``work``. What cannot be read is returned too.

    Args:
        skip_unreadable: go on with what is whole in tars that are damaged.

    Raises:
        UserError: a path that is not there, or a tar that cannot be read.
    """
    folders: list[Path] = []
    tars: dict[Path, None] = {}  # an ordered set
    fetched: list[Path] = []
    for path in paths:
        if path.is_dir():
            folders.append(path)
            fetched += _fetched_folders(path)
            tars.update(dict.fromkeys(tar.resolve() for tar in sorted(path.glob("*.tar")) if tar.is_file()))
        elif path.is_file():
            tars[path.resolve()] = None
        else:
            raise UserError(f"--images {path}: no such file or folder")
    if not tars and not fetched:
        return LocalImages(tuple(folders)), []
    index = index_images(list(tars), work, fetched)
    images = LocalImages(tuple(folders), index)
    problems = [problem for (problem,) in images._rows("SELECT problem FROM tars WHERE problem != ''")]
    if problems and not skip_unreadable:
        index.unlink()  # so that they are read again once they were replaced
        raise UserError([*problems, "replace these tars, or go on with what is whole in them: --skip-unreadable"])
    return images, problems


def _fetched_folders(folder: Path) -> list[Path]:
    """Find the folders into which img2dataset wrote images as files: ``00000`` beside ``00000_stats.json``."""
    shards = (path.with_name(path.name.removesuffix(STATS)) for path in sorted(folder.glob(f"*{STATS}")))
    return [shard.resolve() for shard in shards if shard.is_dir()]


def index_images(tars: Sequence[Path], work: Path, fetched: Sequence[Path] = ()) -> Path:
    """Write an SQLite file that leads from names and URL digests of images to where they lie.

    Args:
        tars: of images.
        fetched: folders of images with a ``.json`` beside each that tells its URL.

    Raises:
        UserError: it cannot be written.
    """
    places = [*tars, *fetched]
    listing = repr([(os.fsencode(place), place.stat().st_size, place.stat().st_mtime_ns) for place in places])
    path = work / f"images-{hashlib.sha256(listing.encode()).hexdigest()[:16]}.sqlite"
    if path.exists():
        return path
    work.mkdir(parents=True, exist_ok=True)
    partial = partial_name(path)
    partial.unlink(missing_ok=True)
    try:
        with _full_disk_as_os_error(partial), closing(sqlite3.connect(partial)) as database:
            database.executescript(SCHEMA)
            for number, tar in enumerate(tars):
                database.execute("INSERT INTO tars VALUES (?, ?, '')", (number, os.fsencode(tar)))
                _index_tar(database, number, tar)
            for folder in fetched:
                _index_fetched(database, folder)
            database.execute(
                "INSERT INTO flat SELECT NOT EXISTS (SELECT 1 FROM names WHERE instr(key, x'2f') < length(key))"
            )
            database.commit()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


@contextmanager
def _full_disk_as_os_error(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        code = errno.ENOSPC if error.sqlite_errorcode == sqlite3.SQLITE_FULL else errno.EIO
        raise OSError(code, str(error), str(path)) from error


def _index_tar(database: sqlite3.Connection, number: int, tar: Path) -> None:
    """Index names and URLs of one tar; what is whole in a damaged one is indexed and its problem noted."""
    names: dict[bytes, Location] = {}
    urls: dict[bytes, Location] = {}
    key, url, image = "", None, None
    try:
        for sample, suffix, member, its_url in _members_in(tar):
            if sample != key:
                key, url, image = sample, None, None
            location = number, member.offset_data, member.size
            names[_key(_steps_of(member.name.lstrip("/")))] = location
            image = location if suffix in IMAGE_SUFFIXES else image
            url = its_url or url
            if url and image:
                urls[url_digest(url).encode()] = image
    except (OSError, tarfile.TarError, ValueError) as error:
        problem = printable(f"--images {tar}: cannot be read to its end: {error}")
        database.execute("UPDATE tars SET problem = ? WHERE number = ?", (problem, number))
    database.executemany("INSERT INTO names VALUES (?, ?, ?, ?)", ((name, *member) for name, member in names.items()))
    database.executemany(
        "INSERT OR IGNORE INTO urls VALUES (?, ?, ?, ?)", ((digest, *member) for digest, member in urls.items())
    )


def _index_fetched(database: sqlite3.Connection, folder: Path) -> None:
    """Index the URLs of images that lie in a folder; each is entered as a tar that holds nothing else."""
    ((number,),) = database.execute("SELECT coalesce(max(number), -1) FROM tars")
    for about in sorted(folder.glob("*.json")):
        url = _url_in(about.read_bytes())
        image = next((path for suffix in IMAGE_SUFFIXES if (path := about.with_suffix(f".{suffix}")).is_file()), None)
        if url is not None and image is not None:
            number += 1
            database.execute("INSERT INTO tars VALUES (?, ?, '')", (number, os.fsencode(image)))
            place = url_digest(url).encode(), number, 0, image.stat().st_size
            database.execute("INSERT OR IGNORE INTO urls VALUES (?, ?, ?, ?)", place)


def _members_in(tar: Path) -> Iterator[tuple[str, str, tarfile.TarInfo, str | None]]:
    """Yield key, suffix and header of a tar's files; of ``.json`` files also the URL in them."""
    size = tar.stat().st_size
    # Tars may be joined end to end, and damage costs only what is damaged.
    with tarfile.open(tar, "r:", ignore_zeros=True) as opened:
        for member in opened:
            opened.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
            try:
                placed = key_and_suffix_of(member, size)
            except ValueError:
                if member.offset_data + member.size > size:
                    raise
                continue  # sparse or too large
            if placed is not None:
                file = opened.extractfile(member) if placed[1] == "json" else None
                yield *placed, member, _url_in(file.read()) if file else None


def _url_in(data: bytes) -> str | None:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        return None
    url = record.get("url") if isinstance(record, dict) else None
    return url if isinstance(url, str) else None


def _steps_of(name: str) -> tuple[bytes, ...]:
    """Split a name into folders and file, as the disk knows them; empty where it leads out or names no file."""
    path = PurePosixPath(name)
    if "\0" in name or path.is_absolute() or ".." in path.parts:
        return ()
    try:
        return tuple(os.fsencode(step) for step in path.parts)
    except UnicodeEncodeError:  # half a surrogate pair
        return ()


def _key(steps: Sequence[bytes]) -> bytes:
    """Write a name from its end: all keys that begin with it are those of names that end in this one."""
    return b"".join(step + b"/" for step in reversed(steps))


def _read_inside(folder: Path, steps: tuple[bytes, ...]) -> bytes | None:
    """Read a regular file of a folder; None when there is none, or a link leads out of the folder.

    Raises:
        BadSampleError: it cannot be read.
    """
    root = os.path.realpath(os.fsencode(folder)).rstrip(b"/") + b"/"
    with _one_files_errors():
        try:
            path = os.path.realpath(root + b"/".join(steps), strict=True)
        except OSError as error:
            if error.errno in ABSENT:
                return None
            raise
    return read_plain_file(path) if path.startswith(root) else None


def read_plain_file(path: Path | bytes) -> bytes | None:
    """Read a regular file, through links; None when there is none.

    Raises:
        BadSampleError: it cannot be read.
    """
    with _one_files_errors():
        try:
            if not os.path.isfile(path):
                return None
            with open(path, "rb") as file:
                data = file.read(MAX_MEMBER_BYTES + 1)
        except OSError as error:
            if error.errno in ABSENT:
                return None
            raise
        except ValueError:  # a zero byte in the name
            return None
    if len(data) > MAX_MEMBER_BYTES:
        raise BadSampleError("an image file that is too large")
    return data


@contextmanager
def _one_files_errors() -> Iterator[None]:
    """Tell errors of a single file from those of the machine. Raises: BadSampleError, or OSError for the latter."""
    try:
        yield
    except OSError as error:
        if error.errno in UNREADABLE:
            raise BadSampleError("an image that cannot be read") from None
        raise
