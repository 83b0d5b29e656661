"""The sweep of `linear_cross_entropy` on a GPU: one Triton kernel makes exponentials, cuBLAS the gradient products.

The logit of the target is computed first, by a dot product per row. It anchors the exponentials: E = exp(z - anchor),
anchor = z_target + 30, can be stored by the kernel that computes z, without knowing the row maximum, because bfloat16
has the range of float32. The row's own scale comes out of both gradient products: with v_i = g_i / sum_i,

    d hidden = v * (E @ weight)    and    d weight = E.T @ (v * hidden).

The target is left out of E and its gradient added in float32, so nothing cancels when a token is nearly certain. A row
with a logit far above its target (70 and more) would overflow; such rows are marked, and the same kernel makes their
tiles again with their maximum as anchor. Nothing waits for the device.

What lies between the large products is done by one kernel per row each: `target_logits_kernel` before the exponentials,
`finish_rows_kernel` after them, `finish_hidden_kernel` after the product with the weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lcl_kernels._common import INTERPRETED, matmul_, row_chunks, separate_rows
from lcl_kernels.sweep import Counted, Gradients, Inputs, Options, RowResults, Scan, Wanted, empty_gradients
from lcl_kernels.tiles import (
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
    finish_rows_kernel,
    scan_labels_kernel,
    target_logits_kernel,
)

LEAD = 30.0
"""Anchor minus target logit, in nats: rows may have logits from 57 below to about 70 above their target."""
LIMIT = 2.0**60
"""Sum of exponentials of a row in one tile above which the row is made again: gradient factors and products stay in
range too."""
FLOAT16_LIFT = 14
"""Float16 holds the softmax times two to this power: else classes less likely than 1e-5 would lose their digits."""
SEGMENT_ROWS = 16
ROW_BLOCK = 64 if INTERPRETED else 4
"""Rows of one program of the kernels that do something per row."""
BIAS_COLUMNS = 8
"""Of the operand that sums the bias gradient: two that are used, and as many as make rows of 16 bytes for cuBLAS."""


def scan(inputs: Inputs, options: Options, counted_rows: int | None, rows_made: RowResults) -> Scan:
    """See `torch_linear_cross_entropy.scan`. One launch; nothing waits for the device."""
    labels, token_weight, class_weight = inputs.labels, inputs.token_weight, inputs.class_weight
    new = labels.new_empty
    made = Scan(
        rows=new(len(labels), dtype=torch.int32),
        labels=new(len(labels), dtype=torch.int32),
        summary=new(2, dtype=torch.int64),
        right=new(2, dtype=torch.bool),
        mass=new(2, dtype=torch.float32),
    )
    scan_labels_kernel[(1,)](
        labels, token_weight, class_weight, made.rows, made.labels, *rows_made, made.summary, made.right, made.mass,
        len(labels), len(inputs.weight), labels.stride(0), _stride(token_weight), options.ignore_index,
        -1 if counted_rows is None else counted_rows,
        HAS_TOKEN_WEIGHT=token_weight is not None, HAS_CLASS_WEIGHT=class_weight is not None,
        RANK=options.statistics, PREDICT=options.predicted,
        BLOCK=max(16, min(4096, triton.next_power_of_2(len(labels)))),
    )  # fmt: skip
    return made


def _stride(vector: Tensor | None) -> int:
    return 0 if vector is None else vector.stride(0)


def sweep(inputs: Inputs, counted: Counted, options: Options, wanted: Wanted, rows_made: RowResults) -> Gradients:
    """See `torch_linear_cross_entropy.sweep`. Everything is enqueued; nothing waits for the device."""
    gradients = empty_gradients(inputs, counted, wanted)
    n = len(counted.rows)
    if n == 0:
        return gradients
    inputs = inputs._replace(hidden=separate_rows(inputs.hidden), weight=separate_rows(inputs.weight))
    call = _Call(inputs, counted, options, wanted, rows_made, gradients)
    buffers: _Buffers | None = None
    for chunk in row_chunks(n, *_limits(call)):
        if buffers is None:  # the first chunk is the largest
            buffers = _buffers(call, chunk.stop - chunk.start)
        part = _part(call, buffers, chunk)
        _find_targets(call, part)
        _make_exponentials(call, part)
        _finish_rows(call, part)
        if any(wanted):
            if call.two_passes:
                _make_softmax(call, part)
            _add_products(call, part, first=chunk.start == 0)
    if wanted.weight or wanted.bias:
        _add_targets(call)
    return gradients


class _Call:
    """What all chunks of one call share."""

    def __init__(
        self,
        inputs: Inputs,
        counted: Counted,
        options: Options,
        wanted: Wanted,
        rows_made: RowResults,
        gradients: Gradients,
    ):
        self.inputs, self.counted, self.options, self.wanted = inputs, counted, options, wanted
        self.rows_made, self.gradients = rows_made, gradients
        hidden = inputs.hidden
        self.gathers = len(counted.rows) != len(hidden)
        # Float16 has too little range for anchored exponentials, and a smoothed label acts on every class by a term
        # that is no multiple of the exponential: both find the log-sum-exp first, then store the softmax.
        self.two_passes = any(wanted) and (hidden.dtype == torch.float16 or options.label_smoothing > 0)
        self.tile = _tile(_room_for_rows(hidden, 0) if self.gathers else hidden, inputs, options)
        self.column_tiles = triton.cdiv(len(inputs.weight), self.tile.columns)
        self.at_target = hidden.new_empty(len(counted.rows) if any(wanted) else 0, dtype=torch.float32)
        self.bias_sums = hidden.new_empty(len(inputs.weight) if wanted.bias else 0, BIAS_COLUMNS, dtype=torch.float32)
        weight = inputs.class_weight
        self.class_weight_sum = None if weight is None or not options.label_smoothing else weight.sum()
        self.lift = FLOAT16_LIFT if any(wanted) and hidden.dtype == torch.float16 else 0
        self.unit = _unit(inputs, counted, options.label_smoothing) if any(wanted) else None


def _unit(inputs: Inputs, counted: Counted, smoothing: float) -> Tensor | None:
    """What row factors are divided by where they are rounded to float16, whose range weights of the loss may leave.

    Weights are upstream gradients, too: 1e-5 of a mean over many tokens, or 65536 of a loss scaler.
    """
    weights = (inputs.token_weight, inputs.class_weight, inputs.lse_grad)
    if inputs.hidden.dtype != torch.float16 or all(weight is None for weight in weights):
        return None
    of_rows, of_classes, of_lse = (None if weight is None else weight.abs() for weight in weights)
    unit = inputs.hidden.new_ones((), dtype=torch.float32)
    if of_rows is not None:
        unit = of_rows.index_select(0, counted.rows).amax()
    if of_classes is not None:
        of_labels = of_classes.index_select(0, counted.labels).amax()
        unit = unit * (of_labels + smoothing * of_classes.mean() if smoothing else of_labels)
    if of_lse is not None:
        unit = unit + of_lse.index_select(0, counted.rows).amax()
    return unit.clamp(min=torch.finfo(torch.float32).tiny)


def _room_for_rows(hidden: Tensor, rows: int) -> Tensor:
    """[rows, H], uninitialised, rows at multiples of 16 bytes, as descriptors need them."""
    width = hidden.shape[1]
    return hidden.new_empty(rows, triton.cdiv(width, 8) * 8)[:, :width]


def _tile(x: Tensor, inputs: Inputs, options: Options) -> Tile:
    if options.statistics or options.predicted or options.softcap is not None:
        kernel = "logits_crowded"
    elif inputs.bias is not None or options.label_smoothing:
        kernel = "logits_general"
    else:
        kernel = "logits"
    return tile_on(kernel, x, inputs.weight)


def _limits(call: _Call) -> tuple[int, float, int]:
    """Bytes per row, workspace in MB and the multiple of rows for `row_chunks`."""
    options = call.options
    partials = 2 + (options.label_smoothing > 0) + options.statistics + 2 * options.predicted
    stored, itemsize = any(call.wanted), call.inputs.hidden.itemsize
    return (
        bytes_per_row(len(call.inputs.weight), itemsize, stored, partials, call.column_tiles),
        options.workspace_mb,
        MOST_ROWS,
    )


def bytes_per_row(vocab: int, itemsize: int, stored: bool, partials: int, column_tiles: int) -> int:
    """Of the exponentials, where they are stored, and of so many partial results for each tile of columns."""
    return _padded(vocab) * itemsize * stored + 4 * partials * column_tiles


def _padded(vocab: int) -> int:
    """Row stride of the exponentials: rows start at whole cache lines whatever the vocabulary."""
    return triton.cdiv(vocab, 64) * 64


class _Buffers(NamedTuple):
    """Of C rows, those of the largest chunk; None where a call has no use for it. T tiles cross the vocabulary.

    Logits, anchors and tops are in units of log 2. What each holds is said by the kernel that fills it.
    """

    x: Tensor | None  # [C, H], where rows have to be gathered
    target: Tensor  # [C]
    slope: Tensor | None  # [C], with a softcap
    anchor: Tensor  # [C]
    marked: Tensor  # [C + 1] int32
    sums: Tensor  # [C, T]
    tops: Tensor  # [C, T]
    logit_sums: Tensor | None  # [C, T]
    higher: Tensor | None  # [C, T] int32
    best: Tensor | None  # [C, T]
    best_class: Tensor | None  # [C, T] int32
    exponentials: Tensor | None = None  # [C, V], operand dtype, rows at multiples of 128 bytes
    factor: Tensor | None = None  # [C]
    share: Tensor | None = None  # [C]
    excess: Tensor | None = None  # [C]
    product: Tensor | None = None  # [C, H] float32
    scaled: Tensor | None = None  # [C, H]
    columns: Tensor | None = None  # [C, BIAS_COLUMNS]


def _buffers(call: _Call, rows: int) -> _Buffers:
    inputs, options, wanted = call.inputs, call.options, call.wanted
    hidden, vocab, width = inputs.hidden, len(inputs.weight), inputs.hidden.shape[1]

    def new(*shape: int, dtype: torch.dtype = torch.float32, when: bool = True) -> Any:
        return hidden.new_empty(shape, dtype=dtype) if when else None

    low, tiles, any_wanted = hidden.dtype, (rows, call.column_tiles), any(wanted)
    smoothed = options.label_smoothing > 0
    exponentials = new(rows, _padded(vocab), dtype=low, when=any_wanted)
    return _Buffers(
        x=_room_for_rows(hidden, rows) if call.gathers else None,
        target=new(rows),
        slope=new(rows, when=options.softcap is not None),
        anchor=new(rows),
        marked=new(rows + 1, dtype=torch.int32),
        sums=new(*tiles),
        tops=new(*tiles),
        logit_sums=new(*tiles, when=smoothed),
        higher=new(*tiles, dtype=torch.int32, when=options.statistics),
        best=new(*tiles, when=options.predicted),
        best_class=new(*tiles, dtype=torch.int32, when=options.predicted),
        exponentials=None if exponentials is None else exponentials[:, :vocab],
        factor=new(rows, when=any_wanted),
        share=new(rows, when=any_wanted and smoothed),
        excess=new(rows, when=any_wanted and smoothed),
        product=new(rows, width, when=wanted.hidden),
        scaled=new(rows, width, dtype=low, when=wanted.weight),
        columns=new(rows, BIAS_COLUMNS, dtype=low, when=wanted.bias),
    )


class _Part(NamedTuple):
    """A chunk of counted rows. Buffers may have more rows."""

    buffers: _Buffers
    x: Tensor  # [C, H]
    rows: Tensor  # [C]
    labels: Tensor  # [C]
    at_target: Tensor  # [C], derivative of the loss by the logit of the label


def _part(call: _Call, buffers: _Buffers, chunk: slice) -> _Part:
    count = chunk.stop - chunk.start
    x = call.inputs.hidden[chunk] if buffers.x is None else buffers.x[:count]
    return _Part(buffers, x, call.counted.rows[chunk], call.counted.labels[chunk], call.at_target[chunk])


def _grid(rows: int) -> tuple[int]:
    return (triton.cdiv(rows, ROW_BLOCK),)


def _width_block(width: int) -> int:
    return min(1024, triton.next_power_of_2(width))


def _find_targets(call: _Call, part: _Part) -> None:
    """Fills target, slope and anchor of the chunk, and x where its rows have to be gathered."""
    inputs, options, buffers = call.inputs, call.options, part.buffers
    hidden, weight, width, count = inputs.hidden, inputs.weight, inputs.hidden.shape[1], len(part.rows)
    target_logits_kernel[_grid(count + 1)](  # one more than rows, as `marked` has
        hidden, weight, inputs.bias, part.rows, part.labels, buffers.x, buffers.target, buffers.slope, buffers.anchor,
        buffers.marked, count, hidden.stride(0), weight.stride(0), part.x.stride(0), width, options.softcap or 0.0,
        LEAD * LOG2E,
        HAS_BIAS=inputs.bias is not None, HAS_SOFTCAP=options.softcap is not None, GATHER=call.gathers,
        ROWS=ROW_BLOCK, BLOCK=_width_block(width),
    )  # fmt: skip


def _make_exponentials(call: _Call, part: _Part) -> None:
    """Fills the exponentials, unless they come in a second pass, and the sums, with rows that overflow made again."""
    options, stored = call.options, any(call.wanted) and not call.two_passes
    _launch(
        call, part, STORE=stored, SUMS=True, SUM_LOGITS=options.label_smoothing > 0, RANK=options.statistics,
        PREDICT=options.predicted,
    )  # fmt: skip
    # Rows with a logit far above their target. Rare, so found after the fact; without any, the launches are empty.
    _launch(call, part, TOPS=True, RETRY=True)
    _launch(call, part, STORE=stored, SUMS=True, RETRY=True)


def _make_softmax(call: _Call, part: _Part) -> None:
    """Fills the exponentials with share * softmax - excess, 0 at the target."""
    _launch(call, part, STORE=True, HAS_EXCESS=call.options.label_smoothing > 0)


def _launch(
    call: _Call,
    part: _Part,
    *,
    STORE: bool = False,
    SUMS: bool = False,
    TOPS: bool = False,
    SUM_LOGITS: bool = False,
    RANK: bool = False,
    PREDICT: bool = False,
    RETRY: bool = False,
    HAS_EXCESS: bool = False,
) -> None:
    """`exp_logits_kernel` for what is named."""
    inputs, options, buffers, tile, x = call.inputs, call.options, part.buffers, call.tile, part.x
    left, stride_h, h_descriptor = operand(x, (tile.rows, tile.inner))
    right, stride_w, w_descriptor = operand(inputs.weight, (tile.columns, tile.inner))
    exponentials = None
    if STORE:
        assert buffers.exponentials is not None
        exponentials = operand(buffers.exponentials[: len(x)], (tile.rows, tile.columns))[0]
    class_weight = inputs.class_weight if SUM_LOGITS or HAS_EXCESS else None
    programs = programs_on(x, tile)
    exp_logits_kernel[(programs,)](
        left, right, inputs.bias, part.labels, buffers.target, buffers.anchor, buffers.marked, buffers.share,
        buffers.excess, class_weight, exponentials, buffers.sums, buffers.tops, buffers.logit_sums,
        buffers.higher, buffers.best, buffers.best_class,
        len(x), len(inputs.weight), x.shape[1], stride_h, stride_w, options.softcap or 0.0, LIMIT,
        HAS_BIAS=inputs.bias is not None, HAS_SOFTCAP=options.softcap is not None, HAS_EXCESS=HAS_EXCESS,
        HAS_CLASS_WEIGHT=class_weight is not None,
        STORE=STORE, SUMS=SUMS, TOPS=TOPS, SUM_LOGITS=SUM_LOGITS, RANK=RANK, PREDICT=PREDICT, RETRY=RETRY,
        H_DESCRIPTOR=h_descriptor, W_DESCRIPTOR=w_descriptor,
        ROWS=tile.rows, COLUMNS=tile.columns, INNER=tile.inner, GROUP=tile.group, PROGRAMS=programs,
        PRECISION=precision_of(x), UPCAST=INTERPRETED,
        **launch_options(tile),
    )  # fmt: skip


def _finish_rows(call: _Call, part: _Part) -> None:
    """Fills the results of the chunk's rows, and what the gradient products need."""
    inputs, options, wanted, buffers, x = call.inputs, call.options, call.wanted, part.buffers, part.x
    finish_rows_kernel[_grid(len(x))](
        x, part.rows, part.labels, buffers.target, buffers.slope, buffers.anchor, buffers.marked, buffers.sums,
        buffers.tops, buffers.logit_sums, buffers.higher, buffers.best, buffers.best_class,
        inputs.token_weight, inputs.class_weight, call.class_weight_sum, inputs.lse_grad, call.unit,
        *call.rows_made, part.at_target, buffers.factor, buffers.share, buffers.excess, buffers.scaled,
        buffers.columns,
        len(x), call.column_tiles, len(inputs.weight), x.shape[1], x.stride(0), _stride(inputs.token_weight),
        _stride(inputs.lse_grad), options.z_loss, options.label_smoothing, LEAD + 10,
        2.0**call.lift, float(call.lift),
        HAS_SOFTCAP=options.softcap is not None, HAS_TOKEN_WEIGHT=inputs.token_weight is not None,
        HAS_CLASS_WEIGHT=inputs.class_weight is not None, HAS_LSE_GRAD=inputs.lse_grad is not None,
        HAS_UNIT=call.unit is not None, SMOOTHED=options.label_smoothing > 0, RANK=options.statistics,
        PREDICT=options.predicted, GRADIENT=any(wanted), TWO_PASSES=call.two_passes,
        SCALE=wanted.weight, BIAS=wanted.bias,
        ROWS=ROW_BLOCK, SPAN=min(256, triton.next_power_of_2(call.column_tiles)), BLOCK=_width_block(x.shape[1]),
        UPCAST=INTERPRETED,
    )  # fmt: skip


