"""What this GPU reaches at best: ``python launch/gpu_ceilings.py [--dry]`` prints JSON.

Matmul and copy rates bound every other number; the head's three products, with logits in rows of 49,411 and of 49,472
elements, show what an odd leading dimension costs. ``--dry`` runs tiny shapes on any device: the numbers mean nothing.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

VOCABULARY, PADDED = 49_411, 49_472
"""Rows of the head, and the next multiple of 64."""


def median_seconds(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of one call after three for warm-up."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            function()
            times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def random(rows: int, columns: int, device: torch.device) -> Tensor:
    """bf16, normal: a GPU multiplies zeros or constants faster than data, as it draws less power."""
    return torch.randn(rows, columns, device=device, dtype=torch.bfloat16)


def with_leading_dimension(matrix: Tensor, leading: int) -> Tensor:
    """The same values in rows that lie ``leading`` elements apart."""
    rows, columns = matrix.shape
    storage = torch.empty(rows, leading, dtype=matrix.dtype, device=matrix.device)
    return storage[:, :columns].copy_(matrix)


def measure_matmul(n: int, device: torch.device, repeats: int) -> dict[str, Any]:
    a, b = random(n, n, device), random(n, n, device)
    out = torch.empty_like(a)
    seconds = median_seconds(lambda: torch.mm(a, b, out=out), device, repeats)
    return {"n": n, "seconds": seconds, "tflops": 2 * n**3 / seconds / 1e12}


def measure_copy(megabytes: int, device: torch.device, repeats: int) -> dict[str, Any]:
    """Bytes read plus bytes written per second."""
    source = torch.empty(megabytes * 2**20, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), device, repeats)
    return {"megabytes": megabytes, "seconds": seconds, "tb_per_s": 2 * source.numel() / seconds / 1e12}


def measure_head(
    tokens: int, width: int, vocabulary: int, leading: int, device: torch.device, repeats: int
) -> dict[str, Any]:
    """The products of a fused head over one chunk of ``tokens``, logits in rows ``leading`` elements apart."""
    hidden, weight = random(tokens, width, device), random(vocabulary, width, device)
    logits = with_leading_dimension(random(tokens, vocabulary, device), leading)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)
    products: dict[str, Callable[[], Tensor]] = {
        "grad_hidden": lambda: torch.mm(logits, weight, out=grad_hidden),
        "grad_weight": lambda: torch.mm(logits.t(), hidden, out=grad_weight),
        "logits": lambda: torch.mm(hidden, weight.t(), out=logits),  # last: it overwrites the others' operand
    }
    seconds = {name: median_seconds(product, device, repeats) for name, product in products.items()}
    flops = 2 * tokens * width * vocabulary
    return {
        "tokens": tokens,
        "width": width,
        "vocabulary": vocabulary,
        "leading_dimension": leading,
        "seconds": seconds,
        "tflops": {name: flops / s / 1e12 for name, s in seconds.items()},
    }


def measure(dry: bool) -> dict[str, Any]:
    """All of it; on a CPU only when ``dry``."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not dry:
        raise SystemExit("error: no CUDA device; --dry runs tiny shapes without one")
    torch.manual_seed(0)
    vocabulary, padded = (131, 192) if dry else (VOCABULARY, PADDED)
    shapes = [(16, 32)] if dry else [(4096, 768), (4096, 2048)]
    repeats = 3 if dry else 20
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "tiny_shapes": dry,
        "matmul_bf16": measure_matmul(64 if dry else 8192, device, repeats),
        "copy": measure_copy(1 if dry else 2048, device, repeats),
        "head": [
            measure_head(tokens, width, vocabulary, leading, device, repeats)
            for tokens, width in shapes
            for leading in (vocabulary, padded)
        ],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure what this GPU reaches at best.")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, on a CPU too: checks the program alone")
    print(json.dumps(measure(parser.parse_args(argv).dry), indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
