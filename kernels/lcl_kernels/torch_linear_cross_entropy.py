"""The sweep of `linear_cross_entropy` in plain torch: chunks of rows, the logits of one chunk at a time.

On a CPU this is the backend. Logits, softmax and gradient of a chunk live in the same workspace.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lcl_kernels._common import (
    compute_dtype,
    exclusive_cross_entropy,
    largest_chunk,
    matmul_,
    operand_dtype,
    row_chunks,
)
from lcl_kernels.sweep import Counted, Gradients, Inputs, Options, RowResults, Scan, Wanted, empty_gradients


def scan(inputs: Inputs, options: Options, counted_rows: int | None, rows_made: RowResults) -> Scan:
    """Find the rows that count, and fill `rows_made` where they do not; see `Scan`.

    Args:
        counted_rows: how many count, when the caller knows; nothing waits for the device then.
    """
    labels, vocab, n = inputs.labels, len(inputs.weight), len(inputs.labels)
    counts = labels != options.ignore_index
    bad = counts & ((labels < 0) | (labels >= vocab))
    count = counts.sum()
    first_bad = torch.where(bad, torch.arange(n, device=labels.device), n).amin() if n else count
    if counted_rows is None:
        rows = counts.nonzero().squeeze(1)
    else:  # a stable sort keeps the order and, unlike nonzero, does not wait for the device
        rows = torch.argsort((~counts).to(torch.uint8), stable=True)
    # The clamp keeps a bad label from reading outside the weight until the assertion is seen.
    clamped = labels.long().clamp(0, vocab - 1)
    mass = count.to(rows_made.lse.dtype)
    if inputs.token_weight is not None or inputs.class_weight is not None:
        weights = torch.ones_like(rows_made.lse) if inputs.token_weight is None else inputs.token_weight
        if inputs.class_weight is not None:
            weights = weights * inputs.class_weight.index_select(0, clamped)
        mass = weights.where(counts, 0).sum()
    for values in (rows_made.row_loss, rows_made.lse):
        values.zero_()
    for values in (rows_made.rank, rows_made.predicted):
        values.fill_(-1)
    infinity = torch.full_like(mass, math.inf)
    return Scan(
        rows=rows,
        labels=clamped.index_select(0, rows),
        summary=torch.stack([count, first_bad]),
        right=torch.stack([first_bad == n, count == (-1 if counted_rows is None else counted_rows)]),
        mass=torch.stack([infinity.where(mass == 0, mass), infinity.where(count == 0, -infinity)]),
    )


def sweep(inputs: Inputs, counted: Counted, options: Options, wanted: Wanted, rows_made: RowResults) -> Gradients:
    """Fill the results of the rows that count, and make the gradients of the sum of their losses; see `Inputs`."""
    hidden, rows, vocab = inputs.hidden, counted.rows, len(inputs.weight)
    operand, dtype = operand_dtype(hidden), compute_dtype(hidden.dtype)
    gradients = empty_gradients(inputs, counted, wanted)
    weight = inputs.weight.to(operand)
    bias = None if inputs.bias is None else inputs.bias.to(dtype)

    # Per class: the logit, with a softcap what its slope is made from, and a byte for comparisons with the target.
    keep_decay = options.softcap is not None and any(wanted)
    limits = (vocab * (dtype.itemsize * (2 if keep_decay else 1) + options.statistics), options.workspace_mb)
    workspace = _workspace(largest_chunk(len(rows), *limits), vocab, hidden, dtype)
    decay_workspace = torch.empty_like(workspace) if keep_decay else None

    for chunk in row_chunks(len(rows), *limits):
        x = hidden.index_select(0, rows[chunk]).to(operand)
        target = counted.labels[chunk].unsqueeze(1)
        logits = matmul_(workspace[: len(x)], x, weight.t())
        if bias is not None:
            logits.add_(bias)
        decay = None
        if options.softcap is not None:
            logits.div_(options.softcap)
            if decay_workspace is not None:
                decay = decay_workspace[: len(x)].copy_(logits).abs_().mul_(-2).exp_()
            logits.tanh_().mul_(options.softcap)

        row_weights = _row_weights(inputs, rows[chunk], target, options.label_smoothing)
        row = _statistics(logits, target, row_weights, inputs, options)
        _keep(rows_made, rows[chunk], row)
        if not any(wanted):
            continue

        d_logits = _d_logits(logits, target, row, row_weights, inputs, options)
        if decay is not None:  # the slope of tanh at x is 4 u / (1 + u)^2, u = exp(-2 |x|); 1 - tanh^2 loses its digits
            d_logits.mul_(decay).mul_(4)
            d_logits.div_(decay.add_(1)).div_(decay)
        if wanted.bias:
            _add(gradients.bias, d_logits.sum(0), first=chunk.start == 0)
        if wanted.hidden and len(rows) == len(hidden):
            matmul_(gradients.hidden[chunk], d_logits, weight)
        elif wanted.hidden:
            product = matmul_(gradients.hidden.new_empty(x.shape), d_logits, weight)
            gradients.hidden.index_copy_(0, rows[chunk], product)
        if wanted.weight:
            matmul_(gradients.weight, d_logits.t(), x, accumulate=chunk.start > 0)
    return gradients


def _add(total: Tensor, part: Tensor, *, first: bool) -> None:
    if first:
        total.copy_(part)
    else:
        total.add_(part)


class _RowWeights(NamedTuple):
    """What the parts of a row's loss are multiplied with, each [rows, 1] or a number."""

    token: Tensor | float
    entropy: Tensor | float
    """Of the cross entropy of the label, (1 - label_smoothing) class_weight[label]."""
    lse: Tensor | float
    """Of the log-sum-exp in the smoothed part, label_smoothing mean(class_weight)."""
    label: Tensor | float
    """Of the label's logit in the smoothed part, label_smoothing class_weight[label] / V."""
    lse_grad: Tensor | float


