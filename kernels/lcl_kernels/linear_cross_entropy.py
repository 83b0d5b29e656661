"""Linear layer and cross entropy in one, without the [N, V] logits.

Rows whose label is ignored are left out first. The others go through in chunks: logits of a chunk, their softmax in
place, and, when gradients are wanted, the gradient products of that chunk at once. So logits are computed once, and
backward only multiplies by the upstream gradient.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from lcl_kernels._common import (
    DEFAULT_WORKSPACE_MB,
    Backend,
    check_same,
    choose_backend,
    compute_dtype,
    exp_excluding_target_,
    first_derivative_only,
    largest_chunk,
    matmul_,
    operand_dtype,
    refuse_dtensor,
    row_chunks,
    scaled,
)

Reduction = Literal["mean", "sum", "none"]


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
    normalizer: float | Tensor | None = None,
    reduction: Reduction = "mean",
    return_lse: Literal[False] = False,
    return_z_loss: Literal[False] = False,
    backend: Backend = "auto",
    workspace_mb: float = DEFAULT_WORKSPACE_MB,
) -> Tensor: ...


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
    normalizer: float | Tensor | None = None,
    reduction: Reduction = "mean",
    return_lse: bool = False,
    return_z_loss: bool = False,
    backend: Backend = "auto",
    workspace_mb: float = DEFAULT_WORKSPACE_MB,
) -> Tensor | tuple[Tensor, ...]: ...


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
    normalizer: float | Tensor | None = None,
    reduction: Reduction = "mean",
    return_lse: bool = False,
    return_z_loss: bool = False,
    backend: Backend = "auto",
    workspace_mb: float = DEFAULT_WORKSPACE_MB,
) -> Tensor | tuple[Tensor, ...]:
    """Cross entropy of `hidden @ weight.T + bias` against `labels`: the generation loss of LCL (arXiv 2406.07543).

    Per counted row i, with z_i = softcap * tanh((W h_i + b) / softcap) and lse_i = log sum_j exp(z_ij):
    loss_i = lse_i - z_i[label_i] + z_loss * lse_i^2. Labels belong to their own row; nothing is shifted.

    Args:
        hidden: [N, H]; float32, bfloat16, float16 or float64. Under autocast hidden, weight and bias are cast to
            the autocast dtype, as `F.linear` does; otherwise the three must agree.
        weight: [V, H]. Its gradient is summed in float32 (float64 for float64) whatever its dtype.
        labels: [N], int64 or int32, in [0, V) or equal to `ignore_index`.
        bias: [V] or None.
        ignore_index: rows with this label count nowhere and cost nothing. A value inside [0, V) stays in the softmax.
        z_loss: weight of the squared log-sum-exp.
        softcap: bound of the logits, or None.
        normalizer: with reduction "mean", what the sum is divided by instead of the number of counted rows: a number
            or a tensor of one element (a constant, never read on the host). Use the global token count here.
        reduction: "mean", "sum", or "none" for [N] with 0 at ignored rows. "none" computes the logits a second time
            in backward, because the gradient of each row is known only then.
        return_lse: also return lse [N], 0 at ignored rows, without gradient.
        return_z_loss: also return the part of the loss that is z_loss, reduced like the loss, without gradient.
        backend: "auto" or "torch"; "triton" is refused while this build has no Triton kernels.
        workspace_mb: bound of the logits kept at a time (one row at least).

    Returns:
        The loss in float32 (float64 for float64 inputs), or (loss, lse and/or z_loss part) in that order. Without any
        counted row the loss is 0, with zero gradients, whatever the normalizer.

    Raises:
        ValueError: shapes, dtypes or devices that do not match; a label out of range (on CUDA an asynchronous device
            assertion instead, so that nothing waits); an empty weight; a DTensor; an unusable option.
        RuntimeError: backend "triton", and differentiating twice.

    On a GPU, finding the counted rows is the one point that waits for the device.
    """
    choose_backend(backend)
    _check_tensors(hidden, weight, labels, bias)
    _check_options(reduction, normalizer, softcap, z_loss, workspace_mb)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    check_same("dtype", hidden=hidden, weight=weight, bias=bias)

    labels = labels.long()
    counted = labels != ignore_index
    _check_labels(labels, counted, weight.shape[0])
    rows = counted.nonzero().squeeze(1)
    if len(rows) == 0 or reduction != "mean":
        divisor: float | Tensor = 1.0
    elif normalizer is None:
        divisor = float(len(rows))
    elif isinstance(normalizer, Tensor):
        divisor = normalizer.detach().to(compute_dtype(hidden.dtype)).reshape(())
    else:
        divisor = float(normalizer)
        if divisor == 0:
            raise ValueError(f"normalizer is 0, but {len(rows)} labels count")

    # Inside a Function the grad mode is always off, so whether gradients are wanted has to be settled here.
    wanted = tuple(t is not None and t.requires_grad and torch.is_grad_enabled() for t in (hidden, weight, bias))
    options = _Options(z_loss, softcap, workspace_mb, reduction == "none")
    with torch.autocast(device, enabled=False):
        loss, lse, z_part = _LinearCrossEntropy.apply(hidden, weight, bias, labels, rows, divisor, wanted, options)
    if not (return_lse or return_z_loss):
        return loss
    return (loss, *([lse] if return_lse else []), *([z_part] if return_z_loss else []))


class _Options(NamedTuple):
    z_loss: float
    softcap: float | None
    workspace_mb: float
    per_row: bool


class _Wanted(NamedTuple):
    hidden: bool = False
    weight: bool = False
    bias: bool = False


class _Swept(NamedTuple):
    loss: Tensor  # [n]
    lse: Tensor  # [n]
    d_hidden: Tensor | None  # [n, H]
    d_weight: Tensor | None  # [V, H]
    d_bias: Tensor | None  # [V]


def _sweep(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rows: Tensor,
    options: _Options,
    wanted: _Wanted,
    row_grad: Tensor | None = None,
) -> _Swept:
    """Losses of `rows` [n] and the gradients of sum_i row_grad[i] * loss[i] (row_grad None: ones)."""
    n, vocab = len(rows), len(weight)
    dtype, operand = compute_dtype(hidden.dtype), operand_dtype(hidden)
    weight = weight.to(operand)
    bias = None if bias is None else bias.to(dtype)
    loss, lse = hidden.new_empty(n, 1, dtype=dtype), hidden.new_empty(n, 1, dtype=dtype)
    d_hidden = hidden.new_empty(n, hidden.shape[1], dtype=dtype) if wanted.hidden else None
    d_weight = torch.zeros_like(weight, dtype=dtype) if wanted.weight else None
    d_bias = hidden.new_zeros(vocab, dtype=dtype) if wanted.bias else None

    keep_tanh = options.softcap is not None and any(wanted)
    row_bytes = vocab * dtype.itemsize * (2 if keep_tanh else 1)
    chunks = (row_bytes, options.workspace_mb)
    workspace = _workspace(largest_chunk(n, *chunks), vocab, hidden, dtype)
    tanh_workspace = torch.empty_like(workspace) if keep_tanh else None

    for chunk in row_chunks(n, *chunks):
        x = hidden.index_select(0, rows[chunk]).to(operand)
        target = labels.index_select(0, rows[chunk]).unsqueeze(1)
        logits = matmul_(workspace[: len(x)], x, weight.t())
        if bias is not None:
            logits.add_(bias)
        tanh = None
        if options.softcap is not None:
            logits.div_(options.softcap).tanh_()
            if tanh_workspace is not None:
                tanh = tanh_workspace[: len(x)].copy_(logits)
            logits.mul_(options.softcap)

        statistics = exp_excluding_target_(logits, target)
        cross_entropy, lse[chunk], total = statistics
        loss[chunk] = cross_entropy + options.z_loss * statistics.lse.square()
        if not any(wanted):
            continue

        # d loss / d z_j = (1 + 2 z_loss lse) p_j - [j is the target], with 1 - p_target taken from the cross entropy.
        pull = 2 * options.z_loss * statistics.lse
        grad = 1.0 if row_grad is None else row_grad[chunk].unsqueeze(1)
        at_target = grad * (torch.expm1(-cross_entropy) + pull * torch.exp(-cross_entropy))
        d_logits = logits.mul_(grad * (1 + pull) / total).scatter_(1, target, at_target)
        if tanh is not None:
            d_logits.addcmul_(d_logits, tanh.square_(), value=-1)
        if d_bias is not None:
            d_bias += d_logits.sum(0)
        if d_hidden is not None:
            matmul_(d_hidden[chunk], d_logits, weight)
        if d_weight is not None:
            matmul_(d_weight, d_logits.t(), x, accumulate=True)
    return _Swept(loss.squeeze(1), lse.squeeze(1), d_hidden, d_weight, d_bias)


def _workspace(rows: int, vocab: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty [rows, vocab]. On a CPU vocabulary-major: BLAS fills that order about a third faster at large V."""
    if like.is_cuda:
        return like.new_empty(rows, vocab, dtype=dtype)
    return like.new_empty(vocab, rows, dtype=dtype).t()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        rows: Tensor,
        divisor: float | Tensor,
        wanted: tuple[bool, bool, bool],
        options: _Options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.wanted, ctx.options, ctx.divisor = _Wanted(*wanted), options, divisor
        ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
        swept = _sweep(hidden, weight, bias, labels, rows, options, _Wanted() if options.per_row else ctx.wanted)
        if options.per_row:
            ctx.save_for_backward(hidden, weight, bias, labels, rows)
        else:
            ctx.save_for_backward(swept.d_hidden, swept.d_weight, swept.d_bias, rows)

        z_part = options.z_loss * swept.lse.square()
        lse = _spread(swept.lse, rows, len(hidden))
        if options.per_row:
            loss, z_part = _spread(swept.loss, rows, len(hidden)), _spread(z_part, rows, len(hidden))
        else:
            loss, z_part = swept.loss.sum() / divisor, z_part.sum() / divisor
        ctx.mark_non_differentiable(lse, z_part)
        return loss, lse, z_part

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.options.per_row:
            hidden, weight, bias, labels, rows = ctx.saved_tensors
            row_grad = grad.index_select(0, rows)
            swept = _sweep(hidden, weight, bias, labels, rows, ctx.options, ctx.wanted, row_grad)
            d_hidden, d_weight, d_bias, scale = *swept[2:], grad.new_ones(())
        else:
            d_hidden, d_weight, d_bias, rows = ctx.saved_tensors
            scale = grad / ctx.divisor
        d_hidden, d_weight, d_bias = (scaled(g, scale, ctx.dtype) for g in (d_hidden, d_weight, d_bias))
        if d_hidden is not None:
            d_hidden = _spread(d_hidden, rows, ctx.shape[0])
        return d_hidden, d_weight, d_bias, None, None, None, None, None


