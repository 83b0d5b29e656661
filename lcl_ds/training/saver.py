"""Save checkpoints while training goes on.

Every rank copies what it holds to host memory, and a thread of its own writes the copy, flushes it to disk and hashes
it. Ranks tell each other that theirs is written by a number among those that they sum in every step anyway. Then the
first rank compares all files with what the ranks report, writes the manifest, flushes it, renames the folder and
replaces ``latest``; a checkpoint exists from the renaming on. Nobody waits for a disk, unless it is slower than
training between two checkpoints, or training ends.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from lcl_ds.config import Config
from lcl_ds.data.stream.loader import LoaderState, merge_states
from lcl_ds.errors import UserError
from lcl_ds.files import naming, sentence_of, write_whole
from lcl_ds.flops import size_of
from lcl_ds.metrics import LOSS_ENDING, METRICS
from lcl_ds.models.settings import part_of
from lcl_ds.training.averaging import EncoderAverage
from lcl_ds.training.checkpoint import (
    BEST,
    CONFIG,
    EMA,
    LATEST,
    MANIFEST,
    MOMENTS,
    PARTIAL,
    STATE,
    WEIGHTS,
    ManifestEntry,
    Progress,
    all_checkpoints,
    checkpoint_of,
    checkpoints_folder,
    complete_checkpoints,
    hash_of,
    read_manifest,
    read_state,
    slice_of,
    step_of,
)
from lcl_ds.training.distributed import RankInfo, gather_to_first, on_all_ranks
from lcl_ds.training.engine_state import held_parts, optimizer_steps, own_share
from lcl_ds.training.input_folders import folder_contents
from lcl_ds.training.pulse import PULSE
from lcl_ds.training.slices import SUFFIX, Slice, write_slices

logger = logging.getLogger(__name__)

WRITTEN, FAILED = "ranks that have written their part", "ranks that could not write theirs"
"""Travel with what one step sums over ranks."""
OLD = ".old"
"""How the hidden names of checkpoints that are to be removed end."""
GB = 1e9


@dataclass
class RankFiles:
    """What one rank writes of one checkpoint."""

    partial: Path
    rank: int
    world_size: int
    slices: dict[str, list[Slice]]
    """By subfolder."""
    texts: dict[str, bytes]
    """Small files of the first rank, by name."""


@dataclass
class _InFlight:
    """A checkpoint on its way."""

    final: Path
    partial: Path
    started: float
    stalled_s: float
    written: "Future[dict[str, ManifestEntry]]"
    collected: bool = False
    published: "Future[None] | None" = None
    """On the first rank, once all ranks have written."""


@dataclass
class Saver:
    """Writes the checkpoints of one run; every rank has one and calls it at the same steps."""

    engine: Any
    config: Config
    rank_info: RankInfo
    run_dir: Path
    vocab_size: int
    average: EncoderAverage | None = None
    evaluation: dict[str, float | None] | None = field(default=None, init=False)
    """Figures on held-out documents after the last step, where it was evaluated."""
    _in_flight: _InFlight | None = None
    _host: dict[str, Tensor] = field(default_factory=dict)
    """Host memory that a copy is made to, kept from one save to the next."""

    def __post_init__(self) -> None:
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="saver")

    def begin(self, progress: Progress, loader_state: LoaderState, metrics: bytes = b"") -> Path:
        """Begin to save this moment; collective. What is trained may change as soon as this returns.

        Args:
            loader_state: this rank's; those of all ranks are merged, so that any number of ranks can read them.
            metrics: lines of ``metrics.jsonl`` since the checkpoint before, kept as a copy.

        Returns:
            Where the checkpoint will be.

        Raises:
            UserError: on all ranks: the save before failed, or there is no room for this one.
        """
        started = time.perf_counter()
        self.finish()
        final = checkpoint_of(self.run_dir, progress.step)
        partial = final.with_name(f"{PARTIAL}{final.name}")
        if not self.rank_info.is_first:  # the same everywhere, and it names every shard
            loader_state = {key: value for key, value in loader_state.items() if key != "fingerprint"}
        states = gather_to_first(loader_state)
        with on_all_ranks(self.rank_info):
            if self.rank_info.is_first:
                check_room(self.run_dir, self.bytes_of_checkpoint())
            slices = self._own_slices()
            for name in slices:
                (partial / name).mkdir(parents=True, exist_ok=True)
            texts = self._texts(progress, states, metrics) if states is not None else {}
        rank, world_size = self.rank_info.rank, self.rank_info.world_size
        written = self._threads.submit(write_files, RankFiles(partial, rank, world_size, slices, texts))
        self._in_flight = _InFlight(final, partial, started, time.perf_counter() - started, written)
        if not self.config.checkpoint.asynchronous:
            self.finish()
        return final

    def counts(self) -> dict[str, bool]:
        """Say how this rank's part stands, to be summed over ranks."""
        save = self._in_flight
        futures = [future for future in (save.written, save.published) if future] if save else []
        done = [future for future in futures if future.done()]
        return {
            WRITTEN: save is not None and not save.collected and save.written.done(),
            FAILED: any(future.exception() is not None for future in done),
        }

    def advance(self, totals: dict[Any, float]) -> None:
        """Publish what all ranks have written; collective, with the sums over ranks of :meth:`counts`.

        Raises:
            UserError: on all ranks: a rank could not write its part.
        """
        if totals[FAILED]:
            self.finish()
        elif totals[WRITTEN] == self.rank_info.world_size:
            self._collect()

    def finish(self) -> None:
        """Wait until what was begun is published; collective.

        Raises:
            UserError: on all ranks: it could not be; the checkpoints before it are as they were.
        """
        if (save := self._in_flight) is None:
            return
        try:
            if not save.collected:
                self._collect()
            with on_all_ranks(self.rank_info), _disk_errors_named(save):
                if save.published:
                    save.published.result()
        except UserError:
            if self.rank_info.is_first:
                shutil.rmtree(save.partial, ignore_errors=True)
            raise
        finally:
            self._in_flight = None

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Finish what was begun also where the block ends with a mistake that all ranks know of: it is of use.

        Raises:
            UserError: on all ranks: the block's own, and with it what kept a checkpoint from being written.
        """
        try:
            yield
        except UserError as error:
            if not error.on_every_rank:  # the others are not here
                raise
            try:
                self.finish()
            except UserError as unsaved:
                raise UserError([*error.problems, *unsaved.problems]) from error
            raise

    def close(self) -> None:
        """Let the thread end; what it is writing is written but not published."""
        self._threads.shutdown(wait=True)

    def bytes_of_checkpoint(self) -> int:
        """Estimate the size of a checkpoint of all ranks."""
        return bytes_to_save(self.engine.module.named_parameters(), self.average is not None)

    def _own_slices(self) -> dict[str, list[Slice]]:
        """List this rank's slices by subfolder, in memory that training does not touch."""
        slices: dict[str, list[Slice]] = {WEIGHTS: [], MOMENTS: []}
        for part in held_parts(self.engine):
            start, values = own_share(part)
            for kind, value in values.items():
                folder, name = slice_of(part.name, kind)
                if value.numel():
                    slices[folder].append(Slice(name, start, part.shape, self._kept(name, value)))
        if self.average is not None:
            slices[EMA] = [
                replace(part, values=self._kept(f"{EMA}.{part.name}", part.values)) for part in self.average.slices
            ]
        if self.rank_info.device.type == "cuda":
            torch.cuda.synchronize()  # copies to pinned memory are not waited for one by one
        return slices

    def _kept(self, name: str, value: Tensor) -> Tensor:
        """Copy values to host memory, unless training waits for the disk and they are there already."""
        if not self.config.checkpoint.asynchronous and value.device.type == "cpu":
            return value
        kept = self._host.get(name)
        if kept is None or kept.shape != value.shape or kept.dtype != value.dtype:
            kept = self._host[name] = self._host_memory(name, value)
        return kept.copy_(value, non_blocking=True)

    def _host_memory(self, name: str, value: Tensor) -> Tensor:
        try:
            return torch.empty(value.shape, dtype=value.dtype, pin_memory=self.rank_info.device.type == "cuda")
        except RuntimeError as error:  # which is what torch raises where there is no memory
            size = value.numel() * value.element_size() / GB
            raise UserError(
                f"checkpoint: the host has no memory for the copy of {name} ({size:.3g} GB) that is written while "
                "training goes on; give the job more memory, spread it over more ranks or, where weights are on the "
                "CPU, set checkpoint.asynchronous=false"
            ) from error

    def _texts(self, progress: Progress, states: list[LoaderState], metrics: bytes) -> dict[str, bytes]:
        state = {
            "progress": asdict(progress),
            "optimizer_steps": optimizer_steps(self.engine),
            "loader": merge_states(states),
            "vocab_size": self.vocab_size,
            "folders": folder_contents(self.config),
            "evaluation": self.evaluation,
            # How it was written; any other way can continue it.
            "world_size": self.rank_info.world_size,
            "zero_stage": self.engine.zero_optimization_stage(),
        }
        settings = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False)
        return {STATE: json.dumps(state).encode(), CONFIG: settings.encode(), METRICS: metrics}

    def _collect(self) -> None:
        """Let the first rank know what all have written, and publish it; collective."""
        save = self._in_flight
        assert save is not None
        with on_all_ranks(self.rank_info), _disk_errors_named(save):
            written = save.written.result()
        reports = gather_to_first(written)
        save.collected = True
        if reports is not None:
            manifest = {name: entry for report in reports for name, entry in report.items()}
            save.published = self._threads.submit(self._publish, save, manifest)

    def _publish(self, save: _InFlight, manifest: dict[str, ManifestEntry]) -> None:
        publish(save.partial, save.final, manifest)
        seconds = time.perf_counter() - save.started
        PULSE.saved(step_of(save.final), seconds)
        size = sum(entry.bytes for entry in manifest.values())
        logger.info(
            "saved %s: %.3g GB in %.3g s, of which training waited %.2g s",
            save.final,
            size / GB,
            seconds,
            save.stalled_s if self.config.checkpoint.asynchronous else seconds,
        )
        best = best_checkpoint(self.run_dir, self.config.checkpoint.keep_best)
        remove_old(self.run_dir, self.config.checkpoint.keep, self.config.checkpoint.keep_every, best)


