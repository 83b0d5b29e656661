"""Turn any published format into shards: ``python -m lcl_ds.data build``.

One source file is one unit of work. A finished unit lies whole in ``OUT/.build``, so a build that was killed, or whose
disk was full, goes on with the next one; when all are there, their shards are put in place, without duplicates where
that is asked for. What comes out depends on the sources and settings alone, to the byte: not on workers, kills or order
of completion.
"""

import hashlib
import json
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from webdataset import TarWriter

from lcl_ds.data.corpora import READERS
from lcl_ds.data.corpora.local_images import open_images
from lcl_ds.data.corpora.record import IMAGE_MEMBERS, ReadOptions, SourceDocument
from lcl_ds.data.corpora.tars import read_tar
from lcl_ds.data.documents import MAX_TEXT_BYTES, BadSampleError, document_of, text_bytes
from lcl_ds.data.images import check_image
from lcl_ds.data.shards.shard import index_shard
from lcl_ds.data.shards.storage import INDEX_SUFFIX, expand_paths, is_remote
from lcl_ds.data.shards.tar_members import COMPRESSED
from lcl_ds.errors import UserError
from lcl_ds.files import PARTIAL, naming, only_one, printable, write_whole, writing

VERSION = 2
WORK, MANIFEST, LIST = ".build", "manifest.json", "shards.txt"
SETTINGS, UNIT, HASHES = "settings.json", "unit.json", "hashes"
REPORT_EVERY = 64
"""Documents between two reports of a worker."""
EXAMPLES = 3
"""Keys of records that are kept for each reason why something was left out."""


@dataclass(frozen=True)
class Job:
    """One source file."""

    number: int
    source: Path
    identity: list[int]
    """See :func:`_identity`; of the time before it is read."""
    format: str
    options: ReadOptions
    shard_samples: int
    work: Path

    @property
    def folder(self) -> Path:
        """The folder in which its finished shards wait."""
        return self.work / f"{self.number:06d}"


@dataclass(frozen=True)
class Built:
    """What :func:`build` leaves."""

    manifest: dict[str, Any]
    is_new: bool
    """False: a finished build was found and nothing was done."""


def local_files(patterns: Sequence[str]) -> list[Path]:
    """List the files that paths, globs, braces and lists name.

    Raises:
        UserError: there are none, or no plain files; says what to do.
    """
    _refuse_streams(patterns)
    locations = expand_paths(patterns)
    _refuse_streams(locations)
    for path in map(Path, locations):
        if path.is_dir():
            raise UserError(f"{path}: is a folder; name its files, as in '{path}/*'")
        if not path.is_file():
            raise UserError(f"{path}: is not a plain file; write its content to a file and name that")
    return [Path(location) for location in locations]


def _refuse_streams(locations: Iterable[str]) -> None:
    for location in locations:
        if location.startswith("pipe:"):
            raise UserError(f"{location}: build reads files; write the command's output to one and name that")
        if is_remote(location):
            raise UserError(f"{location}: build reads local files; download it and name the copy")


