"""Turn any published format into shards: ``python -m lcl_ds.data build``.

One input file, or a part of a folder of images, is one unit of work (``build_unit.py``). A finished unit lies whole in
``OUT/.build``, so a build that was killed, or whose disk was full, goes on with the next one (``build_folder.py``).
When all are there, their shards are put in place, held-out ones in a folder of their own (``build_join.py``). What
comes out depends on the input files and settings alone, to the byte: not on workers, kills or order of completion.
"""

import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from lcl_ds.data.corpora.build_folder import VERSION, WORK, attempt, claim, finished_manifest
from lcl_ds.data.corpora.build_join import join_units, skips_of
from lcl_ds.data.corpora.build_unit import Job, build_unit, count_with, finished_unit, start_worker
from lcl_ds.data.corpora.inputs import identity, inputs_of
from lcl_ds.data.corpora.local_images import NOT_THERE, open_images
from lcl_ds.data.corpora.record import ReadOptions
from lcl_ds.errors import UserError
from lcl_ds.files import only_one


@dataclass(frozen=True)
class Built:
    """What :func:`build` leaves."""

    manifest: dict[str, Any]
    is_new: bool
    """False: a finished build was found and nothing was done."""


def build(
    files: list[Path],
    out: Path,
    format: str,
    options: ReadOptions,
    images: Sequence[Path] = (),
    *,
    workers: int = 1,
    shard_samples: int = 1000,
    deduplicate: bool = False,
    holdout: float = 0.0,
    skip_unreadable: bool = False,
    console: Console | None = None,
) -> Built:
    """Write shards, their indices, a list of them and a manifest.

    Args:
        files: input files, or folders where the format is one of folders, in order.
        out: a folder; one that holds an unfinished build of the same is continued.
        images: folders and tars of the images that the format names by file or URL.
        workers: processes.
        deduplicate: of documents with the same texts and images in the same order, keep the first.
        holdout: about this fraction of the documents, chosen by their content, goes to held-out shards.
        skip_unreadable: go on without input files that cannot be read, and name them in the manifest.

    Raises:
        UserError: the folder holds something else; an input file cannot be read; nothing came of them all.
        OSError: the machine cannot do it; what is finished stays, what is not is removed.
    """
    settings = {
        "version": VERSION,
        "format": format,
        "sources": [os.path.abspath(file) for file in files],
        "images": [[os.path.abspath(path), *(identity(path) if path.is_file() else [])] for path in images],
        "options": {k: v for k, v in asdict(options).items() if k not in ("images", "names")},
        "shard_samples": shard_samples,
        "deduplicate": deduplicate,
        "holdout": holdout,
    }
    inputs = inputs_of(files, format, shard_samples)
    manifest = finished_manifest(out, settings, inputs)
    if manifest is not None:
        return Built(manifest, is_new=False)
    claim(out, settings)
    work = out / WORK
    with only_one(work / "build"):
        manifest = finished_manifest(out, settings, inputs)  # another process may have made it meanwhile
        if manifest is not None:
            shutil.rmtree(work, ignore_errors=True)
            return Built(manifest, is_new=False)
        with attempt(out):
            local_images, image_problems = open_images(images, work, skip_unreadable)
            options = replace(options, images=local_images)
            jobs = [
                Job(number, part, part.identity(), format, options, shard_samples, holdout, work)
                for number, part in enumerate(inputs)
            ]
            units = _make_units(jobs, workers, console)
            _refuse_problems(jobs, units, out, skip_unreadable, bool(images))
            manifest = join_units(jobs, units, out, settings, image_problems)
        shutil.rmtree(work)
    return Built(manifest, is_new=True)


def _refuse_problems(
    jobs: list[Job], units: list[dict[str, Any]], out: Path, skip_unreadable: bool, has_images: bool
) -> None:
    """Refuse input files that cannot be read, unless they may be skipped, and a build that gives nothing.

    Raises:
        UserError: names each file, or the most frequent reasons.
    """
    problems = list(dict.fromkeys(unit["problem"] for unit in units if unit["problem"]))
    is_empty = not any(unit["samples"] for unit in units)
    if is_empty or (problems and not skip_unreadable):
        for job, unit in zip(jobs, units, strict=True):
            if is_empty or unit["problem"]:
                shutil.rmtree(job.folder)  # so that it is read again, repaired or with other settings
    if problems and all(unit["problem"] for unit in units):
        raise UserError(problems)
    if problems and not skip_unreadable:
        raise UserError([*problems, "repair these files, or go on without them: --skip-unreadable"])
    if is_empty:
        most = skips_of(units).most_common(5)
        reasons = ", ".join(f"{count} times {reason}" for reason, count in most) or "nothing"
        is_missing = NOT_THERE in dict(most) and not has_images
        remedy = "; name the folders or tars of the images: --images PATH" if is_missing else ""
        raise UserError([*problems, f"{out}: the input files gave no documents; left out were {reasons}{remedy}"])


def _make_units(jobs: list[Job], workers: int, console: Console | None) -> list[dict[str, Any]]:
    """Make the units that are not finished yet, and return what came of each job."""
    _run([job for job in jobs if finished_unit(job) is None], len(jobs), workers, console)
    return [finished_unit(job) or {} for job in jobs]


class _Documents(ProgressColumn):
    """Shows how many documents all processes have written by now."""

    def __init__(self, counter: Any):
        super().__init__()
        self.counter = counter

    def render(self, task: Task) -> Text:
        return Text(f"{self.counter.value} documents")


def _run(jobs: list[Job], total: int, workers: int, console: Console | None) -> None:
    """Run jobs in processes of their own, with a bar of progress over all of the build."""
    context = get_context("spawn")
    counter = context.Value("q", 0)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, _Documents(counter), console=console) as bar:
        task = bar.add_task("input files", total=total, completed=total - len(jobs))
        workers = min(workers, len(jobs))
        if workers <= 1:
            count_with(counter)
            for job in jobs:
                build_unit(job)
                bar.update(task, advance=1)
            return
        arguments = (counter, jobs[0].work, os.getpid())
        with ProcessPoolExecutor(workers, context, start_worker, arguments) as pool:
            futures = [pool.submit(build_unit, job) for job in jobs]
            try:
                for future in as_completed(futures):
                    future.result()
                    bar.update(task, advance=1)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
