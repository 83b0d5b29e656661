"""Read one input file and write its documents as shards: the unit of work of a build.

A finished unit is a folder with the shards of one input file, ``unit.json``, which says what came of it, and the hashes
of its documents. Units know nothing of each other, so any process can make any of them, in any order.
"""

import json
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from webdataset import TarWriter

from lcl_ds.data.corpora import READERS
from lcl_ds.data.corpora.build_folder import WORKERS, read_object
from lcl_ds.data.corpora.inputs import Input
from lcl_ds.data.corpora.record import RawDocument, ReadOptions
from lcl_ds.data.corpora.samples import HASH_COLUMNS, checked_members, hash_document, is_held_out, shard_writer
from lcl_ds.data.documents import BadSampleError, text_bytes
from lcl_ds.data.shards.tar_members import COMPRESSED
from lcl_ds.errors import UserError
from lcl_ds.files import naming, one_of_many, printable, write_whole

UNIT, HASHES = "unit.json", "hashes"
HELD_OUT_TAR = "heldout.tar"
EXAMPLES = 3
"""Keys of records that are kept for each reason why something was left out."""


@dataclass(frozen=True)
class Job:
    """One input file, or a part of a folder, and how it is to be read."""

    number: int
    input: Input
    identity: list[int]
    """See :meth:`lcl_ds.data.corpora.inputs.Input.identity`; of the time before it is read."""
    format: str
    options: ReadOptions
    shard_samples: int
    holdout: float
    work: Path

    @property
    def folder(self) -> Path:
        """Name the folder in which its finished shards wait."""
        return self.work / f"{self.number:06d}"

    def shard_name(self, number: int) -> str:
        """Name one of its shards, so that names of all jobs sort as the documents do."""
        return f"{self.number:06d}-{number:05d}.tar"


def finished_unit(job: Job) -> dict[str, Any] | None:
    """Read what came of a finished input file; None where it must be read, or read again because it changed."""
    unit = read_object(job.folder / UNIT)
    hashes = job.folder / HASHES
    if (
        unit is None
        or unit["identity"] != job.identity
        or not hashes.is_file()
        or hashes.stat().st_size != 8 * HASH_COLUMNS * unit["samples"]
    ):
        return None
    return unit


def hashes_of(job: Job) -> np.ndarray:
    """Read the hashes of all N documents of a finished unit: uint64 [N, 3]; see :func:`hash_document`."""
    return np.frombuffer((job.folder / HASHES).read_bytes(), dtype="<u8").reshape(-1, HASH_COLUMNS)


_counter: Any = None
"""Of this process; see :func:`count_with`."""
_lock: Any = None
"""Of this process where it is a worker; see :func:`start_worker`."""


def count_with(counter: Any) -> None:
    """Let this process add the documents that it reads to a counter that others share."""
    global _counter
    _counter = counter


def start_worker(counter: Any, work: Path, build: int) -> None:
    """Prepare a process of its own to make units for the build that runs as process ``build``, and to end with it.

    It holds the lock of workers from before it looks whether the build still runs, so the next try in this folder
    (:func:`lcl_ds.data.corpora.build_folder.attempt`) waits until no worker of a killed one can write there.

    Args:
        counter: of documents, see :func:`count_with`.
        work: the build's work folder.
    """
    global _lock
    _lock = one_of_many(work / WORKERS)
    count_with(counter)
    if os.getppid() != build:
        os._exit(1)
    threading.Thread(target=_end_with, args=(build,), daemon=True).start()


def _end_with(build: int) -> None:
    """End this worker when its build was killed: it would wait for work forever."""
    while os.getppid() == build:
        time.sleep(1)
    os._exit(1)


