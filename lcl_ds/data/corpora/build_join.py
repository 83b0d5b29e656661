"""Join the finished units of a build: put their shards in place, duplicates left out if asked, and write the manifest.

Every step may be killed and repeated: a shard is either still in its unit's folder or whole in the output folder.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lcl_ds.data.corpora.build_folder import HELD_OUT, MANIFEST, SHARD_LIST, as_json
from lcl_ds.data.corpora.build_unit import HELD_OUT_TAR, Job, hashes_of
from lcl_ds.data.corpora.samples import is_held_out, shard_writer
from lcl_ds.data.corpora.tars import Members, read_tar
from lcl_ds.data.documents import BadSampleError
from lcl_ds.data.shards.shard import index_shard
from lcl_ds.data.shards.storage import INDEX_SUFFIX
from lcl_ds.errors import UserError
from lcl_ds.files import printable, write_whole, writing


def join_units(
    jobs: list[Job], units: list[dict[str, Any]], out: Path, settings: dict[str, Any], image_problems: list[str]
) -> dict[str, Any]:
    """Put all shards in place, list them, and return the manifest. May be killed and run again at any point.

    Raises:
        UserError: the input files changed meanwhile, or a finished shard was damaged.
    """
    hashes = np.concatenate([hashes_of(job) for job in jobs])
    keep = first_of_each(hashes[:, :2]) if settings["deduplicate"] else np.ones(len(hashes), dtype=bool)
    is_out = is_held_out(hashes, settings["holdout"])
    if is_out[keep].all():
        for job in jobs:
            shutil.rmtree(job.folder)  # so that the next try may be with another fraction
        raise UserError(f"{out}: --holdout {settings['holdout']} leaves no document to train on; hold out fewer")
    ends = np.cumsum([unit["samples"] for unit in units])[:-1]
    by_job = [*zip(jobs, np.split(keep, ends), np.split(is_out, ends), strict=True)]
    shards: dict[str, Any] = {}
    for job, kept, is_out_here in by_job:
        shards.update(_place_shards(job, kept[~is_out_here], out))
    held_out = _write_held_out([(job, kept[is_out_here]) for job, kept, is_out_here in by_job], out)
    manifest = {
        "settings": as_json(settings),
        "samples": int(keep.sum()),
        "duplicates": int((~keep).sum()),
        "longest_text_bytes": max(unit["longest_text_bytes"] for unit in units),
        "skips": dict(sorted(skips_of(units).items())),
        "image_problems": [printable(problem) for problem in image_problems],
        "sources": units,
        "shards": shards,
        "heldout": held_out,
    }
    for path in out.glob("[0-9]*-[0-9]*.tar*"):
        if path.name.removesuffix(INDEX_SUFFIX) not in shards:
            path.unlink()  # of an interrupted try, and of an input file that has changed since
    write_whole(out / SHARD_LIST, "".join(f"{name}\n" for name in shards))
    write_whole(out / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return manifest


def skips_of(units: list[dict[str, Any]]) -> Counter[str]:
    """Add up, by reason, what was left out of all units."""
    skips: Counter[str] = Counter()
    for unit in units:
        skips.update(unit["skips"])
    return skips


def _place_shards(job: Job, kept: np.ndarray, out: Path) -> dict[str, Any]:
    """Put the shards of one input file in place, and return what the manifest says of each.

    Args:
        kept: bool, for each sample of the job whether it stays; a shard of which none stays is left out.
    """
    shards: dict[str, Any] = {}
    for number, start in enumerate(range(0, len(kept), job.shard_samples)):
        kept_here = kept[start : start + job.shard_samples]
        if not kept_here.any():
            continue
        name = job.shard_name(number)
        put_in_place(job.folder / name, out / name, kept_here)
        shards[name] = _facts_of(out / name, int(kept_here.sum()))
    return shards


def _facts_of(path: Path, samples: int) -> dict[str, Any]:
    """Say what the manifest keeps of a shard. Raises: UserError when it does not hold as many samples."""
    shard = index_shard(path)
    if shard.sample_count != samples:
        raise UserError(
            f"{path.parent}: its input files changed while its shards were put in place; remove it and build again"
        )
    return {"samples": samples, "bytes": path.stat().st_size, "layout": shard.fingerprint()}


def _write_held_out(kept_of_jobs: list[tuple[Job, np.ndarray]], out: Path) -> dict[str, Any]:
    """Write the held-out documents of all input files into shards of their own, and return what the manifest says.

    Args:
        kept_of_jobs: with each job bool, for each of its held-out samples whether it stays.
    """
    folder = out / HELD_OUT
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted try
    count = sum(int(kept.sum()) for _, kept in kept_of_jobs)
    if not count:
        return {}
    folder.mkdir()
    size = kept_of_jobs[0][0].shard_samples
    samples = _held_out_samples(kept_of_jobs)
    facts = {}
    for number, start in enumerate(range(0, count, size)):
        path = folder / f"{number:06d}.tar"
        with writing(path) as file, shard_writer(file) as writer:
            for key, members in islice(samples, size):
                writer.write({"__key__": key, **members})
        facts[f"{HELD_OUT}/{path.name}"] = _facts_of(path, min(size, count - start))
    return facts


def _held_out_samples(kept_of_jobs: list[tuple[Job, np.ndarray]]) -> Iterator[tuple[str, Members]]:
    for job, kept in kept_of_jobs:
        if kept.any():
            yield from _kept_samples(job.folder / HELD_OUT_TAR, kept)


def _kept_samples(tar: Path, kept: np.ndarray) -> Iterator[tuple[str, Members]]:
    """Yield the samples of a unit's tar that stay. Raises: UserError when it was damaged."""
    for is_kept, (key, members) in zip(kept, read_tar(tar), strict=True):
        if isinstance(members, BadSampleError):
            raise UserError(f"{tar}: it was damaged since it was written; remove it and build again")
        if is_kept:
            yield key, members


def put_in_place(staged: Path, final: Path, kept: np.ndarray) -> None:
    """Move a shard, or write it again without the samples that do not stay; does nothing where this was done before."""
    if not staged.exists():
        return  # an earlier try got this far
    if kept.all():
        staged.replace(final)
        return
    with writing(final) as file, shard_writer(file) as writer:
        for key, members in _kept_samples(staged, kept):
            writer.write({"__key__": key, **members})
    staged.unlink()


def first_of_each(hashes: np.ndarray) -> np.ndarray:
    """Mark the rows of uint64 [N, 2] that have no equal row before them: bool [N]."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: equal rows stay in their order
    ordered = hashes[order]
    first = np.ones(len(hashes), dtype=bool)
    first[order[1:]] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return first
