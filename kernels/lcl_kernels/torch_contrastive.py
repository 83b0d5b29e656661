"""The block functions of `contrastive_loss` in plain torch: chunks of rows, two or three of [rows, c] at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from lcl_kernels._common import exclusive_cross_entropy, largest_chunk, matmul_, row_chunks
from lcl_kernels.similarity import Block, Kind, OwnPairs, PairLosses, clear, merge, rounding_of


def pair_products(x: Tensor, y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """See `similarity.BlockFunctions`."""
    x_norm, y_norm = (torch.linalg.vector_norm(side, dim=1, dtype=dtype) for side in (x, y))
    return (x.to(dtype) * y.to(dtype)).sum(1), x_norm, y_norm


def statistics(block: Block, rows: Tensor, columns: Tensor, *, first: bool, workspace_mb: float) -> None:
    """See `similarity.BlockFunctions`."""
    clear(columns, block.kind)
    if first:
        clear(rows, block.kind)
    for chunk, (logits, room), same in _chunks(block, 2, workspace_mb):
        matmul_(logits, block.x[chunk], block.y.t()).mul_(block.scale)
        if block.diagonal:
            logits[:, chunk].fill_diagonal_(-torch.inf)
        of_rows, of_columns = _sums_of(logits, room, same, block.kind)
        rows[chunk] = merge(torch.stack([rows[chunk], of_rows]), block.kind)
        columns.copy_(merge(torch.stack([columns, of_columns]), block.kind))


def _sums_of(logits: Tensor, room: Tensor, same: Tensor | None, kind: Kind) -> tuple[Tensor, Tensor]:
    """Sums of the rows and of the columns of `logits`, which this destroys; `same` marks pairs of one group."""
    of_rows, of_columns = (logits.new_zeros(n, kind.sums) for n in logits.shape)
    if kind.positives:
        torch.where(cast(Tensor, same), logits, logits.new_zeros(()), out=room)
        of_rows[:, -1], of_columns[:, -1] = room.sum(1), room.sum(0)
    if kind.ignored:
        logits.masked_fill_(cast(Tensor, same), -torch.inf)
    if kind.highest:
        negatives = logits
        if kind.positives:
            negatives = room.copy_(logits).masked_fill_(cast(Tensor, same), -torch.inf)
        of_rows[:, 2], of_columns[:, 2] = negatives.amax(1), negatives.amax(0)
    lowest = torch.finfo(logits.dtype).min
    of_rows[:, 0], of_columns[:, 0] = logits.amax(1), logits.amax(0)
    of_rows[:, 1] = torch.sub(logits, of_rows[:, :1].clamp(min=lowest), out=room).exp_().sum(1)
    of_columns[:, 1] = logits.sub_(of_columns[:, 0].clamp(min=lowest)).exp_().sum(0)
    return of_rows, of_columns


def pair_losses(pairs: OwnPairs, rows: Tensor, columns: Tensor) -> PairLosses:
    """See `similarity.BlockFunctions`."""
    kind, positive = pairs.kind, pairs.similarity * pairs.scale
    weight = torch.as_tensor(pairs.weight, dtype=positive.dtype, device=positive.device).expand_as(positive)
    sides = [_side(sums, positive, weight, pairs) for sums in (rows, merge(columns, kind))]
    (row_loss, of_row, row_terms, x_first), (column_loss, of_column, column_terms, y_first) = sides
    loss = row_loss + column_loss
    return PairLosses(
        torch.where(weight > 0, weight * loss, 0.0),
        (of_row + of_column) * pairs.similarity,
        row_terms,
        column_terms,
        of_row,
        of_column,
        *((loss / 2, x_first, y_first) if kind.highest else (None, None, None)),
    )


def _side(
    sums: Tensor, positive: Tensor, weight: Tensor, pairs: OwnPairs
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Of the rows or of the columns: loss [m], its weighted derivative by S_ii, terms, and whether S_ii is first."""
    loss = exclusive_cross_entropy(sums[:, 0] - positive, sums[:, 1])
    slope, terms = torch.expm1(-loss), [positive + loss - weight.log()]
    if pairs.group_size is not None:
        others = pairs.group_size - 1
        loss = loss + (others * positive - sums[:, -1]) / pairs.group_size
        slope = slope + others / pairs.group_size
        terms.append(weight / pairs.group_size)
    first = None
    if pairs.kind.highest:
        first = positive - sums[:, 2] > rounding_of(pairs.x) * pairs.x_norm * pairs.y_norm * pairs.scale.abs()
    return loss, weight * slope, torch.stack(terms, 1), first


def pair_gradients(x: Tensor, y: Tensor, of_x: Tensor, of_y: Tensor) -> tuple[Tensor, Tensor]:
    """See `similarity.BlockFunctions`."""
    return of_x.unsqueeze(1) * y, of_y.unsqueeze(1) * x


def gradients(
    block: Block,
    row_terms: Tensor | None,
    column_terms: Tensor | None,
    *,
    d_x: Tensor | None,
    d_y: Tensor | None,
    workspace_mb: float,
) -> Tensor:
    """See `similarity.BlockFunctions`."""
    x, y = block.x, block.y
    d_scale = block.scale.new_zeros(1)
    for chunk, (cosines, gradient, room), same in _chunks(block, 3, workspace_mb):
        matmul_(cosines, x[chunk], y.t())
        for i, term in enumerate(_given(row_terms, column_terms, chunk)):
            part = torch.mul(cosines, block.scale, out=room if i else gradient).sub_(term[..., 0]).exp_()
            if i:
                gradient.add_(part)
        if block.kind.positives:
            for term in _given(row_terms, column_terms, chunk):
                gradient.sub_(torch.mul(cast(Tensor, same), term[..., 1], out=room))
        if block.kind.ignored:
            gradient.masked_fill_(cast(Tensor, same), 0.0)
        if block.diagonal:
            gradient[:, chunk].fill_diagonal_(0.0)
        d_scale += torch.mul(cosines, gradient, out=room).sum()
        if d_x is not None:
            matmul_(d_x[chunk], gradient, y, accumulate=True)
        if d_y is not None:
            matmul_(d_y, gradient.t(), x[chunk], accumulate=True)
    return d_scale


def _given(row_terms: Tensor | None, column_terms: Tensor | None, chunk: slice) -> list[Tensor]:
    """The given terms of the rows of `chunk` and of all columns, to be broadcast to [rows, c, ...]."""
    terms = [row_terms[chunk].unsqueeze(1)] if row_terms is not None else []
    return terms + ([column_terms.unsqueeze(0)] if column_terms is not None else [])


def _chunks(block: Block, rooms: int, workspace_mb: float) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Slices of the rows, with rooms [rooms, rows, c] and which pairs, other than one and the same, share a group."""
    rows, columns = len(block.x), len(block.y)
    grouped = block.x_groups is not None
    limits = ((rooms * block.scale.dtype.itemsize + grouped) * columns, workspace_mb)
    most = largest_chunk(rows, *limits)
    room = block.scale.new_empty(rooms, most, columns)
    same_room = torch.empty(most, columns, dtype=torch.bool, device=room.device) if grouped else None
    for chunk in row_chunks(rows if columns else 0, *limits):
        height, same = chunk.stop - chunk.start, None
        if same_room is not None:
            same = same_room[:height]
            torch.eq(cast(Tensor, block.x_groups)[chunk].unsqueeze(1), cast(Tensor, block.y_groups), out=same)
            if block.diagonal:
                same[:, chunk].fill_diagonal_(False)
        yield chunk, room[:, :height], same
