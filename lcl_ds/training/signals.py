"""Requests to stop: heard and answered at once, obeyed where nothing is lost.

A Python handler does not run while the main thread is in a long call of C, such as a backward pass or a collective. A
thread therefore reads the signals from a pipe that Python's C handler writes to. Imports nothing heavy: signals are
heard before torch is loaded.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Literal, NoReturn

from lcl_ds.tasks import task_number
from lcl_ds.training.pulse import PULSE, Pulse

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
PATIENCE_S = 5.0
"""Launchers and terminals send several signals at one moment: those within this time count as one."""
SHOW_CURSOR = b"\x1b[?25h"

Phase = Literal["starting", "training", "closing"]
"""Before the first step is done; while there are steps to save; when the weights are saved and are evaluated."""


class StopRequest:
    """Hears signals for this process and remembers the first.

    While training, the loop obeys at the next micro-step; in the other phases the process ends at once, with
    128 + the signal's number, because nothing is lost.
    """

    def __init__(self, pulse: Pulse):
        self.received = 0
        """Number of the first signal; 0: none."""
        self._pulse = pulse
        self._phase: Phase = "starting"
        self._since = 0.0
        self._lock = threading.Lock()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear signals during the block. What was ignored when the process started, as under ``nohup``, stays so."""
        if threading.current_thread() is not threading.main_thread():  # Python sets handlers nowhere else
            yield
            return
        self.received, self._phase = 0, "starting"
        self._terminals = [number for number in (1, 2) if os.isatty(number)]
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        thread = threading.Thread(target=self._listen, args=(reader,), daemon=True, name="signals")
        thread.start()
        earlier_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        earlier = {number: signal.signal(number, lambda *_: None) for number in heard}
        fork = _ForkGuard(earlier)
        try:
            yield
        finally:
            fork.is_on = False
            for number, handler in earlier.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(earlier_writer)
            os.write(writer, bytes([0]))
            thread.join()
            os.close(reader)
            os.close(writer)

    def enter(self, phase: Phase) -> None:
        """Say in which phase the process is from now on."""
        with self._lock:
            self._phase = phase

    def ask(self, number: int, reason: str) -> None:
        """Ask this process to stop as if signal ``number`` had come, unless one came before; not from the main thread.

        Args:
            reason: how the message about it begins.
        """
        with self._lock:
            if self.received:
                return
            if number == signal.SIGHUP:  # before the main thread can learn of it and print
                self._let_go_of_terminal()
            self.received, self._since, phase = number, time.monotonic(), self._phase
        self._obey(number, reason, phase)

    def _listen(self, reader: int) -> None:
        while True:
            for number in os.read(reader, 64):
                if not number:
                    return
                if number in SIGNALS:
                    self._hear(number)

    def _hear(self, number: int) -> None:
        name = signal.Signals(number).name
        if not self.received:
            self.ask(number, name)
            return
        waited = time.monotonic() - self._since
        if waited >= PATIENCE_S:
            saved = self._pulse.saved_step
            then = f"continues from step {saved}" if saved else "starts again"
            self._end(
                number, f"{name}, {waited:.0f} s after the first signal: the run ends at once; the same command {then}"
            )

    def _obey(self, number: int, reason: str, phase: Phase) -> None:
        if phase == "starting":
            self._end(number, f"{reason}: the run ends at once; nothing has been trained since this start")
        if phase == "closing":
            self._end(
                number, f"{reason}: the run ends at once; the weights are saved, and the same command evaluates them"
            )
        self._say(
            f"{reason}: the run saves after this micro-step and ends with code {128 + number}, {self._estimate()}; a "
            f"second signal, {PATIENCE_S:.0f} s after this one or later, ends at once and saves nothing"
        )

    def _estimate(self) -> str:
        step_s, save_s = self._pulse.usual_s, self._pulse.save_s
        if step_s is None:
            return "soon"
        if save_s is None:
            return f"in about {max(1, round(step_s))} s and what a first save takes"
        return f"in about {max(1, round(step_s + save_s))} s (micro-step {step_s:.1f} s, save {save_s:.1f} s)"

    def _say(self, sentence: str) -> None:
        """Write past Python's streams, which the main thread may be using; the terminal may be gone."""
        if task_number() == 0:
            with suppress(OSError):
                os.write(2, f"{sentence}\n".encode())

    def _end(self, number: int, sentence: str) -> NoReturn:
        self._say(f"{sentence} (code {128 + number})")
        if 1 in self._terminals and task_number() == 0:
            with suppress(OSError):
                os.write(1, SHOW_CURSOR)
        os._exit(128 + number)

    def _let_go_of_terminal(self) -> None:
        """Where the terminal hung up, print nowhere from now on: every write would fail, before anything is saved."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in self._terminals:
            if not os.isatty(number):
                os.dup2(nowhere, number)
        os.close(nowhere)


class _ForkGuard:
    """Gives forked processes the handlers back that this one had: they end on signals and speak for nobody else.

    Signals wait while a process forks: the child would take one that comes early for its parent's.
    """

    def __init__(self, handlers: Mapping[signal.Signals, Any]):
        self.is_on = True
        self._handlers, self._owner, self._masks = handlers, os.getpid(), threading.local()
        os.register_at_fork(before=self._before, after_in_parent=self._unblock, after_in_child=self._in_child)

    def _before(self) -> None:
        if self.is_on and os.getpid() == self._owner:
            self._masks.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def _unblock(self) -> None:
        if (mask := self._masks.__dict__.pop("mask", None)) is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _in_child(self) -> None:
        if self.is_on and os.getppid() == self._owner:
            signal.set_wakeup_fd(-1)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        self._unblock()


STOP = StopRequest(PULSE)
"""Of this process."""