def build(
    sources: list[Path],
    out: Path,
    format: str,
    options: ReadOptions,
    images: Sequence[Path] = (),
    *,
    workers: int = 1,
    shard_samples: int = 1000,
    deduplicate: bool = False,
    skip_unreadable: bool = False,
    console: Console | None = None,
) -> Built:
    """Write shards, their indices, a list of them and a manifest.

    Args:
        sources: files, in order.
        out: a folder; one that holds an unfinished build of the same is continued.
        images: folders and tars of the images that the format names by file or URL.
        workers: processes.
        deduplicate: of documents with the same texts and images in the same order, keep the first.
        skip_unreadable: go on without source files that cannot be read, and name them in the manifest.

    Raises:
        UserError: the folder holds something else; a source cannot be read; nothing came of them all.
        OSError: the machine cannot do it; what is finished stays, what is not is removed.
    """
    settings = {
        "version": VERSION,
        "format": format,
        "sources": [os.path.abspath(source) for source in sources],
        "images": [[os.path.abspath(place), *(_identity(place) if place.is_file() else [])] for place in images],
        "options": {k: v for k, v in asdict(options).items() if k != "images"},
        "shard_samples": shard_samples,
        "deduplicate": deduplicate,
    }
    finished = _finished(out, settings, sources)
    if finished is not None:
        return Built(finished, is_new=False)
    _claim(out, settings)
    work = out / WORK
    with only_one(work / "build"):
        finished = _finished(out, settings, sources)  # another process may have been at it meanwhile
        if finished is not None:
            shutil.rmtree(work, ignore_errors=True)
            return Built(finished, is_new=False)
        _remove_parts(out)
        try:
            found, image_problems = open_images(images, work, skip_unreadable)
            options = replace(options, images=found)
            jobs = [
                Job(number, source, _identity(source), format, options, shard_samples, work)
                for number, source in enumerate(sources)
            ]
            _run([job for job in jobs if _unit(job) is None], len(jobs), workers, console)
            units = [_unit(job) or {} for job in jobs]
            _refuse_problems(jobs, units, out, skip_unreadable)
            manifest = _publish(jobs, units, out, settings, image_problems)
        except BaseException:
            _remove_parts(out)
            if not any(path.name[:1].isdigit() or path.suffix == ".sqlite" for path in work.glob("*")):
                _give_up(out)  # nothing was finished, so the next try may be of something else
            raise
        shutil.rmtree(work)
    return Built(manifest, is_new=True)


