"""The block functions of `contrastive_loss` on a GPU.

One Triton kernel makes a tile of similarities and from it the sums of its rows and of its columns; another makes the
same tile and writes the gradient of the loss with respect to it, for cuBLAS to multiply with the features. Sums are
kept per tile and added up in a fixed order: no atomics, the same bits every time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcl_kernels._common import INTERPRETED, largest_chunk, matmul_, row_chunks
from lcl_kernels.similarity import ExpSums, merge
from lcl_kernels.tiles import (
    LN2,
    LOG2E,
    Tile,
    launch_options,
    operand,
    precision_of,
    programs_on,
    round_to,
    tile_on,
    tile_position,
    tile_product,
)

SAFE_BOUND = 40.0 * LOG2E
"""While |S| is at most 40 nats, exp(S - bound) is at least e^-80 and a normal float32: one exponential serves the row
and the column, and no maximum is needed."""
LEAST_ROWS = 2048
"""Rows of a gradient block below which its columns are split too: d_y is read and written once per block of rows."""


@triton.jit
def similarity_statistics_kernel(
    x, y, scale, bound, row_tops, row_totals, column_tops, column_totals,
    rows, columns, width, stride_x, stride_y, diagonal, safe_bound,
    DIAGONAL: tl.constexpr, BOUNDED: tl.constexpr, X_DESCRIPTOR: tl.constexpr, Y_DESCRIPTOR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Per tile, in units of log 2: a top and the sum of 2^(S - top), of each row and of each column.

    Two launches, of which one returns at once: BOUNDED with the bound of all |S| as top where it is safe, else with
    the largest S of the tile.
    """
    row_tiles = tl.cdiv(rows, ROWS)
    column_tiles = tl.cdiv(columns, COLUMNS)
    most = tl.load(bound)
    mine = (most <= safe_bound) == BOUNDED
    tiles = tl.where(mine, row_tiles * column_tiles, 0)
    factor = tl.load(scale) * 1.4426950408889634
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
        row_tile, column_tile = tile_position(tile, row_tiles, column_tiles, GROUP)
        product = tile_product(
            x, y, stride_x, stride_y, row_tile * ROWS, column_tile * COLUMNS, rows, columns, width,
            X_DESCRIPTOR, Y_DESCRIPTOR, ROWS, COLUMNS, INNER, PRECISION, UPCAST,
        )  # fmt: skip
        r = row_tile * ROWS + tl.arange(0, ROWS)
        c = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        negative = (r[:, None] < rows) & (c[None, :] < columns)
        if DIAGONAL:
            negative = negative & (r[:, None] + diagonal != c[None, :])
        of_row = column_tile.to(tl.int64) * rows + r
        of_column = row_tile.to(tl.int64) * columns + c
        s = product * factor
        if BOUNDED:
            e = tl.where(negative, tl.exp2(s - most), 0.0)
            tl.store(row_totals + of_row, tl.sum(e, 1), mask=r < rows)
            tl.store(column_totals + of_column, tl.sum(e, 0), mask=c < columns)
        else:
            s = tl.where(negative, s, float("-inf"))
            top = tl.max(s, 1)
            e = tl.exp2(s - tl.maximum(top, -3.0e38)[:, None])
            tl.store(row_tops + of_row, top, mask=r < rows)
            tl.store(row_totals + of_row, tl.sum(e, 1), mask=r < rows)
            top = tl.max(s, 0)
            e = tl.exp2(s - tl.maximum(top, -3.0e38)[None, :])
            tl.store(column_tops + of_column, top, mask=c < columns)
            tl.store(column_totals + of_column, tl.sum(e, 0), mask=c < columns)


@triton.jit
def similarity_gradient_kernel(
    x, y, scale, row_shift, column_shift, gradient, weighted_sums,
    rows, columns, width, stride_x, stride_y, diagonal,
    DIAGONAL: tl.constexpr, X_DESCRIPTOR: tl.constexpr, Y_DESCRIPTOR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """gradient[i, j] = exp(S_ij - row_shift_i) + exp(S_ij - column_shift_j), 0 at positives; per tile the sum of
    gradient * (x . y)."""
    row_tiles = tl.cdiv(rows, ROWS)
    column_tiles = tl.cdiv(columns, COLUMNS)
    factor = tl.load(scale) * 1.4426950408889634
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, PROGRAMS, flatten=True):
        row_tile, column_tile = tile_position(tile, row_tiles, column_tiles, GROUP)
        product = tile_product(
            x, y, stride_x, stride_y, row_tile * ROWS, column_tile * COLUMNS, rows, columns, width,
            X_DESCRIPTOR, Y_DESCRIPTOR, ROWS, COLUMNS, INNER, PRECISION, UPCAST,
        )  # fmt: skip
        r = row_tile * ROWS + tl.arange(0, ROWS)
        c = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        of_row = tl.load(row_shift + r, mask=r < rows, other=float("inf")) * 1.4426950408889634
        of_column = tl.load(column_shift + c, mask=c < columns, other=float("inf")) * 1.4426950408889634
        s = product * factor
        g = tl.exp2(s - of_row[:, None]) + tl.exp2(s - of_column[None, :])
        negative = (r[:, None] < rows) & (c[None, :] < columns)
        if DIAGONAL:
            negative = negative & (r[:, None] + diagonal != c[None, :])
        g = tl.where(negative, g, 0.0)
        tl.store(weighted_sums + row_tile.to(tl.int64) * column_tiles + column_tile, tl.sum(g * product))
        gradient.store([row_tile * ROWS, column_tile * COLUMNS], round_to(g, gradient.dtype, UPCAST))