def bytes_to_save(named: Iterable[tuple[str, Tensor]], ema: bool) -> int:
    """Estimate the size of a checkpoint of all ranks: fp32 weights with two moments (a matrix under Muon has only one),
    frozen ones as the model has them.

    Args:
        named: all weights of the model, also those that ZeRO has partitioned or that take no memory.
        ema: whether a moving average of the vision tower is saved as well.
    """

    def bytes_per_element(name: str, weight: Tensor) -> int:
        if not weight.requires_grad:
            return weight.element_size()
        return 16 if ema and part_of(name) == "vision" else 12

    return sum(size_of([weight]) * bytes_per_element(name, weight) for name, weight in named)


def write_files(files: RankFiles) -> dict[str, ManifestEntry]:
    """Write one rank's files, flush them to disk, and say what they are."""
    part = f"part_{files.rank:05d}_of_{files.world_size:05d}{SUFFIX}"
    names: list[str] = []
    for folder, slices in files.slices.items():
        if slices:
            names.append(f"{folder}/{part}")
            write_slices(files.partial / names[-1], slices)
    for name, content in files.texts.items():
        names.append(name)
        (files.partial / name).write_bytes(content)
    for name in names:
        flush(files.partial / name)
    return {name: _entry(files.partial / name) for name in names}


