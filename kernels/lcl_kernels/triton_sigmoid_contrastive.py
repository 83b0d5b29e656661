"""The block function of `sigmoid_contrastive_loss` on a GPU.

One Triton kernel makes a tile of logits, sums its losses and writes the gradient with respect to it, for cuBLAS to
multiply with the features. Sums are kept per tile and added up in a fixed order: no atomics, the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lcl_kernels._common import matmul_, row_chunks
from lcl_kernels.sigmoid_negatives import Block, Negatives, gradient_unit
from lcl_kernels.tiles import Tile, operand, round_to, tile_on, tile_position, tile_product
from lcl_kernels.triton_blocks import gradient_parts, launch


@triton.jit
def log1p_of_decay(e):
    """log(1 + e) for e in [0, 1] with all its digits, however small e is: a polynomial, within 2e-7 of it.

    A logarithm of the rounded sum 1 + e would have no digits for e below 6e-8, and few for the 4.5e-5 of exp(-10).
    """
    p = -3.244021209e-3 * e + 1.985144429e-2
    p = p * e - 5.695949867e-2
    p = p * e + 1.060365140e-1
    p = p * e - 1.530559063e-1
    p = p * e + 1.967593879e-1
    p = p * e - 2.495413423e-1
    p = p * e + 3.332996368e-1
    p = p * e - 4.999990165e-1
    return e + p * e * e


@triton.jit(do_not_specialize=["diagonal"])
def sigmoid_negatives_kernel(
    x, y, scale, bias, gradient, sums,
    rows, columns, width, stride_x, stride_y, diagonal, unit,
    DIAGONAL: tl.constexpr, GRADIENT: tl.constexpr, X_DESCRIPTOR: tl.constexpr, Y_DESCRIPTOR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """sums[0, tile] = sum of log(1 + exp(z_ij)). GRADIENT: gradient[i, j] = unit * sigmoid(z_ij), and sums[1, tile] and
    sums[2, tile] of sigmoid(z_ij) and sigmoid(z_ij) x_i . y_j. Positives count as 0."""
    row_tiles = tl.cdiv(rows, ROWS)
    column_tiles = tl.cdiv(columns, COLUMNS)
    tiles = row_tiles * column_tiles
    factor = tl.load(scale)
    shift = tl.load(bias)
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
        z = tl.where(negative, product * factor + shift, float("-inf"))  # where loss and gradient are 0
        decay = tl.exp2(tl.abs(z) * -1.4426950408889634)
        place = sums + tile
        tl.store(place, tl.sum(tl.maximum(z, 0.0) + log1p_of_decay(decay)))
        if GRADIENT:
            g = tl.where(z >= 0.0, 1.0, decay) / (1.0 + decay)
            tl.store(place + tiles, tl.sum(g))
            tl.store(place + 2 * tiles.to(tl.int64), tl.sum(g * product))
            gradient.store([row_tile * ROWS, column_tile * COLUMNS], round_to(g * unit, gradient.dtype, UPCAST))


def negatives(block: Block, *, gradients: bool, d_x: Tensor | None, want_y: bool, workspace_mb: float) -> Negatives:
    """See `sigmoid_negatives.BlockFunction`."""
    x, y, scale = block[:3]
    d_y = scale.new_zeros(y.shape) if want_y else None
    totals = scale.new_zeros(3)
    if not (len(x) and len(y)):
        return Negatives(totals, d_y)
    tile = tile_on("sigmoid", x, y)
    if not gradients:
        for chunk in row_chunks(len(x), 4 * triton.cdiv(len(y), tile.columns) // tile.rows, workspace_mb, tile.rows):
            totals[:1] += _sums(tile, block._replace(x=x[chunk]), None, chunk.start)
        return Negatives(totals, None)
    parts = list(gradient_parts(len(x), len(y), x.itemsize, tile, workspace_mb))
    room = x.new_empty(max((down.stop - down.start) * stride for down, _, stride in parts))
    for down, across, stride in parts:
        rows, width = down.stop - down.start, across.stop - across.start
        gradient = room[: rows * stride].view(rows, stride)[:, :width]
        filled = operand(gradient, (tile.rows, tile.columns))[0]
        totals += _sums(tile, block._replace(x=x[down], y=y[across]), filled, down.start - across.start)
        if d_x is not None:
            matmul_(d_x[down], gradient, y[across], accumulate=True)
        if d_y is not None:
            matmul_(d_y[across], gradient.t(), x[down], accumulate=True)
    return Negatives(totals, d_y)


def _sums(tile: Tile, block: Block, gradient: Tensor | TensorDescriptor | None, first: int) -> Tensor:
    """Launch the kernel for a part of a block and add up: [1] of the losses alone, [3] where `gradient` is filled too.

    Args:
        first: column of the positive of row 0, in a block that has positives.
    """
    x, y, scale, bias, diagonal = block
    tiles = triton.cdiv(len(x), tile.rows) * triton.cdiv(len(y), tile.columns)
    sums = scale.new_empty(1 if gradient is None else 3, tiles)
    launch(
        sigmoid_negatives_kernel, tile, x, y, (scale, bias, gradient, sums), (first, gradient_unit(x)),
        DIAGONAL=diagonal, GRADIENT=gradient is not None,
    )  # fmt: skip
    return sums.sum(1)
