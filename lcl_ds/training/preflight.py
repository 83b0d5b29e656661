"""Try a job before it costs anything: ``launch/train.py --preflight``, started as the training will be.

All ranks come together, look at what a run needs of each of them, and end with one table. No model takes memory and
nothing is left in the run folder.
"""

import hashlib
import json
import os
import platform
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import distributed as dist

from lcl_ds import __version__
from lcl_ds.assembly import build_empty, open_checked_data
from lcl_ds.config import Config
from lcl_ds.data.corpus import OpenData
from lcl_ds.environment import git_commit, versions
from lcl_ds.errors import UserError
from lcl_ds.evaluation.check import check_held_out
from lcl_ds.models.build import check_attention_here
from lcl_ds.training.checkpoint import checkpoints_folder
from lcl_ds.training.distributed import (
    RankInfo,
    gather_objects,
    init_distributed,
    on_all_ranks,
    raise_for_all,
    team_of,
)
from lcl_ds.training.engine import complete_ds_config, rows_per_micro_step
from lcl_ds.training.optimizer import freeze_parts
from lcl_ds.training.run_folder import check_own_folder, check_run_writable, check_same_settings, check_seen_by_all
from lcl_ds.training.saver import bytes_to_save

PATIENCE_S = 600
"""How long the ranks wait for each other; much less than a training does."""
COMPARED = ("torch", "deepspeed", "transformers", "triton", "numpy")
"""Packages that must have one version everywhere."""
SMALL_FILES_BYTES = 16 << 20
"""Of a checkpoint: position in the data, settings, metrics."""
REDUCED_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
REPEATS = 3
CLOCKS_APART_S = 1.0
"""From here on the table says that clocks should be set."""


@dataclass
class Job:
    """What is checked."""

    config: Config
    ds_config: dict[str, Any]
    run_dir: Path
    rank_info: RankInfo
    data: OpenData | None = None
    """Once it could be opened."""


def preflight(config: Config, ds_config: dict[str, Any], run_dir: Path) -> int:
    """Make all checks on all ranks, and print their table; returns exit code 0.

    Args:
        ds_config: from :func:`lcl_ds.training.engine.load_ds_config`.

    Raises:
        UserError: on every rank: all that is wrong, after the table.
    """
    rank_info = init_distributed(PATIENCE_S)
    raise_for_all([], rank_info)
    job = Job(config, ds_config, run_dir, rank_info)
    table = Table("check", "result", "", title=f"preflight of {run_dir}: ranks: {rank_info.world_size}")
    problems: list[str] = []
    for name, check in CHECKS.items():
        try:
            with on_all_ranks(rank_info):
                result, state = check(job), "ok"
        except UserError as error:
            result, state = "\n".join(error.problems), "wrong"
            problems += error.problems
        table.add_row(name, result, state)
    if rank_info.is_first:
        _print(table)
    if problems:
        raise UserError(problems)
    dist.destroy_process_group()
    return 0


def _print(table: Table) -> None:
    console = Console(highlight=False, markup=False)
    # Where there is no terminal nobody knows the width; what is read in a log should not be broken into columns.
    console.print(table) if console.is_terminal else Console(highlight=False, markup=False, width=150).print(table)


def by_host(values: Sequence[tuple[str, str]]) -> str:
    """Write what the ranks of each host have: once where all hosts have the same, else a line for each kind of host.

    Args:
        values: host and text of every rank.
    """
    hosts: dict[str, list[str]] = {}
    for host, text in values:
        hosts.setdefault(host, []).append(text)
    kinds: dict[str, list[str]] = {}
    for host, texts in hosts.items():
        counts = {text: texts.count(text) for text in texts}
        kinds.setdefault(", ".join(f"{count} x {text}" for text, count in counts.items()), []).append(host)
    if len(kinds) == 1:
        (kind,) = kinds
        return f"{len(hosts)} hosts with {kind}" if len(hosts) > 1 else kind
    return "\n".join(f"{', '.join(names)}: {kind}" for kind, names in kinds.items())


def check_versions(job: Job) -> str:
    """Compare what runs on each rank. Raises: UserError where something differs."""
    own = {"python": platform.python_version(), **versions(COMPARED), "lcl_ds": git_commit() or __version__}
    everywhere = gather_objects((socket.gethostname(), own))
    problems = []
    for name in own:
        found: dict[str | None, list[str]] = {}
        for host, of_rank in everywhere:
            found.setdefault(of_rank[name], []).append(host)
        if len(found) > 1:
            told = "; ".join(f"{version or 'none'} on {_some(hosts)}" for version, hosts in found.items())
            problems.append(f"{name} is not the same on all hosts: {told}; install the same everywhere")
    if problems:
        raise UserError(problems)
    return ", ".join(f"{name} {_short(version)}" for name, version in own.items() if version)


def _short(version: str) -> str:
    """Cut a commit as git does."""
    return version[:10] if len(version) == 40 else version


def _some(names: Sequence[str]) -> str:
    different = list(dict.fromkeys(names))
    return ", ".join(different[:3]) + (f" and {len(different) - 3} more" if len(different) > 3 else "")


def check_devices(job: Job) -> str:
    """List GPUs with their memory, or processors, of each host."""
    device = job.rank_info.device
    check_attention_here(job.config.model, device.type, job.config.precision)
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        own = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"
    else:
        own = f"CPU rank, {len(os.sched_getaffinity(0))} cores"
    return by_host(gather_objects((socket.gethostname(), own)))