def _entry(path: Path) -> ManifestEntry:
    return ManifestEntry(bytes=path.stat().st_size, sha256=hash_of(path))


def publish(partial: Path, final: Path, manifest: dict[str, ManifestEntry]) -> None:
    """Make a checkpoint of a folder that holds all files of ``manifest``, flushed to disk.

    Raises:
        UserError: a file that a rank has written is not there: ranks do not see the same disk.
        OSError: the disk did not take it.
    """
    entries = {name: entry.model_dump() for name, entry in manifest.items()}
    (partial / MANIFEST).write_text(json.dumps(entries, indent=1))
    read_manifest(partial)
    folders = {partial / Path(name).parent for name in manifest}
    for path in (partial / MANIFEST, *(folders - {partial}), partial):
        flush(path)
    if os.path.lexists(final):  # one that was damaged
        hide(final)
    partial.rename(final)
    flush(final.parent)
    write_whole(final.parent / LATEST, final.name + "\n")
    flush(final.parent)


def best_checkpoint(run_dir: Path, name: str | None) -> Path | None:
    """Find the checkpoint with the best figure of this name, the lowest loss or the highest of anything else, the
    earliest of equal ones, and write its name into ``checkpoints/best``; None where no checkpoint has such a figure."""
    if name is None:
        return None
    figures = {path: (read_state(path).get("evaluation") or {}).get(name) for path in complete_checkpoints(run_dir)}
    known = {path: figure for path, figure in figures.items() if figure is not None}
    if not known:
        return None
    choose = min if name.endswith(LOSS_ENDING) else max
    best = choose(known, key=known.__getitem__)
    write_whole(checkpoints_folder(run_dir) / BEST, f"{best.name}\n")
    return best


