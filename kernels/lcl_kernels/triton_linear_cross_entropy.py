"""The sweep of `linear_cross_entropy` on a GPU: one Triton kernel makes exponentials, cuBLAS the gradient products.

The logit of the target is computed first, by a dot product per row. It anchors the exponentials: E = exp(z - anchor),
anchor = z_target + 30, can be stored by the kernel that computes z, without knowing the row maximum, because bfloat16
has the range of float32. The row's own scale comes out of both gradient products: with v_i = g_i / sum_i,

    d hidden = v * (E @ weight)    and    d weight = E.T @ (v * hidden).

The target is left out of E and its gradient added in float32, so nothing cancels when a token is nearly certain. A row
with a logit far above its target (70 and more) would overflow; such rows are marked, and the same kernel makes their
tiles again with their maximum as anchor. Nothing waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lcl_kernels._common import INTERPRETED, exclusive_cross_entropy, matmul_, row_chunks, separate_rows, smoothed
from lcl_kernels.sweep import Options, Swept, Wanted, empty_results
from lcl_kernels.tiles import (
    LN2,
    LOG2E,
    MOST_ROWS,
    Tile,
    launch_options,
    operand,
    precision_of,
    programs_on,
    tile_on,
)
from lcl_kernels.triton_linear_kernels import (
    add_targets_kernel,
    exp_logits_kernel,
    finish_hidden_kernel,
    target_logits_kernel,
)

LEAD = 30.0
"""Anchor minus target logit, in nats: rows may have logits from 57 below to about 70 above their target."""
LIMIT = 2.0**60
"""Sum of exponentials of a row above which it is made again: gradient factors and products stay in range too."""
SEGMENT_ROWS = 16


def sweep(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rows: Tensor,
    options: Options,
    wanted: Wanted,
    row_grad: Tensor | None = None,
) -> Swept:
    """See `torch_linear_cross_entropy.sweep`. Everything is enqueued; nothing waits for the device."""
    results = empty_results(hidden, weight, labels, options, wanted)
    if len(rows) == 0:
        results.d_weight.zero_()
        return results
    hidden, weight = separate_rows(hidden), separate_rows(weight)
    bias = None if bias is None else bias.contiguous()
    target, slope, anchor = _target_logits(hidden, weight, bias, rows, labels, options)
    at_target = torch.empty_like(target)
    room: Tensor | None = None
    # Float16 has too little range for anchored exponentials, and a smoothed label acts on every class by a term that
    # is no multiple of the exponential: both find the log-sum-exp first, and make the exponentials again from it.
    two_passes = any(wanted) and (hidden.dtype == torch.float16 or options.label_smoothing > 0)
    for chunk in row_chunks(len(rows), *_limits(hidden, weight, options, wanted)):
        x = hidden[chunk] if len(rows) == len(hidden) else hidden.index_select(0, rows[chunk])
        of_softcap = None if slope is None else slope[chunk]
        block = _Block(x, weight, bias, labels[chunk], target[chunk], of_softcap, options)
        if any(wanted) and room is None:  # the first chunk is the largest
            room = _room(block)
        exponentials = None if room is None else room[: len(x)]
        made = _exponentials(block, anchor[chunk], None if two_passes else exponentials)
        cross_entropy, lse, total = _losses(block, made)
        _keep(results, chunk, block, made, cross_entropy, lse)
        if not any(wanted):
            continue
        pull = 2 * options.z_loss * lse
        grad = torch.ones_like(lse) if row_grad is None else row_grad[chunk]
        at_target[chunk] = grad * _slope_at_target(block, cross_entropy, pull)
        factor = grad * (1 + pull)
        assert exponentials is not None
        if two_passes:
            _softmax(block, lse, options.label_smoothing / len(weight) / (1 + pull), exponentials)
        else:
            factor = factor / total
        _gradients(block, exponentials, rows[chunk], factor, at_target[chunk], results, wanted, first=chunk.start == 0)
    if wanted.weight or wanted.bias:
        _add_targets(hidden, rows, labels, at_target, results, wanted)
    return results


class _Block(NamedTuple):
    """A chunk of counted rows."""

    x: Tensor  # [C, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    labels: Tensor  # [C]
    target: Tensor  # [C], logit of the label in units of log 2
    slope: Tensor | None  # [C], of the softcap at that logit
    options: Options


class _Made(NamedTuple):
    """What the launches of `exp_logits_kernel` made besides the exponentials."""

    reference: Tensor  # [C], in units of log 2
    others: Tensor  # [C], sum of 2^(z - reference) without the target
    logit_sum: Tensor | None  # [C], in units of log 2, with the target
    higher: Tensor | None  # [C] int64


def _limits(hidden: Tensor, weight: Tensor, options: Options, wanted: Wanted) -> tuple[int, float, int]:
    """Bytes per row, workspace in MB and the multiple of rows for `row_chunks`."""
    stored = _padded(len(weight)) * hidden.itemsize if any(wanted) else 0
    partials = 2 + (options.label_smoothing > 0) + options.statistics  # of 4 bytes per tile of at least 64 columns
    return stored + 4 * partials * triton.cdiv(len(weight), 64), options.workspace_mb, MOST_ROWS


def _padded(vocab: int) -> int:
    """Row stride of the exponentials: rows start at whole cache lines whatever the vocabulary."""
    return triton.cdiv(vocab, 64) * 64


def _target_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, labels: Tensor, options: Options
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Of every counted row: the logit of its label, the slope of the softcap there, and the anchor."""
    target = hidden.new_empty(len(rows), dtype=torch.float32)
    anchor = torch.empty_like(target)
    slope = None if options.softcap is None else torch.empty_like(target)
    width = hidden.shape[1]
    target_logits_kernel[(len(rows),)](
        hidden, weight, bias, rows, labels, target, slope, anchor, hidden.stride(0), weight.stride(0), width,
        options.softcap or 0.0, LEAD * LOG2E,
        HAS_BIAS=bias is not None, HAS_SOFTCAP=options.softcap is not None,
        BLOCK=min(1024, triton.next_power_of_2(width)),
    )  # fmt: skip
    return target, slope, anchor