def build_unit(job: Job) -> None:
    """Read one input file and put its folder in place; an input file that cannot be read gives a unit that says so.

    Raises:
        OSError: the machine cannot do it; nothing is left of the unit.
    """
    partial = job.folder.with_suffix(f".{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        tally = _Tally()
        problem = None
        try:
            with _ShardFiles(partial, job) as files, _ShardFiles(partial, job, HELD_OUT_TAR) as held_out:
                _write_documents(job, files, held_out, tally)
        except UserError as error:
            problem = printable(str(error))
        write_whole(partial / HASHES, b"".join(tally.hashes))
        write_whole(partial / UNIT, json.dumps(tally.as_dict(job, problem)))
        shutil.rmtree(job.folder, ignore_errors=True)
        partial.rename(job.folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@dataclass
class _Tally:
    """What came of one input file."""

    hashes: list[bytes] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    skips: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    longest_text_bytes: int = 0

    def add(self, document: RawDocument, digest: bytes) -> None:
        """Count a document that was written, with its hash."""
        self.hashes.append(digest)
        self.counts["pairs" if document.is_pair else "documents"] += 1
        self.counts["images"] += sum(image is not None for image in document.images)
        length = text_bytes(text for text in document.texts if text is not None)
        self.longest_text_bytes = max(self.longest_text_bytes, length)

    def leave_out(self, key: str, reasons: Iterable[str]) -> None:
        """Count what a record lost, or why it was lost as a whole."""
        lost = list(reasons)
        self.counts["incomplete"] += bool(lost)
        for reason in lost:
            self.skips[reason] += 1
            examples = self.examples.setdefault(reason, [])
            if len(examples) < EXAMPLES and key not in examples:
                examples.append(key)

    def as_dict(self, job: Job, problem: str | None) -> dict[str, Any]:
        """Convert to JSON; ``incomplete`` counts the records of which something or everything was left out."""
        return {
            "source": printable(job.input.path.name),
            "identity": job.identity,
            "samples": len(self.hashes),
            **{name: self.counts[name] for name in ("records", "incomplete", "documents", "pairs", "images")},
            "longest_text_bytes": self.longest_text_bytes,
            "skips": dict(sorted(self.skips.items())),
            "examples": dict(sorted(self.examples.items())),
            "problem": problem,
        }


def _write_documents(job: Job, files: "_ShardFiles", held_out: "_ShardFiles", tally: _Tally) -> None:
    """Write every document that can be used. Raises: UserError when the input file cannot be read or holds nothing."""
    path = job.input.path
    if not job.input.names:
        _refuse_compressed(path)
    for document in READERS[job.format](path, replace(job.options, names=job.input.names)):
        reasons = list(document.skips)
        if document.texts:
            key = f"{job.number:06d}-{len(tally.hashes):08d}"
            digest = hash_document(document)
            out = held_out if is_held_out(np.frombuffer(digest, "<u8"), job.holdout) else files
            try:
                out.write(key, checked_members(document, key, job.options.max_text_bytes))
            except BadSampleError as problem:
                reasons.append(problem.reason)
            else:
                tally.add(document, digest)
                with _counter.get_lock():
                    _counter.value += 1
        tally.leave_out(document.key, reasons)
        tally.counts["records"] += 1
    if not tally.counts["records"]:
        raise UserError(f"{path}: it holds no records")


def _refuse_compressed(input_file: Path) -> None:
    try:
        with input_file.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise UserError(f"{input_file}: cannot be read: {error.strerror or error}") from error
    for start, name in COMPRESSED.items():
        if head.startswith(start):
            raise UserError(f"{input_file}: it is compressed with {name}; unpack it and name the unpacked file")


class _ShardFiles:
    """Writes samples to one tar after another.

    Args:
        name: of a single tar that takes them all; None: shards of as many samples as the job says.
    """

    def __init__(self, folder: Path, job: Job, name: str | None = None):
        self.folder, self.job, self.name = folder, job, name
        self.written = 0
        self.path = folder
        self.file: IO[bytes] | None = None
        self.writer: TarWriter | None = None

    def __enter__(self) -> "_ShardFiles":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, UserError):
            self._finish()
        elif self.file is not None and self.writer is not None:
            for half_done in (self.writer, self.file):
                with suppress(OSError):  # the first error is the one to report
                    half_done.close()

    def _finish(self) -> None:
        if self.file is None or self.writer is None:
            return
        with naming(self.path), self.file:
            self.writer.close()
            self.file.flush()
            os.fsync(self.file.fileno())

    def write(self, key: str, members: dict[str, bytes]) -> None:
        """Write one sample. Raises: OSError, with a path."""
        shard, sample = divmod(self.written, self.job.shard_samples)
        if self.file is None or (sample == 0 and self.name is None):
            self._finish()
            self.path = self.folder / (self.name or self.job.shard_name(shard))
            self.file = self.path.open("wb")
            self.writer = shard_writer(self.file)
        assert self.writer is not None
        with naming(self.path):
            self.writer.write({"__key__": key, **members})
        self.written += 1
