"""The block function of `sigmoid_contrastive_loss` in plain torch: chunks of rows, three of [rows, c] at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lcl_kernels._common import largest_chunk, matmul_, row_chunks
from lcl_kernels.sigmoid_negatives import Block, Negatives, gradient_unit


def negatives(block: Block, *, gradients: bool, d_x: Tensor | None, want_y: bool, workspace_mb: float) -> Negatives:
    """See `sigmoid_negatives.BlockFunction`."""
    x, y, scale, bias, diagonal = block
    d_y = scale.new_zeros(y.shape) if want_y else None
    sums, zero = scale.new_zeros(3), scale.new_zeros(())
    matrices = 3 if gradients else 1
    limits = (matrices * len(y) * scale.dtype.itemsize, workspace_mb)
    workspaces = scale.new_empty(matrices, largest_chunk(len(x), *limits), len(y))
    for chunk in row_chunks(len(x), *limits):
        cosines, *others = workspaces[:, : chunk.stop - chunk.start]
        logits, product = others if gradients else (cosines, cosines)
        matmul_(cosines, x[chunk], y.t())
        torch.mul(cosines, scale, out=logits).add_(bias)
        if diagonal:
            logits[:, chunk].fill_diagonal_(-torch.inf)
        sums[0] += torch.logaddexp(logits, zero, out=product).sum()
        if not gradients:
            continue
        gradient = logits.sigmoid_()
        sums[1] += gradient.sum()
        sums[2] += torch.mul(cosines, gradient, out=product).sum()
        if (unit := gradient_unit(x)) != 1:
            gradient.mul_(unit)
        if d_x is not None:
            matmul_(d_x[chunk], gradient, y, accumulate=True)
        if d_y is not None:
            matmul_(d_y, gradient.t(), x[chunk], accumulate=True)
    return Negatives(sums, d_y)
