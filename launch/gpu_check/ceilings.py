"""What this GPU reaches at best: ``python -m launch.gpu_check.ceilings --out FILE`` writes JSON lines.

The rates of a square matrix product and of a copy bound every other number. The products of the losses are made by the
very calls that lcl_kernels makes, with float32 results of bfloat16 operands, first and accumulated; beside the kernel
that makes exponentials of logits stands the plain product of hidden states and weight, to see which wins.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from lcl_kernels._common import matmul_
from torch import Tensor

from launch.gpu_check import lines
from launch.gpu_check.lines import Measurement
from launch.gpu_check.timing import DEVICE, GPU, kernels_of, median_ms
from lcl_ds.bench.losses import LossCase
from lcl_ds.bench.peers import LOSSES, OURS
from lcl_ds.bench.runner import step

HEADS = (  # rows of a chunk, width, vocabulary; the second is 12 % of the first
    (8192, 768, 49411),
    (983, 768, 49411),
    (4096, 2048, 128256),
    (4096, 4096, 128256),
    (8192, 512, 49411),
)
PAIRS = ((16384, 32768, 768), (16384, 32768, 512))
"""Rows and columns of a block of similarities, and the width of features."""
DRY_HEADS, DRY_PAIRS = ((16, 32, 131),), ((16, 32, 8),)
LINE = 64
"""Rows of logits are padded to a multiple of so many elements, as in lcl_kernels."""


def main(argv: list[str] | None = None) -> int:
    torch.manual_seed(0)
    return lines.main(__doc__ or "", ceilings, argv)


def ceilings(dry: bool) -> Iterator[Measurement]:
    """What to measure, most important first."""
    repeats = 2 if dry else 20
    yield {"what": "square matmul, bf16"}, partial(measure_matmul, 64 if dry else 8192, repeats)
    yield {"what": "copy"}, partial(measure_copy, 1 if dry else 2048, repeats)
    for head in DRY_HEADS if dry else HEADS:
        shape = dict(zip("NHV", head, strict=True))
        yield {"what": "linear cross entropy", "shape": shape}, partial(measure_head, *head, repeats)
    for pairs in DRY_PAIRS if dry else PAIRS:
        shape = dict(zip(("rows", "columns", "D"), pairs, strict=True))
        yield {"what": "contrastive", "shape": shape}, partial(measure_pairs, *pairs, repeats)


def random(rows: int, columns: int) -> Tensor:
    """bf16, normal: a GPU multiplies zeros or constants faster than data, as it draws less power."""
    return torch.randn(rows, columns, device=DEVICE, dtype=torch.bfloat16)


def padded(rows: int, columns: int) -> Tensor:
    """The same in rows that start at whole cache lines."""
    room = torch.empty(rows, columns + -columns % LINE, device=DEVICE, dtype=torch.bfloat16)
    return room[:, :columns].copy_(random(rows, columns))


def measure_matmul(n: int, repeats: int) -> dict[str, Any]:
    a, b = random(n, n), random(n, n)
    out = torch.empty_like(a)
    ms = median_ms(lambda: torch.mm(a, b, out=out), repeats)
    return {"n": n, "ms": ms, "tflops": 2 * n**3 / ms / 1e9}


def measure_copy(megabytes: int, repeats: int) -> dict[str, Any]:
    """Bytes read plus bytes written per second."""
    source = torch.empty(megabytes * 2**20, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    ms = median_ms(lambda: target.copy_(source), repeats)
    return {"megabytes": megabytes, "ms": ms, "tb_per_s": 2 * source.numel() / ms / 1e9}


def measure_head(tokens: int, width: int, vocabulary: int, repeats: int) -> dict[str, Any]:
    """The products of one chunk of linear cross entropy."""
    hidden, weight, logits = random(tokens, width), random(vocabulary, width), padded(tokens, vocabulary)
    d_hidden, d_weight = (torch.zeros(t.shape, device=DEVICE) for t in (hidden, weight))
    operand, features = (logits, hidden) if GPU else (logits.float(), hidden.float())
    products: dict[str, Callable[[], object]] = {
        "d_hidden": lambda: matmul_(d_hidden, operand, weight),
        "d_weight": lambda: matmul_(d_weight, operand.t(), features),
        "d_weight, accumulated": lambda: matmul_(d_weight, operand.t(), features, accumulate=True),
        "logits, torch.mm in bf16": lambda: torch.mm(hidden, weight.t(), out=logits),  # overwrites the operand
    }
    ms: dict[str, float | None] = {name: median_ms(product, repeats) for name, product in products.items()}
    ms["exponentials, our kernel"] = _exponentials_ms(tokens, width, vocabulary)
    return _rates(ms, 2 * tokens * width * vocabulary)


def _exponentials_ms(tokens: int, width: int, vocabulary: int) -> float | None:
    """Of the kernel that makes them, in a whole step; None where the profiler sees no kernels."""
    case = LossCase((tokens, width, vocabulary), "bf16", DEVICE.type, workspace_mb=4096)
    loss, inputs = LOSSES[OURS].function(case), case.inputs()
    rows = kernels_of(lambda: step(loss, inputs), 3)
    return sum(row["ms"] for row in rows if "exp_logits" in row["kernel"]) or None


def measure_pairs(rows: int, columns: int, width: int, repeats: int) -> dict[str, Any]:
    """The products of one block of a contrastive loss."""
    x, y, gradient = random(rows, width), random(columns, width), padded(rows, columns)
    d_x, d_y = (torch.zeros(t.shape, device=DEVICE) for t in (x, y))
    products: dict[str, Callable[[], object]] = {
        "d_x, accumulated": lambda: matmul_(d_x, gradient, y, accumulate=True),
        "d_y, accumulated": lambda: matmul_(d_y, gradient.t(), x, accumulate=True),
        "similarities, torch.mm in bf16": lambda: torch.mm(x, y.t(), out=gradient),
    }
    ms = {name: median_ms(product, repeats) for name, product in products.items()}
    return _rates(ms, 2 * rows * columns * width)


def _rates(ms: dict[str, Any], flops: int) -> dict[str, Any]:
    return {"ms": ms, "tflops": {name: flops / taken / 1e9 for name, taken in ms.items() if taken}}


if __name__ == "__main__":
    sys.exit(main())