def _identity(path: Path) -> list[int]:
    """Say what a file is recognised by besides its path: bytes, and nanoseconds of its last change."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _finished(out: Path, settings: dict[str, Any], sources: list[Path]) -> dict[str, Any] | None:
    """Read the manifest of a finished build; None where there is none.

    Raises:
        UserError: it is of other sources or settings, or its sources or shards are no longer what they were.
    """
    manifest = _read_json(out / MANIFEST)
    if manifest is None or "settings" not in manifest:
        return None
    difference = _difference(manifest["settings"], settings)
    if difference:
        raise UserError(f"{out}: it holds a finished build of other {difference}; name a new folder")
    units = zip(manifest["sources"], sources, strict=True)
    newer = [source for unit, source in units if unit["identity"] != _identity(source)]
    if newer:
        raise UserError(
            f"{out}: it holds a finished build, but {len(newer)} of its {len(sources)} sources changed since, the "
            f"first {newer[0]}; name a new folder to build again"
        )
    changed = [name for name, facts in manifest["shards"].items() if not _is_unchanged(out / name, facts)]
    if changed:
        raise UserError(
            f"{out}: it holds a finished build, but {len(changed)} of its {len(manifest['shards'])} shards are gone "
            f"or changed, the first {changed[0]}; name a new folder, or remove this one to build again"
        )
    return manifest


def _is_unchanged(shard: Path, facts: dict[str, Any]) -> bool:
    try:
        return shard.stat().st_size == facts["bytes"] and index_shard(shard).fingerprint() == facts["layout"]
    except (FileNotFoundError, UserError):
        return False


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder this build's.

    Raises:
        UserError: it is a file, or holds something else.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; name a new folder")
    saved = _read_json(out / WORK / SETTINGS)
    if saved is None:
        if out.exists() and any(path.name != WORK for path in out.iterdir()):
            raise UserError(f"{out}: it is not empty and holds no build that could go on; name a new folder")
        try:
            (out / WORK).mkdir(parents=True, exist_ok=True)
            write_whole(out / WORK / SETTINGS, json.dumps(settings))
        except BaseException:
            _give_up(out)
            raise
    elif difference := _difference(saved, settings):
        raise UserError(f"{out}: it holds an unfinished build of other {difference}; name a new folder")


def _difference(saved: dict[str, Any], settings: dict[str, Any]) -> str:
    """Say what differs between the saved settings of a build and others; empty where nothing does."""
    old, new = ({**values, **values.get("options", {})} for values in (saved, _as_json(settings)))
    names = [name for name in new if name != "options" and old.get(name) != new[name]]
    return f"sources or settings ({', '.join(names)})" if names else ""


def _remove_parts(out: Path) -> None:
    """Remove what an attempt left half done; only for the process that holds the lock."""
    for folder in (out, out / WORK):
        with suppress(OSError):  # what cannot be removed now is removed at the next start
            for path in folder.iterdir():
                if folder != out and path.is_dir() and path.suffix:
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name.startswith(".") and path.suffix == PARTIAL:
                    path.unlink(missing_ok=True)


def _give_up(out: Path) -> None:
    """Leave nothing of a build that finished nothing."""
    shutil.rmtree(out / WORK, ignore_errors=True)
    with suppress(OSError):  # it is not there or not empty; the first error is the one to report
        out.rmdir()


def _as_json(value: dict[str, Any]) -> Any:
    """Convert a value to what it is after it was saved as JSON: tuples become lists."""
    return json.loads(json.dumps(value))


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        read = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return read if isinstance(read, dict) else None


def _unit(job: Job) -> dict[str, Any] | None:
    """Read what is known of a finished source file; None where it must be read, or read again because it changed."""
    unit = _read_json(job.folder / UNIT)
    hashes = job.folder / HASHES
    if (
        unit is None
        or unit["identity"] != job.identity
        or not hashes.is_file()
        or hashes.stat().st_size != 16 * unit["samples"]
    ):
        return None
    return unit


def _refuse_problems(jobs: list[Job], units: list[dict[str, Any]], out: Path, skip_unreadable: bool) -> None:
    """Refuse sources that cannot be read, unless they may be skipped, and a build that gives nothing.

    Raises:
        UserError: names each source, or the commonest reasons.
    """
    problems = [unit["problem"] for unit in units if unit["problem"]]
    is_empty = not any(unit["samples"] for unit in units)
    if is_empty or (problems and not skip_unreadable):
        for job, unit in zip(jobs, units, strict=True):
            if is_empty or unit["problem"]:
                shutil.rmtree(job.folder)  # so that it is read again, repaired or with other settings
    if problems and not skip_unreadable:
        raise UserError([*problems, "repair these sources, or go on without them: --skip-unreadable"])
    if is_empty:
        skips: Counter[str] = Counter()
        for unit in units:
            skips.update(unit["skips"])
        most = [f"{count} times {reason}" for reason, count in skips.most_common(5)] or ["nothing"]
        raise UserError([f"{out}: the sources gave no documents; left out were:", *problems, *most])


def _run(jobs: list[Job], total: int, workers: int, console: Console | None) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[documents]} documents"), console=console) as bar:
        task = bar.add_task("source files", total=total, completed=total - len(jobs), documents=0)
        context = get_context("spawn")
        counter = context.Value("q", 0)
        if workers <= 1:
            _start_worker(counter, watch=False)
            for job in jobs:
                _build_unit(job)
                bar.update(task, advance=1, documents=counter.value)
            return
        with ProcessPoolExecutor(workers, context, _start_worker, (counter, True)) as pool:
            futures = [pool.submit(_build_unit, job) for job in jobs]
            try:
                for future in as_completed(futures):
                    future.result()
                    bar.update(task, advance=1, documents=counter.value)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


_counter: Any = None


def _start_worker(counter: Any, watch: bool) -> None:
    global _counter
    _counter = counter
    if watch:
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this worker when its build was killed: it would wait for work forever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _build_unit(job: Job) -> None:
    partial = job.folder.with_suffix(f".{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        findings = _Findings()
        problem = None
        try:
            with _ShardFiles(partial, job) as files:
                _write_documents(job, files, findings)
        except UserError as error:
            problem = printable(str(error))
        write_whole(partial / HASHES, b"".join(findings.hashes))
        write_whole(partial / UNIT, json.dumps(findings.as_dict(job, problem)))
        shutil.rmtree(job.folder, ignore_errors=True)
        partial.rename(job.folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@dataclass
class _Findings:
    """What came of one source file."""

    hashes: list[bytes] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    skips: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    longest_text_bytes: int = 0

    def add(self, document: SourceDocument) -> None:
        """Count a document that was written."""
        self.hashes.append(content_hash(document))
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
            "source": printable(job.source.name),
            "identity": job.identity,
            "samples": len(self.hashes),
            **{name: self.counts[name] for name in ("records", "incomplete", "documents", "pairs", "images")},
            "longest_text_bytes": self.longest_text_bytes,
            "skips": dict(sorted(self.skips.items())),
            "examples": dict(sorted(self.examples.items())),
            "problem": problem,
        }


def _write_documents(job: Job, files: "_ShardFiles", findings: _Findings) -> None:
    """Raises: UserError when the source cannot be read or holds nothing."""
    _refuse_compressed(job.source)
    for document in READERS[job.format](job.source, job.options):
        reasons = list(document.skips)
        if document.texts:
            key = f"{job.number:06d}-{len(findings.hashes):08d}"
            try:
                files.write(key, _checked_members(document, key, job.options))
            except BadSampleError as problem:
                reasons.append(problem.reason)
            else:
                findings.add(document)
        findings.leave_out(document.key, reasons)
        findings.counts["records"] += 1
        if findings.counts["records"] % REPORT_EVERY == 0:
            with _counter.get_lock():
                _counter.value += REPORT_EVERY
    if not findings.counts["records"]:
        raise UserError(f"{job.source}: it holds no records")


def _refuse_compressed(source: Path) -> None:
    try:
        with source.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error.strerror or error}") from error
    for start, name in COMPRESSED.items():
        if head.startswith(start):
            raise UserError(f"{source}: it is compressed with {name}; unpack it and name the unpacked file")


def _checked_members(document: SourceDocument, key: str, options: ReadOptions) -> dict[str, bytes]:
    """Make the members of a sample, and check that training's own reader takes them.

    Raises:
        BadSampleError: it would refuse them.
    """
    members = to_members(document, key)
    sizes = {suffix: len(data) for suffix, data in members.items()}
    document_of(key, sizes, members.__getitem__, options.max_text_bytes)
    return members


class _ShardFiles:
    """Writes samples to one tar after another."""

    def __init__(self, folder: Path, job: Job):
        self.folder, self.job = folder, job
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
        part, place = divmod(self.written, self.job.shard_samples)
        if place == 0:
            self._finish()
            self.path = self.folder / f"{self.job.number:06d}-{part:05d}.tar"
            self.file = self.path.open("wb")
            self.writer = shard_writer(self.file)
        assert self.writer is not None
        with naming(self.path):
            self.writer.write({"__key__": key, **members})
        self.written += 1


def shard_writer(file: IO[bytes]) -> TarWriter:
    """Open webdataset's writer of samples whose members are bytes; times and owners would make two builds differ."""
    return TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False)


