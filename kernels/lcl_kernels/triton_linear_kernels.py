"""The Triton kernels of `triton_linear_cross_entropy`."""

from __future__ import annotations

import triton
import triton.language as tl

from lcl_kernels.tiles import round_to, tile_position, tile_product


@triton.jit
def target_logits_kernel(
    hidden, weight, bias, rows, labels, target, slope, anchor, stride_h, stride_w, width, softcap, lead,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """target[i] = logit of the label of row i, in units of log 2; anchor[i] = a whole number near target + lead, finite
    also where the target is -inf, so that other classes of -inf are 0 against it; slope[i] = that of the softcap."""
    i = tl.program_id(0)
    row = tl.load(rows + i)
    label = tl.load(labels + i)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        h = tl.load(hidden + row * stride_h + k, mask=k < width, other=0.0).to(tl.float32)
        w = tl.load(weight + label * stride_w + k, mask=k < width, other=0.0).to(tl.float32)
        sums += h * w
    z = tl.sum(sums, 0)
    if HAS_BIAS:
        z += tl.load(bias + label).to(tl.float32)
    if HAS_SOFTCAP:
        t, decay = tanh_and_decay(z / softcap)
        z = softcap * t
        tl.store(slope + i, slope_of(decay))
    z *= 1.4426950408889634
    tl.store(target + i, z)
    tl.store(anchor + i, tl.where(z > float("-inf"), tl.floor(z + lead + 0.5), -1.0e30))


@triton.jit
def tanh_and_decay(x):
    """tanh(x) with all its digits, near 0 (a polynomial, as in Cephes) as well as far; and exp(-2|x|)."""
    decay = tl.exp2(tl.abs(x) * -2.8853900817779268)
    far = (1.0 - decay) / (1.0 + decay)
    far = tl.where(x < 0.0, -far, far)
    square = x * x
    near = -5.70498872745e-3 * square + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    near = near * square * x + x
    return tl.where(tl.abs(x) < 0.625, near, far), decay


@triton.jit
def slope_of(decay):
    """Derivative of tanh at x from exp(-2|x|), with all its digits, which 1 - tanh(x)^2 has not where x is large."""
    return 4.0 * decay / ((1.0 + decay) * (1.0 + decay))


@triton.jit
def exp_logits_kernel(
    hidden, weight, bias, labels, target, anchor, overflowed, excess, exponentials, sums, tops, logit_sums, higher,
    rows, vocab, width, stride_h, stride_w, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_EXCESS: tl.constexpr, STORE: tl.constexpr,
    SUMS: tl.constexpr, TOPS: tl.constexpr, SUM_LOGITS: tl.constexpr, RANK: tl.constexpr, RETRY: tl.constexpr,
    H_DESCRIPTOR: tl.constexpr, W_DESCRIPTOR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """exponentials[i, j] = 2^(z_ij - anchor_i), 0 at the target, and their sums per row and tile of columns.

    RETRY: returns at once unless overflowed[rows], the last entry, is set, and makes only tiles of marked rows.
    TOPS: no exponentials; the largest logit per row and tile.
    """
    row_tiles = tl.cdiv(rows, ROWS)
    column_tiles = tl.cdiv(vocab, COLUMNS)
    tiles = row_tiles * column_tiles
    if RETRY:
        tiles = tl.where(tl.load(overflowed + rows) != 0, tiles, 0)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=not RETRY):
        row_tile, column_tile = tile_position(tile, row_tiles, column_tiles, GROUP)
        r = row_tile * ROWS + tl.arange(0, ROWS)
        c = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        valid_row = r < rows
        wanted = True
        if RETRY:
            wanted = tl.max(tl.load(overflowed + r, mask=valid_row, other=0), 0) > 0
        if wanted:
            z = tile_product(
                hidden, weight, stride_h, stride_w, row_tile * ROWS, column_tile * COLUMNS, rows, vocab, width,
                H_DESCRIPTOR, W_DESCRIPTOR, ROWS, COLUMNS, INNER, PRECISION, UPCAST,
            )  # fmt: skip
            if HAS_BIAS:
                z += tl.load(bias + c, mask=c < vocab, other=0.0).to(tl.float32)[None, :]
            if HAS_SOFTCAP:
                t, decay = tanh_and_decay(z / softcap)
                z = softcap * t
            z *= 1.4426950408889634
            label = tl.load(labels + r, mask=valid_row, other=-1).to(tl.int32)
            inside = c[None, :] < vocab
            other = inside & (c[None, :] != label[:, None])
            place = r.to(tl.int64) * column_tiles + column_tile
            if SUM_LOGITS:
                tl.store(logit_sums + place, tl.sum(tl.where(inside, z, 0.0), 1), mask=valid_row)
            if RANK:
                z_target = tl.load(target + r, mask=valid_row, other=0.0)
                count = tl.sum((other & (z > z_target[:, None])).to(tl.int32), 1)
                tl.store(higher + place, count, mask=valid_row)
            if TOPS:
                tl.store(tops + place, tl.max(tl.where(other, z, float("-inf")), 1), mask=valid_row)
            else:
                reference = tl.load(anchor + r, mask=valid_row, other=0.0)
                e = tl.where(other, tl.exp2(z - reference[:, None]), 0.0)
                if SUMS:
                    tl.store(sums + place, tl.sum(e, 1), mask=valid_row)
                if STORE:
                    if HAS_EXCESS:
                        less = tl.load(excess + r, mask=valid_row, other=0.0)
                        e = tl.where(other, e - less[:, None], 0.0)
                    if HAS_SOFTCAP:
                        e *= slope_of(decay)
                    stored = round_to(e, exponentials.dtype, UPCAST)
                    exponentials.store([row_tile * ROWS, column_tile * COLUMNS], stored)


@triton.jit
def finish_hidden_kernel(
    product, weight, rows, labels, factor, at_target, d_hidden, stride_w, width, BLOCK: tl.constexpr
):  # fmt: skip
    """d_hidden[rows[i]] = factor[i] * product[i] + at_target[i] * weight[labels[i]]"""
    i = tl.program_id(0)
    row = tl.load(rows + i)
    label = tl.load(labels + i)
    v = tl.load(factor + i)
    t = tl.load(at_target + i)
    for start in range(0, width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        p = tl.load(product + i.to(tl.int64) * width + k, mask=k < width, other=0.0)
        w = tl.load(weight + label * stride_w + k, mask=k < width, other=0.0).to(tl.float32)
        tl.store(d_hidden + row * width + k, v * p + t * w, mask=k < width)


@triton.jit
def add_targets_kernel(
    hidden, rows, order, sorted_labels, at_target, d_weight, d_bias, count, stride_h, width,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, SEGMENT_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d_weight[label] += sum of at_target[i] * hidden[rows[i]] over the rows i with that label, always in one order.

    Rows are sorted by label; the program of the first row of a label does them all, the others do nothing.
    """
    first = tl.program_id(0)
    label = tl.load(sorted_labels + first)
    before = tl.load(sorted_labels + first - 1, mask=first > 0, other=-1)
    if label != before:
        k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        sums = tl.zeros((BLOCK,), dtype=tl.float32)
        bias_sum = 0.0
        position = first
        more = True
        while more:
            at = position + tl.arange(0, SEGMENT_ROWS)
            same = tl.load(sorted_labels + at, mask=at < count, other=-1) == label
            i = tl.load(order + at, mask=same, other=0)
            t = tl.load(at_target + i, mask=same, other=0.0)
            row = tl.load(rows + i, mask=same, other=0)
            if WEIGHT:
                h = tl.load(
                    hidden + row[:, None] * stride_h + k[None, :],
                    mask=same[:, None] & (k[None, :] < width), other=0.0,
                ).to(tl.float32)  # fmt: skip
                sums += tl.sum(t[:, None] * h, 0)
            bias_sum += tl.sum(t, 0)
            position += SEGMENT_ROWS
            more = tl.sum(same.to(tl.int32), 0) == SEGMENT_ROWS
        if WEIGHT:
            place = d_weight + label * width + k
            tl.store(place, tl.load(place, mask=k < width, other=0.0) + sums, mask=k < width)
        if BIAS and tl.program_id(1) == 0:
            tl.store(d_bias + label, tl.load(d_bias + label) + bias_sum)
