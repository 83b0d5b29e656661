"""Hand the rows of lanes to ranks: which rank gets which row, in which process, and where to continue."""

import atexit
import logging
import math
import multiprocessing
import os
import signal
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from multiprocessing.synchronize import Event
from typing import Any, TypeVar

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lcl_ds.batch import Batch
from lcl_ds.data.exclusion import unknown_keys
from lcl_ds.data.shards.source import Source
from lcl_ds.data.stream.lanes import Lane, LaneSettings, LaneState, choose_lanes, sizes_by_image_tokens
from lcl_ds.data.stream.packing import Row, collate
from lcl_ds.data.stream.skips import Skips
from lcl_ds.data.stream.stalls import StallWatch
from lcl_ds.errors import UserError
from lcl_ds.tokens import TextTokenizer

logger = logging.getLogger(__name__)

T = TypeVar("T")
LoaderState = dict[str, Any]
"""JSON: ``next_row`` of the global stream, ``lanes`` by number, ``lane_count``, ``fingerprint`` of the shards."""
SHOWN_DIFFERENCES = 10
"""Shards that are named when a position was saved for other data."""


class GroupStream(IterableDataset[tuple[int, list[Row] | UserError, LaneState]]):
    """This rank's groups of rows of the global stream, ``rank, rank + world_size, ...``, from ``first_group`` on.

    With several loader processes they take this rank's groups in turn. Where ``lanes`` is a multiple of
    ranks x workers each lane lives in one process; else several draw and pack the rows of a lane, and each decodes its
    own. A UserError is handed on as an item: one that is raised in a loader process would arrive as a traceback.
    """

    def __init__(
        self,
        sources: list[Source],
        settings: LaneSettings,
        tokenizer: TextTokenizer,
        rank: int,
        world_size: int,
        first_group: int,
        lane_states: dict[str, LaneState],
    ):
        self.sources, self.settings, self.tokenizer = sources, settings, tokenizer
        self.rank, self.world_size, self.first_group = rank, world_size, first_group
        self.lane_states = lane_states

    def __iter__(self) -> Iterator[tuple[int, list[Row] | UserError, LaneState]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        lanes: dict[int, Lane] = {}
        skips, watch = Skips(self.settings.max_bad_share), StallWatch(self.settings.stall_seconds)
        sizes = sizes_by_image_tokens(self.sources, self.settings, self.tokenizer)  # one for all lanes of the process
        group = self.first_group + self.rank + number * self.world_size
        while True:
            n = group % self.settings.lanes
            try:
                if n not in lanes:
                    state = self.lane_states.get(str(n))
                    lanes[n] = Lane(self.sources, self.settings, n, self.tokenizer, state, skips, sizes, watch)
                while lanes[n].rows_returned < group // self.settings.lanes * self.settings.group_rows:
                    lanes[n].skip_row()
                rows = [lanes[n].next_row() for _ in range(self.settings.group_rows)]
            except UserError as error:
                yield n, error, {}
                return
            yield n, rows, lanes[n].state()
            group += self.world_size * workers


class BatchLoader:
    """Micro-batches of one rank, with a position that can be saved and continued on any number of ranks and workers.

    Args:
        sources, settings, tokenizer: what the stream is made of.
        rows_per_batch: rows of this rank in one micro-step.
        rank, world_size: which of how many processes this is.
        workers: loader processes; 0 makes rows in this one.
        state: from :meth:`state`, with the lanes of all ranks.
        pin_memory: for asynchronous copies to a GPU.

    Raises:
        UserError: groups that do not divide the rows of a rank, or a saved position of other data.
    """

    def __init__(
        self,
        sources: list[Source],
        settings: LaneSettings,
        tokenizer: TextTokenizer,
        rows_per_batch: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        state: LoaderState | None = None,
        pin_memory: bool = False,
    ):
        if rows_per_batch % settings.group_rows:
            raise UserError(
                f"data.group_rows: {settings.group_rows} does not divide the {rows_per_batch} rows of a rank's "
                "micro-step (train.global_batch_rows / train.accumulation_steps / ranks)"
            )
        if not settings.lanes:
            lanes = state["lane_count"] if state else choose_lanes(sources, settings, tokenizer)
            settings = replace(settings, lanes=lanes)
        processes = world_size * max(1, workers)
        if rank == 0 and (packers := processes // math.gcd(processes, settings.lanes)) > 1:
            logger.info(
                "data.lanes: %d for %d loader processes: every document is read and packed by %d of them, its images "
                "are decoded by one",
                settings.lanes,
                processes,
                packers,
            )
        if rank == 0 and (unknown := unknown_keys(settings.excluded, sources)):
            logger.warning(
                "data.exclude: %d of %d keys name no document of data.shards: %s",
                len(unknown),
                len(settings.excluded),
                ", ".join(unknown[:SHOWN_DIFFERENCES]),
            )
        self.settings, self.tokenizer, self.rows_per_batch = settings, tokenizer, rows_per_batch
        self.world_size, self.pin_memory = world_size, pin_memory
        self.fingerprint = {key: value for source in sources for key, value in source.fingerprint().items()}
        state = state or {"next_row": 0, "lanes": {}, "lane_count": settings.lanes, "fingerprint": self.fingerprint}
        check_same_data(state, settings.lanes, self.fingerprint)
        self._next_row: int = state["next_row"]
        self._lane_states: dict[str, LaneState] = {}
        first_group = self._next_row // settings.group_rows
        stream = GroupStream(sources, settings, tokenizer, rank, world_size, first_group, state["lanes"])
        shared = math.gcd(world_size, settings.lanes)
        self._lane_states.update({n: s for n, s in state["lanes"].items() if int(n) % shared == rank % shared})
        # Two micro-steps are made ahead: torch's default is two items, which are rows here.
        ahead = math.ceil(2 * rows_per_batch / settings.group_rows / workers) if workers else 0
        self._groups = iter(
            DataLoader(
                stream,
                batch_size=None,
                collate_fn=_as_it_is,
                num_workers=workers,
                prefetch_factor=max(2, ahead) if workers else None,
                worker_init_fn=partial(_leave_signals_to_the_trainer, self._ending_event(workers)),
                persistent_workers=workers > 0,
            )
        )

    def _ending_event(self, workers: int) -> Event | None:
        """Make an event that is set when this loader or its process ends; None without loader processes."""
        if not workers:
            return None
        ending = multiprocessing.Event()
        weakref.finalize(self, ending.set)
        atexit.register(ending.set)
        return ending

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        rows: list[Row] = []
        while len(rows) < self.rows_per_batch:
            lane, group, state = next(self._groups)
            if isinstance(group, UserError):
                raise UserError(group.problems, on_every_rank=False)
            self._lane_states[str(lane)] = state
            rows += group
        self._next_row += self.rows_per_batch * self.world_size
        settings = self.settings
        batch = collate(
            rows,
            settings.row_tokens,
            settings.image_size,
            self.tokenizer.vocabulary,
            settings.view.readout_names,
            settings.native,
        )
        return batch.pin_memory() if self.pin_memory else batch

    @property
    def next_row(self) -> int:
        """Return the number, in the stream of all ranks, of the first row of the next micro-step."""
        return self._next_row

    def state(self) -> LoaderState:
        """Return the position after the last batch; its ``lanes`` are those of this rank, see :func:`merge_states`."""
        return {**self.position(), "fingerprint": self.fingerprint}

    def position(self) -> LoaderState:
        """Return what differs between ranks of :meth:`state`: all but the fingerprint, which names every shard."""
        return {"next_row": self._next_row, "lanes": dict(self._lane_states), "lane_count": self.settings.lanes}


def _as_it_is(item: T) -> T:
    """Hand on rows as they are: torch would look through every document for arrays to convert."""
    return item


def merge_states(states: list[LoaderState]) -> LoaderState:
    """Merge the states of all ranks; of a lane that several ranks read, the furthest state counts.

    Args:
        states: in rank order; of all but the first the position is enough.
    """
    lanes: dict[str, LaneState] = {}
    for state in states:
        for n, lane in state["lanes"].items():
            if n not in lanes or _rows_of(lane) > _rows_of(lanes[n]):
                lanes[n] = lane
    return {**states[0], "lanes": dict(sorted(lanes.items(), key=lambda item: int(item[0])))}


def _rows_of(lane: LaneState) -> int:
    rows: int = lane["rows"] + lane["emitted"]
    return rows


def check_same_data(state: LoaderState, lanes: int, fingerprint: dict[str, str]) -> None:
    """Refuse to continue on other data than the position was saved for.

    The same shards in the same order are the same data, whatever folders they lie in.

    Raises:
        UserError: names the shards that are missing, new, changed or in another order.
    """
    if state["lane_count"] != lanes:
        raise UserError(f"data.lanes: the checkpoint was written with {state['lane_count']}, not {lanes}; it is fixed")
    saved = state.get("fingerprint")
    if not isinstance(saved, dict):
        raise UserError("data.shards: the checkpoint does not say which shards it was written for; start a new run")
    problems = shard_differences(saved, fingerprint)
    if len(problems) > SHOWN_DIFFERENCES:
        problems = [*problems[:SHOWN_DIFFERENCES], f"{len(problems) - SHOWN_DIFFERENCES} more shards differ"]
    if problems:
        raise UserError([f"data.shards: {problem}" for problem in problems])


def shard_differences(saved: dict[str, str], now: dict[str, str]) -> list[str]:
    """Say what differs between two fingerprints, a sentence for each shard."""
    before, after = _by_source(saved), _by_source(now)
    problems: list[str] = []
    for source in {**before, **after}:
        problems += _differences_of_source(before.get(source, {}), after.get(source, {}))
    if not problems and list(before) != list(after):
        problems.append(f"the checkpoint has the sources in the order {', '.join(before)}; restore it")
    return problems


def _by_source(fingerprint: dict[str, str]) -> dict[str, dict[str, str]]:
    sources: dict[str, dict[str, str]] = {}
    for name, layout in fingerprint.items():
        sources.setdefault(name.partition("/")[0], {})[name] = layout
    return sources


def _differences_of_source(saved: dict[str, str], now: dict[str, str]) -> list[str]:
    if list(saved.values()) == list(now.values()):
        return []
    missing, new = _not_in(saved, now), _not_in(now, saved)
    problems = []
    for name in missing:
        changed = next((other for other in new if _may_be_same_file(name, other)), None)
        if changed is None:
            problems.append(f"shard {name} of the checkpoint is missing; restore it or start a new run")
        else:
            new.remove(changed)
            problems.append(f"shard {name} changed since the checkpoint; restore it or start a new run")
    problems += [f"shard {name} is new since the checkpoint; remove it or start a new run" for name in new]
    if not problems:
        known = {layout: name for name, layout in reversed(saved.items())}
        moved = [f"{name} is the one that the checkpoint knows as {known[now[name]]}" for name in now]
        telling = [sentence for name, sentence in zip(now, moved, strict=True) if known[now[name]] != name]
        problems.append(
            f"the same shards are in another order: {(telling or moved)[0]}; give them back their names or start a new "
            "run"
        )
    return problems


def _not_in(some: dict[str, str], others: dict[str, str]) -> list[str]:
    """Name the ``some`` shards that ``others`` lack; of shards with one layout those first whose name they lack too."""
    lacking = Counter(some.values()) - Counter(others.values())
    names = []
    for name in sorted(some, key=lambda name: name in others):
        if lacking[some[name]] > 0:
            lacking[some[name]] -= 1
            names.append(name)
    return sorted(names)


def _may_be_same_file(name: str, other: str) -> bool:
    """Say whether two names below common folders agree as far as the shorter one goes."""
    ours, theirs = name.split("/")[1:], other.split("/")[1:]
    length = min(len(ours), len(theirs))
    return ours[-length:] == theirs[-length:]


def _leave_signals_to_the_trainer(ending: Event | None, _: int) -> None:
    """Ignore signals: launchers signal whole process trees, and the trainer needs its loaders for its last checkpoint.

    But when a loader is given up after an error, or its process ends, Python sends the same signal and waits.
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if ending is not None and ending.is_set() else None)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