def _add_products(call: _Call, part: _Part, *, first: bool) -> None:
    """The gradient products of one chunk; those of the first are the beginning of the sums over chunks."""
    inputs, wanted, buffers, x = call.inputs, call.wanted, part.buffers, part.x
    count, width = x.shape
    assert buffers.exponentials is not None
    exponentials = buffers.exponentials[:count]
    if wanted.hidden:
        assert buffers.product is not None
        product = matmul_(buffers.product[:count], exponentials, inputs.weight)
        finish_hidden_kernel[_grid(count)](
            product, inputs.weight, part.rows, part.labels, buffers.factor, part.at_target, call.gradients.hidden,
            count, inputs.weight.stride(0), width, ROWS=ROW_BLOCK, BLOCK=_width_block(width),
        )  # fmt: skip
    if wanted.weight:
        assert buffers.scaled is not None
        matmul_(call.gradients.weight, exponentials.t(), buffers.scaled[:count], accumulate=not first)
    if wanted.bias:
        assert buffers.columns is not None
        matmul_(call.bias_sums, exponentials.t(), buffers.columns[:count], accumulate=not first)


def _add_targets(call: _Call) -> None:
    """Add the part of the labels' own logits to the gradients of weight and bias."""
    counted, wanted, gradients, hidden = call.counted, call.wanted, call.gradients, call.inputs.hidden
    if call.lift:
        for sums in (gradients.weight, call.bias_sums):
            sums.mul_(2.0**-call.lift if call.unit is None else 2.0**-call.lift * call.unit)
    if wanted.bias:
        torch.sum(call.bias_sums[:, :2], 1, out=gradients.bias)
    sorted_labels, order = torch.sort(counted.labels, stable=True)
    count, width = len(counted.rows), hidden.shape[1]
    block = min(256, triton.next_power_of_2(width))
    add_targets_kernel[(count, triton.cdiv(width, block) if wanted.weight else 1)](
        hidden, counted.rows, order, sorted_labels, call.at_target, gradients.weight, gradients.bias, count,
        hidden.stride(0), width, WEIGHT=wanted.weight, BIAS=wanted.bias, SEGMENT_ROWS=SEGMENT_ROWS, BLOCK=block,
    )  # fmt: skip