def _row_weights(inputs: Inputs, rows: Tensor, target: Tensor, smoothing: float) -> _RowWeights:
    of_label: Tensor | float = 1.0
    mean: Tensor | float = 1.0
    if inputs.class_weight is not None:
        of_label, mean = inputs.class_weight[target], inputs.class_weight.mean()
    return _RowWeights(
        token=1.0 if inputs.token_weight is None else inputs.token_weight[rows].unsqueeze(1),
        entropy=(1 - smoothing) * of_label,
        lse=smoothing * mean,
        label=smoothing / len(inputs.weight) * of_label,
        lse_grad=0.0 if inputs.lse_grad is None else inputs.lse_grad[rows].unsqueeze(1),
    )


class _Rows(NamedTuple):
    """Of the rows of a chunk, each [rows, 1]."""

    loss: Tensor
    cross_entropy: Tensor
    lse: Tensor
    total: Tensor
    """Sum of the exponentials, with the target."""
    rank: Tensor | None
    predicted: Tensor | None


def _statistics(logits: Tensor, target: Tensor, weights: _RowWeights, inputs: Inputs, options: Options) -> _Rows:
    """Losses of the rows; turns `logits` in place into exp(logits - row maximum), the target zeroed."""
    at_target = logits.gather(1, target)
    rank = _count_above(logits, at_target) if options.statistics else None
    predicted = logits.argmax(1, keepdim=True) if options.predicted else None
    mean = None
    if options.label_smoothing:
        mean = logits.mean(1, keepdim=True)
        if inputs.class_weight is not None:
            mean = torch.mv(logits, inputs.class_weight / logits.shape[1]).unsqueeze(1)
    top = logits.amax(1, keepdim=True)
    gap = top - at_target
    others = logits.sub_(top).exp_().scatter_(1, target, 0.0).sum(1, keepdim=True)
    cross_entropy = exclusive_cross_entropy(gap, others)
    total = others + torch.exp(-gap)
    lse = top + total.log()
    loss = weights.entropy * cross_entropy
    if mean is not None:  # no difference of infinities where a logit is -inf
        loss = loss + weights.lse * lse - options.label_smoothing * mean
    loss = weights.token * (loss + options.z_loss * lse * lse)
    return _Rows(loss, cross_entropy, lse, total, rank, predicted)


def _keep(rows_made: RowResults, rows: Tensor, row: _Rows) -> None:
    made = (row.loss, row.lse, row.rank, row.predicted)
    for result, values in zip(rows_made, made, strict=True):
        if values is not None:
            result.index_copy_(0, rows, values.flatten())


def _d_logits(
    exponentials: Tensor, target: Tensor, row: _Rows, weights: _RowWeights, inputs: Inputs, options: Options
) -> Tensor:
    """Turns the exponentials in place into the derivative by the logits after softcap.

    d loss / d z_j = (entropy + lse weights + 2 z_loss lse) p_j - entropy weight [j is the target] - smoothing c_j / V,
    where 1 - p_target comes from the cross entropy, which has its digits also when it is small.
    """
    pull = 2 * options.z_loss * row.lse
    probability = torch.exp(-row.cross_entropy)
    of_softmax = weights.entropy + weights.lse
    at_target = of_softmax * torch.expm1(-row.cross_entropy) + (weights.lse - weights.label) + pull * probability
    at_target = weights.token * at_target + weights.lse_grad * probability
    d_logits = exponentials.mul_((weights.token * (of_softmax + pull) + weights.lse_grad) / row.total)
    if options.label_smoothing:
        taken = weights.token * torch.full_like(row.lse, options.label_smoothing / exponentials.shape[1])
        if inputs.class_weight is None:
            d_logits.sub_(taken)
        else:
            d_logits.addmm_(taken, inputs.class_weight.unsqueeze(0), alpha=-1)
    return d_logits.scatter_(1, target, at_target)


def _count_above(logits: Tensor, bar: Tensor) -> Tensor:
    """How many logits of each row are above its bar [rows, 1], in pieces: torch sums comparisons as a copy in int64."""
    rank = torch.zeros_like(bar, dtype=torch.int64).squeeze(1)
    for piece in logits.split(-(-logits.shape[1] // 16), 1):
        rank += (piece > bar).sum(1)
    return rank


def _workspace(rows: int, vocab: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty [rows, vocab]. On a CPU vocabulary-major: BLAS fills that order about a third faster at large V."""
    if like.is_cuda:
        return like.new_empty(rows, vocab, dtype=dtype)
    return like.new_empty(vocab, rows, dtype=dtype).t()
