"""The Triton kernels of `triton_contrastive`. Logarithms are in units of log 2, losses in nats."""

from __future__ import annotations

import triton
import triton.language as tl

from lcl_kernels.tiles import log1p_exact, round_to, tile_position, tile_product


@triton.jit(do_not_specialize=["pairs"])
def pair_products_kernel(
    x, y, products, x_norms, y_norms, pairs, width, stride_x, stride_y, PAIRS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """products[i] = x_i . y_i, and the norms of both."""
    i = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    product = tl.zeros((PAIRS,), dtype=tl.float32)
    x_square = tl.zeros((PAIRS,), dtype=tl.float32)
    y_square = tl.zeros((PAIRS,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = (i < pairs)[:, None] & (k < width)[None, :]
        of_x = tl.load(x + i.to(tl.int64)[:, None] * stride_x + k[None, :], mask=inside, other=0.0).to(tl.float32)
        of_y = tl.load(y + i.to(tl.int64)[:, None] * stride_y + k[None, :], mask=inside, other=0.0).to(tl.float32)
        product += tl.sum(of_x * of_y, 1)
        x_square += tl.sum(of_x * of_x, 1)
        y_square += tl.sum(of_y * of_y, 1)
    tl.store(products + i, product, mask=i < pairs)
    tl.store(x_norms + i, tl.sqrt(x_square), mask=i < pairs)
    tl.store(y_norms + i, tl.sqrt(y_square), mask=i < pairs)


@triton.jit
def largest_similarity(scale, x_norm, y_norm):
    """A bound of all |S| from the largest norms."""
    return tl.abs(tl.load(scale)) * 1.4426950408889634 * tl.load(x_norm) * tl.load(y_norm)


@triton.jit
def on_diagonal(row_tile, column_tile, diagonal, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Whether a tile has pairs that stand for themselves, in column row + diagonal. The others need no look for them,
    which would take registers."""
    first = row_tile * ROWS + diagonal - column_tile * COLUMNS
    return (first < COLUMNS) & (first > -ROWS)


@triton.jit(do_not_specialize=["diagonal"])
def similarity_statistics_kernel(
    x, y, scale, x_norm, y_norm, x_groups, y_groups, row_parts, column_parts,
    rows, columns, width, stride_x, stride_y, diagonal, safe_bound,
    DIAGONAL: tl.constexpr, IGNORED: tl.constexpr, POSITIVES: tl.constexpr, HIGHEST: tl.constexpr,
    BOUNDED: tl.constexpr, SUMS: tl.constexpr, X_DESCRIPTOR: tl.constexpr, Y_DESCRIPTOR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Per tile the sums (`similarity`) of its part of each row and column: row_parts [column tiles, SUMS, rows] and
    column_parts [row tiles, SUMS, columns].

    Two launches, of which one returns at once: BOUNDED, where the bound of all |S| is a safe top for all and tops are
    not written, and else with the largest S of the tile.
    """
    row_tiles = tl.cdiv(rows, ROWS)
    column_tiles = tl.cdiv(columns, COLUMNS)
    most = largest_similarity(scale, x_norm, y_norm)
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
        counted = (r[:, None] < rows) & (c[None, :] < columns)
        if DIAGONAL:  # noqa: SIM102 - this is known when compiling, the next is not
            if on_diagonal(row_tile, column_tile, diagonal, ROWS, COLUMNS):
                counted = counted & (r[:, None] + diagonal != c[None, :])
        of_row = row_parts + column_tile.to(tl.int64) * SUMS * rows + r
        of_column = column_parts + row_tile.to(tl.int64) * SUMS * columns + c
        s = product * factor
        if IGNORED or POSITIVES:
            x_group = tl.load(x_groups + r, mask=r < rows, other=-1)
            y_group = tl.load(y_groups + c, mask=c < columns, other=-1)
            same = x_group[:, None] == y_group[None, :]
        if IGNORED:
            counted = counted & (same == 0)
        if POSITIVES:
            others = tl.where(counted & same, s, 0.0)
            tl.store(of_row + (SUMS - 1) * rows, tl.sum(others, 1), mask=r < rows)
            tl.store(of_column + (SUMS - 1) * columns, tl.sum(others, 0), mask=c < columns)
        if HIGHEST:
            negative = counted
            if POSITIVES:
                negative = counted & (same == 0)
            negatives = tl.where(negative, s, float("-inf"))
            tl.store(of_row + 2 * rows, tl.max(negatives, 1), mask=r < rows)
            tl.store(of_column + 2 * columns, tl.max(negatives, 0), mask=c < columns)
        if BOUNDED:
            e = tl.where(counted, tl.exp2(s - most), 0.0)
            tl.store(of_row + rows, tl.sum(e, 1), mask=r < rows)
            tl.store(of_column + columns, tl.sum(e, 0), mask=c < columns)
        else:
            s = tl.where(counted, s, float("-inf"))
            top = tl.max(s, 1)
            e = tl.exp2(s - tl.maximum(top, -3.0e38)[:, None])
            tl.store(of_row, top, mask=r < rows)
            tl.store(of_row + rows, tl.sum(e, 1), mask=r < rows)
            top = tl.max(s, 0)
            e = tl.exp2(s - tl.maximum(top, -3.0e38)[None, :])
            tl.store(of_column, top, mask=c < columns)
            tl.store(of_column + columns, tl.sum(e, 0), mask=c < columns)


@triton.jit(do_not_specialize=["length", "bounded_tiles", "other_tiles", "first"])
def merge_sums_kernel(
    parts, sums, scale, x_norm, y_norm, length, bounded_tiles, other_tiles, safe_bound, first,
    HIGHEST: tl.constexpr, POSITIVES: tl.constexpr, SUMS: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums [length, SUMS] (as if of nothing if `first`) and parts [tiles, SUMS, length] of the same rows or columns
    together, TILES parts at a time, always in one order."""
    most = largest_similarity(scale, x_norm, y_norm)
    bounded = most <= safe_bound
    tiles = tl.where(bounded, bounded_tiles, other_tiles)
    common_top = tl.where(bounded, most, float("-inf"))
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = sums + k.to(tl.int64) * SUMS
    known = (k < length) & (first == 0)
    top = tl.load(at, mask=known, other=float("-inf"))
    total = tl.load(at + 1, mask=known, other=0.0)
    if HIGHEST:
        highest = tl.load(at + 2, mask=known, other=float("-inf"))
    if POSITIVES:
        others = tl.load(at + SUMS - 1, mask=known, other=0.0)
    for start in range(0, tiles, TILES):
        t = start + tl.arange(0, TILES)
        inside = (t < tiles)[:, None] & (k < length)[None, :]
        place = parts + t.to(tl.int64)[:, None] * SUMS * length + k[None, :]
        part_top = tl.load(place, mask=inside & (bounded == 0), other=float("-inf"))
        part_top = tl.where(inside, tl.maximum(part_top, common_top), float("-inf"))
        part = tl.load(place + length, mask=inside, other=0.0)
        larger = tl.maximum(top, tl.max(part_top, 0))
        reference = tl.maximum(larger, -3.0e38)
        total = total * tl.exp2(top - reference) + tl.sum(part * tl.exp2(part_top - reference[None, :]), 0)
        top = larger
        if HIGHEST:
            part_highest = tl.load(place + 2 * length, mask=inside, other=float("-inf"))
            highest = tl.maximum(highest, tl.max(part_highest, 0))
        if POSITIVES:
            others += tl.sum(tl.load(place + (SUMS - 1) * length, mask=inside, other=0.0), 0)
    tl.store(at, top, mask=k < length)
    tl.store(at + 1, total, mask=k < length)
    if HIGHEST:
        tl.store(at + 2, highest, mask=k < length)
    if POSITIVES:
        tl.store(at + SUMS - 1, others, mask=k < length)


@triton.jit
def side_of_pair(top, total, others, positive, size, POSITIVES: tl.constexpr):
    """Of the rows or of the columns: the loss, its derivative by S_ii, and the log-sum-exp.

    As `exclusive_cross_entropy`: `total` does not hold the positive, so that nothing cancels.
    """
    gap = top - positive
    half = tl.exp2(0.5 * tl.minimum(gap, 245.0))  # in two steps, so that only a huge product can overflow
    odds = total * half * half
    far = gap * 0.6931471805599453 + tl.log(total + tl.exp2(-tl.maximum(gap, 0.0)))
    bounded = tl.minimum(odds, 1.0e30)
    loss = tl.where(odds < 1.0e30, log1p_exact(bounded), far)
    slope = -bounded / (1.0 + bounded)
    lse = positive + loss * 1.4426950408889634
    if POSITIVES:
        loss += ((size - 1.0) * positive - others) * 0.6931471805599453 / size
        slope += (size - 1.0) / size
    return loss, slope, lse


@triton.jit(do_not_specialize=["pairs"])
def pair_losses_kernel(
    rows, columns, scale, similarity, x_norms, y_norms, weights, sizes,
    weighted, d_scale, row_terms, column_terms, of_row, of_column, pair_loss, x_first, y_first,
    pairs, ranks, weight, rounding,
    WEIGHTED: tl.constexpr, HIGHEST: tl.constexpr, POSITIVES: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All of `similarity.PairLosses` from the sums of rows [pairs, SUMS] and columns [ranks, pairs, SUMS]."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = k < pairs
    factor = tl.load(scale) * 1.4426950408889634
    cosine = tl.load(similarity + k, mask=own, other=0.0)
    positive = cosine * factor
    size = tl.full((BLOCK,), 1.0, dtype=tl.float32)
    others = tl.zeros((BLOCK,), dtype=tl.float32)
    w = tl.zeros((BLOCK,), dtype=tl.float32) + weight
    if WEIGHTED:
        w = tl.load(weights + k, mask=own, other=0.0)

    at = rows + k.to(tl.int64) * SUMS
    top = tl.load(at, mask=own, other=float("-inf"))
    total = tl.load(at + 1, mask=own, other=0.0)
    if HIGHEST:
        row_highest = tl.load(at + 2, mask=own, other=float("-inf"))
        column_highest = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    if POSITIVES:
        size = tl.load(sizes + k, mask=own, other=1.0)
        others = tl.load(at + SUMS - 1, mask=own, other=0.0)
    row_loss, row_slope, row_lse = side_of_pair(top, total, others, positive, size, POSITIVES)

    top = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    others = tl.zeros((BLOCK,), dtype=tl.float32)
    for rank in range(0, ranks):
        at = columns + (k.to(tl.int64) + rank * pairs) * SUMS
        part_top = tl.load(at, mask=own, other=float("-inf"))
        larger = tl.maximum(top, part_top)
        reference = tl.maximum(larger, -3.0e38)
        total = total * tl.exp2(top - reference)
        total += tl.load(at + 1, mask=own, other=0.0) * tl.exp2(part_top - reference)
        top = larger
        if HIGHEST:
            column_highest = tl.maximum(column_highest, tl.load(at + 2, mask=own, other=float("-inf")))
        if POSITIVES:
            others += tl.load(at + SUMS - 1, mask=own, other=0.0)
    column_loss, column_slope, column_lse = side_of_pair(top, total, others, positive, size, POSITIVES)

    loss = row_loss + column_loss
    tl.store(weighted + k, tl.where(w > 0.0, w * loss, 0.0), mask=own)
    tl.store(d_scale + k, w * (row_slope + column_slope) * cosine, mask=own)
    tl.store(of_row + k, w * row_slope, mask=own)
    tl.store(of_column + k, w * column_slope, mask=own)
    log_weight = tl.where(w > 0.0, tl.log2(tl.where(w > 0.0, w, 1.0)), float("-inf"))
    place = k * (1 + POSITIVES)
    tl.store(row_terms + place, row_lse - log_weight, mask=own)
    tl.store(column_terms + place, column_lse - log_weight, mask=own)
    if POSITIVES:
        tl.store(row_terms + place + 1, w / size, mask=own)
        tl.store(column_terms + place + 1, w / size, mask=own)
    if HIGHEST:
        least = rounding * tl.load(x_norms + k, mask=own, other=0.0) * tl.load(y_norms + k, mask=own, other=0.0)
        least *= tl.abs(factor)
        tl.store(pair_loss + k, 0.5 * loss, mask=own)
        tl.store(x_first + k, positive - row_highest > least, mask=own)
        tl.store(y_first + k, positive - column_highest > least, mask=own)


@triton.jit(do_not_specialize=["pairs"])
def pair_gradients_kernel(
    x, y, of_x, of_y, d_x, d_y, pairs, width, stride_x, stride_y, PAIRS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """d_x[i] = of_x[i] * y_i, d_y[i] = of_y[i] * x_i"""
    i = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    factor_x = tl.load(of_x + i, mask=i < pairs, other=0.0)[:, None]
    factor_y = tl.load(of_y + i, mask=i < pairs, other=0.0)[:, None]
    for start in range(0, width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = (i < pairs)[:, None] & (k < width)[None, :]
        row = i.to(tl.int64)[:, None]
        of_block = tl.load(x + row * stride_x + k[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(d_y + row * width + k[None, :], factor_y * of_block, mask=inside)
        of_block = tl.load(y + row * stride_y + k[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(d_x + row * width + k[None, :], factor_x * of_block, mask=inside)


@triton.jit(do_not_specialize=["diagonal"])
def similarity_gradient_kernel(
    x, y, scale, x_groups, y_groups, row_terms, column_terms, gradient, weighted_sums,
    rows, columns, width, stride_x, stride_y, diagonal,
    DIAGONAL: tl.constexpr, FROM_ROWS: tl.constexpr, FROM_COLUMNS: tl.constexpr,
    IGNORED: tl.constexpr, POSITIVES: tl.constexpr, X_DESCRIPTOR: tl.constexpr, Y_DESCRIPTOR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The gradient G of `BlockFunctions.gradients`, from rows, columns or both; per tile the sum of G * (x . y)."""
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
        s = product * factor
        if FROM_ROWS:
            at_row = row_terms + r * (1 + POSITIVES)
            g = tl.exp2(s - tl.load(at_row, mask=r < rows, other=float("inf"))[:, None])
        if FROM_COLUMNS:
            at_column = column_terms + c * (1 + POSITIVES)
            of_columns = tl.exp2(s - tl.load(at_column, mask=c < columns, other=float("inf"))[None, :])
            if FROM_ROWS:
                g += of_columns
            else:
                g = of_columns
        counted = (r[:, None] < rows) & (c[None, :] < columns)
        if DIAGONAL:
            counted = counted & (r[:, None] + diagonal != c[None, :])
        if IGNORED or POSITIVES:
            x_group = tl.load(x_groups + r, mask=r < rows, other=-1)
            y_group = tl.load(y_groups + c, mask=c < columns, other=-1)
            same = x_group[:, None] == y_group[None, :]
        if IGNORED:
            counted = counted & (same == 0)
        if POSITIVES:
            if FROM_ROWS:
                row_share = tl.load(at_row + 1, mask=r < rows, other=0.0)[:, None]
            if FROM_COLUMNS:
                column_share = tl.load(at_column + 1, mask=c < columns, other=0.0)[None, :]
            if FROM_ROWS and FROM_COLUMNS:
                g -= tl.where(same, row_share + column_share, 0.0)
            elif FROM_ROWS:
                g -= tl.where(same, row_share, 0.0)
            else:
                g -= tl.where(same, column_share, 0.0)
        g = tl.where(counted, g, 0.0)
        tl.store(weighted_sums + tile, tl.sum(g * product))
        gradient.store([row_tile * ROWS, column_tile * COLUMNS], round_to(g, gradient.dtype, UPCAST))