def _exponentials(block: _Block, anchor: Tensor, exponentials: Tensor | None) -> _Made:
    """Fills `exponentials` [C, V], if given, and sums them, with rows that overflow at first made again."""
    rows, vocab, device = len(block.x), len(block.weight), anchor.device
    partials = (rows, triton.cdiv(vocab, _tile(block).columns))
    sums = anchor.new_empty(partials)
    logit_sums = anchor.new_empty(partials) if block.options.label_smoothing else None
    higher = torch.empty(partials, dtype=torch.int32, device=device) if block.options.statistics else None
    _launch(block, anchor, exponentials=exponentials, sums=sums, logit_sums=logit_sums, higher=higher)

    # Rows with a logit far above their target. Rare, so found after the fact; without any, the launches are empty.
    marked = sums.sum(1) > LIMIT
    overflowed = torch.cat([marked, marked.any().unsqueeze(0)]).to(torch.int32)
    tops = torch.empty_like(sums)
    _launch(block, anchor, overflowed=overflowed, tops=tops)
    anchor = torch.where(marked, tops.amax(1), anchor)
    _launch(block, anchor, overflowed=overflowed, exponentials=exponentials, sums=sums)
    return _Made(
        anchor,
        sums.sum(1),
        None if logit_sums is None else logit_sums.sum(1),
        None if higher is None else higher.sum(1),
    )


def _room(block: _Block) -> Tensor:
    """[C, V], operand dtype, uninitialised, rows at multiples of 128 bytes."""
    return block.x.new_empty(len(block.x), _padded(len(block.weight)))[:, : len(block.weight)]


def _softmax(block: _Block, lse: Tensor, excess: Tensor, exponentials: Tensor) -> None:
    """Fills `exponentials` with exp(z - lse) - excess, 0 at the target."""
    _launch(block, lse * LOG2E, exponentials=exponentials, excess=excess if block.options.label_smoothing else None)


def _launch(
    block: _Block,
    anchor: Tensor,
    *,
    overflowed: Tensor | None = None,
    exponentials: Tensor | None = None,
    sums: Tensor | None = None,
    tops: Tensor | None = None,
    excess: Tensor | None = None,
    logit_sums: Tensor | None = None,
    higher: Tensor | None = None,
) -> None:
    """`exp_logits_kernel`, which makes what is given to be filled."""
    x, weight, options = block.x, block.weight, block.options
    tile = _tile(block)
    left, stride_h, h_descriptor = operand(x, (tile.rows, tile.inner))
    right, stride_w, w_descriptor = operand(weight, (tile.columns, tile.inner))
    filled = None if exponentials is None else operand(exponentials, (tile.rows, tile.columns))[0]
    programs = programs_on(x, tile)
    exp_logits_kernel[(programs,)](
        left, right, block.bias, block.labels, block.target, anchor, overflowed, excess, filled, sums, tops,
        logit_sums, higher,
        len(x), len(weight), x.shape[1], stride_h, stride_w, options.softcap or 0.0,
        HAS_BIAS=block.bias is not None, HAS_SOFTCAP=options.softcap is not None, HAS_EXCESS=excess is not None,
        STORE=exponentials is not None, SUMS=sums is not None, TOPS=tops is not None,
        SUM_LOGITS=logit_sums is not None, RANK=higher is not None, RETRY=overflowed is not None,
        H_DESCRIPTOR=h_descriptor, W_DESCRIPTOR=w_descriptor,
        ROWS=tile.rows, COLUMNS=tile.columns, INNER=tile.inner, GROUP=tile.group, PROGRAMS=programs,
        PRECISION=precision_of(x), UPCAST=INTERPRETED,
        **launch_options(tile),
    )  # fmt: skip


