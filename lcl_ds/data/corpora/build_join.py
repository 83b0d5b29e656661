"""Join the finished units of a build: put their shards in place, duplicates left out if asked, and write the manifest.

Every step may be killed and repeated: a shard is either still in its unit's folder or whole in the output folder.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from lcl_ds.data.corpora.build_folder import MANIFEST, SHARD_LIST, as_json
from lcl_ds.data.corpora.build_unit import Job, hashes_of
from lcl_ds.data.corpora.samples import shard_writer
from lcl_ds.data.corpora.tars import read_tar
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
    keep = first_of_each(hashes) if settings["deduplicate"] else np.ones(len(hashes), dtype=bool)
    ends = np.cumsum([unit["samples"] for unit in units])
    shards: dict[str, Any] = {}
    for job, kept in zip(jobs, np.split(keep, ends[:-1]), strict=True):
        shards.update(_place_shards(job, kept, out))
    manifest = {
        "settings": as_json(settings),
        "samples": int(keep.sum()),
        "duplicates": int((~keep).sum()),
        "longest_text_bytes": max(unit["longest_text_bytes"] for unit in units),
        "skips": dict(sorted(skips_of(units).items())),
        "image_problems": [printable(problem) for problem in image_problems],
        "sources": units,
        "shards": shards,
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
        shard = index_shard(out / name)
        if shard.sample_count != kept_here.sum():
            raise UserError(
                f"{out}: its input files changed while its shards were put in place; remove it and build again"
            )
        shards[name] = {
            "samples": shard.sample_count,
            "bytes": (out / name).stat().st_size,
            "layout": shard.fingerprint(),
        }
    return shards


def put_in_place(staged: Path, final: Path, kept: np.ndarray) -> None:
    """Move a shard, or write it again without the samples that do not stay; does nothing where this was done before."""
    if not staged.exists():
        return  # an earlier try got this far
    if kept.all():
        staged.replace(final)
        return
    with writing(final) as file, shard_writer(file) as writer:
        for is_kept, (key, members) in zip(kept, read_tar(staged), strict=True):
            if isinstance(members, BadSampleError):
                raise UserError(f"{staged}: it was damaged since it was written; remove it and build again")
            if is_kept:
                writer.write({"__key__": key, **members})
    staged.unlink()


def first_of_each(hashes: np.ndarray) -> np.ndarray:
    """Mark the rows of uint64 [N, 2] that have no equal row before them: bool [N]."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: equal rows stay in their order
    ordered = hashes[order]
    first = np.ones(len(hashes), dtype=bool)
    first[order[1:]] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return first
