"""How long calls take, and which kernels they run."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from lcl_ds.bench.measure import seconds_of

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
Call = Callable[[], object]


def median_ms(call: Call, repeats: int, warm_up: int = 3) -> float:
    """Median milliseconds of one call, on a GPU by events."""
    for _ in range(warm_up):
        call()
    return 1e3 * statistics.median(seconds_of(call, DEVICE) for _ in range(repeats))


def kernels_of(call: Call, repeats: int) -> list[dict[str, Any]]:
    """Kernels and copies that one call runs, the slowest first: name, launches and milliseconds per call.

    Without a GPU the operators of torch instead, so that there is something to try the program on.
    """
    call()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if GPU else [])]) as profiler:
        for _ in range(repeats):
            call()
        if GPU:
            torch.cuda.synchronize()
    launches: dict[str, int] = defaultdict(int)
    microseconds: dict[str, float] = defaultdict(float)
    for event in profiler.events() or []:
        if event.device_type == (DeviceType.CUDA if GPU else DeviceType.CPU):
            launches[event.name] += 1
            microseconds[event.name] += event.time_range.elapsed_us()
    return [
        {"kernel": name[:120], "launches": launches[name] / repeats, "ms": microseconds[name] / repeats / 1e3}
        for name in sorted(launches, key=lambda name: -microseconds[name])
    ]


def enqueue_ms(call: Call, repeats: int) -> float:
    """Median milliseconds until a call returns, its work enqueued: what the CPU takes for it."""
    taken = []
    for _ in range(repeats):
        if GPU:
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    if GPU:
        torch.cuda.synchronize()
    return 1e3 * statistics.median(taken)
