"""``python -m lcl_ds.bench losses``: linear layer and cross entropy, forward and backward.

Data: weight rows are normal with a standard deviation of 2 / sqrt(H), hidden states are normal with one of 1, so that
logits have one of about 2. Labels are uniform over the vocabulary; hidden[i] then gets as much of the weight row of
its label as makes the loss about 3, as in the middle of training. Which labels are ignored is random, their number
exact.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lcl_kernels import reference_linear_cross_entropy
from torch import Tensor

from lcl_ds.bench.case import Case, Inputs, Row
from lcl_ds.bench.peers import IGNORED, LOSSES, Method

Shape = tuple[int, int, int]
GPU_SHAPES: dict[Shape, tuple[float, ...]] = {
    (8192, 768, 49411): (1.0, 0.5, 0.12),
    (16384, 2048, 128256): (1.0, 0.5),
    (4096, 4096, 128256): (1.0, 0.5),
    (8192, 768, 49408): (1.0,),  # a multiple of 256, which some peers need
}
LARGE_SHAPES: dict[Shape, tuple[float, ...]] = {(32768, 4096, 151936): (1.0, 0.5)}
CPU_SHAPES: dict[Shape, tuple[float, ...]] = {(2048, 512, 49411): (1.0, 0.5, 0.12)}
LOGIT_STD, LOSS = 2.0, 3.0
TRUTH_ROWS = {"cpu": 256, "cuda": 1024}


@dataclass(frozen=True)
class LossCase(Case):
    """One shape (N, H, V) at one fraction of labels that count."""

    valid: float = 1.0

    @property
    def methods(self) -> dict[str, Method]:
        return LOSSES

    @property
    def title(self) -> str:
        n, h, v = self.shape
        return f"linear cross entropy, N {n}, H {h}, V {v}, {self.dtype_name}, {100 * self.valid:g} % of labels count"

    @property
    def counted(self) -> int:
        """Labels that are not ignored."""
        return max(1, round(self.valid * self.shape[0]))

    @property
    def useful_flops(self) -> float:
        return 6.0 * self.counted * self.shape[1] * self.shape[2]

    @property
    def result_names(self) -> tuple[str, ...]:
        return "loss", "d_hidden", "d_weight"

    @property
    def truth_rows(self) -> int:
        return TRUTH_ROWS[self.device.type]

    def describe(self) -> Row:
        shape = dict(zip("NHV", self.shape, strict=True))
        return {**super().describe(), "shape": shape, "valid_fraction": self.valid, "counted_labels": self.counted}

    def inputs(self) -> Inputs:
        """hidden [N, H], weight [V, H], labels [N]."""
        n, h, v = self.shape
        generator = torch.Generator(self.device).manual_seed(self.seed)
        options: dict[str, Any] = {"generator": generator, "device": self.device}
        weight = torch.randn(v, h, **options).mul_(LOGIT_STD / math.sqrt(h)).to(self.dtype)
        hidden = torch.randn(n, h, **options)
        labels = torch.randint(v, (n,), **options)
        # Rows without a target's share have a log-sum-exp of about log V + std^2 / 2; |weight row|^2 is about std^2.
        share = (math.log(v) + LOGIT_STD**2 / 2 - LOSS) / LOGIT_STD**2
        hidden += max(0.0, share) * weight[labels].float()
        labels[torch.randperm(n, **options)[self.counted :]] = IGNORED
        return hidden.to(self.dtype).requires_grad_(), weight.requires_grad_(), labels

    def first_rows(self, inputs: Inputs, rows: int) -> Inputs:
        hidden, weight, labels = inputs
        return hidden.detach()[:rows].clone().requires_grad_(), weight.detach().requires_grad_(), labels[:rows]

    def truth(self, *inputs: Tensor) -> Tensor:
        hidden, weight, labels = inputs
        return reference_linear_cross_entropy(hidden, weight, labels, ignore_index=IGNORED)


def loss_cases(
    device: str,
    dtype: str,
    *,
    shapes: Sequence[Shape] = (),
    fractions: Sequence[float] = (),
    large: bool = False,
    seed: int = 0,
    workspace_mb: float | None = None,
) -> list[LossCase]:
    """Cases to run: `shapes` and `fractions`, or those that suit the device.

    On a CPU a step takes seconds, so errors are measured at the largest fraction alone.
    """
    defaults = {**GPU_SHAPES, **(LARGE_SHAPES if large else {})} if device == "cuda" else CPU_SHAPES
    chosen = {shape: (1.0, 0.5, 0.12) for shape in shapes} or defaults
    return [
        LossCase(
            shape, dtype, device, seed, workspace_mb, checked=device == "cuda" or valid == max(valids), valid=valid
        )
        for shape, valids in ((shape, fractions or valids) for shape, valids in chosen.items())
        for valid in valids
    ]
