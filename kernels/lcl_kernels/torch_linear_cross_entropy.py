"""The sweep of `linear_cross_entropy` in plain torch: chunks of rows, the logits of one chunk at a time.

On a CPU this is the backend. Logits, softmax and gradient of a chunk live in the same workspace.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lcl_kernels._common import (
    compute_dtype,
    exclusive_cross_entropy,
    largest_chunk,
    matmul_,
    operand_dtype,
    row_chunks,
    smoothed,
)
from lcl_kernels.sweep import Options, Swept, Wanted, empty_results


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
    """Statistics of the counted `rows` [n] and the gradients of sum_i row_grad[i] * loss[i] (row_grad None: ones).

    Args:
        hidden: [N, H]; weight: [V, H]; bias: [V] or None; labels: [n], those of `rows`; row_grad: [n].
    """
    vocab, operand = len(weight), operand_dtype(hidden)
    dtype = compute_dtype(hidden.dtype)
    results = empty_results(hidden, weight, labels, options, wanted)
    weight = weight.to(operand)
    bias = None if bias is None else bias.to(dtype)

    # Per class: the logit, with a softcap what its slope is made from, and a byte for comparisons with the target.
    keep_decay = options.softcap is not None and any(wanted)
    limits = (vocab * (dtype.itemsize * (2 if keep_decay else 1) + options.statistics), options.workspace_mb)
    workspace = _workspace(largest_chunk(len(rows), *limits), vocab, hidden, dtype)
    decay_workspace = torch.empty_like(workspace) if keep_decay else None

    for chunk in row_chunks(len(rows), *limits):
        x = hidden.index_select(0, rows[chunk]).to(operand)
        target = labels[chunk].unsqueeze(1)
        logits = matmul_(workspace[: len(x)], x, weight.t())
        if bias is not None:
            logits.add_(bias)
        decay = None
        if options.softcap is not None:
            logits.div_(options.softcap)
            if decay_workspace is not None:
                decay = decay_workspace[: len(x)].copy_(logits).abs_().mul_(-2).exp_()
            logits.tanh_().mul_(options.softcap)

        cross_entropy, lse, total = _statistics(logits, target, chunk, options, results)
        if not any(wanted):
            continue

        # d loss / d z_j = (1 + 2 z_loss lse) p_j - (1 - smoothing) [j is the target] - smoothing / V, where
        # 1 - p_target comes from the cross entropy, which has its digits also when it is small.
        pull = 2 * options.z_loss * lse
        grad = torch.ones_like(lse) if row_grad is None else row_grad[chunk].unsqueeze(1)
        at_target = torch.expm1(-cross_entropy) + pull * torch.exp(-cross_entropy) + options.label_smoothing
        d_logits = logits.mul_(grad * (1 + pull) / total).scatter_(1, target, grad * at_target)
        if options.label_smoothing:
            d_logits.sub_(grad * (options.label_smoothing / vocab))
        if decay is not None:  # the slope of tanh at x is 4 u / (1 + u)^2, u = exp(-2 |x|); 1 - tanh^2 loses its digits
            d_logits.mul_(decay).mul_(4)
            d_logits.div_(decay.add_(1)).div_(decay)
        if wanted.bias:
            results.d_bias.add_(d_logits.sum(0))
        if wanted.hidden and len(rows) == len(hidden):
            matmul_(results.d_hidden[chunk], d_logits, weight)
        elif wanted.hidden:
            product = matmul_(results.d_hidden.new_empty(x.shape), d_logits, weight)
            results.d_hidden.index_copy_(0, rows[chunk], product)
        if wanted.weight:
            matmul_(results.d_weight, d_logits.t(), x, accumulate=chunk.start > 0)
    if wanted.weight and len(rows) == 0:
        results.d_weight.zero_()
    return results


def _statistics(
    logits: Tensor, target: Tensor, chunk: slice, options: Options, results: Swept
) -> tuple[Tensor, Tensor, Tensor]:
    """Fills `results` for `chunk` and turns `logits` in place into exp(logits - row maximum), the target zeroed.

    Returns:
        Cross entropy, log-sum-exp and the sum of the exponentials with the target, each [rows, 1].
    """
    at_target = logits.gather(1, target)
    if options.statistics:
        results.rank[chunk] = _count_above(logits, at_target)
    mean = logits.mean(1, keepdim=True) if options.label_smoothing else None
    top = logits.amax(1, keepdim=True)
    gap = top - at_target
    others = logits.sub_(top).exp_().scatter_(1, target, 0.0).sum(1, keepdim=True)
    cross_entropy = exclusive_cross_entropy(gap, others)
    total = others + torch.exp(-gap)
    lse = top + total.log()
    loss = smoothed(cross_entropy, lse, mean, options.label_smoothing) + options.z_loss * lse.square()
    results.row_loss[chunk], results.lse[chunk] = loss.squeeze(1), lse.squeeze(1)
    return cross_entropy, lse, total


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