def _tile(block: _Block) -> Tile:
    options = block.options
    if options.statistics or options.softcap is not None:
        kernel = "logits_crowded"
    elif block.bias is not None or options.label_smoothing:
        kernel = "logits_general"
    else:
        kernel = "logits"
    return tile_on(kernel, block.x, block.weight)


def _losses(block: _Block, made: _Made) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy [C], log-sum-exp [C], both in nats, and the sum [C] of 2^(z - reference) with the target."""
    gap = (made.reference - block.target) * LN2
    cross_entropy = exclusive_cross_entropy(gap, made.others)
    total = made.others + torch.exp2(block.target - made.reference)
    # Far above the target, the reference is near the log-sum-exp, and finite where the target is -inf.
    far = made.reference * LN2 + total.log()
    return cross_entropy, torch.where(gap > LEAD + 10, far, block.target * LN2 + cross_entropy), total


def _keep(results: Swept, chunk: slice, block: _Block, made: _Made, cross_entropy: Tensor, lse: Tensor) -> None:
    mean = None if made.logit_sum is None else made.logit_sum * (LN2 / len(block.weight))
    loss = smoothed(cross_entropy, lse, mean, block.options.label_smoothing) + block.options.z_loss * lse.square()
    results.row_loss[chunk], results.lse[chunk] = loss, lse
    if made.higher is not None:
        results.rank[chunk] = made.higher


def _slope_at_target(block: _Block, cross_entropy: Tensor, pull: Tensor) -> Tensor:
    """d loss / d logit of the label, before softcap; 1 - p comes from the cross entropy, so it has all its digits."""
    smoothing = block.options.label_smoothing
    slope = torch.expm1(-cross_entropy) + pull * torch.exp(-cross_entropy) + smoothing - smoothing / len(block.weight)
    return slope if block.slope is None else slope * block.slope


def _gradients(
    block: _Block,
    exponentials: Tensor,
    rows: Tensor,
    factor: Tensor,
    at_target: Tensor,
    results: Swept,
    wanted: Wanted,
    *,
    first: bool,
) -> None:
    """The gradient products of one chunk; `factor` and `at_target` are [C]."""
    x, weight = block.x, block.weight
    width = x.shape[1]
    if wanted.hidden:
        product = matmul_(x.new_empty(x.shape, dtype=torch.float32), exponentials, weight)
        finish_hidden_kernel[(len(x),)](
            product, weight, rows, block.labels, factor, at_target, results.d_hidden, weight.stride(0), width,
            BLOCK=min(1024, triton.next_power_of_2(width)),
        )  # fmt: skip
    if wanted.weight:
        scaled_x = torch.mul(x, factor.unsqueeze(1), out=torch.empty_like(x))
        matmul_(results.d_weight, exponentials.t(), scaled_x, accumulate=not first)
    if wanted.bias:
        high = factor.to(x.dtype)  # a sum of two operands has twice the digits
        columns = torch.stack([high, (factor - high).to(x.dtype)], 1)
        results.d_bias.add_(matmul_(factor.new_empty(len(weight), 2), exponentials.t(), columns).sum(1))


def _add_targets(
    hidden: Tensor, rows: Tensor, labels: Tensor, at_target: Tensor, results: Swept, wanted: Wanted
) -> None:
    sorted_labels, order = torch.sort(labels, stable=True)
    width = hidden.shape[1]
    block = min(256, triton.next_power_of_2(width))
    add_targets_kernel[(len(rows), triton.cdiv(width, block) if wanted.weight else 1)](
        hidden, rows, order, sorted_labels, at_target, results.d_weight, results.d_bias, len(rows), hidden.stride(0),
        width, WEIGHT=wanted.weight, BIAS=wanted.bias, SEGMENT_ROWS=SEGMENT_ROWS, BLOCK=block,
    )  # fmt: skip
