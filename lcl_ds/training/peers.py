"""What ranks know of each other beside collectives: each writes what it does into the job's store."""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torch import distributed as dist

from lcl_ds.training.distributed import RankInfo
from lcl_ds.training.pulse import PULSE, Pulse

logger = logging.getLogger(__name__)

BEAT_S = 4.0
SILENT_S = 3 * BEAT_S
"""A rank that wrote nothing for this long is not heard of."""
NAMED = 8
"""Ranks that are named in one message."""
ANSWER_S = 5.0


class StorePeers:
    """A thread that writes this rank's pulse into the store every few seconds and reads the others' when asked.

    It has a connection of its own, and nobody waits for it: the store may live in the very process that hangs.

    Args:
        pulse: what this rank does.
    """

    def __init__(self, rank_info: RankInfo, pulse: Pulse):
        self._rank, self._world_size, self._pulse = rank_info.rank, rank_info.world_size, pulse
        self._ended = threading.Event()
        self._looking_until = 0.0
        self._looking_since = 0.0
        self._answered: float | None = None
        self._beats: dict[int, tuple[Any, float]] = {}
        self._data_beat: tuple[bytes, float] | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="peers")

    def look(self) -> None:
        now = time.monotonic()
        if now > self._looking_until:
            self._looking_since, self._beats, self._data_beat, self._answered = now, {}, None, None
        self._looking_until = now + SILENT_S

    def is_informed(self) -> bool:
        return time.monotonic() - self._looking_since >= SILENT_S

    def waiting_for_data(self) -> bool:
        beat = self._data_beat
        return beat is not None and time.monotonic() - beat[1] < SILENT_S and self._looking_since < beat[1]

    def may_speak(self) -> bool:
        """The first rank speaks; the second where it does not hear of the first."""
        if self._rank == 0:
            return True
        return self._rank == 1 and self.is_informed() and 0 in self._silent()

    def report(self) -> str:
        if not self.is_informed():
            return "which rank is behind is not known yet"
        if self._answered is None or time.monotonic() - self._answered > SILENT_S:
            return "the ranks' meeting place, which rank 0 or torchrun keeps, does not answer"
        silent = self._silent()
        beats = dict(self._beats)
        if silent:
            last = (self._name(rank, beats.get(rank, (None,))[0]) for rank in silent[:NAMED])
            more = f" and {len(silent) - NAMED} more" if len(silent) > NAMED else ""
            return f"not heard of for {SILENT_S:.0f} s: {', '.join(last)}{more}"
        behind = min((beat for beat, _ in beats.values()), key=lambda beat: (beat["step"], beat["micro_step"]))
        rank = next(rank for rank, (beat, _) in beats.items() if beat is behind)
        return f"all ranks are alive, the one furthest behind is {self._name(rank, behind)}"

    def _name(self, rank: int, beat: dict[str, Any] | None) -> str:
        if beat is None:
            return f"rank {rank}"
        return f"rank {rank} on {beat['host']} (step {beat['step']}, micro-step {beat['micro_step']}, {beat['doing']})"

    def _silent(self) -> list[int]:
        now = time.monotonic()
        heard = {rank for rank, (_, changed) in self._beats.items() if now - changed < SILENT_S}
        return [rank for rank in range(self._world_size) if rank not in heard and rank != self._rank]

    @contextmanager
    def beating(self) -> Iterator["StorePeers"]:
        """Write and read during the block."""
        self._thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            self._thread.join(ANSWER_S)  # it may wait for a store that does not answer

    def _run(self) -> None:
        try:
            store = open_store()
            count = 0
            while True:
                self._beat(store, count)
                if time.monotonic() < self._looking_until:
                    self._read(store)
                count += 1
                if self._ended.wait(BEAT_S):
                    return
        except (RuntimeError, OSError) as error:
            if not self._ended.is_set():
                logger.debug("rank %d hears no more of the others: %s", self._rank, error)

    def _beat(self, store: dist.Store, count: int) -> None:
        pulse = self._pulse
        beat = {
            "beat": count,
            "host": socket.gethostname(),
            "step": pulse.step,
            "micro_step": pulse.micro_step,
            "doing": pulse.doing,
        }
        store.set(_beat_of(self._rank), json.dumps(beat))
        if pulse.doing == "waiting for data":
            store.set("data", f"{self._rank} {count}")

    def _read(self, store: dist.Store) -> None:
        names = [_beat_of(rank) for rank in range(self._world_size)] if self._rank < 2 else []
        if store.check(["data"]):
            data = store.get("data")
            if self._data_beat is None or self._data_beat[0] != data:
                is_first = self._data_beat is None
                self._data_beat = data, self._looking_since if is_first else time.monotonic()
        now = time.monotonic()
        self._answered = now
        if not names or not store.check(names):
            return
        for rank, text in enumerate(store.multi_get(names)):
            beat = json.loads(text)
            known = self._beats.get(rank)
            if known is None:
                self._beats[rank] = beat, self._looking_since
            elif known[0]["beat"] != beat["beat"]:
                self._beats[rank] = beat, now


def _beat_of(rank: int) -> str:
    return f"rank {rank}"


def open_store() -> dist.Store:
    """Connect to the store in which the ranks met.

    Raises:
        RuntimeError: it does not answer.
    """
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=ANSWER_S),
        wait_for_workers=False,
    )
    return dist.PrefixStore(f"lcl_ds pulse {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


@contextmanager
def peers_of(rank_info: RankInfo) -> Iterator[StorePeers | None]:
    """Keep in touch with the other ranks during the block; None where there are none."""
    if rank_info.world_size == 1:
        yield None
        return
    with StorePeers(rank_info, PULSE).beating() as peers:
        yield peers
