"""Measures and watchers that the kernel tests share."""

from types import SimpleNamespace
from typing import Any

import lcl_kernels
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
running = SimpleNamespace(backend="torch")


def linear_cross_entropy(hidden: Tensor, *args: Any, **options: Any) -> Any:
    """The function under test, on the backend of the running test; float64 exists in torch only."""
    options.setdefault("backend", "torch" if hidden.dtype == torch.float64 else running.backend)
    return lcl_kernels.linear_cross_entropy(hidden, *args, **options)


def contrastive_loss(x: Tensor, *args: Any, **options: Any) -> Any:
    """The function under test, on the backend of the running test; float64 exists in torch only."""
    options.setdefault("backend", "torch" if x.dtype == torch.float64 else running.backend)
    return lcl_kernels.contrastive_loss(x, *args, **options)


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


class LargestTensor(TorchDispatchMode):
    """Remembers the elements of the largest storage an operator returned, those of `known` tensors left aside."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.elements = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self._known:
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return result
