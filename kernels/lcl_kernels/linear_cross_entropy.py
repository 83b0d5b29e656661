"""Linear layer and cross entropy in one, without the [N, V] logits.

Rows whose label is ignored are left out first. The others go through in chunks: exponentials of the logits of a chunk,
then, when gradients are wanted, the gradient products of that chunk at once. So logits are computed once, and backward
only multiplies by the upstream gradient.

Two custom operators carry this through torch.compile: `linear_cross_entropy_sum` makes gradients in its forward,
`linear_cross_entropy_rows` (reduction="none") in its backward, by calling the first.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from lcl_kernels import torch_linear_cross_entropy
from lcl_kernels._common import (
    Backend,
    check_dtypes,
    check_same,
    compute_dtype,
    first_derivative_only,
    refuse_dtensor,
    resolve_workspace,
    scaled,
    use_triton,
    wants_gradients,
)
from lcl_kernels.sweep import Options, Swept, Wanted

Reduction = Literal["mean", "sum", "none"]
LARGEST_SOFTCAP = 1e30
"""A larger softcap moves no logit below 1e26 by as much as float32 can tell. The quotient would leave its range."""
SMALLEST_SOFTCAP = 1e-30


class TokenStatistics(NamedTuple):
    """What `linear_cross_entropy` can tell besides the loss; without gradients. Ignored rows have 0, in `rank` -1."""

    row_loss: Tensor
    """[N], the loss of each row, before reduction."""
    lse: Tensor
    """[N], log-sum-exp of the logits."""
    z_loss: Tensor
    """The part of the loss that is z_loss, reduced like the loss."""
    rank: Tensor
    """[N] int64, how many classes have a larger logit than the target: accuracy is the share of zeros."""


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
    label_smoothing: float = 0.0,
    normalizer: float | Tensor | None = None,
    reduction: Reduction = "mean",
    counted_rows: int | None = None,
    return_statistics: Literal[False] = False,
    backend: Backend = "auto",
    workspace_mb: float | None = None,
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
    label_smoothing: float = 0.0,
    normalizer: float | Tensor | None = None,
    reduction: Reduction = "mean",
    counted_rows: int | None = None,
    return_statistics: Literal[True],
    backend: Backend = "auto",
    workspace_mb: float | None = None,
) -> tuple[Tensor, TokenStatistics]: ...


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    normalizer: float | Tensor | None = None,
    reduction: Reduction = "mean",
    counted_rows: int | None = None,
    return_statistics: bool = False,
    backend: Backend = "auto",
    workspace_mb: float | None = None,
) -> Tensor | tuple[Tensor, TokenStatistics]:
    """Cross entropy of z = hidden @ weight.T + bias against labels that are already aligned with `hidden`.

    Row i costs lse(z_i) - (1 - label_smoothing) z_i[label] - label_smoothing mean(z_i) + z_loss * lse(z_i)^2. With
    `softcap` c, z becomes c * tanh(z / c) first.

    Args:
        hidden: [N, H], float32, bfloat16, float16 or float64. Only rows that count are read.
        weight: [V, H], same dtype. bias: [V], same dtype, or None. Under autocast all three are cast as F.linear would,
            so not from float64. A bias of -inf hides its class; a row with such a label costs inf.
        labels: [N], int64 or int32, in [0, V), or `ignore_index`.
        ignore_index: rows with this label count nowhere and cost nothing. A value inside [0, V) stays in the softmax.
        z_loss: weight of the squared log-sum-exp (PaLM, arXiv 2204.02311, section 5).
        softcap: bound of the logits, at least 1e-30, or None (Gemma 2, arXiv 2408.00118, section 2).
        label_smoothing: in [0, 1], as in torch.nn.functional.cross_entropy. In Triton the logits are then computed
            twice.
        normalizer: with reduction "mean", what the sum is divided by instead of the number of counted rows: a number
            or a tensor of one element (a constant, never read on the host). Use the global token count here.
        reduction: "mean", "sum", or "none" for [N] with 0 at ignored rows. "none" computes the logits a second time
            in backward, because the gradient of each row is known only then.
        counted_rows: how many labels are not `ignore_index`, when the caller knows. On a GPU nothing then waits for
            the device, and the call can be captured in a CUDA graph.
        return_statistics: also return `TokenStatistics`, at the price of one comparison per logit.
        backend: "auto" (Triton on a GPU, torch elsewhere and for float64), "triton" or "torch".
        workspace_mb: bound of the logits kept at a time (one row at least); None: 1024 on a GPU, 128 on a CPU.

    Returns:
        The loss in float32 (float64 for float64 inputs), or (loss, TokenStatistics). Without any counted row the loss
        is 0, with zero gradients, whatever the normalizer. Gradients have the dtypes of their inputs; the same inputs
        give the same bits.

    Raises:
        ValueError: shapes, dtypes or devices that do not match; a label out of range or a wrong `counted_rows` (on
            CUDA an asynchronous device assertion instead, so that nothing waits); an empty weight; a DTensor; an
            unusable option.
        RuntimeError: backend "triton" where it cannot run; differentiating twice, forward or by torch.func.
    """
    _check_tensors(hidden, weight, labels, bias)
    _check_options(reduction, normalizer, ignore_index, softcap, z_loss, label_smoothing, counted_rows, len(labels))
    hidden, weight, bias = (_autocast(tensor) for tensor in (hidden, weight, bias))
    check_dtypes(hidden=hidden, weight=weight, bias=bias)
    if softcap is not None and softcap > LARGEST_SOFTCAP:
        softcap = None

    wants = wants_gradients(hidden, weight, bias)
    tensors = (hidden, weight, bias, labels)
    triton, workspace = use_triton(backend, hidden), resolve_workspace(workspace_mb, hidden)
    settings = (ignore_index, counted_rows, z_loss, softcap, label_smoothing, return_statistics, triton, workspace)
    if reduction == "none":
        loss, lse, rank = torch.ops.lcl_kernels.linear_cross_entropy_rows(*tensors, *settings)
        row_loss, divisor = loss, None
    else:
        total, row_loss, lse, rank, *_ = torch.ops.lcl_kernels.linear_cross_entropy_sum(
            *tensors, None, *settings, *wants
        )
        divisor = _divisor(reduction, normalizer, labels, ignore_index, total.dtype)
        loss = total if divisor is None else total / divisor
    if not return_statistics:
        return loss
    z_part = z_loss * lse.square()
    if reduction != "none":
        z_part = z_part.sum() if divisor is None else z_part.sum() / divisor
    return loss, TokenStatistics(row_loss.detach(), lse, z_part, rank)


def _autocast(tensor: Tensor | None) -> Any:
    """The tensor as F.linear reads it under autocast, which leaves float64 alone."""
    if tensor is None or tensor.dtype == torch.float64 or not torch.is_autocast_enabled(tensor.device.type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _divisor(
    reduction: Reduction, normalizer: float | Tensor | None, labels: Tensor, ignore_index: int, dtype: torch.dtype
) -> Tensor | None:
    """What the sum of the losses is divided by, computed on the device; 1 when no row counts."""
    if reduction == "sum":
        return None
    count = (labels != ignore_index).sum()
    if normalizer is None:
        return count.clamp(min=1).to(dtype)
    if isinstance(normalizer, Tensor):
        divisor = normalizer.detach().to(labels.device, dtype).reshape(())
    else:
        if normalizer == 0:
            _check_no_row_counts(count)
        divisor = torch.full((), float(normalizer), dtype=dtype, device=labels.device)
    return torch.where(count == 0, 1.0, divisor)


def _check_no_row_counts(count: Tensor) -> None:
    """Refuse to divide by a normalizer of 0 when there is a loss to divide."""
    if torch.compiler.is_compiling():
        torch._assert_async(count == 0, "normalizer is 0, but labels count")
    elif count:
        raise ValueError(f"normalizer is 0, but {int(count)} labels count")


@torch.library.custom_op("lcl_kernels::linear_cross_entropy_sum", mutates_args=())
def _sum_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_grad: Tensor | None,
    ignore_index: int,
    counted_rows: int | None,
    z_loss: float,
    softcap: float | None,
    label_smoothing: float,
    statistics: bool,
    triton: bool,
    workspace_mb: float,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(sum of the losses, row_loss [N], lse [N], rank [N], d_hidden, d_weight, d_bias), the gradients being those of
    the sum weighted by `row_grad` [N] (None: ones), in the compute dtype and empty where not wanted."""
    options = Options(z_loss, softcap, label_smoothing, statistics, workspace_mb)
    wanted = Wanted(want_hidden, want_weight, want_bias)
    with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
        rows, counted_labels = _counted(labels, ignore_index, counted_rows, len(weight))
        if triton:
            from lcl_kernels.triton_linear_cross_entropy import sweep
        else:
            sweep = torch_linear_cross_entropy.sweep
        if row_grad is not None:
            row_grad = row_grad.to(compute_dtype(hidden.dtype)).index_select(0, rows)
        swept: Swept = sweep(hidden, weight, bias, counted_labels, rows, options, wanted, row_grad)
    n = len(labels)
    return (
        swept.row_loss.sum(),
        _spread(swept.row_loss, rows, n, 0),
        _spread(swept.lse, rows, n, 0),
        _spread(swept.rank, rows, n, -1) if statistics else swept.rank,
        swept.d_hidden,
        swept.d_weight,
        swept.d_bias,
    )


