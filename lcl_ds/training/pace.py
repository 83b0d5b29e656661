"""How long each rank is busy by itself in a step, so that the slowest one can be named."""

import resource
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lcl_ds.training.distributed import RankInfo


class Pace:
    """Measures the time of a step that this rank does not spend waiting for others; nothing waits for the device.

    It is the time of drawing rows and, on a CPU, the processor time of the rest, since a rank that waits takes none. On
    a GPU it is drawing rows and what the device took, in the step before, until the decoder had run for the first time:
    below ZeRO stage 3 no rank waits for another until then; at stage 3 it does, so that there only drawing tells ranks
    apart.

    Args:
        decoder: what runs once per micro-step, after the encoder.
    """

    def __init__(self, rank_info: RankInfo, decoder: nn.Module):
        self._rank_info = rank_info
        self._draw_s = self._draw_cpu_s = self._device_s = self._cpu_at = 0.0
        self._events: list[Any] = []
        self._hook: Any = None
        if rank_info.device.type == "cuda":
            self._hook = decoder.register_forward_hook(lambda *_: self._mark(2))

    def begin(self) -> None:
        """Note that a step begins."""
        self._draw_s = self._draw_cpu_s = 0.0
        self._cpu_at = time.thread_time()
        if self._hook is not None:
            if len(self._events) == 2 and self._events[1].query():
                self._device_s = self._events[0].elapsed_time(self._events[1]) / 1e3
            self._events = []
            self._mark(1)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Count what is done meanwhile as drawing rows."""
        began, cpu_at = time.perf_counter(), time.thread_time()
        yield
        self._draw_s += time.perf_counter() - began
        self._draw_cpu_s += time.thread_time() - cpu_at

    @property
    def draw_s(self) -> float:
        """Return how long this rank took in this step to draw rows."""
        return self._draw_s

    def _mark(self, most: int) -> None:
        """Record the device's time, unless the step has that many marks."""
        if len(self._events) < most:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)

    def busy_s(self) -> float:
        """Return how long this rank has been busy since the step began."""
        computing = time.thread_time() - self._cpu_at - self._draw_cpu_s
        return self._draw_s + (self._device_s if self._hook is not None else computing)

    def metrics(self, busy_s: list[float]) -> dict[str, Any]:
        """Name the rank that was busy longest, by the keys of the metrics; empty where there is one rank alone.

        Args:
            busy_s: of each rank.
        """
        if len(busy_s) == 1:
            return {}
        slowest = max(range(len(busy_s)), key=busy_s.__getitem__)
        return {"slowest_rank": slowest, "slowest_rank_s": busy_s[slowest], "median_rank_s": statistics.median(busy_s)}

    def close(self) -> None:
        """Leave the decoder as it was."""
        if self._hook is not None:
            self._hook.remove()


def peak_memory_gb(device: torch.device) -> float:
    """Return the most memory so far in GiB: allocated on this GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
