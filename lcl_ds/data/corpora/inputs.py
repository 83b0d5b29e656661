"""List what a build reads: files, or folders of images that are cut into parts of about one shard each."""

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lcl_ds.data.documents import IMAGE_SUFFIXES
from lcl_ds.data.shards.storage import expand_paths, is_remote
from lcl_ds.errors import UserError
from lcl_ds.files import printable

CAPTION_SUFFIX = "txt"
PICTURE_SUFFIXES = {*IMAGE_SUFFIXES, "jfif", "heic", "heif", "avif", "jxl", "tif", "tiff", "svg", "psd"}
"""Names of pictures. Those that are not read are counted and named, too."""
TABLE_SUFFIXES = {".csv", ".tsv", ".jsonl"}
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
"""Names of the parts into which published data is split."""
FOLDERS = ("folder", "imagefolder")
"""Formats whose inputs are folders."""
FILES_OF_FOLDER = {"huggingface": ("parquet", "arrow")}
"""Formats whose input files may be named by their folder, and how those files end."""


@dataclass(frozen=True)
class Input:
    """What one unit of a build reads."""

    path: Path
    names: tuple[str, ...] = ()
    """Files below ``path`` where that is a folder."""

    def identity(self) -> list[int]:
        """Say what it is recognised by besides its path: bytes, and nanoseconds of the last change or a hash of both.

        Raises:
            OSError: the file is not there any more.
        """
        if not self.names:
            return identity(self.path)
        size, digest = 0, hashlib.blake2b(digest_size=7)
        for name in self.names:
            try:
                status = (self.path / name).stat()
                facts = status.st_size, status.st_mtime_ns
            except FileNotFoundError:  # a link that leads nowhere, or a file that went away
                facts = 0, 0
            size += facts[0]
            digest.update(repr((os.fsencode(name), *facts)).encode())
        return [size, int.from_bytes(digest.digest(), "little")]


def identity(path: Path) -> list[int]:
    """Say what a file is recognised by besides its path: bytes, and nanoseconds of its last change."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def inputs_of(paths: Sequence[Path], format: str, samples: int) -> list[Input]:
    """List what is to be read, unit by unit.

    Args:
        samples: of a shard; a part of a folder has as many.

    Raises:
        UserError: a folder holds nothing of the format; says what it holds.
    """
    if format not in FOLDERS:
        return [Input(path) for path in paths]
    return [part for path in paths for part in _parts(path, format, samples)]


def _parts(folder: Path, format: str, samples: int) -> list[Input]:
    """Cut a folder into parts, in an order that mixes its subfolders and depends on names alone."""
    groups = grouped(_files_below(folder))
    _check_folder(folder, format, groups)
    stems = sorted(groups, key=lambda stem: (hashlib.blake2b(os.fsencode(stem)).digest(), stem))
    parts = [stems[start : start + samples] for start in range(0, len(stems), samples)]
    return [Input(folder, tuple(name for stem in part for name in groups[stem])) for part in parts]


def grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Put names together that differ in their suffix alone, however umlauts are written; sorted within a group."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        stem = unicodedata.normalize("NFC", name[: -len(suffix_of(name)) - 1])
        groups.setdefault(stem, []).append(name)
    return groups


def suffix_of(name: str) -> str:
    """Return a name's suffix in small letters, without the dot."""
    return PurePosixPath(name).suffix[1:].lower()


def is_picture(name: str) -> bool:
    return suffix_of(name) in PICTURE_SUFFIXES


def _files_below(folder: Path) -> Iterator[str]:
    """Yield the pictures and what may belong to them; hidden files and folders are no part of a corpus.

    Links to folders are followed, but no folder is entered from within itself.
    """
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent) + os.sep
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith((".", "__MACOSX"))
            and not real.startswith(os.path.realpath(os.path.join(parent, name)) + os.sep)
        )
        for name in files:
            is_wanted = is_picture(name) or suffix_of(name) in (CAPTION_SUFFIX, "json")
            if is_wanted and not name.startswith("."):
                yield os.path.relpath(os.path.join(parent, name), folder)