@_sum_op.register_fake
def _(hidden, weight, bias, labels, *arguments):  # type: ignore[no-untyped-def]
    statistics, (want_hidden, want_weight, want_bias) = arguments[6], arguments[-3:]
    n, dtype = hidden.shape[0], compute_dtype(hidden.dtype)
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(n, dtype=dtype),
        hidden.new_empty(n, dtype=dtype),
        labels.new_empty(n if statistics else 0, dtype=torch.int64),
        hidden.new_empty(hidden.shape if want_hidden else (0,), dtype=dtype),
        hidden.new_empty(weight.shape if want_weight else (0,), dtype=dtype),
        hidden.new_empty(weight.shape[0] if want_bias else 0, dtype=dtype),
    )


def _sum_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.wanted = inputs[-3:]
    ctx.dtype, ctx.inputs = inputs[0].dtype, len(inputs)
    ctx.save_for_backward(*output[4:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@first_derivative_only
def _sum_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * ctx.inputs
    if grad is not None:
        for i, (gradient, want) in enumerate(zip(ctx.saved_tensors, ctx.wanted, strict=True)):
            gradients[i] = scaled(gradient, grad, ctx.dtype) if want else None
    return tuple(gradients)


_sum_op.register_autograd(_sum_backward, setup_context=_sum_context)


@torch.library.custom_op("lcl_kernels::linear_cross_entropy_rows", mutates_args=())
def _rows_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    counted_rows: int | None,
    z_loss: float,
    softcap: float | None,
    label_smoothing: float,
    statistics: bool,
    triton: bool,
    workspace_mb: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(row_loss [N], lse [N], rank [N])."""
    settings = (ignore_index, counted_rows, z_loss, softcap, label_smoothing, statistics, triton, workspace_mb)
    results = _sum_op(hidden, weight, bias, labels, None, *settings, False, False, False)
    return results[1], results[2], results[3]


@_rows_op.register_fake
def _(hidden, weight, bias, labels, *arguments):  # type: ignore[no-untyped-def]
    n, dtype = hidden.shape[0], compute_dtype(hidden.dtype)
    rank = labels.new_empty(n if arguments[5] else 0, dtype=torch.int64)
    return hidden.new_empty(n, dtype=dtype), hidden.new_empty(n, dtype=dtype), rank


def _rows_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.settings = inputs[4:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@first_derivative_only
def _rows_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (1 + len(ctx.settings))
    if grad is None:
        return (None, None, None, *nothing)
    hidden, weight, bias, labels = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    settings = (*ctx.settings[:5], False, *ctx.settings[6:])
    results = torch.ops.lcl_kernels.linear_cross_entropy_sum(hidden, weight, bias, labels, grad, *settings, *wanted)
    gradients = (d.to(hidden.dtype) if want else None for d, want in zip(results[4:], wanted, strict=True))
    return (*gradients, *nothing)


_rows_op.register_autograd(_rows_backward, setup_context=_rows_context)


def _counted(labels: Tensor, ignore_index: int, counted_rows: int | None, vocab: int) -> tuple[Tensor, Tensor]:
    """Indices [n] of the rows that count, in order, and their labels [n] as int64."""
    counted = labels != ignore_index
    bad = counted & ((labels < 0) | (labels >= vocab))
    if labels.is_cuda:
        torch._assert_async(~bad.any(), f"a label is outside [0, {vocab}) and is not ignore_index")
        if counted_rows is not None:
            torch._assert_async(counted.sum() == counted_rows, f"counted_rows={counted_rows} is not what labels say")
    elif bad.any():
        first = int(bad.nonzero()[0, 0])
        raise ValueError(f"labels[{first}] = {int(labels[first])} is outside [0, {vocab}) and is not ignore_index")
    elif counted_rows is not None and counted.sum() != counted_rows:
        raise ValueError(f"counted_rows is {counted_rows}, but {int(counted.sum())} labels count")

    if counted_rows is None:
        rows = counted.nonzero().squeeze(1)
    elif counted_rows == len(labels):
        rows = torch.arange(counted_rows, device=labels.device)
    else:  # a stable sort keeps the order and, unlike nonzero, does not wait for the device
        rows = torch.argsort((~counted).to(torch.uint8), stable=True)[:counted_rows]
    # The clamp keeps a bad label from reading outside the weight until the assertion is seen.
    return rows, labels.index_select(0, rows).long().clamp(0, vocab - 1)


def _spread(values: Tensor, rows: Tensor, length: int, fill: int) -> Tensor:
    """`values` of the counted rows [n], `fill` at the others: [length]."""
    if len(rows) == length:
        return values
    return values.new_full((length,), fill).index_copy_(0, rows, values)


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
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        check_dtypes(**{name: tensor})  # before autocast, which would take any floating point dtype
    check_same("device", hidden=hidden, weight=weight, labels=labels, bias=bias)


def _check_options(
    reduction: str,
    normalizer: float | Tensor | None,
    ignore_index: int,
    softcap: float | None,
    z_loss: float,
    label_smoothing: float,
    counted_rows: int | None,
    rows: int,
) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', not {reduction!r}")
    if normalizer is not None and reduction != "mean":
        raise ValueError(f"normalizer replaces the count of reduction='mean'; it has no meaning with {reduction!r}")
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer must have one element, got {list(normalizer.shape)}")
    elif normalizer is not None and not 0 <= normalizer < math.inf:
        raise ValueError(f"normalizer must be a finite number that is not negative, got {normalizer}")
    if not isinstance(ignore_index, (int, numbers.Integral)):
        raise ValueError(
            f"ignore_index must be an integer, got {ignore_index!r}; where every label counts leave it at -100"
        )
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit into int64, got {ignore_index}")
    if softcap is not None and not softcap >= SMALLEST_SOFTCAP:
        raise ValueError(f"softcap must be positive, {SMALLEST_SOFTCAP} at least, got {softcap}")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be finite and must not be negative, got {z_loss}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if counted_rows is not None and not 0 <= counted_rows <= rows:
        raise ValueError(f"counted_rows must be in [0, {rows}], got {counted_rows}")
