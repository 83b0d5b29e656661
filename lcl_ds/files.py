"""Files and folders that are whole or not there, and what the system says about them, as sentences."""

import errno
import fcntl
import glob
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import yaml

from lcl_ds.errors import UserError

PARTIAL = ".partial"
"""Ends the names of files and folders that are being written."""

REMEDIES = {
    errno.ENOSPC: "no space is left on the disk; free some or name a place on another disk",
    errno.EDQUOT: "the disk quota is used up; free some space or name a place on another disk",
    errno.EFBIG: "the file would be larger than the system allows (see ulimit -f)",
    errno.EROFS: "the disk is read-only; name another place",
    errno.EACCES: "permission is denied; change the permissions or name another place",
    errno.EPERM: "the system does not permit it; change the permissions or name another place",
    errno.ENOENT: "there is no such file or folder; make it or correct the path",
    errno.ENOTDIR: "a part of the path is a file and no folder; correct the path",
    errno.EISDIR: "it is a folder; name a file",
    errno.EEXIST: "it exists already; name another place",
    errno.ENOTEMPTY: "the folder is not empty; name another place",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.ELOOP: "its symbolic links lead in a circle; correct the path",
    errno.EMFILE: "this process may open no more files; raise the limit (ulimit -n)",
    errno.ENFILE: "the system can open no more files; close other programs",
    errno.ENOMEM: "the system has no memory left; use fewer workers or close other programs",
    errno.EIO: "the disk reports an error; check it, or name a place on another disk",
    errno.ESTALE: "the file went away on its server; mount it again or start again",
    errno.ENODEV: "the disk is gone; mount it again",
    errno.ETIMEDOUT: "its server does not answer; try again later",
    errno.EBUSY: "another program holds it; end that or name another place",
    errno.ETXTBSY: "another program runs it; end that or name another place",
}
"""What is wrong and what to do, for errors that lie in the machine and not in this program."""


def shipped_folder(path: str) -> Path:
    """Find a folder of files that come with the program.

    Args:
        path: where it lies in a checkout, as ``launch/recipes``; an installed package has it inside as ``recipes``.
    """
    package = Path(__file__).resolve().parent
    installed = package / Path(path).name
    return installed if installed.is_dir() else package.parent / path


def shipped_file(kind: str, name_or_path: str, folder: Path, plural: str) -> Path:
    """Find a YAML file from its path, or from the name that it has in a folder of files that come with the program.

    Args:
        kind, plural: what such a file is called.

    Raises:
        UserError: there is no such file.
    """
    path = Path(name_or_path)
    if path.suffix not in {".yaml", ".yml"}:
        path = folder / f"{name_or_path}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise UserError(f"{kind} {name_or_path}: there is no such file; shipped {plural}: {known}")
    return path


def sentence_of(error: OSError) -> str | None:
    """Say what the machine's error means and what to do, with its path; None where it may be our own mistake."""
    remedy = REMEDIES.get(error.errno or 0)
    if remedy is None:
        return None
    paths = [
        printable(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))
    ]
    return f"{' -> '.join(paths)}: {remedy}" if paths else remedy


def printable(text: str) -> str:
    """Write a name from outside with line breaks, terminal commands and bytes that are no text written as escapes."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give the path to errors of the block that carry none, as those of ``write`` and ``fsync`` do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def system_error(error: Exception, path: Path) -> OSError | None:
    """Find the system's error in that of safetensors, which hides it in a sentence of its own; None: it has another
    cause."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1])), str(path)) if number else None


@contextmanager
def writing(path: Path, sync: bool = True) -> Iterator[IO[bytes]]:
    """Open a file beside ``path`` that becomes ``path`` when the block succeeds and is removed when it does not.

    Args:
        sync: wait for the disk; False for what is checked before it is believed, and quickly made again.

    Raises:
        OSError: with a path.
    """
    partial = partial_name(path)
    try:
        with naming(path):
            with partial.open("wb") as file:
                yield file
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            partial.replace(path)
    except BaseException:
        with suppress(OSError):  # the first error is the one to report
            partial.unlink()
        raise


