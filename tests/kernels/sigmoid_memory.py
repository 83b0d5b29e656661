"""Prints the memory that the sigmoid loss needs by the number of pairs: ``python -m tests.kernels.sigmoid_memory``.

On the CPU, with the torch backend: forward and backward, float32, D = 64, a workspace of 1 MB, beside the dense loss.
"""

from collections.abc import Callable
from typing import Any

import torch
from lcl_kernels import reference_sigmoid_contrastive_loss, sigmoid_contrastive_loss

from tests.kernels.checks import leaf, memory_of

WIDTH, WORKSPACE_MB = 64, 1.0
PAIRS = (512, 1024, 2048, 4096, 8192)
MOST_DENSE_PAIRS = 4096


def peak_mb(loss: Callable[..., Any], pairs: int, **options: Any) -> float:
    """The most megabytes that a call with its backward has at a time, besides the features."""
    x, y = (leaf(torch.nn.functional.normalize(torch.randn(pairs, WIDTH), dim=1)) for _ in range(2))
    scalars = [torch.tensor(s, requires_grad=True) for s in (10.0, -10.0)]
    return memory_of(lambda: loss(x, y, *scalars, **options).backward()).peak / 2**20


def main() -> None:
    print(f"{'pairs':>8} {'MB':>8} {'bytes per pair':>15} {'dense MB':>9}")
    for pairs in PAIRS:
        ours = peak_mb(sigmoid_contrastive_loss, pairs, backend="torch", workspace_mb=WORKSPACE_MB)
        dense = f"{peak_mb(reference_sigmoid_contrastive_loss, pairs):9.1f}" if pairs <= MOST_DENSE_PAIRS else ""
        print(f"{pairs:8} {ours:8.2f} {(ours - WORKSPACE_MB) * 2**20 / pairs:15.0f} {dense}")


if __name__ == "__main__":
    main()
