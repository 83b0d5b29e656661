"""``python -m lcl_ds.bench contrastive``: symmetric InfoNCE over M pairs on one device, forward and backward.

Data: rows of x are random directions; y[i] has a cosine with x[i] that makes the loss about 3 at the chosen logit
scale, as in the middle of training, and is random otherwise. Useful operations are 8 M^2 D: similarities twice, since
an algorithm that keeps no matrix computes them again in backward, and two products for the gradients.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lcl_kernels import reference_contrastive_loss
from torch import Tensor

from lcl_ds.bench.case import Case, Inputs, Row
from lcl_ds.bench.peers import CONTRASTIVE, Method

Shape = tuple[int, int]
GPU_SHAPES: tuple[Shape, ...] = ((32768, 768), (131072, 768))
CPU_SHAPES: tuple[Shape, ...] = ((2048, 256),)
GPU_SWEEP = (8192, 16384, 32768, 65536, 131072)
CPU_SWEEP = (512, 1024, 2048)
LOSS = 3.0
TRUTH_ROWS = {"cpu": 1024, "cuda": 4096}


@dataclass(frozen=True)
class ContrastiveCase(Case):
    """M pairs of features of width D."""

    @property
    def methods(self) -> dict[str, Method]:
        return CONTRASTIVE

    @property
    def title(self) -> str:
        m, d = self.shape
        return f"contrastive loss, M {m}, D {d}, {self.dtype_name}, logit scale {self.scale:g}"

    @property
    def useful_flops(self) -> float:
        return 8.0 * self.shape[0] ** 2 * self.shape[1]

    @property
    def result_names(self) -> tuple[str, ...]:
        return "loss", "d_x", "d_y"

    @property
    def truth_rows(self) -> int:
        return TRUTH_ROWS[self.device.type]

    def describe(self) -> Row:
        return {**super().describe(), "shape": dict(zip("MD", self.shape, strict=True)), "scale": self.scale}

    def inputs(self) -> Inputs:
        """x [M, D], y [M, D], logit scale [] in float32."""
        m, d = self.shape
        generator = torch.Generator(self.device).manual_seed(self.seed)
        x, noise = (F.normalize(torch.randn(m, d, generator=generator, device=self.device)) for _ in range(2))
        # Other pairs add about log M + scale^2 / (2 D) to the loss, and the pair's own cosine takes scale * cosine.
        cosine = (math.log(m) + self.scale**2 / (2 * d) - LOSS) / self.scale if self.scale else 0.0
        cosine = min(max(cosine, 0.0), 0.95)
        y = F.normalize(cosine * x + math.sqrt(1 - cosine**2) * noise)
        scale = torch.tensor(self.scale, device=self.device)
        return x.to(self.dtype).requires_grad_(), y.to(self.dtype).requires_grad_(), scale.requires_grad_()

    def first_rows(self, inputs: Inputs, rows: int) -> Inputs:
        x, y, scale = (tensor.detach() for tensor in inputs)
        return x[:rows].clone().requires_grad_(), y[:rows].clone().requires_grad_(), scale.requires_grad_()

    def truth(self, *inputs: Tensor) -> Tensor:
        return reference_contrastive_loss(*inputs)


def contrastive_cases(
    device: str,
    dtype: str,
    *,
    shapes: Sequence[Shape] = (),
    sweep: Sequence[int] | None = None,
    scale: float = 14.3,
    seed: int = 0,
    workspace_mb: float | None = None,
) -> list[ContrastiveCase]:
    """Cases to run: timed ones, then the sweep over M for memory at the width of the last timed one.

    Args:
        shapes: (M, D); none: those that suit the device, and then a sweep too unless `sweep` says otherwise.
        sweep: numbers of pairs; None: a sweep that suits the device, or none beside `shapes`.
    """
    gpu = device == "cuda"
    if sweep is None:
        sweep = () if shapes else GPU_SWEEP if gpu else CPU_SWEEP
    chosen = list(shapes) or list(GPU_SHAPES if gpu else CPU_SHAPES)
    width = chosen[-1][1]
    swept = [(m, width) for m in sweep if (m, width) not in chosen]
    return [
        ContrastiveCase(shape, dtype, device, seed, workspace_mb, scale, timed=shape not in swept)
        for shape in (*chosen, *swept)
    ]