def statistics(x: Tensor, y: Tensor, scale: Tensor, *, diagonal: bool, workspace_mb: float) -> tuple[ExpSums, ExpSums]:
    """See `similarity.BlockFunctions`."""
    row_top, row_total = scale.new_full((len(x),), -torch.inf), scale.new_zeros(len(x))
    columns = ExpSums(scale.new_full((len(y),), -torch.inf), scale.new_zeros(len(y)))
    if not (len(x) and len(y)):
        return ExpSums(row_top, row_total), columns
    tile = tile_on("statistics", x, y)
    bound = (scale * _largest_norm(x) * _largest_norm(y)).abs() * LOG2E
    limits = _statistics_limits(len(y), tile, workspace_mb)
    most_rows, column_tiles = largest_chunk(len(x), *limits), triton.cdiv(len(y), tile.columns)
    row_room = scale.new_empty(2, column_tiles * most_rows)
    column_room = scale.new_empty(2, triton.cdiv(most_rows, tile.rows) * len(y))
    for chunk in row_chunks(len(x), *limits):
        rows = chunk.stop - chunk.start
        row_parts = _parts(row_room, column_tiles, rows, bound)
        column_parts = _parts(column_room, triton.cdiv(rows, tile.rows), len(y), bound)
        for bounded in (True, False):
            _launch(
                similarity_statistics_kernel, tile, x[chunk], y,
                (scale, bound, *row_parts, *column_parts), (chunk.start, SAFE_BOUND),
                DIAGONAL=diagonal, BOUNDED=bounded,
            )  # fmt: skip
        row_top[chunk], row_total[chunk] = _merged(row_parts)
        columns = merge(*map(torch.stack, zip(columns, _merged(column_parts), strict=True)))
    return ExpSums(row_top, row_total), columns


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
    if not (len(x) and len(y)):
        return d_y, d_scale
    tile = tile_on("gradient", x, y)
    parts = list(_gradient_parts(len(x), len(y), x.itemsize, tile, workspace_mb))
    room = x.new_empty(max((down.stop - down.start) * stride for down, _, stride in parts))
    for down, across, stride in parts:
        rows, width = down.stop - down.start, across.stop - across.start
        gradient = room[: rows * stride].view(rows, stride)[:, :width]
        filled = operand(gradient, (tile.rows, tile.columns))[0]
        sums = scale.new_empty(triton.cdiv(rows, tile.rows) * triton.cdiv(width, tile.columns))
        _launch(
            similarity_gradient_kernel, tile, x[down], y[across],
            (scale, row_shift[down], column_shift[across], filled, sums),
            (down.start - across.start,), DIAGONAL=diagonal,
        )  # fmt: skip
        d_scale = d_scale + sums.sum()
        if d_x is not None:
            matmul_(d_x[down], gradient, y[across], accumulate=True)
        if d_y is not None:
            matmul_(d_y[across], gradient.t(), x[down], accumulate=True)
    return d_y, d_scale


def _gradient_parts(
    rows: int, columns: int, itemsize: int, tile: Tile, workspace_mb: float
) -> Iterator[tuple[slice, slice, int]]:
    """Rows, columns and row stride of the parts of the similarities whose gradient is kept at a time."""
    most_columns = max(tile.columns, int(workspace_mb * 2**20) // (LEAST_ROWS * itemsize))
    for across in row_chunks(columns, 1, most_columns / 2**20, tile.columns):
        stride = triton.cdiv(across.stop - across.start, 64) * 64
        for down in row_chunks(rows, stride * itemsize, workspace_mb, tile.rows):
            yield down, across, stride


def _launch(
    kernel: triton.JITFunction,
    tile: Tile,
    x: Tensor,
    y: Tensor,
    tensors: tuple[Any, ...],
    numbers: tuple[float, ...],
    **options: bool,
) -> None:
    left, stride_x, x_descriptor = operand(x, (tile.rows, tile.inner))
    right, stride_y, y_descriptor = operand(y, (tile.columns, tile.inner))
    programs = programs_on(x, tile)
    kernel[(programs,)](
        left, right, *tensors, len(x), len(y), x.shape[1], stride_x, stride_y, *numbers,
        X_DESCRIPTOR=x_descriptor, Y_DESCRIPTOR=y_descriptor,
        ROWS=tile.rows, COLUMNS=tile.columns, INNER=tile.inner, GROUP=tile.group, PROGRAMS=programs,
        PRECISION=precision_of(x), UPCAST=INTERPRETED, **launch_options(tile), **options,
    )  # fmt: skip


def _largest_norm(features: Tensor) -> Tensor:
    return torch.linalg.vector_norm(features, dim=1, dtype=torch.float32).amax()


def _statistics_limits(columns: int, tile: Tile, workspace_mb: float) -> tuple[int, float, int]:
    """Bytes per row, workspace in MB and multiple for `row_chunks`: every row and column of a tile has two numbers."""
    return max(1, 8 * columns // tile.columns + 8 * columns // tile.rows), workspace_mb, tile.rows


def _parts(room: Tensor, tiles: int, length: int, bound: Tensor) -> tuple[Tensor, Tensor]:
    """Tops and totals [tiles, length] in `room`; the tops are the bound, which stays where it is safe."""
    tops, totals = room[:, : tiles * length].view(2, tiles, length)
    return tops.copy_(bound.expand_as(tops)), totals


def _merged(parts: tuple[Tensor, Tensor]) -> ExpSums:
    """Of all tiles, in nats; like `similarity.merge`, but in the room of the parts."""
    tops, totals = parts
    tops.mul_(LN2)
    top = tops.amax(0)
    factors = tops.sub_(top.clamp(min=torch.finfo(top.dtype).min)).exp_()
    return ExpSums(top, factors.mul_(totals).sum(0))
