"""A thread of every rank that notices what the rank itself cannot: a launcher that is gone, a step that never ends.

Imports nothing heavy: launchers are watched before torch is loaded.
"""

import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from lcl_ds.tasks import task_number
from lcl_ds.training.pulse import PULSE, Pulse
from lcl_ds.training.signals import STOP, StopRequest

logger = logging.getLogger(__name__)

HUNG = 124
"""Exit code of a rank that made no progress within the limit; ``timeout`` has the same."""
POLL_S = 1.0
SUSPENDED_S = 10.0
"""A poll that comes later than this means that the whole process was stopped, which is not a step that hangs."""
FIRST_NOTICE_S = 30.0
"""How long nothing happens at least before it is said."""
LOOK_S = 16.0
"""How long before the first notice a rank begins to look what the others do."""
LAST_WORDS_S = 3.0
"""How long a rank waits after its stacks: the others print theirs before they lose this one."""
DEEPSPEED_GRACE_S = 30.0
"""What ``deepspeed.launcher.launch`` leaves its ranks after a signal; it cannot be set."""
TORCHRUN_GRACE_S = 30.0
"""What torchrun leaves its ranks where nothing else is said."""
SETTABLE_SINCE = (2, 12)
"""The first torch whose torchrun can be told otherwise."""

TORCHRUN = frozenset({"torchrun", "torch.distributed.run", "torch.distributed.launch"})
DEEPSPEED = frozenset({"deepspeed.launcher.launch"})
ACCELERATE = frozenset({"accelerate", "accelerate-launch", "accelerate.commands.launch"})
DEEPSPEED_RUNNER = frozenset({"deepspeed", "ds", "deepspeed.launcher.runner"})


@dataclass(frozen=True)
class Limits:
    """Seconds without progress after which a run ends."""

    first_s: float
    """Until the first step is done, and in a save."""
    then_s: float


class Peers(Protocol):
    """What is known of the other ranks; see :class:`lcl_ds.training.peers.StorePeers`."""

    def look(self) -> None:
        """Begin to read what the others write, or go on."""

    def is_informed(self) -> bool:
        """Say whether this rank has looked long enough to know who is silent."""

    def waiting_for_data(self) -> bool:
        """Say whether some rank is alive and waits for its data."""

    def may_speak(self) -> bool:
        """Say whether this rank is the one that tells the user."""

    def report(self) -> str:
        """Name the ranks that are not heard of, and what the others do."""


@dataclass(frozen=True)
class Launcher:
    """A process that started this one and should outlive it."""

    name: str
    pid: int
    started: str

    def is_gone(self) -> bool:
        """Say whether it has ended; its number may belong to another process by now."""
        status = _status_of(self.pid)
        return status is None or status.state == "Z" or status.started != self.started


