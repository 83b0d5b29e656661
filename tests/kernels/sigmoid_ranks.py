"""What the four gloo ranks of `ranks.py` make of `sigmoid_contrastive_loss`."""

from typing import Any, NamedTuple

import torch
from lcl_kernels import sigmoid_contrastive_loss
from torch import Tensor

from tests.kernels.checks import leaf

COUNTS = [(5, 0), (3, 4), (0, 0), (1, 0), (5, 0, 3, 1), (0, 3, 0, 0), (0, 0, 0, 0), (2, 2, 2, 2)]


class SigmoidCase(NamedTuple):
    counts: tuple[int, ...]
    scale: float
    bias: float
    dtype: torch.dtype = torch.float64
    exchange: str = "gather"
    backend: str = "torch"


SIGMOID_CASES = [
    SigmoidCase(counts, *settings)
    for counts in COUNTS
    for settings in (
        (14.3, -10.0, torch.float64, "gather"),
        (1.0, 5.0, torch.float64, "ring"),
        (14.3, 0.0, torch.float32, "gather"),
        (100.0, -10.0, torch.float32, "ring"),
        (14.3, -10.0, torch.bfloat16, "ring"),
    )
]
SIGMOID_CASES += [
    SigmoidCase(counts, 14.3, -10.0, torch.float32, exchange, "triton")
    for counts in [(3, 4), (5, 0, 3, 1)]
    for exchange in ("gather", "ring")
]


def runs_of_sigmoid(case: SigmoidCase) -> int:
    """How often the same bits are asked for."""
    return 5 if case.dtype == torch.float32 and case.backend == "torch" else 2


def run_sigmoid(case: SigmoidCase, x: Tensor, y: Tensor, group: Any, *, known: bool) -> list[Tensor]:
    """Loss and gradients from the own x and y; `known`: all ranks know the counts."""
    leaves = [leaf(x), leaf(y), *(torch.tensor([s], requires_grad=True) for s in (case.scale, case.bias))]
    loss = sigmoid_contrastive_loss(
        *leaves,
        group=group,
        counts=case.counts if known else None,
        exchange=case.exchange,
        backend=case.backend,
        workspace_mb=1e-4,
    )
    loss.backward()
    return [loss.detach(), *(tensor.grad for tensor in leaves)]