def to_members(document: SourceDocument, key: str) -> dict[str, bytes]:
    """Turn a document into the members of a sample, by suffix; a pair becomes what img2dataset writes."""
    members: dict[str, bytes] = {}
    names: list[str | None] = []
    for image in document.images:
        suffix = IMAGE_MEMBERS[check_image(image, decode=False).format] if image is not None else ""
        name = None if image is None else suffix if document.is_pair else f"{len(members):03d}.{suffix}"
        names.append(name)
        if name is not None and image is not None:
            members[name] = image
    about: dict[str, Any] = {"source_key": document.key, "url": document.url}
    if document.is_pair:
        caption = next(text for text in document.texts if text is not None)
        record = {**about, "caption": caption, "key": key, "status": "success"}
        return {**members, "json": _dump(record), "txt": caption.encode()}
    record = {**about, "texts": document.texts, "images": names}
    if any(match is not None for match in document.matched_text_index):
        record["matched_text_index"] = document.matched_text_index
    if any(similarity is not None for similarity in document.matched_sim):
        record["matched_sim"] = document.matched_sim
    return {**members, "json": _dump(record)}


def _dump(record: dict[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode()


def content_hash(document: SourceDocument) -> bytes:
    """Hash a document to 16 bytes: equal texts and images in the same order give equal bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for text, image in zip(document.texts, document.images, strict=True):
        content = image if text is None else text.encode()
        assert content is not None
        digest.update((b"i" if text is None else b"t") + len(content).to_bytes(8, "little") + content)
    return digest.digest()


def first_of_each(hashes: np.ndarray) -> np.ndarray:
    """Mark the rows of uint64 [N, 2] that have no equal row before them: bool [N]."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: equal rows stay in their order
    ordered = hashes[order]
    first = np.ones(len(hashes), dtype=bool)
    first[order[1:]] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return first


def _publish(
    jobs: list[Job], units: list[dict[str, Any]], out: Path, settings: dict[str, Any], image_problems: list[str]
) -> dict[str, Any]:
    """Put all shards in place. May be killed and run again at any point."""
    hashes = np.concatenate([_hashes(job) for job in jobs])
    keep = first_of_each(hashes) if settings["deduplicate"] else np.ones(len(hashes), dtype=bool)
    shards: dict[str, Any] = {}
    start = 0
    for job, unit in zip(jobs, units, strict=True):
        end = start + unit["samples"]
        for part, place in enumerate(range(start, end, job.shard_samples)):
            name = f"{job.number:06d}-{part:05d}.tar"
            kept = keep[place : min(place + job.shard_samples, end)]
            if not kept.any():
                continue
            _put_in_place(job.folder / name, out / name, kept)
            shard = index_shard(out / name)
            if shard.sample_count != kept.sum():
                raise UserError(
                    f"{out}: its sources changed while its shards were put in place; remove it and build again"
                )
            shards[name] = {
                "samples": shard.sample_count,
                "bytes": (out / name).stat().st_size,
                "layout": shard.fingerprint(),
            }
        start = end
    skips: Counter[str] = Counter()
    for unit in units:
        skips.update(unit["skips"])
    manifest = {
        "settings": _as_json(settings),
        "samples": int(keep.sum()),
        "duplicates": int((~keep).sum()),
        "longest_text_bytes": max(unit["longest_text_bytes"] for unit in units),
        "skips": dict(sorted(skips.items())),
        "image_problems": [printable(problem) for problem in image_problems],
        "sources": units,
        "shards": shards,
    }
    for path in out.glob("[0-9]*-[0-9]*.tar*"):
        if path.name.removesuffix(INDEX_SUFFIX) not in shards:
            path.unlink()  # of an interrupted try, and of a source that has changed since
    write_whole(out / LIST, "".join(f"{name}\n" for name in shards))
    write_whole(out / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return manifest


def _hashes(job: Job) -> np.ndarray:
    """uint64 [N, 2]"""
    return np.frombuffer((job.folder / HASHES).read_bytes(), dtype="<u8").reshape(-1, 2)


def _put_in_place(staged: Path, final: Path, kept: np.ndarray) -> None:
    if not staged.exists():
        return  # an earlier try got this far
    if kept.all():
        staged.replace(final)
        return
    with writing(final) as file, shard_writer(file) as writer:
        for wanted, (key, parts) in zip(kept, read_tar(staged), strict=True):
            if isinstance(parts, BadSampleError):
                raise UserError(f"{staged}: it was damaged since it was written; remove it and build again")
            if wanted:
                writer.write({"__key__": key, **parts})
    staged.unlink()


def text_limit_of(shard: str) -> int:
    """Say how many bytes of text a document of a shard may have; a build records a limit other than the usual one."""
    manifest = (None if is_remote(shard) else _read_json(Path(shard).parent / MANIFEST)) or {}
    shards, longest = manifest.get("shards"), manifest.get("longest_text_bytes")
    if isinstance(shards, dict) and Path(shard).name in shards and isinstance(longest, int):
        return max(MAX_TEXT_BYTES, longest)
    return MAX_TEXT_BYTES