class Watch:
    """Looks once a second at launchers and, from :meth:`guard` on, at the progress of the run.

    Args:
        stop: is asked to stop when a launcher is gone: ranks without one save and end.
        pulse: what this rank does.
    """

    def __init__(self, stop: StopRequest, pulse: Pulse):
        self._stop, self._pulse = stop, pulse
        self._ended = threading.Event()
        self._launchers: list[Launcher] = []
        self._limits: Limits | None = None
        self._peers: Peers | None = None
        self._said_s = 0.0
        self._warned = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch during the block."""
        self._ended.clear()
        self._limits, self._peers = None, None
        self._launchers = launchers_of_this_process()
        thread = threading.Thread(target=self._run, daemon=True, name="watch")
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def guard(self, limits: Limits, peers: Peers | None) -> None:
        """End the process when there is no progress for too long, from now on.

        Args:
            peers: what is known of the other ranks; None: there are none.
        """
        self._limits, self._peers = limits, peers

    def _run(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(POLL_S):
            now = time.monotonic()
            if now - before > SUSPENDED_S:
                self._pulse.forgive(now - before)
            before = now
            for launcher in self._launchers:
                if launcher.is_gone():
                    self._launchers = []
                    self._stop.ask(signal.SIGTERM, f"{launcher.name} (process {launcher.pid}) has ended")
            if self._limits is not None:
                self._look_for_progress(self._limits)
                self._compare_with_grace()

    def _look_for_progress(self, limits: Limits) -> None:
        pulse, peers = self._pulse, self._peers
        doing, usual_s = pulse.doing, pulse.usual_s
        if doing in ("waiting for data", "closing"):
            return
        waited_s = time.monotonic() - pulse.since
        limit_s = limits.then_s if pulse.has_stepped and doing == "training" else limits.first_s
        notice_s = min(limit_s / 2, limit_s / 8 if usual_s is None else max(10 * usual_s, FIRST_NOTICE_S))
        if waited_s < notice_s:
            self._said_s = 0.0
            if waited_s > notice_s - LOOK_S and peers:
                peers.look()
            return
        if peers:
            peers.look()
        if waited_s >= max(notice_s, 2 * self._said_s) and (peers is None or peers.may_speak()):
            self._said_s = waited_s
            usual = "" if usual_s is None else f", usual {usual_s:.3g} s"
            who = f"; {peers.report()}" if peers else ""
            logger.warning(
                "no step for %.0f s%s: %s%s; the run ends after %.0f s",
                *(waited_s, usual, pulse.where(), who, limit_s),
            )
        if waited_s >= limit_s and (peers is None or (peers.is_informed() and not peers.waiting_for_data())):
            self._give_up(waited_s, f"; {peers.report()}" if peers and peers.may_speak() else "")

    def _give_up(self, waited_s: float, others: str) -> None:
        """Print where every thread stands, and end the process; its launcher ends the other ranks."""
        who = f"rank {task_number()} on {socket.gethostname()}"
        text = f"{who}: no progress for {waited_s:.0f} s {self._pulse.where()}{others}; the threads of this rank are:\n"
        with suppress(OSError):
            os.write(2, text.encode())
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        time.sleep(LAST_WORDS_S)
        os._exit(HUNG)

    def _compare_with_grace(self) -> None:
        """Warn once where a step and a save take nearly as long as the launcher waits before it kills."""
        step_s, save_s = self._pulse.usual_s, self._pulse.save_s
        if self._warned or step_s is None or task_number() or not self._launchers:
            return
        grace = grace_of(self._launchers[0])
        needed_s = step_s + (save_s or 0.0)
        if grace is None or needed_s < 2 / 3 * grace[0]:
            return
        self._warned = True
        logger.warning(
            "a signal to %s may lose the steps since the last checkpoint: it kills the ranks after %.0f s, and a "
            "micro-step and a save take %.0f s here; %s",
            *(self._launchers[0].name, grace[0], needed_s, grace[1]),
        )


def grace_of(launcher: Launcher) -> tuple[float, str] | None:
    """Say how many seconds a launcher leaves its ranks after a signal, and what to do where that is too short."""
    if launcher.name in DEEPSPEED:
        return (
            DEEPSPEED_GRACE_S,
            f"this cannot be set: signal the first rank alone (process {os.getpid()} on {socket.gethostname()}), which "
            "stops all ranks and gives them the time they need, or start the run with torchrun",
        )
    if launcher.name in TORCHRUN | ACCELERATE:
        if tuple(int(number) for number in version("torch").split(".")[:2]) < SETTABLE_SINCE:
            return TORCHRUN_GRACE_S, "from torch 2.12 on TORCH_ELASTIC_SHUTDOWN_TIMEOUT=<seconds> gives them more"
        given = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "")
        words = [part for word in _words_of(launcher.pid) for part in word.split("=")]
        for name in ("--shutdown-timeout", "--shutdown_timeout"):
            if name in words[:-1]:
                given = words[words.index(name) + 1]
        advice = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=<seconds> gives them more"
        return float(given) if given.isdigit() else TORCHRUN_GRACE_S, advice
    return None


def launchers_of_this_process() -> list[Launcher]:
    """Find the launcher that started this process and, where that has one above it, that too.

    Only programs that wait for their ranks count. That a shell, ``nohup`` or ``srun``'s daemon ends says nothing.
    """
    launcher = _launcher(os.getppid(), TORCHRUN | DEEPSPEED | ACCELERATE)
    if launcher is None:
        return []
    above = _status_of(launcher.pid)
    runner = _launcher(above.parent, DEEPSPEED_RUNNER) if above and launcher.name in DEEPSPEED else None
    return [launcher] if runner is None else [launcher, runner]


def _launcher(pid: int, names: frozenset[str]) -> Launcher | None:
    status, name = _status_of(pid), program_of(_words_of(pid))
    return Launcher(name, pid, status.started) if status and name in names else None


def program_of(words: list[str]) -> str:
    """Name the Python module or script that a command line runs: ``torchrun``, ``deepspeed.launcher.launch``."""
    rest = iter(words[1:])
    if words and not Path(words[0]).name.startswith("python"):
        return Path(words[0]).name
    for word in rest:
        if word == "-m":
            return next(rest, "")
        if not word.startswith("-"):
            return Path(word).name
    return ""


def _words_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:  # it has ended, or there is no /proc: then nothing is known of launchers
        return []


@dataclass(frozen=True)
class _Status:
    state: str
    parent: int
    started: str


def _status_of(pid: int) -> _Status | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return _Status(fields[0], int(fields[1]), fields[19])


WATCH = Watch(STOP, PULSE)
"""Of this process."""
