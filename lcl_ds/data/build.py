"""Any published format to shards: ``python -m lcl_ds.data build``.

One source file is one unit of work. A finished unit lies whole in ``OUT/.build``, so a build that was killed goes on
with the next one; when all are there, their shards are put in place, without duplicates where that is asked for. What
comes out depends on the sources and settings alone, to the byte: not on workers, kills or order of completion.
"""

import hashlib
import io
import json
import os
import shutil
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lcl_ds.data.documents import BadSampleError
from lcl_ds.data.formats import READERS
from lcl_ds.data.formats.local_images import open_images
from lcl_ds.data.formats.record import IMAGE_MEMBERS, ReadOptions, SourceDocument
from lcl_ds.data.formats.tars import read_tar
from lcl_ds.data.images import check_image
from lcl_ds.data.shards import index_shard
from lcl_ds.errors import UserError
from lcl_ds.files import only_one, write_whole

VERSION = 1
WORK, MANIFEST, LIST = ".build", "manifest.json", "shards.txt"
REPORT_EVERY = 64
"""Documents between two reports of a worker."""


@dataclass(frozen=True)
class Job:
    """One source file."""

    number: int
    source: Path
    format: str
    options: ReadOptions
    shard_samples: int
    work: Path

    @property
    def folder(self) -> Path:
        """Where its finished shards wait."""
        return self.work / f"{self.number:06d}"


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
) -> dict[str, Any]:
    """Write shards, their indices, a list of them and a manifest.

    Args:
        sources: files, in order.
        out: a folder; one that holds an unfinished build of the same is continued.
        images: folders and tars of the images that the format names by file or URL.
        workers: processes.
        deduplicate: of documents with the same texts and images in the same order, keep the first.
        skip_unreadable: go on without source files that cannot be read, and name them in the manifest.

    Returns:
        The manifest.

    Raises:
        UserError: the folder holds something else; a source cannot be read; nothing came of them all.
    """
    settings = {
        "version": VERSION,
        "format": format,
        "sources": [[source.name, source.stat().st_size] for source in sources],
        "images": [str(place) for place in images],
        "options": {k: v for k, v in asdict(options).items() if k != "images"},
        "shard_samples": shard_samples,
        "deduplicate": deduplicate,
    }
    finished = _read_json(out / MANIFEST)
    work = out / WORK
    if finished is not None and finished.get("settings") == settings:
        shutil.rmtree(work, ignore_errors=True)
        return finished
    _claim(out, settings)
    with only_one(work / "build"):
        options = replace(options, images=open_images(images, work))
        jobs = [Job(i, source, format, options, shard_samples, work) for i, source in enumerate(sources)]
        _run([job for job in jobs if not job.folder.exists()], len(jobs), workers, console)
        units = [_read_json(job.folder / "unit.json") or {} for job in jobs]
        problems = [unit["problem"] for unit in units if unit["problem"]]
        if problems and not skip_unreadable:
            for job, unit in zip(jobs, units, strict=True):
                if unit["problem"]:
                    shutil.rmtree(job.folder)  # so that it is read again once it was mended
            raise UserError([*problems, "mend these sources, or go on without them: --skip-unreadable"])
        if not any(unit["samples"] for unit in units):
            raise UserError([f"{out}: no documents came of the sources; left out were:", *_most(units)])
        manifest = _publish(jobs, units, out, settings)
    shutil.rmtree(work)
    return manifest


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Raises: UserError when the folder holds something else."""
    saved = _read_json(out / WORK / "settings.json")
    if saved is None:
        if out.exists() and any(out.iterdir()):
            raise UserError(f"{out}: it is not empty and holds no build that could go on; name a new folder")
        (out / WORK).mkdir(parents=True)
        write_whole(out / WORK / "settings.json", json.dumps(settings).encode())
    elif saved != json.loads(json.dumps(settings)):
        raise UserError(f"{out}: it holds an unfinished build of other sources or settings; name a new folder")


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        read: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return read


def _most(units: list[dict[str, Any]]) -> list[str]:
    skips: Counter[str] = Counter()
    for unit in units:
        skips.update(unit["skips"])
    return [f"{count} times {reason}" for reason, count in skips.most_common(5)] or ["nothing"]


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
    """A worker whose build was killed would wait for work for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _build_unit(job: Job) -> None:
    partial = job.folder.with_suffix(f".{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    skips: Counter[str] = Counter()
    hashes: list[bytes] = []
    counts: Counter[str] = Counter()
    problem = None
    try:
        with _ShardFiles(partial, job) as files:
            for number, document in enumerate(READERS[job.format](job.source, job.options)):
                skips.update(document.skips)
                if document.texts:
                    key = f"{job.number:06d}-{len(hashes):08d}"
                    files.write(key, to_members(document, key))
                    hashes.append(content_hash(document))
                    counts["pairs" if document.is_pair else "documents"] += 1
                    counts["images"] += sum(image is not None for image in document.images)
                if number % REPORT_EVERY == 0:
                    with _counter.get_lock():
                        _counter.value += REPORT_EVERY
            if not hashes and not skips:
                raise UserError(f"{job.source}: it holds no records")
    except UserError as error:
        problem = str(error)
    unit = {
        "source": job.source.name,
        "samples": len(hashes),
        **{key: counts[key] for key in ("documents", "pairs", "images")},
        "skips": dict(sorted(skips.items())),
        "problem": problem,
    }
    np.save(partial / "hashes.npy", np.frombuffer(b"".join(hashes), dtype="<u8").reshape(-1, 2))
    (partial / "unit.json").write_text(json.dumps(unit))
    shutil.rmtree(job.folder, ignore_errors=True)
    partial.rename(job.folder)


class _ShardFiles:
    """Writes samples to one tar after another."""

    def __init__(self, folder: Path, job: Job):
        self.folder, self.job = folder, job
        self.written = 0
        self.tar: tarfile.TarFile | None = None

    def __enter__(self) -> "_ShardFiles":
        return self

    def __exit__(self, *_: object) -> None:
        if self.tar is not None:
            self.tar.close()

    def write(self, key: str, members: dict[str, bytes]) -> None:
        part, place = divmod(self.written, self.job.shard_samples)
        if place == 0:
            self.__exit__()
            self.tar = tarfile.TarFile(self.folder / f"{self.job.number:06d}-{part:05d}.tar", "w")
        assert self.tar is not None
        add_sample(self.tar, key, members)
        self.written += 1


def add_sample(tar: tarfile.TarFile, key: str, members: dict[str, bytes]) -> None:
    """Append a sample; without times and owners, or two builds would differ."""
    for suffix, data in sorted(members.items()):
        info = tarfile.TarInfo(f"{key}.{suffix}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def to_members(document: SourceDocument, key: str) -> dict[str, bytes]:
    """A document as the members of a sample, by suffix; a pair as img2dataset writes it."""
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
    return json.dumps(record, ensure_ascii=False).encode()


def content_hash(document: SourceDocument) -> bytes:
    """16 bytes that two documents share when their texts and images are equal and in the same order."""
    digest = hashlib.blake2b(digest_size=16)
    for text, image in zip(document.texts, document.images, strict=True):
        content = image if text is None else text.encode()
        assert content is not None
        digest.update((b"i" if text is None else b"t") + len(content).to_bytes(8, "little") + content)
    return digest.digest()


def first_of_each(hashes: np.ndarray) -> np.ndarray:
    """Which rows of uint64 [N, 2] have no equal row before them: bool [N]."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: equal rows stay in their order
    ordered = hashes[order]
    first = np.ones(len(hashes), dtype=bool)
    first[order[1:]] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return first


def _publish(jobs: list[Job], units: list[dict[str, Any]], out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Put all shards in place. May be killed and run again at any point."""
    hashes = np.concatenate([np.load(job.folder / "hashes.npy") for job in jobs])
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
            index_shard(out / name)
            shards[name] = {"samples": int(kept.sum()), "bytes": (out / name).stat().st_size}
        start = end
    skips: Counter[str] = Counter()
    for unit in units:
        skips.update(unit["skips"])
    manifest = {
        "settings": json.loads(json.dumps(settings)),
        "samples": int(keep.sum()),
        "duplicates": int((~keep).sum()),
        "skips": dict(sorted(skips.items())),
        "sources": units,
        "shards": shards,
    }
    write_whole(out / LIST, "".join(f"{name}\n" for name in shards).encode())
    write_whole(out / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    return manifest


def _put_in_place(staged: Path, final: Path, kept: np.ndarray) -> None:
    if not staged.exists():
        return  # an earlier try got this far
    if kept.all():
        staged.replace(final)
        return
    partial = final.with_name(f".{final.name}.partial")
    with tarfile.TarFile(partial, "w") as tar:
        for wanted, (key, parts) in zip(kept, read_tar(staged), strict=True):
            if isinstance(parts, BadSampleError):
                raise UserError(f"{staged}: it was damaged since it was written; remove it and build again")
            if wanted:
                add_sample(tar, key, parts)
    partial.replace(final)
    staged.unlink()