def _spread(values: Tensor, rows: Tensor, length: int) -> Tensor:
    """`values` of the counted rows, zeros elsewhere."""
    if len(rows) == length:
        return values
    return values.new_zeros(length, *values.shape[1:]).index_copy_(0, rows, values)


def _check_tensors(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    refuse_dtensor(hidden=hidden, weight=weight, labels=labels, bias=bias)
    if weight.numel() == 0:
        raise ValueError(
            "weight is empty: under ZeRO-3 call this inside the forward of the module that owns the weight "
            "(or inside deepspeed.zero.GatheredParameters)"
        )
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be [N, H] and weight [V, H], got {list(hidden.shape)} and {list(weight.shape)}")
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels must be [N] = [{hidden.shape[0]}], got {list(labels.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [V] = [{weight.shape[0]}], got {list(bias.shape)}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels must be int64 or int32, got {labels.dtype}")
    if not hidden.is_floating_point():
        raise ValueError(f"hidden must be floating point, got {hidden.dtype}")
    check_same("device", hidden=hidden, weight=weight, labels=labels, bias=bias)


def _check_options(
    reduction: str, normalizer: float | Tensor | None, softcap: float | None, z_loss: float, workspace_mb: float
) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', not {reduction!r}")
    if normalizer is not None and reduction != "mean":
        raise ValueError(f"normalizer replaces the count of reduction='mean'; it has no meaning with {reduction!r}")
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer must have one element, got {list(normalizer.shape)}")
    elif normalizer is not None and not (math.isfinite(normalizer) and normalizer >= 0):
        raise ValueError(f"normalizer must be a finite number that is not negative, got {normalizer}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    if not z_loss >= 0:
        raise ValueError(f"z_loss must not be negative, got {z_loss}")
    if not workspace_mb > 0:
        raise ValueError(f"workspace_mb must be positive, got {workspace_mb}")


def _check_labels(labels: Tensor, counted: Tensor, vocab: int) -> None:
    bad = counted & ((labels < 0) | (labels >= vocab))
    if labels.is_cuda:
        torch._assert_async(~bad.any(), f"a label is outside [0, {vocab}) and is not ignore_index")
    elif bad.any():
        first = int(bad.nonzero()[0, 0])
        raise ValueError(f"labels[{first}] = {int(labels[first])} is outside [0, {vocab}) and is not ignore_index")
