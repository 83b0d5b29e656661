"""The folder of a run: whose it is, whether it can be written, and what every start leaves in it."""

import json
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from lcl_ds.config import Config
from lcl_ds.environment import git_commit, machine, versions
from lcl_ds.errors import UserError
from lcl_ds.files import check_writable, read_yaml, write_whole
from lcl_ds.training.checkpoint import MANIFEST, checkpoints_folder
from lcl_ds.training.distributed import RankInfo, from_first, on_all_ranks
from lcl_ds.training.lock import RunLock

CONFIG, DS_CONFIG, ENVIRONMENT = "config.yaml", "ds_config.json", "environment.json"
HISTORY = "history"
"""Holds one folder per start with the three files as of that start."""
NO_CONTENT = ("lost+found", "*.log", "*.out", "*.err")
"""What may stand in a new run's folder, because people send the output of a run there."""
SHOWN = 3
"""Settings that are named where ranks have different ones."""


@contextmanager
def holding_folder(run_dir: Path, rank_info: RankInfo) -> Iterator[None]:
    """Hold the folder of a run during the block, by the first rank, and one that its checkpoints are a link to: two
    runs must not share that either; collective.

    Raises:
        UserError: on all ranks: the folder is in use by another start, or holds something else than a run.
    """
    checkpoints = checkpoints_folder(run_dir)
    with ExitStack() as held:
        with on_all_ranks(rank_info):
            if rank_info.is_first:
                check_own_folder(run_dir)
                is_link = checkpoints.is_symlink() and checkpoints.is_dir()
                for folder in (run_dir, checkpoints.resolve()) if is_link else (run_dir,):
                    if (lock := RunLock.take(folder)) is not None:
                        held.callback(lock.release)
        yield


def check_own_folder(run_dir: Path) -> None:
    """Refuse a folder that holds something else than a run, before anything is written there.

    Raises:
        UserError: it is a file, or not empty and no run's.
    """
    if not run_dir.is_dir():
        if os.path.lexists(run_dir):
            raise UserError(f"--run_dir {run_dir}: is a file; name a folder")
        return
    try:
        content = sorted(path for path in run_dir.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"--run_dir {run_dir}: cannot be read: {error.strerror}") from error
    content = [path for path in content if not any(path.match(pattern) for pattern in NO_CONTENT)]
    if checkpoints_folder(run_dir).is_symlink() and not any(checkpoints_folder(run_dir).glob("[!.]*")):
        content.remove(checkpoints_folder(run_dir))  # made before the first start, for a place on another disk
    if content and not is_run(run_dir):
        raise UserError(
            f"--run_dir {run_dir}: holds {content[0].name} and is no run's folder; name a new or an empty folder"
        )


def is_run(folder: Path) -> bool:
    """Say whether an earlier start wrote there, whatever has become of single files since."""
    if any(checkpoints_folder(folder).glob(f"step_*/{MANIFEST}")) or any((folder / HISTORY).glob(f"[0-9]*/{CONFIG}")):
        return True
    if all((folder / name).is_file() for name in (CONFIG, DS_CONFIG, ENVIRONMENT)):
        return True
    try:
        tree = read_yaml(folder / CONFIG)
    except UserError:
        return False
    needed = {name for name, field in Config.model_fields.items() if field.is_required()}
    return (
        isinstance(tree, dict)
        and needed <= tree.keys() <= Config.model_fields.keys()
        and isinstance(tree["data"], dict)
        and {"shards", "tokenizer"} <= tree["data"].keys()  # other programs have groups of these names as well
    )


def check_run_writable(run_dir: Path) -> None:
    """Try to write into the folder and into that of its checkpoints, which may be a link to another disk.

    Raises:
        UserError: it cannot be done, and why.
    """
    check_writable(run_dir)
    checkpoints = checkpoints_folder(run_dir)
    if checkpoints.is_symlink() and not checkpoints.exists():
        raise UserError(f"{checkpoints}: is a link to {checkpoints.readlink()}, which is not there; mount or make it")
    if checkpoints.exists():
        check_writable(checkpoints)


