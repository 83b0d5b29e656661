"""Measures and watchers that the kernel tests share."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