def remove_old(run_dir: Path, keep: int, keep_every: int | None, best: Path | None = None) -> None:
    """Remove complete checkpoints but the newest ``keep``, those of steps that ``keep_every`` divides, and ``best``.

    What cannot be removed is named: no reason to end a run.
    """
    for old in complete_checkpoints(run_dir)[:-keep]:
        if old != best and (keep_every is None or step_of(old) % keep_every):
            _tried(hide, old)
    for hidden in checkpoints_folder(run_dir).glob(f"{PARTIAL}*{OLD}"):
        _tried(remove, hidden)


def hide(checkpoint: Path) -> Path:
    """Make a checkpoint one that is not finished, before any of its files goes."""
    return checkpoint.rename(checkpoint.with_name(f"{PARTIAL}{checkpoint.name}{OLD}"))


def remove(hidden: Path) -> None:
    """Remove what is hidden; of a link, only the link."""
    if hidden.is_symlink():
        hidden.unlink()
    else:
        shutil.rmtree(hidden)


def _tried(action: Callable[[Path], object], old: Path) -> None:
    try:
        action(old)
    except OSError as error:
        logger.warning("%s: cannot be removed: %s", old, sentence_of(error) or error)


def remove_partial(run_dir: Path) -> None:
    """Remove what was not finished when an earlier start of this run ended."""
    for partial in checkpoints_folder(run_dir).glob(f"{PARTIAL}*"):
        logger.info("%s: was not finished when the run ended; it is removed", partial)
        _tried(remove, partial)


def check_room_for_all(run_dir: Path, size: int, keep: int) -> None:
    """Refuse to train where not one checkpoint finds room, and warn where ``keep`` of them and the next one do not.

    Raises:
        UserError: with what is needed and what is there.
    """
    check_room(run_dir, size)
    to_come = max(1, keep + 1 - len(all_checkpoints(run_dir)))
    free = _free_bytes(run_dir)
    if free < to_come * size:
        logger.warning(
            "%s: the disk has %.3g GB left, and %d more checkpoints of %.3g GB are to come (checkpoint.keep=%d and the "
            "one that is being written)",
            *(checkpoints_folder(run_dir), free / GB, to_come, size / GB, keep),
        )


def check_room(run_dir: Path, needed: int) -> None:
    """Refuse to begin a checkpoint that the disk cannot take.

    Raises:
        UserError: with what is needed and what is there.
    """
    folder, free = checkpoints_folder(run_dir), _free_bytes(run_dir)
    if free < needed:
        raise UserError(
            f"{folder}: a checkpoint needs {needed / GB:.3g} GB and the disk has {free / GB:.3g} GB left; free some "
            "space or let checkpoints be a link to another disk; the checkpoints there are whole, and running the same "
            "command again continues from the newest"
        )


def _free_bytes(run_dir: Path) -> int:
    folder = checkpoints_folder(run_dir)
    return shutil.disk_usage(folder if folder.is_dir() else run_dir).free


def flush(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _disk_errors_named(save: _InFlight) -> Iterator[None]:
    """Turn what a disk refuses into a sentence.

    Raises:
        UserError: on this rank alone.
    """
    try:
        yield
    except OSError as error:
        reason = sentence_of(error)
        if reason is None:
            raise
        raise UserError(
            f"checkpoint {save.final.name} could not be written: {reason}; those before it are whole, and running the "
            "same command again continues from the newest",
            on_every_rank=False,
        ) from error