def check_seen_by_all(run_dir: Path, rank_info: RankInfo, patience_s: float = 10.0) -> None:
    """Refuse a folder that not all ranks share: checkpoints would lack the files of other hosts; collective.

    Args:
        patience_s: how long a rank waits until its host sees a new file; the caches of network file systems are late.

    Raises:
        UserError: on every rank; names the ranks that do not see what the first one writes.
    """
    host, folder, name = from_first(lambda: _write_token(run_dir), rank_info)
    token = run_dir / name
    try:
        with on_all_ranks(rank_info):
            if not _appears(token, patience_s):
                raise UserError(
                    f"--run_dir {run_dir}: what rank 0 on {host} wrote into {folder} does not appear here; name a "
                    "folder on a disk that all hosts share, by the same path everywhere"
                )
    finally:
        if rank_info.is_first:
            token.unlink(missing_ok=True)


def _write_token(run_dir: Path) -> tuple[str, str, str]:
    """Write a file of a new name where checkpoints are written; returns this host, the folder and the name in it."""
    folder = checkpoints_folder(run_dir)  # may be a link to another disk
    token = (folder if folder.is_dir() else run_dir) / f".seen_by_all.{secrets.token_hex(8)}"
    write_whole(token, "\n")
    return socket.gethostname(), str(run_dir.absolute()), str(token.relative_to(run_dir))


def _appears(path: Path, patience_s: float) -> bool:
    end = time.monotonic() + patience_s
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def check_same_settings(config: Config, ds_config: Mapping[str, Any], rank_info: RankInfo) -> None:
    """Refuse ranks that were started with other settings than the first one; collective.

    Raises:
        UserError: on the ranks that differ; names the settings.
    """
    own = {"recipe": config.model_dump(mode="json"), "ds_config": dict(ds_config)}
    first = from_first(lambda: own, rank_info)
    different = [f"{name}: {key or 'all of it'}" for name in own for key in _differences(first[name], own[name])]
    if different:
        raise UserError(
            f"{'; '.join(different[:SHOWN])}: the value here is not rank 0's; start all ranks with the same recipe, "
            "ds_config and arguments"
        )


def _differences(one: Any, other: Any, prefix: str = "") -> list[str]:
    """Name the settings, dotted, whose values differ."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return [] if one == other else [prefix]
    keys = {key: f"{prefix}.{key}" if prefix else str(key) for key in {**one, **other}}
    return [name for key, dotted in keys.items() for name in _differences(one.get(key), other.get(key), dotted)]


def write_run_files(run_dir: Path, config: Config, ds_config: dict[str, Any], world_size: int, step: int = 0) -> None:
    """``config.yaml``, ``ds_config.json`` and ``environment.json``, enough to repeat the run, and their history.

    Args:
        step: where this start continues.
    """
    files = {
        CONFIG: yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
        DS_CONFIG: json.dumps(ds_config, indent=2) + "\n",
        ENVIRONMENT: json.dumps(_environment(world_size, step), indent=2) + "\n",
    }
    run_dir.mkdir(parents=True, exist_ok=True)
    history = run_dir / HISTORY
    if not history.is_dir():
        _keep_older_files(run_dir, history)
    _write_all(_next_start(history), files)
    _write_all(run_dir, files)


def _keep_older_files(run_dir: Path, history: Path) -> None:
    """Keep what a run has that was begun before there was a history, as the first entry."""
    older = [run_dir / name for name in (CONFIG, DS_CONFIG, ENVIRONMENT) if (run_dir / name).is_file()]
    if older:
        first = _next_start(history)
        for path in older:
            shutil.copy2(path, first)


def _next_start(history: Path) -> Path:
    numbers = [int(path.name) for path in history.glob("*") if path.name.isdigit()]
    folder = history / f"{max(numbers, default=0) + 1:04d}"
    folder.mkdir(parents=True)
    return folder


def _write_all(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        write_whole(folder / name, text)


def _environment(world_size: int, step: int) -> dict[str, Any]:
    return {
        "argv": sys.argv,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "continued_at_step": step,
        "world_size": world_size,
        "host": socket.gethostname(),
        **machine(),
        "git_commit": git_commit(),
        "packages": versions(),
    }
