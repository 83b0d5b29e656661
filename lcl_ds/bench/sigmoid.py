"""``python -m lcl_ds.bench sigmoid``: pairwise sigmoid loss over M pairs on one device, forward and backward.

The data are those of the contrastive benchmark, at a logit scale of 10 and a bias of -10, where training starts
(SigLIP, arXiv 2303.15343). Useful operations are 6 M^2 D: similarities once, and two products for the gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lcl_kernels import reference_sigmoid_contrastive_loss
from torch import Tensor

from lcl_ds.bench.case import Inputs, Row
from lcl_ds.bench.contrastive import CPU_SHAPES, GPU_SHAPES, ContrastiveCase, Shape
from lcl_ds.bench.peers import SIGMOID, Method


@dataclass(frozen=True)
class SigmoidCase(ContrastiveCase):
    """M pairs of features of width D."""

    bias: float = -10.0
    """What is added to the logits."""

    @property
    def methods(self) -> dict[str, Method]:
        return SIGMOID

    @property
    def title(self) -> str:
        m, d = self.shape
        return f"sigmoid loss, M {m}, D {d}, {self.dtype_name}, logit scale {self.scale:g}, bias {self.bias:g}"

    @property
    def useful_flops(self) -> float:
        return 6.0 * self.shape[0] ** 2 * self.shape[1]

    def describe(self) -> Row:
        return {**super().describe(), "bias": self.bias}

    def inputs(self) -> Inputs:
        """x [M, D], y [M, D], logit scale [] and logit bias [] in float32."""
        return *super().inputs(), torch.tensor(self.bias, device=self.device, requires_grad=True)

    def first_rows(self, inputs: Inputs, rows: int) -> Inputs:
        return *super().first_rows(inputs[:3], rows), inputs[3].detach().requires_grad_()

    def truth(self, *inputs: Tensor) -> Tensor:
        return reference_sigmoid_contrastive_loss(*inputs)


def sigmoid_cases(
    device: str,
    dtype: str,
    *,
    shapes: Sequence[Shape] = (),
    scale: float = 10.0,
    bias: float = -10.0,
    seed: int = 0,
    workspace_mb: float | None = None,
) -> list[SigmoidCase]:
    """Cases to run: `shapes` (M, D), or those that suit the device."""
    chosen = list(shapes) or list(GPU_SHAPES if device == "cuda" else CPU_SHAPES)
    return [SigmoidCase(shape, dtype, device, seed, workspace_mb, scale, bias=bias) for shape in chosen]
