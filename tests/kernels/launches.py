"""How many kernels one call of a loss launches, counted on a CPU: ``python -m tests.kernels.launches``.

Where there is a GPU, hide it: ``CUDA_VISIBLE_DEVICES= python -m tests.kernels.launches``.

A step is forward and backward. Counted are Triton launches and those torch operators that launch something: no views,
no allocations. On a GPU `linear_cross_entropy` launches two assertions more, about its labels. Inputs are float32,
because a CPU has no matrix product of low precision operands with a float32 result, so that they are cast first.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when lcl_kernels is imported

from lcl_kernels import contrastive_loss, linear_cross_entropy
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

NO_LAUNCH = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand",
    "new_empty", "permute", "resolve_conj", "resolve_neg", "select", "slice", "squeeze", "t", "unbind", "unsqueeze",
    "view",
}  # fmt: skip
COPY_IF_NEEDED = {"to", "reshape", "contiguous"}
ROWS, WIDTH, VOCAB = 16, 16, 130
WORKSPACE_MB = 13_120 / 2**20
"""Of ROWS rows of logits and partial sums, whatever the options."""
run_kernel = GridExecutor.__call__


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


class Launches(TorchDispatchMode):
    """Counts what is launched inside of it, also by custom operators and by backward."""

    def __init__(self) -> None:
        super().__init__()
        self.of = Counter[str]()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = operator._schema.name.split("::")
        if namespace == "lcl_kernels":  # the mode is off in here: what the operator does is counted by entering again
            with self:
                return OPDEFS[f"{namespace}::{name}"]._init_fn(*args, **(kwargs or {}))
        result = operator(*args, **(kwargs or {}))
        if name not in NO_LAUNCH and not (name in COPY_IF_NEEDED and _same_memory(result, args[0])):
            self.of[f"{namespace}::{name}"] += 1
        return result

    def run_kernel(self, executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
        self.of[executor.fn.__name__] += 1
        with _disable_current_modes():  # the interpreter runs in torch itself
            run_kernel(executor, *args, **kwargs)


def launches(step: Callable[[], Any]) -> Counter[str]:
    """What one call of `step` launches, by the name of the operator or kernel."""
    counted = Launches()

    def counting(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
        counted.run_kernel(executor, *args, **kwargs)

    with mock.patch.object(GridExecutor, "__call__", counting), counted:
        step()
    return counted.of


def linear_step(chunks: int, ignored: bool = False, **options: Any) -> Counter[str]:
    """A step of `linear_cross_entropy` in so many chunks, the number of counted rows being known."""
    rows, statistics = ROWS * chunks, options.get("return_statistics", False)
    hidden = torch.randn(rows, WIDTH, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, requires_grad=True)
    bias = torch.randn(VOCAB, requires_grad=True) if options.pop("bias", False) else None
    labels = torch.randint(0, VOCAB, (rows + 5 * ignored,))
    if ignored:
        labels[rows:] = -100
        hidden = torch.randn(len(labels), WIDTH, requires_grad=True)
    options |= {"workspace_mb": WORKSPACE_MB, "backend": "triton", "counted_rows": rows}
    upstream = torch.ones(labels.shape if options.get("reduction") == "none" else ())

    def step() -> None:
        loss = linear_cross_entropy(hidden, weight, labels, bias=bias, **options)
        (loss[0] if statistics else loss).backward(upstream)

    return launches(step)


def contrastive_step() -> Counter[str]:
    """A step of `contrastive_loss` without other ranks."""
    x, y = (torch.randn(64, WIDTH, requires_grad=True) for _ in range(2))
    scale = torch.tensor(14.3, requires_grad=True)
    return launches(lambda: contrastive_loss(x, y, scale, counts=[64], backend="triton").backward())


CASES: dict[str, dict[str, Any]] = {
    "linear, plain": {},
    "linear, some labels ignored": {"ignored": True},
    "linear, z-loss, softcap, bias, statistics": {
        "z_loss": 1e-4, "softcap": 30.0, "bias": True, "return_statistics": True,
    },
    "linear, label smoothing": {"label_smoothing": 0.1},
    "linear, reduction none": {"reduction": "none"},
}  # fmt: skip


def each_further_chunk(options: dict[str, Any]) -> Counter[str]:
    """What two chunks more launch, halved, beyond what is launched once."""
    one, three = linear_step(1, **options), linear_step(3, **options)
    one["aten::addmm_"] += one["aten::mm"]  # the first chunk's product is no sum
    three["aten::addmm_"] += three["aten::mm"]
    del one["aten::mm"], three["aten::mm"]
    return Counter({kernel: (count - one[kernel]) // 2 for kernel, count in three.items() if count > one[kernel]})


def main() -> None:
    for name, options in CASES.items():
        _show(name, linear_step(1, **options))
        _show("  each further chunk", each_further_chunk(options))
    _show("contrastive", contrastive_step())


def _show(name: str, of: Counter[str]) -> None:
    triton = sum(count for kernel, count in of.items() if "::" not in kernel)
    print(f"{name}: {of.total()} launches, {triton} of them Triton's")
    print("     " + ", ".join(f"{kernel} {count}" for kernel, count in sorted(of.items())))


if __name__ == "__main__":
    main()
