"""Time and peak memory of one training step of a loss, the ceilings of the machine, and what the machine is.

Times are medians. On a GPU every call is timed with events, after a buffer larger than any L2 cache was written, so
that no method finds its inputs there. On a CPU the methods take turns, round by round, so that noise hits all alike.

Memory on a GPU is the allocator's peak above what the inputs take. On a CPU it is the growth of the resident set's
high-water mark, which Linux keeps and lets a process reset, during one step in a fresh process that gives freed blocks
back at once: none that an allocator holds back can hide anything. Nothing is sampled, so no short peak is missed.
"""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcl_ds.environment import cpu_name, git_commit, git_modified, gpu_driver, version_of, versions

Call = Callable[[], object]
Times = dict[str, list[float] | Exception]
"""Seconds of every timed call by method, or why there are none."""

PACKAGES = (
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "nvidia-cutlass-dsl",
    "open_clip_torch",
    "memeff",
    "inf-cl",
    "siglip-kernel",
)
L2_FLUSH_BYTES = 256 * 2**20
GPU_BUDGET_S = 0.6
"""A slow method is timed less often: about so many seconds of it, and three times at least."""
SLOW_S = 0.3
"""On a GPU: from here on one call for warm-up is enough."""
CPU_SLOW_S = 10.0
"""On a CPU: from here on one timed call has to do, where nothing compiles the one for warm-up."""
MATMUL_N = {"cuda": 8192, "cpu": 2048}
"""Rows and columns of the matrix product that is the ceiling."""
M_MMAP_THRESHOLD = -3
"""Of glibc's <malloc.h>."""
MB = 2**20


class DeviceLostError(Exception):
    """A method broke the GPU's context: no number after that can be had in this process."""


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Call, device: torch.device, flush: Tensor | None = None) -> float:
    """Seconds of one call; `flush` is written first."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    if flush is not None:
        flush.zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def time_calls(calls: dict[str, Call], device: torch.device, repeats: int, compiling: Collection[str] = ()) -> Times:
    """Time each method; one that fails does not stop the others. The first call of `compiling` ones never counts."""
    if device.type == "cuda":
        return {name: time_on_gpu(call, device, repeats) for name, call in calls.items()}
    times: Times = {name: [] for name in calls}
    for turn in range(1 + repeats):  # the first is for warm-up
        for name, call in calls.items():
            so_far = times[name]
            if isinstance(so_far, Exception) or (so_far and so_far[0] >= CPU_SLOW_S):
                continue
            try:
                seconds = seconds_of(call, device)
            except Exception as error:
                times[name] = without_frames(error)
                continue
            if turn or (seconds >= CPU_SLOW_S and name not in compiling):
                so_far.append(seconds)
    return times


def time_on_gpu(call: Call, device: torch.device, repeats: int) -> list[float] | Exception:
    """Seconds of up to `repeats` calls after three for warm-up; one if the method is slow."""
    try:
        flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device=device)
        call()  # compiles
        typical = seconds_of(call, device, flush)
        count = min(repeats, max(3, int(GPU_BUDGET_S / max(typical, 1e-6))))
        if typical >= SLOW_S:
            return [typical, *(seconds_of(call, device, flush) for _ in range(count - 1))]
        call()
        return [seconds_of(call, device, flush) for _ in range(count)]
    except Exception as error:
        return without_frames(error)
    finally:
        recover(device)


def time_graph(call: Call, device: torch.device, repeats: int) -> list[float]:
    """Seconds of replays of a CUDA graph of `call`, which then costs the CPU nothing.

    Raises:
        Exception: the call waits for the device or does something else that a graph cannot hold.
    """
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device=device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    seconds_of(graph.replay, device, flush)
    typical = seconds_of(graph.replay, device, flush)
    count = min(repeats, max(3, int(GPU_BUDGET_S / max(typical, 1e-6))))
    return [seconds_of(graph.replay, device, flush) for _ in range(count)]


def without_frames(error: Exception) -> Exception:
    """The error alone: the frames of a traceback would keep the tensors of a failed method alive."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def recover(device: torch.device) -> None:
    """Give cached memory back.

    Raises:
        DeviceLostError: the GPU takes no more work from this process.
    """
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except Exception as error:
            raise DeviceLostError(first_line(error)) from error


def first_line(error: BaseException) -> str:
    """What went wrong, in one line."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return "out of memory"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}"[:160] if lines else type(error).__name__


def gpu_peak_extra_bytes(call: Call, device: torch.device) -> int:
    """Peak of allocated bytes during `call` above what was allocated before; gradients of inputs count."""
    recover(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def cpu_peak_extra_bytes(call: Call) -> int:
    """Growth of this process's resident set during `call`, at its peak; run it in a process of its own.

    Raises:
        OSError: no /proc of Linux.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again at the present size
    before = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` in a process that has done nothing but import.

    The processes are forks of a server that imported torch and ran nothing, so that each starts in milliseconds.

    Raises:
        MemoryError: the process was killed.
        RuntimeError: `function` failed; the message is its error in one line.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lcl_ds.bench.__main__"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, function, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        failed, result = receiver.recv()
    except EOFError:
        raise MemoryError from None
    finally:
        process.join()
    if failed:
        raise RuntimeError(result)
    return result


def _send_result(sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        # From 128 KiB on, blocks go back to the system when they are freed. Left alone, glibc raises that bound.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**17)
    try:
        answer = (False, function(*arguments))
    except Exception as error:
        answer = (True, first_line(error))
    sender.send(answer)


def square_matmul(device: torch.device, dtype: torch.dtype) -> tuple[Call, float]:
    """A matrix product of random data, and how many operations it takes."""
    n = MATMUL_N[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2.0 * n**3


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What this machine reaches at best: a square matrix product, and a copy (read and write)."""
    matmul, flops = square_matmul(device, dtype)
    megabytes, repeats = (1024, 20) if device.type == "cuda" else (128, 3)
    source = torch.empty(megabytes * MB, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return {
        "matmul_n": MATMUL_N[device.type],
        "matmul_dtype": str(dtype).removeprefix("torch."),
        "matmul_tflops": flops / _median_seconds(matmul, device, repeats) / 1e12,
        "copy_mb": megabytes,
        "copy_tb_per_s": 2 * source.numel() / _median_seconds(lambda: target.copy_(source), device, repeats) / 1e12,
    }


def _median_seconds(call: Call, device: torch.device, repeats: int) -> float:
    for _ in range(3 if device.type == "cuda" else 1):
        call()
    return statistics.median(seconds_of(call, device) for _ in range(repeats))


def describe_environment(device: torch.device) -> dict[str, Any]:
    """The machine and the versions of all that takes part."""
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "device": device.type,
        "gpu": gpu.name if gpu else None,
        "gpu_memory_gb": gpu.total_memory / 2**30 if gpu else None,
        "driver": gpu_driver() if gpu else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "git_commit": git_commit(),
        "git_modified": git_modified("lcl_ds", "kernels"),
        "peers": versions(PACKAGES),
    }