def write_whole(path: Path, data: bytes | str, sync: bool = True) -> None:
    """Put a file in place in one step, flushed to disk, so that no reader ever sees a part of it.

    Text is written as UTF-8, and what is not valid Unicode, as parts of file names may be, escaped.

    Args:
        sync: see :func:`writing`.

    Raises:
        OSError: with a path; what was there before stays.
    """
    with writing(path, sync) as file:
        file.write(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Make a new folder beside ``out`` that becomes ``out`` when the block succeeds.

    When it does not, the folder is removed, with the parents that were made for it.

    Raises:
        UserError: ``out`` is a file, or a folder that is not empty.
        OSError: with a path.
    """
    check_new_folder(out)
    final = out.resolve()  # not a link, nor "."
    partial = partial_name(final)
    made = [parent for parent in partial.parents if not parent.exists()]
    try:
        partial.mkdir(parents=True)
        with naming(out):
            yield partial
            if final.is_dir():
                final.rmdir()  # an empty one
            partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # never made, or in use by now
                parent.rmdir()
        raise


def check_new_folder(out: Path) -> None:
    """Refuse a folder that cannot be new. Raises: UserError when ``out`` is a file, or a folder that is not empty."""
    if out.is_dir():
        if any(out.iterdir()):
            raise UserError(f"{out}: is not empty; name a new folder")
    elif os.path.lexists(out):
        raise UserError(f"{out}: is a file; name a new folder")


def partial_name(path: Path) -> Path:
    """Name the file that ``path`` is written to before it is whole; another one in every process."""
    return path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")


@contextmanager
def plain_name(folder: Path) -> Iterator[Path]:
    """Give ``folder`` a name for libraries that read brackets and stars in a path as patterns, or take only Unicode."""
    name = str(folder)
    if name.isprintable() and glob.escape(name) == name:
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        link = Path(temporary) / "folder"
        link.symlink_to(folder.resolve(), target_is_directory=True)
        yield link


def check_writable(folder: Path) -> None:
    """Make a folder, with its parents, and try to write a file there.

    Raises:
        UserError: it cannot be done, and why.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Process numbers repeat: ranks on many hosts may try one folder at once.
        probe = folder / f".writable.{secrets.token_hex(8)}"
        probe.write_bytes(b"\n")
        probe.unlink()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to: {sentence_of(error) or error}") from error


def check_output(option: str, path: Path | None, folder: bool = False) -> None:
    """Try, before the work, whether the file (or the folder) of a command's option can be written; None: not asked for.

    Raises:
        UserError: names the option.
    """
    if path is None:
        return
    if not folder and path.is_dir():
        raise UserError(f"{option} {path}: is a folder; name a file")
    try:
        check_writable(path if folder else path.parent)
    except UserError as error:
        raise UserError(f"{option}: {error}") from error


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Hold the lock that belongs to a path; other processes wait. Raises: OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path, fcntl.LOCK_EX):
        yield


def one_of_many(path: Path) -> IO[str]:
    """Hold the lock that belongs to a path together with others; :func:`only_one` waits for all of them.

    Returns:
        A file; the lock is held until it is closed or this process ends.

    Raises:
        OSError: the folder is not there, or its disk knows no locks.
    """
    return _locked(path, fcntl.LOCK_SH)


def _locked(path: Path, kind: int) -> IO[str]:
    lock = path.with_name(f".{path.name}.lock").open("w")
    fcntl.flock(lock, kind)
    return lock


def read_json(path: Path) -> Any:
    """Read the value in a JSON file.

    Raises:
        UserError: it is not there or is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON: {error}") from error


def read_yaml(path: Path) -> Any:
    """Read the value in a YAML file.

    Raises:
        UserError: it is not there or is not YAML.
    """
    try:
        return yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from error
