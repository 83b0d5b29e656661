"""Images on disk that documents name by file name or by URL."""

import hashlib
import json
import os
import sqlite3
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from lcl_ds.data.documents import IMAGE_SUFFIXES
from lcl_ds.data.shard_index import MAX_MEMBER_BYTES, member_place
from lcl_ds.errors import UserError


@dataclass(frozen=True)
class LocalImages:
    """Folders of image files, and tars of images by their index.

    A folder holds files by name, or named by the SHA-256 of their URL, with or without a suffix. In tars (as
    img2dataset writes them) an image is found by its member's name or by the ``url`` of the ``.json`` beside it.
    """

    folders: tuple[Path, ...] = ()
    index: Path | None = None
    """Made by :func:`index_images`."""

    def by_name(self, name: str) -> bytes | None:
        """An image by file name, which may have folders in it; None when there is none.

        Names come from outside: those that lead out of the folder find nothing.
        """
        if not _is_plain(name):
            return None
        for folder in self.folders:
            data = _read_inside(folder, name)
            if data is not None:
                return data
        return self._from_tars(PurePosixPath(name).name)

    def by_url(self, url: str, digest: str | None = None) -> bytes | None:
        """An image by its URL; None when there is none.

        Args:
            digest: the source's own hash of the URL, where it has one, by which files may be named too.
        """
        for name in [url_digest(url), *([digest] if digest and _is_plain(digest) else [])]:
            for folder in self.folders:
                for suffix in ("", *(f".{suffix}" for suffix in IMAGE_SUFFIXES)):
                    data = _read_inside(folder, name + suffix)
                    if data is not None:
                        return data
        return self._from_tars(url_digest(url))

    def _from_tars(self, name: str) -> bytes | None:
        if self.index is None:
            return None
        query = "SELECT tar, offset, size FROM images JOIN tars USING (number) WHERE name = ?"
        found = _database(self.index, os.getpid()).execute(query, (name,)).fetchone()
        if found is None:
            return None
        tar, offset, size = found
        with open(tar, "rb") as file:
            data = os.pread(file.fileno(), size, offset)
        return data if len(data) == size else None


@lru_cache
def _database(index: Path, pid: int) -> sqlite3.Connection:
    """The open index; a connection must not be shared with a forked process, hence ``pid``."""
    return sqlite3.connect(f"file:{index}?mode=ro&immutable=1", uri=True)


def url_digest(url: str) -> str:
    """By which an image is found whose URL is known."""
    return hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()


def open_images(places: Sequence[Path], work: Path) -> LocalImages:
    """Images of folders and tars; tars are indexed once into ``work``.

    Raises:
        UserError: a place that is not there, or a tar that cannot be read.
    """
    folders, tars = [], []
    for place in places:
        if place.is_dir():
            found = sorted(place.glob("*.tar"))
            tars += found
            folders += [] if found else [place]
        elif place.is_file():
            tars.append(place)
        else:
            raise UserError(f"--images {place}: no such file or folder")
    return LocalImages(tuple(folders), index_images(tars, work) if tars else None)


def index_images(tars: Sequence[Path], work: Path) -> Path:
    """Names and URL digests of the images in tars to their places, as an SQLite file.

    Raises:
        UserError: a tar that cannot be read.
    """
    listing = json.dumps([[str(tar.absolute()), tar.stat().st_size] for tar in tars])
    path = work / f"images-{hashlib.sha256(listing.encode()).hexdigest()[:16]}.sqlite"
    if path.exists():
        return path
    work.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.unlink(missing_ok=True)
    database = sqlite3.connect(partial)
    database.execute("PRAGMA journal_mode = OFF")
    database.execute("PRAGMA synchronous = OFF")
    database.execute("CREATE TABLE tars (number INTEGER PRIMARY KEY, tar TEXT)")
    database.execute(
        "CREATE TABLE images (name TEXT PRIMARY KEY, number INTEGER, offset INTEGER, size INTEGER) WITHOUT ROWID"
    )
    for number, tar in enumerate(tars):
        database.execute("INSERT INTO tars VALUES (?, ?)", (number, str(tar.absolute())))
        try:
            rows = ((name, number, offset, size) for name, offset, size in _images_in(tar))
            database.executemany("INSERT OR IGNORE INTO images VALUES (?, ?, ?, ?)", rows)
        except (OSError, tarfile.TarError, ValueError) as error:
            raise UserError(f"--images {tar}: cannot be read: {error}") from error
    database.commit()
    database.close()
    partial.replace(path)
    return path


def _images_in(tar: Path) -> Iterator[tuple[str, int, int]]:
    """(name or URL digest, offset, size) of the images in a tar."""
    size = tar.stat().st_size
    key, url = "", None
    places: list[tuple[str, int, int]] = []

    def named() -> Iterable[tuple[str, int, int]]:
        for name, offset, length in places:
            yield name, offset, length
            if url:
                yield url_digest(url), offset, length

    with tarfile.open(tar, "r:") as opened:
        for member in opened:
            placed = member_place(member, size)
            if placed is None:
                continue
            if placed[0] != key:
                yield from named()
                key, url, places = placed[0], None, []
            if placed[1] in IMAGE_SUFFIXES:
                places.append((PurePosixPath(member.name).name, member.offset_data, member.size))
            elif placed[1] == "json":
                file = opened.extractfile(member)
                url = _url_in(file.read()) if file else None
    yield from named()


def _url_in(data: bytes) -> str | None:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        return None
    url = record.get("url") if isinstance(record, dict) else None
    return url if isinstance(url, str) else None


def _is_plain(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(name) and "\0" not in name and not path.is_absolute() and ".." not in path.parts


def _read_inside(folder: Path, name: str) -> bytes | None:
    """A regular file of a folder; None when there is none, or a link leads out of the folder."""
    try:
        path = (folder / name).resolve(strict=True)
        if not path.is_relative_to(folder.resolve()) or not path.is_file() or path.stat().st_size > MAX_MEMBER_BYTES:
            return None
        return path.read_bytes()
    except OSError:
        return None