def _check_folder(folder: Path, format: str, groups: dict[str, list[str]]) -> None:
    """Refuse a folder in which nothing is of the format. Raises: UserError, says what to do."""
    pictures = [stem for stem, names in groups.items() if any(map(is_picture, names))]
    if not pictures:
        raise UserError(f"{folder}: there are no images in it or below it; name a folder of images")
    first = {PurePosixPath(stem).parts[0] for stem in pictures if "/" in stem}
    if first and {name.lower() for name in first} <= SPLITS:
        raise UserError(
            f"{folder}: it holds the splits {', '.join(sorted(first))}; name one of them, as in {folder}/train"
        )
    if format == "imagefolder" and not first:
        raise UserError(f"{folder}: its images lie in no folders that could name their classes; use --format folder")
    suffixes = (suffix_of(name) for stem in pictures for name in groups[stem])
    if format == "folder" and CAPTION_SUFFIX not in suffixes:
        raise UserError(
            f"{folder}: none of its {len(pictures)} images has a caption beside it, as in {pictures[0]}.txt; "
            f"{_other_format(folder, bool(first))}"
        )


def _other_format(folder: Path, has_folders: bool) -> str:
    table = next((path for path in sorted(folder.iterdir()) if path.suffix.lower() in TABLE_SUFFIXES), None)
    if table is not None:
        return f"the captions may be in {table.name}: build {table} with --format {table.suffix[1:].lower()}"
    if has_folders:
        return "use --format imagefolder if its folders are classes, or csv where a table holds the captions"
    return "use --format csv where a table holds the captions"


def local_files(patterns: Sequence[str], format: str = "") -> list[Path]:
    """List the files that paths, globs, braces and lists name, or folders where the format is one of folders.

    Raises:
        UserError: there are none, or none that the format can be in; says what to do.
    """
    _refuse_streams(patterns)
    locations = expand_paths(patterns)
    _refuse_streams(locations)
    files: list[Path] = []
    for path in map(Path, locations):
        if format in FOLDERS:
            if not path.is_dir():
                raise UserError(f"{path}: is a file; --format {format} reads folders of images")
            files.append(path)
        elif path.is_dir() and format in FILES_OF_FOLDER:
            files += _files_of(path, FILES_OF_FOLDER[format])
        elif path.is_dir():
            raise UserError(f"{path}: is a folder; name its files, as in '{path}/*'")
        elif not path.is_file():
            raise UserError(f"{path}: is not a plain file; write its content to a file and name that")
        else:
            files.append(path)
    return files


def _files_of(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Find the files of a data set in its folder, without the caches that `datasets` leaves.

    Raises:
        UserError: there are none, or they are of several splits.
    """
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix[1:] in suffixes]
    files = sorted(path for path in files if not path.name.startswith(("cache-", ".")))
    if not files:
        raise UserError(
            f"{folder}: it holds no {' or '.join(f'.{suffix}' for suffix in suffixes)} files; correct the path"
        )
    splits = Counter(_split_of(path.relative_to(folder)) for path in files)
    if len(splits) > 1:
        split = next((name for name in splits if name.startswith("train")), next(iter(splits)))
        example = next(path for path in files if _split_of(path.relative_to(folder)) == split)
        named = example.parent if example.parent.name == split else f"{example.parent}/{split}-*"
        raise UserError(f"{folder}: it holds {', '.join(sorted(splits))}; name one of them, as in '{named}'")
    return files


def _split_of(path: Path) -> str:
    """Return the split that a file belongs to, by its folder or the beginning of its name; else the folder's name."""
    for word in (*path.parts[:-1], path.name.split("-")[0], path.stem):
        if word.lower() in SPLITS:
            return word
    return printable(str(path.parent)) if path.parent != Path() else "further files"


def _refuse_streams(locations: Iterable[str]) -> None:
    for location in locations:
        if location.startswith("pipe:"):
            raise UserError(f"{location}: build reads files; write the command's output to one and name that")
        if is_remote(location):
            raise UserError(f"{location}: build reads local files; download it and name the copy")
