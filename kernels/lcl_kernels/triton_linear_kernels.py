"""The Triton kernels of `triton_linear_cross_entropy`."""

from __future__ import annotations

import triton
import triton.language as tl

from lcl_kernels.tiles import log1p_exact, round_to, tile_position, tile_product


@triton.jit(do_not_specialize=["count", "expected"])
def scan_labels_kernel(
    labels, token_weight, class_weight, rows, counted_labels, row_loss, lse, rank, predicted, summary, right, mass,
    count, vocab, stride_labels, stride_weight, ignore_index, expected,
    HAS_TOKEN_WEIGHT: tl.constexpr, HAS_CLASS_WEIGHT: tl.constexpr, RANK: tl.constexpr, PREDICT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Reads all labels in one program and fills what `sweep.Scan` has, and results of rows that do not count.

    Rows that count come first, in order; the others follow, so that every entry is a row whatever is expected.
    """
    counted_before = 0
    first_bad = tl.cast(count, tl.int64)
    weights = 0.0
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < count
        label = tl.load(labels + i.to(tl.int64) * stride_labels, mask=inside, other=0).to(tl.int64)
        counts = inside & (label != ignore_index)
        bad = counts & ((label < 0) | (label >= vocab))
        first_bad = tl.minimum(first_bad, tl.min(tl.where(bad, i, count), 0).to(tl.int64))
        one = counts.to(tl.int32)
        place = counted_before + tl.cumsum(one, 0) - one
        place = tl.where(counts, place, count - 1 - (i - place))
        # The clamp keeps a bad label from reading outside the weight until the assertion is seen.
        label = tl.minimum(tl.maximum(label, 0), vocab - 1)
        tl.store(rows + place, i, mask=inside)
        tl.store(counted_labels + place, label.to(tl.int32), mask=inside)
        ignored = inside & (one == 0)
        tl.store(row_loss + i, 0.0, mask=ignored)
        tl.store(lse + i, 0.0, mask=ignored)
        if RANK:
            tl.store(rank + i, -1, mask=ignored)
        if PREDICT:
            tl.store(predicted + i, -1, mask=ignored)
        if HAS_TOKEN_WEIGHT or HAS_CLASS_WEIGHT:
            w = one.to(tl.float32)
            if HAS_TOKEN_WEIGHT:
                w = tl.load(token_weight + i.to(tl.int64) * stride_weight, mask=counts, other=0.0)
            if HAS_CLASS_WEIGHT:
                w *= tl.load(class_weight + label, mask=counts, other=0.0)
            weights += tl.sum(w, 0)
        counted_before += tl.sum(one, 0)
    divisor = weights if HAS_TOKEN_WEIGHT or HAS_CLASS_WEIGHT else tl.cast(counted_before, tl.float32)
    infinity = float("inf")
    tl.store(summary, tl.cast(counted_before, tl.int64))
    tl.store(summary + 1, first_bad)
    tl.store(right, first_bad == count)
    tl.store(right + 1, counted_before == expected)
    tl.store(mass, tl.where(divisor == 0.0, infinity, divisor))
    tl.store(mass + 1, tl.where(counted_before == 0, infinity, -infinity))


@triton.jit(do_not_specialize=["count"])
def target_logits_kernel(
    hidden, weight, bias, rows, labels, x, target, slope, anchor, marked,
    count, stride_h, stride_w, stride_x, width, softcap, lead,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, GATHER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """target[i] = logit of the label of row i, in units of log 2; anchor[i] = a whole number near target + lead, finite
    also where the target is -inf, so that other classes of -inf are 0 against it; slope[i] = that of the softcap.

    GATHER: also x[i] = hidden[rows[i]]. Clears marked[count + 1].
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = i < count
    row = tl.load(rows + i, mask=valid, other=0).to(tl.int64)
    label = tl.load(labels + i, mask=valid, other=0).to(tl.int64)
    products = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = valid[:, None] & (k[None, :] < width)
        h = tl.load(hidden + row[:, None] * stride_h + k[None, :], mask=inside, other=0.0)
        w = tl.load(weight + label[:, None] * stride_w + k[None, :], mask=inside, other=0.0)
        products += h.to(tl.float32) * w.to(tl.float32)
        if GATHER:
            tl.store(x + i.to(tl.int64)[:, None] * stride_x + k[None, :], h, mask=inside)
    z = tl.sum(products, 1)
    if HAS_BIAS:
        z += tl.load(bias + label, mask=valid, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        t, decay = tanh_and_decay(z / softcap)
        z = softcap * t
        tl.store(slope + i, slope_of(decay), mask=valid)
    z *= 1.4426950408889634
    tl.store(target + i, z, mask=valid)
    tl.store(anchor + i, tl.where(z > float("-inf"), tl.floor(z + lead + 0.5), -1.0e30), mask=valid)
    tl.store(marked + i, 0, mask=i <= count)


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
def largest_of_tiles(tops, row, wanted, tiles, SPAN: tl.constexpr):
    """The largest entry of each wanted row of tops[., tiles]."""
    # Element by element and reduced once: Triton 3.6 and 3.7 fail to compile a reduction per step of a wide loop.
    top = tl.full((row.shape[0], SPAN), float("-inf"), dtype=tl.float32)
    for start in range(0, tiles, SPAN):
        at = start + tl.arange(0, SPAN)
        inside = wanted[:, None] & (at[None, :] < tiles)
        values = tl.load(tops + row.to(tl.int64)[:, None] * tiles + at[None, :], mask=inside, other=float("-inf"))
        top = tl.maximum(top, values)
    return tl.max(top, 1)


@triton.jit(do_not_specialize=["rows"])
def exp_logits_kernel(
    hidden, weight, bias, labels, target, anchor, marked, share, excess, class_weight, exponentials, sums, tops,
    logit_sums, higher, best, best_class,
    rows, vocab, width, stride_h, stride_w, softcap, limit,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_EXCESS: tl.constexpr, HAS_CLASS_WEIGHT: tl.constexpr,
    STORE: tl.constexpr, SUMS: tl.constexpr, TOPS: tl.constexpr, SUM_LOGITS: tl.constexpr, RANK: tl.constexpr,
    PREDICT: tl.constexpr, RETRY: tl.constexpr, H_DESCRIPTOR: tl.constexpr, W_DESCRIPTOR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """exponentials[i, j] = 2^(z_ij - anchor_i), 0 at the target, and their sums per row and tile of columns.

    Rows with a sum above the limit are marked, and marked[rows] tells whether there is one. HAS_EXCESS: what is stored
    is share_i 2^(z_ij - anchor_i) - excess_i class_weight_j. PREDICT: the largest logit per row and tile and its class.

    RETRY: returns at once unless a row is marked, and makes only tiles of marked rows: with TOPS their largest logit
    per row and tile, else their exponentials anew, with the largest of tops[i] as anchor.
    """
    row_tiles = tl.cdiv(rows, ROWS)
    column_tiles = tl.cdiv(vocab, COLUMNS)
    tiles = row_tiles * column_tiles
    if RETRY:
        tiles = tl.where(tl.load(marked + rows) != 0, tiles, 0)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=not RETRY):
        row_tile, column_tile = tile_position(tile, row_tiles, column_tiles, GROUP)
        r = row_tile * ROWS + tl.arange(0, ROWS)
        c = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        valid_row = r < rows
        wanted = True
        if RETRY:
            wanted = tl.max(tl.load(marked + r, mask=valid_row, other=0), 0) > 0
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
                weighted = z
                if HAS_CLASS_WEIGHT:
                    weighted = z * tl.load(class_weight + c, mask=c < vocab, other=0.0)[None, :]
                tl.store(logit_sums + place, tl.sum(tl.where(inside, weighted, 0.0), 1), mask=valid_row)
            if RANK or PREDICT:
                z_target = tl.load(target + r, mask=valid_row, other=0.0)[:, None]
            if RANK:
                count = tl.sum((other & (z > z_target)).to(tl.int32), 1)
                tl.store(higher + place, count, mask=valid_row)
            if PREDICT:  # against the same logit of the target as RANK, so that they agree
                compared = tl.where(other, z, tl.where(inside, z_target, float("-inf")))
                largest, first = tl.max(compared, 1, return_indices=True, return_indices_tie_break_left=True)
                tl.store(best + place, largest, mask=valid_row)
                tl.store(best_class + place, column_tile * COLUMNS + first, mask=valid_row)
            if TOPS:
                tl.store(tops + place, tl.max(tl.where(other, z, float("-inf")), 1), mask=valid_row)
            else:
                reference = tl.load(anchor + r, mask=valid_row, other=0.0)
                if RETRY:
                    again = tl.load(marked + r, mask=valid_row, other=0) > 0
                    reference = tl.where(again, largest_of_tiles(tops, r, again, column_tiles, 32), reference)
                e = tl.where(other, tl.exp2(z - reference[:, None]), 0.0)
                if SUMS:
                    total = tl.sum(e, 1)
                    tl.store(sums + place, total, mask=valid_row)
                    if not RETRY:
                        beyond = valid_row & (total > limit)
                        tl.store(marked + r, 1, mask=beyond)
                        tl.store(marked + tl.where(beyond, rows, 0), 1, mask=beyond)
                if STORE:
                    if HAS_EXCESS:
                        e *= tl.load(share + r, mask=valid_row, other=0.0)[:, None]
                        less = tl.load(excess + r, mask=valid_row, other=0.0)[:, None]
                        if HAS_CLASS_WEIGHT:
                            less = less * tl.load(class_weight + c, mask=c < vocab, other=0.0)[None, :]
                        e = tl.where(other, e - less, 0.0)
                    if HAS_SOFTCAP:
                        e *= slope_of(decay)
                    stored = round_to(e, exponentials.dtype, UPCAST)
                    exponentials.store([row_tile * ROWS, column_tile * COLUMNS], stored)


@triton.jit(do_not_specialize=["count"])
def finish_rows_kernel(
    x, rows, labels, target, slope, anchor, marked, sums, tops, logit_sums, higher, best, best_class,
    token_weight, class_weight, class_weight_sum, lse_grad, unit,
    row_loss, lse, rank, predicted, at_target, factor, share, excess, scaled, columns,
    count, tiles, vocab, width, stride_x, stride_weight, stride_lse_grad, z_loss, smoothing, far, room, lift,
    HAS_SOFTCAP: tl.constexpr, HAS_TOKEN_WEIGHT: tl.constexpr, HAS_CLASS_WEIGHT: tl.constexpr,
    HAS_LSE_GRAD: tl.constexpr, HAS_UNIT: tl.constexpr, SMOOTHED: tl.constexpr, RANK: tl.constexpr,
    PREDICT: tl.constexpr, GRADIENT: tl.constexpr, TWO_PASSES: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Everything per row between the exponentials and the gradient products, for the `count` rows of a chunk.

    Results of a row go to its place in row_loss, lse, rank and predicted [N]. GRADIENT: at_target[i] is the derivative
    by the logit of the label, and factor[i] what both products with the stored exponentials lack; scaled[i] =
    factor[i] x[i]; columns[i] = factor[i] in two parts, whose sum has twice the digits. HAS_UNIT: both divided by unit.
    TWO_PASSES: the exponentials are still to be stored, against anchor[i], with share[i] and excess[i], which keep
    what is stored near `room` = 2^lift at most, whatever the weights; scaled and columns lack 1 / room.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = i < count
    row = tl.load(rows + i, mask=valid, other=0).to(tl.int64)
    label = tl.load(labels + i, mask=valid, other=0).to(tl.int64)
    again = tl.load(marked + i, mask=valid, other=0) > 0
    z = tl.load(target + i, mask=valid, other=0.0)
    reference = tl.load(anchor + i, mask=valid, other=0.0)
    reference = tl.where(again, largest_of_tiles(tops, i, again, tiles, SPAN), reference)

    # Element by element and reduced once, as in `largest_of_tiles`.
    others = tl.zeros((ROWS, SPAN), dtype=tl.float32)
    logit_sum = tl.zeros((ROWS, SPAN), dtype=tl.float32)
    above = tl.zeros((ROWS, SPAN), dtype=tl.int32)
    top = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    top_class = tl.zeros((ROWS,), dtype=tl.int32)
    for start in range(0, tiles, SPAN):
        at = start + tl.arange(0, SPAN)
        place = i.to(tl.int64)[:, None] * tiles + at[None, :]
        inside = valid[:, None] & (at[None, :] < tiles)
        others += tl.load(sums + place, mask=inside, other=0.0)
        if SMOOTHED:
            logit_sum += tl.load(logit_sums + place, mask=inside, other=0.0)
        if RANK:
            above += tl.load(higher + place, mask=inside, other=0)
        if PREDICT:
            values = tl.load(best + place, mask=inside, other=float("-inf"))
            classes = tl.load(best_class + place, mask=inside, other=0)
            largest = tl.max(values, 1)
            first = tl.min(tl.where(inside & (values == largest[:, None]), classes, vocab), 1)
            first = tl.where(first < vocab, first, 0)  # logits of NaN are equal to none
            top_class = tl.where((largest > top) | (start == 0), first, top_class)
            top = tl.maximum(top, largest)
    others = tl.sum(others, 1)
    logit_sum = tl.sum(logit_sum, 1)
    above = tl.sum(above, 1)

    # As `exclusive_cross_entropy` does. In two steps, so that only a huge product can overflow.
    gap = (reference - z) * 0.6931471805599453
    half = tl.exp(0.5 * tl.minimum(gap, 170.0))
    odds = others * half * half
    of_target = tl.exp2(z - reference)
    total = others + of_target
    cross_entropy = tl.where(odds < 1.0e30, log1p_exact(odds), gap + tl.log(total))
    # Far above the target, the reference is near the log-sum-exp, and finite where the target is -inf.
    log_sum = tl.where(
        gap > far, reference * 0.6931471805599453 + tl.log(total), z * 0.6931471805599453 + cross_entropy
    )

    weight_label = 1.0
    mean_weight = 1.0
    if HAS_CLASS_WEIGHT:
        weight_label = tl.load(class_weight + label, mask=valid, other=0.0)
        if SMOOTHED:
            mean_weight = tl.load(class_weight_sum) / vocab
    loss = weight_label * cross_entropy
    if SMOOTHED:
        # `smoothed` without classes of weight: no difference of infinities where a logit is -inf.
        loss = (1.0 - smoothing) * loss + smoothing * (mean_weight * log_sum - logit_sum * 0.6931471805599453 / vocab)
    loss += z_loss * log_sum * log_sum
    g = tl.full((ROWS,), 1.0, dtype=tl.float32)
    if HAS_TOKEN_WEIGHT:
        g = tl.load(token_weight + row * stride_weight, mask=valid, other=0.0)
        loss *= g
    tl.store(row_loss + row, loss, mask=valid)
    tl.store(lse + row, log_sum, mask=valid)
    if RANK:
        tl.store(rank + row, above.to(tl.int64), mask=valid)
    if PREDICT:
        tl.store(predicted + row, top_class.to(tl.int64), mask=valid)

    if GRADIENT:
        probability = of_target / total
        pull = 2.0 * z_loss * log_sum
        entropy_weight = weight_label
        by_label = 0.0
        if SMOOTHED:
            entropy_weight = (1.0 - smoothing) * weight_label + smoothing * mean_weight
            by_label = smoothing * (mean_weight - weight_label / vocab)
        # 1 - p is the share of the others, which has all its digits.
        slope_label = g * (by_label - entropy_weight * (others / total) + pull * probability)
        v = g * (entropy_weight + pull)
        if HAS_LSE_GRAD:
            by_lse = tl.load(lse_grad + row * stride_lse_grad, mask=valid, other=0.0)
            slope_label += by_lse * probability
            v += by_lse
        if HAS_SOFTCAP:
            slope_label *= tl.load(slope + i, mask=valid, other=0.0)
        tl.store(at_target + i, slope_label, mask=valid)
        if TWO_PASSES:
            tl.store(anchor + i, log_sum * 1.4426950408889634 - lift, mask=valid)
            if SMOOTHED:
                taken = g * smoothing / vocab
                size = tl.abs(v) + tl.abs(taken * mean_weight)
                size = tl.where(size > 0.0, size, tl.abs(taken))
                size_or_one = tl.where(size > 0.0, size, 1.0)
                tl.store(share + i, v / size_or_one, mask=valid)
                tl.store(excess + i, taken / size_or_one * room, mask=valid)
                v = size
        else:
            v = v / total
        tl.store(factor + i, v / room, mask=valid)
        if HAS_UNIT:
            v /= tl.load(unit)
        if BIAS:
            high = round_to(v, columns.dtype.element_ty, UPCAST)
            low = round_to(v - high.to(tl.float32), columns.dtype.element_ty, UPCAST)
            part = tl.arange(0, 8)[None, :]
            both = tl.where(part == 0, high[:, None], tl.where(part == 1, low[:, None], 0.0))
            tl.store(columns + i[:, None] * 8 + part, both, mask=valid[:, None])
        if SCALE:
            for start in range(0, width, BLOCK):
                k = start + tl.arange(0, BLOCK)
                inside = valid[:, None] & (k[None, :] < width)
                values = tl.load(x + i.to(tl.int64)[:, None] * stride_x + k[None, :], mask=inside, other=0.0)
                rounded = round_to(values.to(tl.float32) * v[:, None], scaled.dtype.element_ty, UPCAST)
                tl.store(scaled + i.to(tl.int64)[:, None] * width + k[None, :], rounded, mask=inside)


@triton.jit(do_not_specialize=["count"])
def finish_hidden_kernel(
    product, weight, rows, labels, factor, at_target, d_hidden, count, stride_w, width,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d_hidden[rows[i]] = factor[i] * product[i] + at_target[i] * weight[labels[i]]"""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = i < count
    row = tl.load(rows + i, mask=valid, other=0).to(tl.int64)
    label = tl.load(labels + i, mask=valid, other=0).to(tl.int64)
    v = tl.load(factor + i, mask=valid, other=0.0)[:, None]
    t = tl.load(at_target + i, mask=valid, other=0.0)[:, None]
    for start in range(0, width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = valid[:, None] & (k[None, :] < width)
        p = tl.load(product + i.to(tl.int64)[:, None] * width + k[None, :], mask=inside, other=0.0)
        w = tl.load(weight + label[:, None] * stride_w + k[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(d_hidden + row[:, None] * width + k[None, :], v * p + t * w, mask=inside)


@triton.jit(do_not_specialize=["count"])
def add_targets_kernel(
    hidden, rows, order, sorted_labels, at_target, d_weight, d_bias, count, stride_h, width,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, SEGMENT_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d_weight[label] += sum of at_target[i] * hidden[rows[i]] over the rows i with that label, always in one order.

    Rows are sorted by label; the program of the first row of a label does them all, the others do nothing.
    """
    first = tl.program_id(0)
    label = tl.load(sorted_labels + first).to(tl.int64)
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
            row = tl.load(rows + i, mask=same, other=0).to(tl.int64)
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
