"""The block functions of `contrastive_loss` on a GPU.

One Triton kernel makes a tile of similarities and from it the sums of its rows and of its columns; another makes the
same tile and writes the gradient of the loss with respect to it, for cuBLAS to multiply with the features. Sums are
kept per tile and added up in a fixed order: no atomics, the same bits every time. What is left, on rows of features
and on [m] numbers, takes one launch for each step.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from lcl_kernels._common import INTERPRETED, largest_chunk, matmul_, row_chunks
from lcl_kernels.similarity import Block, Kind, OwnPairs, PairLosses, clear, rounding_of
from lcl_kernels.tiles import LOG2E, operand, tile_on
from lcl_kernels.triton_blocks import gradient_parts, launch
from lcl_kernels.triton_contrastive_kernels import (
    merge_sums_kernel,
    pair_gradients_kernel,
    pair_losses_kernel,
    pair_products_kernel,
    similarity_gradient_kernel,
    similarity_statistics_kernel,
)

SAFE_BOUND = 40.0 * LOG2E
"""While |S| is at most 40 nats, exp(S - bound) is at least e^-80 and a normal float32: one exponential serves the row
and the column, and no maximum is needed."""
PAIRS, WIDTH = (256 if INTERPRETED else 4), 256
"""Of the kernels that read features once: pairs of a program, and how much of their features at a time. Large in the
interpreter, which takes the same time for each operation, whatever its size."""
MERGED_TILES, MERGED = 32, (512 if INTERPRETED else 64)
"""Partial sums that are merged at a time, and the rows or columns of a program that does it."""
PAIR_BLOCK = 512 if INTERPRETED else 128
"""Pairs of a program that makes their losses."""


def pair_products(x: Tensor, y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """See `similarity.BlockFunctions`."""
    products, x_norm, y_norm = (x.new_empty(len(x), dtype=dtype) for _ in range(3))
    pair_products_kernel[(triton.cdiv(len(x), PAIRS),)](
        x, y, products, x_norm, y_norm, len(x), x.shape[1], x.stride(0), y.stride(0), PAIRS=PAIRS, BLOCK=WIDTH
    )
    return products, x_norm, y_norm


def statistics(block: Block, rows: Tensor, columns: Tensor, *, first: bool, workspace_mb: float) -> None:
    """See `similarity.BlockFunctions`."""
    x, y, kind = block.x, block.y, block.kind
    if not (len(x) and len(y)):
        clear(columns, kind)
        if first:
            clear(rows, kind)
        return
    tiles = {bounded: tile_on(_statistics_tile(kind, bounded), x, y) for bounded in (True, False)}
    rows_of_tile, columns_of_tile = (min(tile[side] for tile in tiles.values()) for side in (0, 1))
    limits = _statistics_limits(len(y), rows_of_tile, columns_of_tile, kind, workspace_mb)
    most_rows = largest_chunk(len(x), *limits)
    row_parts = block.scale.new_empty(triton.cdiv(len(y), columns_of_tile) * kind.sums * most_rows)
    column_parts = block.scale.new_empty(triton.cdiv(most_rows, rows_of_tile) * kind.sums * len(y))
    bound = (block.scale, block.x_norm.amax(), torch.linalg.vector_norm(y, dim=1, dtype=torch.float32).amax())
    for chunk in row_chunks(len(x), *limits):
        for bounded, tile in tiles.items():
            launch(
                similarity_statistics_kernel, tile, x[chunk], y,
                (*bound, *_groups(block, chunk, slice(None)), row_parts, column_parts), (chunk.start, SAFE_BOUND),
                DIAGONAL=block.diagonal and not kind.ignored, BOUNDED=bounded, SUMS=kind.sums,
                IGNORED=kind.ignored, POSITIVES=kind.positives, HIGHEST=kind.highest,
            )  # fmt: skip
        across = [triton.cdiv(len(y), tile.columns) for tile in tiles.values()]
        down = [_tiles_of(chunk, tile.rows) for tile in tiles.values()]
        _merge(row_parts, rows[chunk], bound, across, first, kind)
        _merge(column_parts, columns, bound, down, chunk.start == 0, kind)


def _merge(parts: Tensor, sums: Tensor, bound: tuple[Tensor, ...], tiles: list[int], first: bool, kind: Kind) -> None:
    """Adds the parts of all tiles to `sums`; there are so many `tiles` where all |S| are bounded, and elsewhere."""
    merge_sums_kernel[(triton.cdiv(len(sums), MERGED),)](
        parts, sums, *bound, len(sums), *tiles, SAFE_BOUND, int(first),
        HIGHEST=kind.highest, POSITIVES=kind.positives, SUMS=kind.sums, TILES=MERGED_TILES, BLOCK=MERGED,
    )  # fmt: skip


def pair_losses(pairs: OwnPairs, rows: Tensor, columns: Tensor) -> PairLosses:
    """See `similarity.BlockFunctions`."""
    kind, like = pairs.kind, pairs.similarity
    m, weighted = len(like), isinstance(pairs.weight, Tensor)
    loss, d_scale, of_row, of_column = (torch.empty_like(like) for _ in range(4))
    row_terms, column_terms = (like.new_empty(m, 1 + kind.positives) for _ in range(2))
    known: list[Any] = [None, None, None]
    if kind.highest:
        known = [like.new_empty(m, dtype=dtype) for dtype in (like.dtype, torch.bool, torch.bool)]
    pair_losses_kernel[(triton.cdiv(m, PAIR_BLOCK),)](
        rows, columns, pairs.scale, like, pairs.x_norm, pairs.y_norm,
        pairs.weight if weighted else None, pairs.group_size,
        loss, d_scale, row_terms, column_terms, of_row, of_column, *known,
        m, len(columns), 0.0 if weighted else pairs.weight, rounding_of(pairs.x),
        WEIGHTED=weighted, HIGHEST=kind.highest, POSITIVES=kind.positives, SUMS=kind.sums, BLOCK=PAIR_BLOCK,
    )  # fmt: skip
    return PairLosses(loss, d_scale, row_terms, column_terms, of_row, of_column, *known)


def pair_gradients(x: Tensor, y: Tensor, of_x: Tensor, of_y: Tensor) -> tuple[Tensor, Tensor]:
    """See `similarity.BlockFunctions`."""
    d_x, d_y = (of_x.new_empty(x.shape) for _ in range(2))
    pair_gradients_kernel[(triton.cdiv(len(x), PAIRS),)](
        x, y, of_x, of_y, d_x, d_y, len(x), x.shape[1], x.stride(0), y.stride(0), PAIRS=PAIRS, BLOCK=WIDTH
    )
    return d_x, d_y


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
    x, y, kind = block.x, block.y, block.kind
    if not (len(x) and len(y)):
        return block.scale.new_zeros(1)
    tile = tile_on("gradient_crowded" if kind.positives or kind.ignored else "gradient", x, y)
    parts = list(gradient_parts(len(x), len(y), x.itemsize, tile, workspace_mb))
    room = x.new_empty(max((down.stop - down.start) * stride for down, _, stride in parts))
    tiles = [_tiles_of(down, tile.rows) * _tiles_of(across, tile.columns) for down, across, _ in parts]
    sums = block.scale.new_empty(sum(tiles))
    for (down, across, stride), part_sums in zip(parts, sums.split(tiles), strict=True):
        gradient = room[: (down.stop - down.start) * stride].view(-1, stride)[:, : across.stop - across.start]
        launch(
            similarity_gradient_kernel, tile, x[down], y[across],
            (
                block.scale,
                *_groups(block, down, across),
                row_terms[down] if row_terms is not None else None,
                column_terms[across] if column_terms is not None else None,
                operand(gradient, (tile.rows, tile.columns))[0],
                part_sums,
            ),
            (down.start - across.start,),
            DIAGONAL=block.diagonal and not kind.ignored, IGNORED=kind.ignored, POSITIVES=kind.positives,
            FROM_ROWS=row_terms is not None, FROM_COLUMNS=column_terms is not None,
        )  # fmt: skip
        if d_x is not None:
            matmul_(d_x[down], gradient, y[across], accumulate=True)
        if d_y is not None:
            matmul_(d_y[across], gradient.t(), x[down], accumulate=True)
    return sums


def _tiles_of(part: slice, length: int) -> int:
    return int(triton.cdiv(part.stop - part.start, length))


def _groups(block: Block, rows: slice, columns: slice) -> tuple[Tensor | None, Tensor | None]:
    if block.x_groups is None or block.y_groups is None:
        return None, None
    return block.x_groups[rows], block.y_groups[columns]


def _statistics_tile(kind: Kind, bounded: bool) -> str:
    """The tile setting of a variant of the kernel, by the registers that it takes."""
    if kind != Kind():
        return "statistics_crowded"
    return "statistics" if bounded else "statistics_two"


def _statistics_limits(
    columns: int, rows_of_tile: int, columns_of_tile: int, kind: Kind, workspace_mb: float
) -> tuple[int, float, int]:
    """Bytes per row, workspace in MB and multiple for `row_chunks`: every row and column of a tile has its sums."""
    numbers = columns // columns_of_tile + columns // rows_of_tile
    return max(1, 4 * kind.sums * numbers), workspace_mb, rows_of_tile