def check_settings(job: Job) -> str:
    """Compare the resolved settings of all ranks, and see whether they fit this number of ranks. Raises: UserError."""
    check_same_settings(job.config, job.ds_config, job.rank_info)
    complete_ds_config(job.ds_config, job.config, job.rank_info.world_size)
    rows = rows_per_micro_step(job.config, job.rank_info.world_size)
    recipe = _hash(job.config.model_dump(mode="json"))
    return f"recipe {recipe}, ds_config {_hash(job.ds_config)} on all ranks; {rows} rows per rank and micro-step"


def _hash(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:10]


def check_data(job: Job) -> str:
    """Open the data, each rank its share of the shards, and try the held-out shards. Raises: UserError."""
    job.data = data = open_checked_data(job.config, team_of(job.rank_info))
    notes: list[str] = []
    if job.rank_info.is_first and job.config.evaluation.shards is not None:
        notes = check_held_out(job.config, data.tokenizer)
    shards = sum(len(source.shards) for source in data.sources)
    share = -(-shards // job.rank_info.world_size)
    counted = ", ".join(f"{source.name} {len(source):,} samples" for source in data.sources)
    lines = [f"{counted}; {shards:,} shards, of which each rank opened {share:,} at most"]
    return "\n".join([*lines, *(f"final evaluation: {note}" for note in notes)])


def check_run_folder(job: Job) -> str:
    """See whether the folder is a run's, can be written by all and is seen by all. Raises: UserError."""
    is_new = not job.run_dir.exists()
    with on_all_ranks(job.rank_info):
        if job.rank_info.is_first:
            check_own_folder(job.run_dir)
    try:
        with on_all_ranks(job.rank_info):
            check_run_writable(job.run_dir)
        check_seen_by_all(job.run_dir, job.rank_info)
    finally:
        if is_new:
            with suppress(OSError):  # another rank removed it, or will
                job.run_dir.rmdir()
    return "written and seen by all ranks"


def check_disk(job: Job) -> str:
    """Compare the room on the run folder's disk with what the checkpoints of the run will take. Raises: UserError."""
    if not job.rank_info.is_first:
        return ""
    if job.data is None:
        return "not looked at: the size of the model depends on the data's tokenizer"
    objective = build_empty(job.config, job.data.tokenizer.vocabulary.size)
    freeze_parts(objective, job.config.train)
    parameters = sum(weight.numel() for weight in objective.parameters())
    one = bytes_to_save(objective.named_parameters(), job.config.train.ema_decay is not None) + SMALL_FILES_BYTES
    count = job.config.checkpoint.keep + 1
    folder = checkpoints_folder(job.run_dir)
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(next(path for path in (folder, *folder.resolve().parents) if path.exists())).free
    needed = max(0, one * count - there)
    told = (
        f"{count} checkpoints of about {_size(one)} ({parameters:,} parameters), of which {_size(there)} are there: "
        f"{_size(needed)} needed, {_size(free)} free"
    )
    if needed > free:
        raise UserError(
            f"{job.run_dir}: too little room for checkpoint.keep + 1 = {told}; free some, lower checkpoint.keep, or "
            "make the folder checkpoints a link to another disk"
        )
    return told


def _size(count: int) -> str:
    """Write a number of bytes for people: ``3.2 GiB``."""
    unit = next((unit for unit in (40, 30, 20) if count >= 1 << unit), 10)
    return f"{count / (1 << unit):.3g} {dict([(40, 'TiB'), (30, 'GiB'), (20, 'MiB'), (10, 'KiB')])[unit]}"


def check_clocks(job: Job) -> str:
    """Compare the clocks of all ranks, as far as the time a message takes allows."""
    dist.barrier()
    clocks = gather_objects((time.time(), socket.gethostname()))
    (first, early), (last, late) = min(clocks), max(clocks)
    apart = f"at most {last - first:.2g} s apart"
    return apart if last - first < CLOCKS_APART_S else f"{apart} ({early}, {late}): set them by NTP"


def check_all_reduce(job: Job) -> str:
    """Time one sum over all ranks. Raises: UserError where it is wrong."""
    if job.rank_info.world_size == 1:
        return "one rank has nothing to exchange"
    device = job.rank_info.device
    size = REDUCED_BYTES["cuda" if device.type == "cuda" else "cpu"]
    values = torch.ones(size // 4, device=device)
    seconds = []
    for _ in range(1 + REPEATS):  # the first one makes the connections
        values.fill_(1)
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(values)
        total = values[-1].item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    if total != job.rank_info.world_size:
        raise UserError(
            f"a sum of ones over {job.rank_info.world_size} ranks is {total}; see to the network of its hosts"
        )
    best = min(seconds[1:])
    return f"{_size(size)} in {1e3 * best:.3g} ms, best of {REPEATS}: {size / best / 1e9:.3g} GB/s"


CHECKS: dict[str, Callable[[Job], str]] = {
    "versions": check_versions,
    "devices": check_devices,
    "settings": check_settings,
    "data": check_data,
    "run folder": check_run_folder,
    "disk": check_disk,
    "clocks": check_clocks,
    "all-reduce": check_all_reduce,
}
"""What is looked at, in this order; every rank makes every check."""
