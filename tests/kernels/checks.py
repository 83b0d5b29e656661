"""Measures and watchers that the kernel tests share."""

from collections.abc import Callable
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, Self

import lcl_kernels
import pytest
import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile
from torch.profiler._utils import traverse_dfs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETER_RUNS = not (version("triton") < "3.7" and version("numpy") >= "2.5")
"""Triton 3.6's interpreter makes numbers of arrays in a way that NumPy 2.5 refuses."""
running = SimpleNamespace(backend="torch")
torch_alone = pytest.mark.parametrize("backend", ["torch"], indirect=True)
triton_alone = pytest.mark.parametrize("backend", ["triton"], indirect=True)
"""A test of one backend in a module whose tests run on both."""


def linear_cross_entropy(hidden: Tensor, *args: Any, **options: Any) -> Any:
    """The function under test, on the backend of the running test; float64 exists in torch only."""
    options.setdefault("backend", "torch" if hidden.dtype == torch.float64 else running.backend)
    return lcl_kernels.linear_cross_entropy(hidden, *args, **options)


def contrastive_loss(x: Tensor, *args: Any, **options: Any) -> Any:
    """The function under test, on the backend of the running test; float64 exists in torch only."""
    options.setdefault("backend", "torch" if x.dtype == torch.float64 else running.backend)
    return lcl_kernels.contrastive_loss(x, *args, **options)


def sigmoid_contrastive_loss(x: Tensor, *args: Any, **options: Any) -> Any:
    """The function under test, on the backend of the running test; float64 exists in torch only."""
    options.setdefault("backend", "torch" if x.dtype == torch.float64 else running.backend)
    return lcl_kernels.sigmoid_contrastive_loss(x, *args, **options)


def few_rows() -> float:
    """A workspace in megabytes for one row at a time, or for a dozen in the interpreter, where every launch is slow."""
    return 1e-6 if running.backend == "torch" else 4e-3


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference relative to that of the expected value; NaN stays NaN and fails every bar."""
    difference = (actual.detach().double() - expected.detach().double()).norm()
    return float(difference / expected.detach().double().norm().clamp(min=1e-30))


def leaf(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Any:
    """A fresh leaf with the same values."""
    return None if tensor is None else tensor.detach().clone().to(dtype or tensor.dtype).requires_grad_()


class LargestTensor:
    """Watches what torch's allocators hand out, also inside operators, where a dispatch mode sees nothing."""

    elements = 0
    """Of the largest tensor, counted as float32 numbers."""
    peak = 0
    """The most bytes alive at once, besides those that were alive before."""

    def __enter__(self) -> Self:
        self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True).__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profiler.__exit__(*error)
        events = traverse_dfs(self._profiler.profiler.kineto_results.experimental_event_tree())
        changes = [
            (event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size)
            for event in events
            if event.tag == _EventType.Allocation and event.extra_fields.device.type == DEVICE
        ]
        alive: dict[int, int] = {}
        for _, address, size in sorted(changes):
            if size < 0:
                alive.pop(address, None)  # unknown: it was alive before
                continue
            alive[address] = size
            self.peak = max(self.peak, sum(alive.values()))
            self.elements = max(self.elements, size // 4)


def memory_of(step: Callable[[], Any]) -> LargestTensor:
    """What one call of `step` allocates."""
    if DEVICE == "cuda":
        step()  # cuBLAS keeps a workspace from its first call on
    with LargestTensor() as memory:
        step()
    return memory
