"""The block functions of `contrastive_loss` in plain torch: chunks of rows, two or three of [rows, c] at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lcl_kernels._common import largest_chunk, matmul_, row_chunks
from lcl_kernels.similarity import ExpSums, merge


def statistics(x: Tensor, y: Tensor, scale: Tensor, *, diagonal: bool, workspace_mb: float) -> tuple[ExpSums, ExpSums]:
    """See `similarity.BlockFunctions`."""
    row_top, row_total = scale.new_empty(len(x)), scale.new_empty(len(x))
    columns: list[ExpSums] = []
    limits = (2 * len(y) * scale.dtype.itemsize, workspace_mb)
    workspaces = scale.new_empty(2, largest_chunk(len(x), *limits), len(y))
    lowest = torch.finfo(scale.dtype).min
    for chunk in row_chunks(len(x), *limits):
        logits, exponentials = workspaces[:, : chunk.stop - chunk.start]
        matmul_(logits, x[chunk], y.t()).mul_(scale)
        if diagonal:
            logits[:, chunk].fill_diagonal_(-torch.inf)
        top = logits.amax(1)
        torch.sub(logits, top.clamp(min=lowest).unsqueeze(1), out=exponentials).exp_()
        row_top[chunk], row_total[chunk] = top, exponentials.sum(1)
        top = logits.amax(0)
        columns.append(ExpSums(top, logits.sub_(top.clamp(min=lowest)).exp_().sum(0)))
        if len(columns) > 1:
            columns = [merge(*map(torch.stack, zip(*columns, strict=True)))]
    nothing = ExpSums(scale.new_full((len(y),), -torch.inf), scale.new_zeros(len(y)))
    return ExpSums(row_top, row_total), columns[0] if columns else nothing


def gradients(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_shift: Tensor,
    column_shift: Tensor,
    *,
    diagonal: bool,
    d_x: Tensor | None,
    want_y: bool,
    workspace_mb: float,
) -> tuple[Tensor | None, Tensor]:
    """See `similarity.BlockFunctions`."""
    d_y = scale.new_zeros(y.shape) if want_y else None
    d_scale = scale.new_zeros(())
    limits = (3 * len(y) * scale.dtype.itemsize, workspace_mb)
    workspaces = scale.new_empty(3, largest_chunk(len(x), *limits), len(y))
    for chunk in row_chunks(len(x), *limits):
        cosines, gradient, column_part = workspaces[:, : chunk.stop - chunk.start]
        matmul_(cosines, x[chunk], y.t())
        torch.mul(cosines, scale, out=gradient)
        torch.sub(gradient, column_shift, out=column_part).exp_()
        gradient.sub_(row_shift[chunk].unsqueeze(1)).exp_().add_(column_part)
        if diagonal:
            gradient[:, chunk].fill_diagonal_(0.0)
        d_scale += torch.mul(cosines, gradient, out=column_part).sum()
        if d_x is not None:
            matmul_(d_x[chunk], gradient, y, accumulate=True)
        if d_y is not None:
            matmul_(d_y, gradient.t(), x[chunk], accumulate=True)
    return d_y, d_scale
