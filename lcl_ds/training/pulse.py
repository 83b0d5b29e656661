"""Where this process is in its work: written by the training loop, read by the threads that watch it.

Imports nothing heavy, since the threads run before torch is loaded.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Literal

Doing = Literal["starting", "waiting for data", "training", "evaluating", "saving", "profiling", "closing"]
REMEMBERED = 20
"""Micro-steps that the usual time is the median of."""


class Pulse:
    """What the process does, since when, and how long that usually takes."""

    def __init__(self) -> None:
        self.doing: Doing = "starting"
        self.step = 0
        """The step that is being computed, or was last."""
        self.micro_step = 0
        self.since = time.monotonic()
        self.has_stepped = False
        self.saved_step = 0
        self.save_s: float | None = None
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)

    @property
    def usual_s(self) -> float | None:
        """Seconds of a usual micro-step; None before there was one."""
        return median(self._seconds) if self._seconds else None

    def begin(self, doing: Doing, step: int, micro_step: int = 0) -> None:
        """Note that something begins now, which ends what was done before; takes a few microseconds.

        Args:
            micro_step: counted from 1; 0: between micro-steps.
        """
        now = time.monotonic()
        if self.doing == "training" and self.micro_step:
            self._seconds.append(now - self.since)
        self.step, self.micro_step, self.since, self.doing = step, micro_step, now, doing

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Note that data is waited for, within a micro-step or not, which then goes on: the time counts for nothing."""
        doing, began = self.doing, time.monotonic()
        since, self.since, self.doing = self.since, began, "waiting for data"
        try:
            yield
        finally:
            self.since, self.doing = since + time.monotonic() - began, doing

    def saved(self, step: int, seconds: float) -> None:
        """Note that everything up to ``step`` is in a checkpoint, and how long saving it took."""
        self.saved_step, self.save_s = step, seconds

    def forgive(self, seconds: float) -> None:
        """Leave out a time in which the whole process was stopped."""
        self.since += seconds

    def where(self) -> str:
        """Say where the process is, as the end of a sentence."""
        if self.doing in ("starting", "closing"):
            return f"while {self.doing}"
        if self.doing == "training":
            return f"in step {self.step}, micro-step {self.micro_step}" if self.micro_step else f"in step {self.step}"
        return f"{self.doing} in step {self.step}"


PULSE = Pulse()
"""Of this process."""
